// The weighted sum of the searched necks, out = a * x + b * y with factors a and b per channel, and
// its gradients, each in one pass over channels-last maps. The forward pass also takes bfloat16.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

template <typename T, typename Acc>
NASFCOS_INLINE void sum_loop(
    const T* x, const T* y, const Acc* a, const Acc* b, int64_t pixels, int64_t n, T* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += n, y += n, out += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(a[i] * load(x + i) + b[i] * load(y + i), out + i);
  }
}

// Writes the gradients of x and y, and adds to those of a and b, sums [2, n].
template <typename T>
NASFCOS_INLINE void grad_loop(
    const T* grad, const T* x, const T* y, const T* a, const T* b, int64_t pixels, int64_t n,
    T* grad_x, T* grad_y, T* sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      grad_x[i] = a[i] * grad[i];
      grad_y[i] = b[i] * grad[i];
      sums[i] += grad[i] * x[i];
      sums[n + i] += grad[i] * y[i];
    }
    grad += n, x += n, y += n, grad_x += n, grad_y += n;
  }
}

#define NASFCOS_SUM_PIXELS(CLONES, T, ACC)                                                       \
  CLONES void sum_pixels(                                                                        \
      const T* x, const T* y, const ACC* a, const ACC* b, int64_t pixels, int64_t n, T* out) {   \
    sum_loop(x, y, a, b, pixels, n, out);                                                        \
  }
NASFCOS_FOR_MAP_TYPES(NASFCOS_SUM_PIXELS)

#define NASFCOS_GRAD_PIXELS(CLONES, T)                                                           \
  CLONES void grad_pixels(                                                                       \
      const T* grad, const T* x, const T* y, const T* a, const T* b, int64_t pixels, int64_t n,  \
      T* grad_x, T* grad_y, T* sums) {                                                           \
    grad_loop(grad, x, y, a, b, pixels, n, grad_x, grad_y, sums);                                \
  }
NASFCOS_FOR_GRAD_TYPES(NASFCOS_GRAD_PIXELS)

void check(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && y.sizes() == x.sizes() && y.scalar_type() == x.scalar_type(),
      "weighted_sum: x and y must be [N, C, H, W], of one shape and dtype");
  for (const Tensor* t : {&a, &b}) {
    TORCH_CHECK_VALUE(
        t->dim() == 3 && t->size(0) == x.size(1) && t->size(1) == 1 && t->size(2) == 1 &&
            t->scalar_type() == at::toOpMathType(x.scalar_type()),
        "weighted_sum: a and b must be [", x.size(1),
        ", 1, 1], in the dtype of the maps or, for bfloat16, in float32");
  }
}

Tensor weighted_sum(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b) {
  check(x, y, a, b);
  const int64_t n = x.size(1);
  const Tensor x_maps = x.contiguous(kLast), y_maps = y.contiguous(kLast);
  const Tensor a_terms = a.contiguous(), b_terms = b.contiguous();
  Tensor output = at::empty(x.sizes(), x.options().memory_format(kLast));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "weighted_sum", [&] {
    using B = Bits<scalar_t>;
    using Acc = at::opmath_type<scalar_t>;
    const B* from_x = reinterpret_cast<const B*>(x_maps.const_data_ptr<scalar_t>());
    const B* from_y = reinterpret_cast<const B*>(y_maps.const_data_ptr<scalar_t>());
    B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>());
    const Acc *of_x = a_terms.const_data_ptr<Acc>(), *of_y = b_terms.const_data_ptr<Acc>();
    at::parallel_for(0, pixels_of(x), pixel_grain(n), [&](int64_t begin, int64_t end) {
      const int64_t start = begin * n;
      sum_pixels(from_x + start, from_y + start, of_x, of_y, end - begin, n, out + start);
    });
  });
  return output.contiguous(format_of(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weighted_sum_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b) {
  check(x, y, a, b);
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
      "weighted_sum: the output's gradient must have the output's shape and dtype");
  const int64_t n = x.size(1), pixels = pixels_of(x);
  const Tensor x_maps = x.contiguous(kLast), y_maps = y.contiguous(kLast);
  const Tensor grads = grad.contiguous(kLast);
  const Tensor a_terms = a.contiguous(), b_terms = b.contiguous();
  Tensor grad_x = at::empty(x.sizes(), x.options().memory_format(kLast));
  Tensor grad_y = at::empty(y.sizes(), y.options().memory_format(kLast));
  Tensor grad_a = at::empty(a.sizes(), a.options()), grad_b = at::empty(b.sizes(), b.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "weighted_sum_backward", [&] {
    const scalar_t* g = grads.const_data_ptr<scalar_t>();
    const scalar_t *from_x = x_maps.const_data_ptr<scalar_t>(),
                   *from_y = y_maps.const_data_ptr<scalar_t>();
    const scalar_t *of_x = a_terms.const_data_ptr<scalar_t>(),
                   *of_y = b_terms.const_data_ptr<scalar_t>();
    scalar_t *to_x = grad_x.mutable_data_ptr<scalar_t>(),
             *to_y = grad_y.mutable_data_ptr<scalar_t>();
    const auto sums = Parts(1, pixels, n).sums<scalar_t>(
        2 * n, [&](int64_t, int64_t first, int64_t count, scalar_t* to) {
          const int64_t start = first * n;
          grad_pixels(
              g + start, from_x + start, from_y + start, of_x, of_y, count, n, to_x + start,
              to_y + start, to);
        });
    std::copy(sums.begin(), sums.begin() + n, grad_a.mutable_data_ptr<scalar_t>());
    std::copy(sums.begin() + n, sums.end(), grad_b.mutable_data_ptr<scalar_t>());
  });
  return {grad_x.contiguous(format_of(x)), grad_y.contiguous(format_of(y)), grad_a, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("weighted_sum", TORCH_FN(weighted_sum));
  m.impl("weighted_sum_backward", TORCH_FN(weighted_sum_backward));
}

}  // namespace nasfcos
