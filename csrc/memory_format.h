#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace nasfcos {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// The memory format of maps, which may be a slice of the channels of other maps.
inline at::MemoryFormat format_of(const at::Tensor& maps) {
  const bool last = maps.size(1) > 1 && maps.stride(1) == 1 && !maps.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline at::Tensor empty_as(const at::Tensor& maps) {
  return at::empty(maps.sizes(), maps.options().memory_format(format_of(maps)));
}

// The number of pixels of all images.
inline int64_t pixels_of(const at::Tensor& maps) {
  return maps.size(0) * maps.size(2) * maps.size(3);
}

}  // namespace nasfcos
