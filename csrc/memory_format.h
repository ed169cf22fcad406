#pragma once

#include <ATen/core/Tensor.h>

// The memory format of maps, of which these may be some channels.
static inline at::MemoryFormat format_of(const at::Tensor& maps) {
  const bool last = maps.size(1) > 1 && maps.stride(1) == 1 && !maps.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}
