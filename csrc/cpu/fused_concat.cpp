// The searched concatenation with fixed statistics, in one pass: out of maps x and y, of C channels
// each, concatenated to z, makes
//   out[c] = sum over i of 2c and 2c + 1 of weight[i] * relu(scale[i] * z[i] + shift[i]).
// As C is even, the first half of the output's channels comes from x and the second from y.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../macros.h"
#include "values.h"

namespace {

using at::Tensor;

// One pixel: n output channels from 2n of the input's.
template <typename T, typename Acc>
NASFCOS_INLINE void pairs_loop(
    const T* x, const Acc* scale, const Acc* shift, const Acc* weight, int64_t n, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const Acc a = relu<Acc>(scale[2 * c] * load(x + 2 * c) + shift[2 * c]);
    const Acc b = relu<Acc>(scale[2 * c + 1] * load(x + 2 * c + 1) + shift[2 * c + 1]);
    store(weight[2 * c] * a + weight[2 * c + 1] * b, out + c);
  }
}
NASFCOS_CLONES void pairs(
    const float* x, const float* scale, const float* shift, const float* weight, int64_t n,
    float* out) {
  pairs_loop(x, scale, shift, weight, n, out);
}
NASFCOS_CLONES void pairs(
    const uint16_t* x, const float* scale, const float* shift, const float* weight, int64_t n,
    uint16_t* out) {
  pairs_loop(x, scale, shift, weight, n, out);
}
void pairs(
    const double* x, const double* scale, const double* shift, const double* weight, int64_t n,
    double* out) {
  pairs_loop(x, scale, shift, weight, n, out);
}

// x, y and the result are channels-last.
template <typename T>
void concat(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& weight, Tensor& output) {
  using B = Bits<T>;
  using Acc = at::opmath_type<T>;
  const int64_t channels = x.size(1), half = channels / 2;
  const B* maps[2] = {
      reinterpret_cast<const B*>(x.const_data_ptr<T>()),
      reinterpret_cast<const B*>(y.const_data_ptr<T>())};
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<T>());
  const Acc* scales = scale.const_data_ptr<Acc>();
  const Acc* shifts = shift.const_data_ptr<Acc>();
  const Acc* weights = weight.const_data_ptr<Acc>();
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  const int64_t grain = (int64_t{1} << 16) / std::max<int64_t>(1, channels) + 1;
  at::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t first = i * channels;
        pairs(
            maps[i] + pixel * channels, scales + first, shifts + first, weights + first, half,
            out + pixel * channels + i * half);
      }
    }
  });
}

Tensor fused_concat(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift,
    const Tensor& weight) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && y.sizes() == x.sizes() && x.size(1) % 2 == 0,
      "fused_concat: x and y must be [N, C, H, W] of one shape and an even number of channels");
  TORCH_CHECK_VALUE(
      y.scalar_type() == x.scalar_type(), "fused_concat: x and y must have one dtype");
  for (const Tensor& terms : {scale, shift, weight}) {
    TORCH_CHECK_VALUE(
        terms.dim() == 1 && terms.size(0) == 2 * x.size(1) &&
            terms.scalar_type() == at::toOpMathType(x.scalar_type()),
        "fused_concat: scale, shift and weight must be [2 * C], of the maps' dtype or, if that is "
        "a half precision, float32");
  }
  const auto format = at::MemoryFormat::ChannelsLast;
  Tensor output = at::empty(x.sizes(), x.options().memory_format(format));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "fused_concat", [&] {
    concat<scalar_t>(
        x.contiguous(format), y.contiguous(format), scale.contiguous(), shift.contiguous(),
        weight.contiguous(), output);
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) { m.impl("fused_concat", TORCH_FN(fused_concat)); }
