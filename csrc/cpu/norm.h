// What norms followed by a ReLU share: loops over the pixels of channels-last maps with n channels,
// out[i] = relu(scale[i] * x[i] + shift[i]).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../macros.h"
#include "values.h"

namespace nasfcos {

// Contiguous [C] each.
struct NormParameters {
  at::Tensor weight, bias;
  double eps;
};

// Means and variances, [C] for batch norm and [N, groups] for group norm.
struct Statistics {
  at::Tensor mean, variance;
};

// Adds differences from `origin` [n], and their squares, to sums [2, n].
template <typename T>
NASFCOS_INLINE void moments_loop(
    const T* x, const double* origin, int64_t pixels, int64_t n, double* sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double difference = load(x + i) - origin[i];
      sums[i] += difference;
      sums[n + i] += difference * difference;
    }
  }
}

template <typename T, typename Acc>
NASFCOS_INLINE void relu_loop(
    const T* x, const Acc* scale, const Acc* shift, int64_t pixels, int64_t n, T* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += n, out += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      store(relu<Acc>(scale[i] * load(x + i) + shift[i]), out + i);
    }
  }
}

// What the gradient depends on besides the maps, [n] each.
template <typename T>
struct Channels {
  const T *mean, *scale, *shift;
  const T *constant, *linear;
  const T* factor = nullptr;  // of the searched concatenation
};

// Adds one value to sums [2, n]: the gradient of the norm's output (that of h where the ReLU passes
// it, else zero), and its product with the difference of x from its mean.
template <typename T>
NASFCOS_INLINE void add_slope(
    T grad, T x, const Channels<T>& of, int64_t i, int64_t n, T* sums) {
  const T slope = of.scale[i] * x + of.shift[i] <= 0 ? T(0) : grad;
  sums[i] += slope;
  sums[n + i] += slope * (x - of.mean[i]);
}

// The gradient of one value of x.
template <typename T>
NASFCOS_INLINE T grad_of(T grad, T x, const Channels<T>& of, int64_t i) {
  const T slope = of.scale[i] * x + of.shift[i] <= 0 ? T(0) : grad;
  return of.scale[i] * slope + of.constant[i] + of.linear[i] * (x - of.mean[i]);
}

template <typename T>
NASFCOS_INLINE void relu_sums_loop(
    const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += n, x += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) add_slope(grad[i], x[i], of, i, n, sums);
  }
}

template <typename T>
NASFCOS_INLINE void relu_grad_loop(
    const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* grad_x) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += n, x += n, grad_x += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad_x[i] = grad_of(grad[i], x[i], of, i);
  }
}

#define NASFCOS_RELU_FORWARD(CLONES, T, ACC)                                                      \
  CLONES static void moments(                                                                     \
      const T* x, const double* origin, int64_t pixels, int64_t n, double* sums) {                \
    moments_loop(x, origin, pixels, n, sums);                                                     \
  }                                                                                               \
  CLONES static void apply(                                                                       \
      const T* x, const ACC* scale, const ACC* shift, int64_t pixels, int64_t n, T* out) {        \
    relu_loop(x, scale, shift, pixels, n, out);                                                   \
  }
NASFCOS_FOR_MAP_TYPES(NASFCOS_RELU_FORWARD)

#define NASFCOS_RELU_BACKWARD(CLONES, T)                                                          \
  CLONES static void add_sums(                                                                    \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* sums) {     \
    relu_sums_loop(grad, x, of, pixels, n, sums);                                                 \
  }                                                                                               \
  CLONES static void write_grad(                                                                  \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* grad_x) {   \
    relu_grad_loop(grad, x, of, pixels, n, grad_x);                                               \
  }
NASFCOS_FOR_GRAD_TYPES(NASFCOS_RELU_BACKWARD)

}  // namespace nasfcos
