// The end of the searched concatenation where batch_norm.cpp does not apply (other norms, and batch
// norm with running statistics): ReLU and a grouped 1x1 convolution with two input channels per
// output channel, with gradients:
//   out[c] = weight[2c] * relu(x[2c]) + weight[2c + 1] * relu(x[2c + 1]).
// Each pass reads and writes every map once, channels-last; maps of other formats are converted,
// and the result back. The forward pass also takes bfloat16.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../macros.h"
#include "../memory_format.h"
#include "parts.h"
#include "values.h"

namespace nasfcos {
namespace {

using at::Tensor;

// For maps with n output channels.
template <typename T, typename Acc>
NASFCOS_INLINE void forward_loop(
    const T* x, const Acc* weight, int64_t pixels, int64_t n, T* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += 2 * n, out += n) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const Acc a = relu<Acc>(load(x + 2 * c)), b = relu<Acc>(load(x + 2 * c + 1));
      store(weight[2 * c] * a + weight[2 * c + 1] * b, out + c);
    }
  }
}

// Writes the gradient of x and adds to that of the weight.
template <typename T>
NASFCOS_INLINE void backward_loop(
    const T* grad, const T* x, const T* weight, int64_t pixels, int64_t n, T* grad_x,
    T* grad_weight) {
  // Every gradient is written twice first, so that all that follows is elementwise over channels.
  constexpr int64_t block = 64;
  T twice[2 * block];
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += n, x += 2 * n, grad_x += 2 * n) {
    for (int64_t first = 0; first < n; first += block) {
      const int64_t count = std::min(block, n - first), start = 2 * first;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) {
        twice[2 * c] = grad[first + c];
        twice[2 * c + 1] = grad[first + c];
      }
#pragma omp simd
      for (int64_t i = 0; i < 2 * count; ++i) {
        const T value = x[start + i];
        grad_x[start + i] = value <= 0 ? T(0) : weight[start + i] * twice[i];
        grad_weight[start + i] += relu(value) * twice[i];
      }
    }
  }
}

#define NASFCOS_FORWARD_PIXELS(CLONES, T, ACC)                                                   \
  CLONES void forward_pixels(                                                                    \
      const T* x, const ACC* weight, int64_t pixels, int64_t n, T* out) {                        \
    forward_loop(x, weight, pixels, n, out);                                                     \
  }
NASFCOS_FOR_MAP_TYPES(NASFCOS_FORWARD_PIXELS)

#define NASFCOS_BACKWARD_PIXELS(CLONES, T)                                                       \
  CLONES void backward_pixels(                                                                   \
      const T* grad, const T* x, const T* weight, int64_t pixels, int64_t n, T* grad_x,          \
      T* grad_weight) {                                                                          \
    backward_loop(grad, x, weight, pixels, n, grad_x, grad_weight);                              \
  }
NASFCOS_FOR_GRAD_TYPES(NASFCOS_BACKWARD_PIXELS)

void check(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK_VALUE(
      input.dim() == 4 && weight.dim() == 4 && input.size(1) == 2 * weight.size(0) &&
          weight.size(1) == 2 && weight.size(2) == 1 && weight.size(3) == 1,
      "rectified_pairs: the input must be [N, 2 * C, H, W] and the weight [C, 2, 1, 1], not ",
      input.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(
      input.scalar_type() == weight.scalar_type(),
      "rectified_pairs: input and weight must have one dtype, not ", input.scalar_type(), " and ",
      weight.scalar_type());
}

Tensor rectified_pairs(const Tensor& input, const Tensor& weight) {
  check(input, weight);
  const int64_t channels = weight.size(0);
  const Tensor maps = input.contiguous(kLast);
  Tensor output = at::empty(
      {input.size(0), channels, input.size(2), input.size(3)},
      input.options().memory_format(kLast));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, input.scalar_type(), "rectified_pairs", [&] {
    using B = Bits<scalar_t>;
    using Acc = at::opmath_type<scalar_t>;
    const Tensor factors = weight.flatten().to(at::toOpMathType(weight.scalar_type())).contiguous();
    const Acc* w = factors.const_data_ptr<Acc>();
    const B* x = reinterpret_cast<const B*>(maps.const_data_ptr<scalar_t>());
    B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>());
    Parts(1, pixels_of(input), channels).each([&](int64_t, int64_t, int64_t begin, int64_t end) {
      forward_pixels(
          x + 2 * begin * channels, w, end - begin, channels, out + begin * channels);
    });
  });
  return output.contiguous(format_of(input));
}

std::tuple<Tensor, Tensor> rectified_pairs_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight) {
  check(input, weight);
  const int64_t channels = weight.size(0);
  TORCH_CHECK_VALUE(
      grad.dim() == 4 && grad.size(0) == input.size(0) && grad.size(1) == channels &&
          grad.size(2) == input.size(2) && grad.size(3) == input.size(3) &&
          grad.scalar_type() == input.scalar_type(),
      "rectified_pairs: the output's gradient must have the output's shape and dtype");
  const Tensor maps = input.contiguous(kLast), grads = grad.contiguous(kLast);
  const Tensor factors = weight.flatten().contiguous();
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(kLast));
  Tensor grad_factors = at::empty(factors.sizes(), factors.options());
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rectified_pairs_backward", [&] {
    const scalar_t* g = grads.const_data_ptr<scalar_t>();
    const scalar_t* x = maps.const_data_ptr<scalar_t>();
    const scalar_t* w = factors.const_data_ptr<scalar_t>();
    scalar_t* grad_x = grad_input.mutable_data_ptr<scalar_t>();
    const auto sums = Parts(1, pixels_of(input), channels).sums<scalar_t>(
        2 * channels, [&](int64_t, int64_t first, int64_t pixels, scalar_t* sums) {
          backward_pixels(
              g + first * channels, x + 2 * first * channels, w, pixels, channels,
              grad_x + 2 * first * channels, sums);
        });
    std::copy(sums.begin(), sums.end(), grad_factors.mutable_data_ptr<scalar_t>());
  });
  Tensor grad_weight = at::empty_like(weight).copy_(grad_factors.view(weight.sizes()));
  return {grad_input.contiguous(format_of(input)), grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("rectified_pairs", TORCH_FN(rectified_pairs));
  m.impl("rectified_pairs_backward", TORCH_FN(rectified_pairs_backward));
}

}  // namespace nasfcos
