// What norms followed by a ReLU share: loops over the pixels of channels-last maps, each of n
// channels, out[i] = relu(scale[i] * x[i] + shift[i]).
#pragma once

#include <cstdint>

#include "../macros.h"
#include "values.h"

namespace nasfcos {

// Sums of differences from `origin` [n] and of their squares: [2, n].
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

// What the gradient needs to know of each channel, each [n].
template <typename T>
struct Channels {
  const T *mean, *scale, *shift;
  const T *constant, *linear;
  const T* factor = nullptr;  // of the searched concatenation
};

// One value's part of the sums: of the output's gradient where the ReLU lets it pass, and of that
// times the difference of x from its mean.
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

// Sums [2, n].
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

// The same for each type, by instruction set.
#define NASFCOS_FORWARD(CLONES, T, ACC)                                                           \
  CLONES static void moments(                                                                     \
      const T* x, const double* origin, int64_t pixels, int64_t n, double* sums) {                \
    moments_loop(x, origin, pixels, n, sums);                                                     \
  }                                                                                               \
  CLONES static void apply(                                                                       \
      const T* x, const ACC* scale, const ACC* shift, int64_t pixels, int64_t n, T* out) {        \
    relu_loop(x, scale, shift, pixels, n, out);                                                   \
  }
NASFCOS_FORWARD(NASFCOS_CLONES, float, float)
NASFCOS_FORWARD(NASFCOS_CLONES, uint16_t, float)
NASFCOS_FORWARD(, double, double)
#undef NASFCOS_FORWARD

#define NASFCOS_BACKWARD(CLONES, T)                                                               \
  CLONES static void add_sums(                                                                    \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* sums) {     \
    relu_sums_loop(grad, x, of, pixels, n, sums);                                                 \
  }                                                                                               \
  CLONES static void write_grad(                                                                  \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, T* grad_x) {   \
    relu_grad_loop(grad, x, of, pixels, n, grad_x);                                               \
  }
NASFCOS_BACKWARD(NASFCOS_CLONES, float)
NASFCOS_BACKWARD(, double)
#undef NASFCOS_BACKWARD

}  // namespace nasfcos
