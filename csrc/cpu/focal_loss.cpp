// Sigmoid focal loss, forward and backward; the arithmetic is in ../focal.h.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../focal.h"
#include "../macros.h"

namespace nasfcos {
namespace {

using at::Tensor;

// Loops over n logits of classes other than the target.

template <bool squared, typename T>
NASFCOS_INLINE T sum_loop(const T* x, int64_t n, T gamma) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += loss_of<squared>(x[i], gamma);
  return sum;
}

template <bool squared, typename T>
NASFCOS_INLINE void loss_loop(const T* x, int64_t n, T gamma, T weight, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = weight * loss_of<squared>(x[i], gamma);
}

template <bool squared, typename T>
NASFCOS_INLINE void slope_loop(const T* x, int64_t n, T gamma, T weight, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = weight * slope_of<squared>(x[i], gamma);
}

NASFCOS_CLONES float sum_of(const float* x, int64_t n, float gamma) {
  return gamma == 2.0f ? sum_loop<true>(x, n, gamma) : sum_loop<false>(x, n, gamma);
}
NASFCOS_CLONES void losses(const float* x, int64_t n, float gamma, float weight, float* y) {
  gamma == 2.0f ? loss_loop<true>(x, n, gamma, weight, y)
                : loss_loop<false>(x, n, gamma, weight, y);
}
NASFCOS_CLONES void slopes(const float* x, int64_t n, float gamma, float weight, float* y) {
  gamma == 2.0f ? slope_loop<true>(x, n, gamma, weight, y)
                : slope_loop<false>(x, n, gamma, weight, y);
}
double sum_of(const double* x, int64_t n, double gamma) { return sum_loop<false>(x, n, gamma); }
void losses(const double* x, int64_t n, double gamma, double weight, double* y) {
  loss_loop<false>(x, n, gamma, weight, y);
}
void slopes(const double* x, int64_t n, double gamma, double weight, double* y) {
  slope_loop<false>(x, n, gamma, weight, y);
}

// Half-precision types are converted to float, one block at a time.
template <typename S>
using Compute = at::opmath_type<S>;
constexpr int64_t kBlock = 512;

template <typename S>
void to_compute(const S* x, int64_t n, Compute<S>* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Compute<S>>(x[i]);
}

// Splits rows [begin, end) into runs of logits that are not the target of their row, single logits
// that are, and whole rows to ignore. Most rows are background, so the runs are long.
template <typename Run, typename Single, typename Ignored>
void walk(
    const int64_t* targets, int64_t begin, int64_t end, int64_t classes, const Run& run,
    const Single& single, const Ignored& ignored) {
  int64_t start = begin * classes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = targets[i];
    if (target == 0) continue;
    const int64_t stop = i * classes + (target > 0 ? target - 1 : 0);
    if (stop > start) run(start, stop);
    if (target > 0) {
      single(stop);
      start = stop + 1;
    } else {
      ignored(i * classes, (i + 1) * classes);
      start = (i + 1) * classes;
    }
  }
  if (end * classes > start) run(start, end * classes);
}

// Rows per unit of work. Fixed, so that the sum does not depend on the number of threads.
int64_t rows_per_part(int64_t classes) {
  return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, classes));
}

Tensor checked_targets(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0),
      "sigmoid_focal_loss: logits must be [N, C] and targets [N]");
  const Tensor result = targets.to(at::kLong).contiguous();
  const int64_t* t = result.const_data_ptr<int64_t>();
  const int64_t classes = logits.size(1);
  for (int64_t i = 0; i < result.numel(); ++i) {
    TORCH_CHECK_VALUE(
        t[i] >= -1 && t[i] <= classes, "sigmoid_focal_loss: targets must lie in -1..", classes,
        " (the number of classes), got ", t[i]);
  }
  return result;
}

template <typename S>
Tensor sum_impl(
    const Tensor& logits, const Tensor& targets, Compute<S> gamma, Compute<S> alpha) {
  using T = Compute<S>;
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const S* x = logits.const_data_ptr<S>();
  const int64_t* t = targets.const_data_ptr<int64_t>();
  const int64_t step = rows_per_part(classes);
  const int64_t parts = (rows + step - 1) / step;
  std::vector<double> sums(parts, 0.0);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      double negative = 0, positive = 0;
      walk(
          t, part * step, std::min(rows, (part + 1) * step), classes,
          [&](int64_t start, int64_t stop) {
            if constexpr (std::is_same_v<S, T>) {
              negative += sum_of(x + start, stop - start, gamma);
            } else {
              T block[kBlock];
              for (int64_t i = start; i < stop; i += kBlock) {
                const int64_t n = std::min(kBlock, stop - i);
                to_compute(x + i, n, block);
                negative += sum_of(block, n, gamma);
              }
            }
          },
          [&](int64_t i) { positive += loss_of<false, T>(-static_cast<T>(x[i]), gamma); },
          [](int64_t, int64_t) {});
      sums[part] = (1 - alpha) * negative + alpha * positive;
    }
  });
  double sum = 0;
  for (double part : sums) sum += part;
  Tensor result = at::empty({}, logits.options().dtype(c10::CppTypeToScalarType<T>::value));
  *result.mutable_data_ptr<T>() = static_cast<T>(sum);
  return result;
}

// The elementwise result scale(i) * f(logit), f being `positive` for targets, else `negatives`.
template <typename S, typename Negatives, typename Positive, typename Scale>
Tensor elementwise_impl(
    const Tensor& logits, const Tensor& targets, const Negatives& negatives,
    const Positive& positive, const Scale& scale) {
  using T = Compute<S>;
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const S* x = logits.const_data_ptr<S>();
  const int64_t* t = targets.const_data_ptr<int64_t>();
  Tensor result = at::empty(logits.sizes(), logits.options());
  S* y = result.mutable_data_ptr<S>();
  at::parallel_for(0, rows, rows_per_part(classes), [&](int64_t first, int64_t last) {
    walk(
        t, first, last, classes,
        [&](int64_t start, int64_t stop) {
          T from[kBlock], to[kBlock];
          for (int64_t i = start; i < stop; i += kBlock) {
            const int64_t n = std::min(kBlock, stop - i);
            to_compute(x + i, n, from);
            negatives(from, n, to);
            for (int64_t k = 0; k < n; ++k) y[i + k] = static_cast<S>(scale(i + k) * to[k]);
          }
        },
        [&](int64_t i) {
          y[i] = static_cast<S>(scale(i) * positive(-static_cast<T>(x[i])));
        },
        [&](int64_t start, int64_t stop) { std::fill(y + start, y + stop, S(0)); });
  });
  return result;
}

Tensor sigmoid_focal_loss(
    const Tensor& logits_, const Tensor& targets_, double gamma_, double alpha_, bool reduce) {
  const Tensor targets = checked_targets(logits_, targets_);
  const Tensor logits = logits_.contiguous();
  Tensor result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "sigmoid_focal_loss", [&] {
        using T = Compute<scalar_t>;
        const T gamma = static_cast<T>(gamma_), alpha = static_cast<T>(alpha_);
        if (reduce) {
          result = sum_impl<scalar_t>(logits, targets, gamma, alpha);
        } else {
          result = elementwise_impl<scalar_t>(
              logits, targets,
              [=](const T* x, int64_t n, T* y) { losses(x, n, gamma, 1 - alpha, y); },
              [=](T z) { return alpha * loss_of<false, T>(z, gamma); },
              [](int64_t) { return T(1); });
        }
      });
  return result;
}

Tensor sigmoid_focal_loss_backward(
    const Tensor& grad_, const Tensor& logits_, const Tensor& targets_, double gamma_,
    double alpha_) {
  const Tensor targets = checked_targets(logits_, targets_);
  const Tensor logits = logits_.contiguous();
  TORCH_CHECK_VALUE(
      grad_.dim() == 0 || grad_.sizes() == logits.sizes(),
      "sigmoid_focal_loss_backward: grad must be a scalar or of the logits' shape");
  Tensor result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "sigmoid_focal_loss_backward", [&] {
        using T = Compute<scalar_t>;
        const T gamma = static_cast<T>(gamma_), alpha = static_cast<T>(alpha_);
        const auto negatives = [=](const T* x, int64_t n, T* y) {
          slopes(x, n, gamma, 1 - alpha, y);
        };
        const auto positive = [=](T z) { return -alpha * slope_of<false, T>(z, gamma); };
        const Tensor grad = grad_.to(c10::CppTypeToScalarType<T>::value).contiguous();
        const T* g = grad.const_data_ptr<T>();
        if (grad.dim() == 0) {
          const T factor = *g;
          result = elementwise_impl<scalar_t>(
              logits, targets, negatives, positive, [=](int64_t) { return factor; });
        } else {
          result = elementwise_impl<scalar_t>(
              logits, targets, negatives, positive, [=](int64_t i) { return g[i]; });
        }
      });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_FN(sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_FN(sigmoid_focal_loss_backward));
}

}  // namespace nasfcos
