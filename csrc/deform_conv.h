#pragma once

// What the modulated deformable convolutions of both devices share: geometry, and where a tap
// reads.

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "macros.h"

namespace nasfcos {

struct Geometry {
  int64_t images, channels, height, width;
  int64_t out_channels, out_height, out_width, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, group_channels;

  NASFCOS_INLINE int64_t pixels() const { return height * width; }
  NASFCOS_INLINE int64_t positions() const { return out_height * out_width; }
  NASFCOS_INLINE int64_t taps() const { return kernel_h * kernel_w; }
};

// Raises ValueError for arguments that do not match.
inline Geometry geometry_of(
    const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t offset_groups) {
  using at::IntArrayRef;
  const char* op = "modulated_deform_conv2d: ";
  TORCH_CHECK_VALUE(
      input.dim() == 4 && offset.dim() == 4 && mask.dim() == 4 && weight.dim() == 4, op,
      "input, offset, mask and weight must have four dimensions");
  TORCH_CHECK_VALUE(
      weight.scalar_type() == input.scalar_type() &&
          offset.scalar_type() == at::toOpMathType(input.scalar_type()) &&
          mask.scalar_type() == offset.scalar_type(),
      op, "input and weight must have one dtype, offset and mask the same or, if that is a half "
      "precision, float32");
  TORCH_CHECK_VALUE(
      offset.device() == input.device() && mask.device() == input.device() &&
          weight.device() == input.device(),
      op, "input, offset, mask and weight must be on one device");
  TORCH_CHECK_VALUE(
      offset_groups >= 1 && input.size(1) > 0 && input.size(1) % offset_groups == 0, op,
      "offset_groups must divide the input channels");
  TORCH_CHECK_VALUE(weight.size(1) == input.size(1), op, "weight and input differ in channels");
  TORCH_CHECK_VALUE(
      stride[0] >= 1 && stride[1] >= 1 && dilation[0] >= 1 && dilation[1] >= 1 && padding[0] >= 0 &&
          padding[1] >= 0,
      op, "stride and dilation must be positive, padding must not be negative");
  Geometry g;
  g.images = input.size(0);
  g.channels = input.size(1);
  g.height = input.size(2);
  g.width = input.size(3);
  g.out_channels = weight.size(0);
  g.kernel_h = weight.size(2);
  g.kernel_w = weight.size(3);
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.pad_h = padding[0];
  g.pad_w = padding[1];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.groups = offset_groups;
  g.group_channels = g.channels / offset_groups;
  g.out_height =
      (g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1) / g.stride_h + 1;
  g.out_width = (g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1) / g.stride_w + 1;
  const int64_t taps = g.groups * g.taps();
  TORCH_CHECK_VALUE(
      g.pixels() < std::numeric_limits<int32_t>::max(), op, "the input image is too large");
  TORCH_CHECK_VALUE(
      taps >= 1 && g.out_height >= 1 && g.out_width >= 1 &&
          offset.sizes() == IntArrayRef({g.images, 2 * taps, g.out_height, g.out_width}) &&
          mask.sizes() == IntArrayRef({g.images, taps, g.out_height, g.out_width}),
      op, "offset or mask do not fit the other arguments");
  return g;
}

// Where one tap of one output position reads the input.
template <typename T>
struct Sample {
  int32_t pixel[4];  // top left, top right, bottom left, bottom right
  T y, x;            // fractional position, from top left towards bottom right
  T mask;

  // The bilinear weights of the four corners.
  NASFCOS_INLINE void blend(T* w) const {
    w[0] = (1 - y) * (1 - x);
    w[1] = (1 - y) * x;
    w[2] = y * (1 - x);
    w[3] = y * x;
  }
};

// The sample at position (y, x). Corners outside the image have the index g.pixels().
template <typename T>
NASFCOS_INLINE Sample<T> locate(const Geometry& g, T y, T x, T mask) {
  const int32_t outside = static_cast<int32_t>(g.pixels());
  Sample<T> s{{outside, outside, outside, outside}, 0, 0, mask};
  if (std::isnan(y) || std::isnan(x)) {
    s.y = s.x = y + x;
    return s;
  }
  // Checked before the conversion to integers, for which the position may be too large.
  if (!(y > -1 && x > -1 && y < T(g.height) && x < T(g.width))) return s;
  const T top = std::floor(y), left = std::floor(x);
  s.y = y - top;
  s.x = x - left;
  const int32_t y0 = static_cast<int32_t>(top), x0 = static_cast<int32_t>(left);
  const int32_t height = static_cast<int32_t>(g.height), width = static_cast<int32_t>(g.width);
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t yc = y0 + corner / 2, xc = x0 + corner % 2;
    if (yc >= 0 && yc < height && xc >= 0 && xc < width) s.pixel[corner] = yc * width + xc;
  }
  return s;
}

// A strided view of maps [N, C, positions].
template <typename T>
struct MapView {
  T* data;
  int64_t image, channel, position;  // strides

  NASFCOS_INLINE MapView at(int64_t n, int64_t c) const {
    return {data + n * image + c * channel, image, channel, position};
  }
  NASFCOS_INLINE T& operator()(int64_t c, int64_t p) const {
    return data[c * channel + p * position];
  }
};

// [N, C, H, W] as [N, C, H * W]; without a copy for the usual memory formats.
inline at::Tensor flatten_pixels(const at::Tensor& maps) {
  return maps.reshape({maps.size(0), maps.size(1), maps.size(2) * maps.size(3)});
}

// The view of a tensor [N, C, positions].
template <typename T>
MapView<const T> view_of(const at::Tensor& flat) {
  return {flat.const_data_ptr<T>(), flat.stride(0), flat.stride(1), flat.stride(2)};
}

// The view of contiguous or channels-last maps [N, C, H, W].
template <typename T>
MapView<T> mutable_view_of(at::Tensor& maps) {
  const at::Tensor flat = maps.view({maps.size(0), maps.size(1), maps.size(2) * maps.size(3)});
  return {maps.mutable_data_ptr<T>(), flat.stride(0), flat.stride(1), flat.stride(2)};
}

}  // namespace nasfcos
