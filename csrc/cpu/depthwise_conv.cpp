// Depthwise convolution of stride 1 that preserves the size of the maps, with any dilation, and its
// gradients.
//
// Maps are read and written channels-last (maps of other formats are converted, and the result
// back), so that a vector holds adjacent channels of one pixel and every tap is one multiply-add of
// vectors. Taps outside the image are skipped rather than read as zeros: for a dilated kernel on a
// small map they are the majority.
//
// The gradient of the input is a convolution with the kernel rotated by 180 degrees. That of the
// weight is summed separately for parts of the rows, one part per thread.
//
// The forward pass also takes bfloat16, which it sums in float32.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../macros.h"
#include "../memory_format.h"
#include "parts.h"
#include "vectors.h"

namespace nasfcos {
namespace {

using at::Tensor;

struct DepthwiseShape {
  int64_t images, channels, height, width, kernel, dilation;

  NASFCOS_INLINE int64_t rows() const { return images * height; }
  NASFCOS_INLINE int64_t taps() const { return kernel * kernel; }
  // The distance from an output pixel to the input pixel of a tap, along one axis.
  NASFCOS_INLINE int64_t shift(int64_t tap) const { return (tap - kernel / 2) * dilation; }
};

// Computes a vector of channels for P adjacent pixels from (y, x) on. All pointers are offset to
// the first of these channels; `image` points to the first pixel of the image, `out` to (y, x);
// weight is [taps, C].
template <int P, typename Vector, typename T, typename Acc>
NASFCOS_INLINE void convolve_pixels(
    const DepthwiseShape& g, const T* image, const Acc* weight, int64_t y, int64_t x, T* out) {
  Vector sums[P] = {};
  for (int64_t ky = 0; ky < g.kernel; ++ky) {
    const int64_t from_y = y + g.shift(ky);
    if (from_y < 0 || from_y >= g.height) continue;
    for (int64_t kx = 0; kx < g.kernel; ++kx) {
      const int64_t from_x = x + g.shift(kx);
      const T* from = image + (from_y * g.width + from_x) * g.channels;
      Vector w, value;
      load(weight + (ky * g.kernel + kx) * g.channels, w);
      if (from_x >= 0 && from_x + P <= g.width) {
        for (int p = 0; p < P; ++p) {
          load(from + p * g.channels, value);
          sums[p] += w * value;
        }
      } else if (from_x + P > 0 && from_x < g.width) {
        for (int p = 0; p < P; ++p) {
          if (from_x + p < 0 || from_x + p >= g.width) continue;
          load(from + p * g.channels, value);
          sums[p] += w * value;
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) store(sums[p], out + p * g.channels);
}

// Pixels computed at once: enough independent sums to hide the latency of multiply-adds, and few
// enough for processors with 16 vector registers.
constexpr int kStrip = 6;

// Computes channels c to `end` of P pixels.
template <int P, int Bytes, typename T, typename Acc>
NASFCOS_INLINE void convolve_channels(
    const DepthwiseShape& g, const T* image, const Acc* weight, int64_t y, int64_t x, int64_t c,
    int64_t end, T* out) {
  using Vector = Lanes<Acc, Bytes>;
  for (; c + Vector::count <= end; c += Vector::count) {
    convolve_pixels<P, typename Vector::type>(g, image + c, weight + c, y, x, out + c);
  }
  for (; c < end; ++c) convolve_pixels<P, Acc>(g, image + c, weight + c, y, x, out + c);
}

// Computes row y of the output, `out`, from an image.
template <typename T, typename Acc>
struct Convolution {
  const DepthwiseShape& g;
  const T* image;
  const Acc* weight;
  int64_t y;
  T* out;
};

template <int Bytes, typename T, typename Acc>
NASFCOS_INLINE void convolve_row_loop(const Convolution<T, Acc>& a) {
  // Channels that are processed together: whole cache lines, but not too many of them.
  constexpr int64_t together = 256 / sizeof(Acc);
  const DepthwiseShape& g = a.g;
  for (int64_t c = 0; c < g.channels; c += together) {
    const int64_t end = std::min(g.channels, c + together);
    if (g.width < kStrip) {
      for (int64_t x = 0; x < g.width; ++x) {
        convolve_channels<1, Bytes>(
            g, a.image, a.weight, a.y, x, c, end, a.out + x * g.channels);
      }
      continue;
    }
    for (int64_t next = 0; next < g.width; next += kStrip) {
      // The last strip of a row may overlap the one before it.
      const int64_t x = std::min(next, g.width - kStrip);
      convolve_channels<kStrip, Bytes>(
          g, a.image, a.weight, a.y, x, c, end, a.out + x * g.channels);
    }
  }
}

// Adds to `sum` the products of the output's gradient with the input pixels `from` that one tap
// reads, for pixels `begin` to `end` of a row.
template <typename Vector, typename T>
NASFCOS_INLINE void dot_pixels(
    const T* grad, const T* from, int64_t begin, int64_t end, int64_t channels, T* sum) {
  // Several independent sums hide the latency of multiply-adds.
  constexpr int parts = 4;
  Vector sums[parts] = {}, a, b;
  int64_t x = begin;
  for (; x + parts <= end; x += parts) {
    for (int part = 0; part < parts; ++part) {
      load(grad + (x + part) * channels, a);
      load(from + (x + part) * channels, b);
      sums[part] += a * b;
    }
  }
  for (; x < end; ++x) {
    load(grad + x * channels, a);
    load(from + x * channels, b);
    sums[0] += a * b;
  }
  Vector total;
  load(sum, total);
  total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  store(total, sum);
}

template <typename Vector, typename T>
NASFCOS_INLINE void weigh_channels(
    const DepthwiseShape& g, const T* grad, const T* image, int64_t y, T* sums) {
  for (int64_t ky = 0; ky < g.kernel; ++ky) {
    const int64_t from_y = y + g.shift(ky);
    if (from_y < 0 || from_y >= g.height) continue;
    for (int64_t kx = 0; kx < g.kernel; ++kx) {
      const int64_t shift = g.shift(kx);
      const int64_t begin = std::max<int64_t>(0, -shift);
      const int64_t end = std::min(g.width, g.width - shift);
      dot_pixels<Vector>(
          grad, image + (from_y * g.width + shift) * g.channels, begin, end, g.channels,
          sums + (ky * g.kernel + kx) * g.channels);
    }
  }
}

// Adds to `sums` [taps, C] the contribution of row y of the output's gradient, `grad`, to the
// gradient of the weight.
template <typename T>
struct Weighing {
  const DepthwiseShape& g;
  const T *grad, *image;
  int64_t y;
  T* sums;
};

template <int Bytes, typename T>
NASFCOS_INLINE void weigh_row_loop(const Weighing<T>& a) {
  using Vector = Lanes<T, Bytes>;
  int64_t c = 0;
  for (; c + Vector::count <= a.g.channels; c += Vector::count) {
    weigh_channels<typename Vector::type>(a.g, a.grad + c, a.image + c, a.y, a.sums + c);
  }
  for (; c < a.g.channels; ++c) {
    weigh_channels<T>(a.g, a.grad + c, a.image + c, a.y, a.sums + c);
  }
}

using FloatConvolution = Convolution<float, float>;
using BFloat16Convolution = Convolution<uint16_t, float>;
using DoubleConvolution = Convolution<double, double>;
NASFCOS_BY_WIDTH(convolve_float, FloatConvolution, convolve_row_loop<kBytes>(a))
NASFCOS_BY_WIDTH(convolve_bfloat16, BFloat16Convolution, convolve_row_loop<kBytes>(a))
NASFCOS_BY_WIDTH(weigh_float, Weighing<float>, weigh_row_loop<kBytes>(a))
void convolve_row(const FloatConvolution& a) { convolve_float(a); }
void convolve_row(const BFloat16Convolution& a) { convolve_bfloat16(a); }
void convolve_row(const DoubleConvolution& a) { convolve_row_loop<16>(a); }
void weigh_row(const Weighing<float>& a) { weigh_float(a); }
void weigh_row(const Weighing<double>& a) { weigh_row_loop<16>(a); }

// The smallest number of rows that is worth a thread.
int64_t row_grain(const DepthwiseShape& g) {
  return (int64_t{1} << 17) / std::max<int64_t>(1, g.width * g.channels * g.taps()) + 1;
}

// [C, 1, k, k] as [taps, C] in the dtype of the arithmetic.
Tensor taps_first(const Tensor& weight) {
  return weight.flatten(1).t().to(at::toOpMathType(weight.scalar_type())).contiguous();
}

// Convolves channels-last maps with weight [taps, C].
template <typename T>
void convolve(const DepthwiseShape& g, const Tensor& input, const Tensor& weight, Tensor& output) {
  using B = Bits<T>;
  const B* in = reinterpret_cast<const B*>(input.const_data_ptr<T>());
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<T>());
  const auto* taps = weight.const_data_ptr<at::opmath_type<T>>();
  const int64_t row = g.width * g.channels;
  at::parallel_for(0, g.rows(), row_grain(g), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      convolve_row(Convolution<B, at::opmath_type<T>>{
          g, in + i / g.height * g.height * row, taps, i % g.height, out + i * row});
    }
  });
}

// The gradient [taps, C] of the weight.
template <typename T>
Tensor weigh(const DepthwiseShape& g, const Tensor& grad, const Tensor& input) {
  const T* in = input.const_data_ptr<T>();
  const T* out = grad.const_data_ptr<T>();
  const int64_t row = g.width * g.channels;
  // Each part of the rows has its own sums.
  const int64_t parts = parts_of(g.rows(), row_grain(g)), size = g.taps() * g.channels;
  Tensor sums = at::zeros({parts, g.taps(), g.channels}, input.options());
  T* all = sums.mutable_data_ptr<T>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = g.rows() * (part + 1) / parts;
      for (int64_t i = g.rows() * part / parts; i < last; ++i) {
        weigh_row(Weighing<T>{
            g, out + i * row, in + i / g.height * g.height * row, i % g.height,
            all + part * size});
      }
    }
  });
  return sums.sum(0);
}

DepthwiseShape checked_shape(const Tensor& input, const Tensor& weight, int64_t dilation) {
  const char* op = "depthwise_conv2d: ";
  TORCH_CHECK_VALUE(input.dim() == 4, op, "the input must be [N, C, H, W], not ", input.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(0) == input.size(1) && weight.size(1) == 1 &&
          weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
      op, "the weight must be [C, 1, k, k] with the C of the input, ", input.size(1),
      ", and an odd k, not ", weight.sizes());
  TORCH_CHECK_VALUE(
      input.scalar_type() == weight.scalar_type(), op, "input and weight must have one dtype, not ",
      input.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(dilation >= 1, op, "the dilation must be positive, not ", dilation);
  return {input.size(0), input.size(1), input.size(2), input.size(3), weight.size(2), dilation};
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, int64_t dilation) {
  const DepthwiseShape g = checked_shape(input, weight, dilation);
  Tensor output = at::empty(input.sizes(), input.options().memory_format(kLast));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, input.scalar_type(), "depthwise_conv2d", [&] {
    convolve<scalar_t>(g, input.contiguous(kLast), taps_first(weight), output);
  });
  return output.contiguous(format_of(input));
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, int64_t dilation) {
  const DepthwiseShape g = checked_shape(input, weight, dilation);
  TORCH_CHECK_VALUE(
      grad.sizes() == input.sizes() && grad.scalar_type() == input.scalar_type(),
      "depthwise_conv2d: the output's gradient must have the input's shape and dtype");
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(kLast));
  Tensor grad_taps;
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "depthwise_conv2d_backward", [&] {
    const Tensor maps = input.contiguous(kLast), grads = grad.contiguous(kLast);
    convolve<scalar_t>(g, grads, taps_first(weight).flip(0).contiguous(), grad_input);
    grad_taps = weigh<scalar_t>(g, grads, maps);
  });
  Tensor grad_weight = at::empty_like(weight).copy_(grad_taps.t().reshape(weight.sizes()));
  return {grad_input.contiguous(format_of(input)), grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_FN(depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_FN(depthwise_conv2d_backward));
}

}  // namespace nasfcos
