// Batch norm and what follows it in the searched layers, with the batch's own statistics
// (training):
//   batch_norm_relu    out[i] = h[i],                                             h = relu(norm(x))
//   batch_norm_concat  out[c] = factor[2c] * h[2c] + factor[2c + 1] * h[2c + 1],  h = relu(norm(z))
// and with a given scale and shift (inference):
//   fused_concat       as batch_norm_concat
// where z are maps x and y, one's channels after the other's. As each has an even number of them,
// the first half of the output's channels comes from x and the second from y: nothing is
// concatenated.
//
// In training, forward reads every map twice (statistics, output) and backward twice (sums,
// gradient); all maps are channels-last. Statistics are sums of doubles.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../macros.h"
#include "../memory_format.h"
#include "norm.h"
#include "parts.h"
#include "values.h"

namespace {

using at::Tensor;
using namespace nasfcos;

// ------------------------------------------------------------------------------- loops over pixels
// Pairs: the channels' own values, such as `scale`, come with those of all first channels of pairs
// before those of all second ones, so that only maps are read and written by pairs. Pixels of `out`
// lie `step` values apart.
template <typename T, typename Acc>
NASFCOS_INLINE void pairs_loop(
    const T* x, const Acc* scale, const Acc* shift, const Acc* factor, int64_t pixels, int64_t n,
    int64_t step, T* out) {
  const int64_t half = n / 2;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += n, out += step) {
#pragma omp simd
    for (int64_t c = 0; c < half; ++c) {
      const Acc a = relu<Acc>(scale[c] * load(x + 2 * c) + shift[c]);
      const Acc b = relu<Acc>(scale[half + c] * load(x + 2 * c + 1) + shift[half + c]);
      store(factor[c] * a + factor[half + c] * b, out + c);
    }
  }
}

// Sums [3, n], the last that of the output's gradient times h.
template <typename T>
NASFCOS_INLINE void pairs_sums_loop(
    const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, int64_t step,
    T* sums) {
  const int64_t half = n / 2;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += step, x += n) {
#pragma omp simd
    for (int64_t c = 0; c < half; ++c) {
      const T g = grad[c], a = x[2 * c], b = x[2 * c + 1];
      add_slope(of.factor[c] * g, a, of, c, n, sums);
      add_slope(of.factor[half + c] * g, b, of, half + c, n, sums);
      sums[2 * n + c] += g * relu(of.scale[c] * a + of.shift[c]);
      sums[2 * n + half + c] += g * relu(of.scale[half + c] * b + of.shift[half + c]);
    }
  }
}

template <typename T>
NASFCOS_INLINE void pairs_grad_loop(
    const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, int64_t step,
    T* grad_x) {
  const int64_t half = n / 2;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, grad += step, x += n, grad_x += n) {
#pragma omp simd
    for (int64_t c = 0; c < half; ++c) {
      const T g = grad[c], a = x[2 * c], b = x[2 * c + 1];
      grad_x[2 * c] = grad_of(of.factor[c] * g, a, of, c);
      grad_x[2 * c + 1] = grad_of(of.factor[half + c] * g, b, of, half + c);
    }
  }
}

// The same for each type, by instruction set.
#define NASFCOS_FORWARD(CLONES, T, ACC)                                                          \
  CLONES void apply_pairs(                                                                       \
      const T* x, const ACC* scale, const ACC* shift, const ACC* factor, int64_t pixels,         \
      int64_t n, int64_t step, T* out) {                                                         \
    pairs_loop(x, scale, shift, factor, pixels, n, step, out);                                   \
  }
NASFCOS_FORWARD(NASFCOS_CLONES, float, float)
NASFCOS_FORWARD(NASFCOS_CLONES, uint16_t, float)
NASFCOS_FORWARD(, double, double)
#undef NASFCOS_FORWARD

#define NASFCOS_BACKWARD(CLONES, T)                                                              \
  CLONES void add_sums_of_pairs(                                                                 \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, int64_t step, \
      T* sums) {                                                                                 \
    pairs_sums_loop(grad, x, of, pixels, n, step, sums);                                         \
  }                                                                                              \
  CLONES void write_grad_of_pairs(                                                               \
      const T* grad, const T* x, const Channels<T>& of, int64_t pixels, int64_t n, int64_t step, \
      T* grad_x) {                                                                               \
    pairs_grad_loop(grad, x, of, pixels, n, step, grad_x);                                       \
  }
NASFCOS_BACKWARD(NASFCOS_CLONES, float)
NASFCOS_BACKWARD(, double)
#undef NASFCOS_BACKWARD

// -------------------------------------------------------------------------------------- operators
// The maps that are normed: x, and y of a concatenation.
struct Maps {
  Maps(const Tensor& x, const Tensor* y) : all{x.contiguous(kLast)} {
    if (y) all.push_back(y->contiguous(kLast));
  }
  std::vector<Tensor> all;
  bool pairs() const { return all.size() == 2; }
  int64_t channels() const { return all[0].size(1); }  // of one of them
};

void check(
    const Tensor& x, const Tensor* y, const Tensor& weight, const Tensor& bias,
    const Tensor* factor) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && pixels_of(x) > 0 && x.size(1) > 0,
      "batch norm: maps must be [N, C, H, W] and not empty, not ", x.sizes());
  TORCH_CHECK_VALUE(
      !y || (y->sizes() == x.sizes() && y->scalar_type() == x.scalar_type() && x.size(1) % 2 == 0),
      "batch_norm_concat: x and y must be of one shape and dtype, with an even number of channels");
  const int64_t channels = x.size(1) * (y ? 2 : 1);
  const auto dtype = at::toOpMathType(x.scalar_type());
  for (const Tensor* t : {&weight, &bias}) {
    TORCH_CHECK_VALUE(
        t->dim() == 1 && t->size(0) == channels && t->scalar_type() == dtype,
        "batch norm: weight and bias must be [", channels, "], in the dtype of the maps or, for "
        "bfloat16, in float32");
  }
  TORCH_CHECK_VALUE(
      !factor || (factor->dim() == 4 && factor->size(0) == x.size(1) && factor->size(1) == 2 &&
                  factor->size(2) == 1 && factor->size(3) == 1 && factor->scalar_type() == dtype),
      "batch_norm_concat: the factor must be [", x.size(1), ", 2, 1, 1], in the weight's dtype");
}

// The norm of one of the maps, by the statistics of its channels or by given factors. Values of
// channels are in the order of the loops: for pairs, the first channels of all, then the second
// ones.
template <typename Acc>
struct Norm {
  Norm(const Maps& maps, int64_t number) : n(maps.channels()), from(number * n), channel(n) {
    for (int64_t k = 0; k < n; ++k) {
      const bool second = k >= n / 2;
      channel[k] = from + (maps.pairs() ? 2 * (k - second * (n / 2)) + second : k);
    }
  }

  void use(
      const Tensor& mean, const Tensor& variance, double eps, const Tensor& weight,
      const Tensor& bias) {
    means = of(mean), inverse = of(variance), scale = of(weight), shift = of(bias);
    for (int64_t k = 0; k < n; ++k) {
      inverse[k] = static_cast<Acc>(1 / std::sqrt(inverse[k] + eps));
      scale[k] *= inverse[k];
      shift[k] -= means[k] * scale[k];
    }
  }

  // Values of these channels, from those of all.
  std::vector<Acc> of(const Tensor& values) const {
    std::vector<Acc> found(n);
    for (int64_t k = 0; k < n; ++k) found[k] = values.const_data_ptr<Acc>()[channel[k]];
    return found;
  }

  int64_t n, from;
  std::vector<int64_t> channel;
  std::vector<Acc> means, inverse, scale, shift;  // `inverse` of the standard deviations
};

// Writes what comes of one of the maps by its scale and shift.
template <typename scalar_t>
void apply_norm(
    const Maps& maps, const Norm<at::opmath_type<scalar_t>>& norm, const Tensor& factor,
    Tensor& output) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = norm.n, number = norm.from / n, step = output.size(1);
  const B* x = reinterpret_cast<const B*>(maps.all[number].const_data_ptr<scalar_t>());
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>()) + number * n / 2;
  const auto factors = maps.pairs() ? norm.of(factor) : std::vector<Acc>();
  const Acc *scale = norm.scale.data(), *shift = norm.shift.data();
  at::parallel_for(0, pixels_of(output), grain_of(n), [&](int64_t begin, int64_t end) {
    const B* from = x + begin * n;
    if (maps.pairs()) {
      apply_pairs(
          from, scale, shift, factors.data(), end - begin, n, step, out + begin * step);
    } else {
      apply(from, scale, shift, end - begin, n, out + begin * step);
    }
  });
}

template <typename scalar_t>
void forward_of(
    const Maps& maps, const Tensor& weight, const Tensor& bias, const Tensor& factor, double eps,
    Tensor& output, Tensor& mean, Tensor& variance) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = maps.channels(), pixels = pixels_of(output);
  const Parts parts(1, pixels, n);
  for (size_t number = 0; number < maps.all.size(); ++number) {
    const B* x = reinterpret_cast<const B*>(maps.all[number].const_data_ptr<scalar_t>());
    Norm<Acc> norm(maps, number);
    // The first pixel is near enough to the mean for little to be lost to cancellation.
    std::vector<double> origin(n);
    for (int64_t i = 0; i < n; ++i) origin[i] = load(x + i);
    const auto sums =
        parts.sums<double>(2 * n, [&](int64_t, int64_t first, int64_t count, double* to) {
          moments(x + first * n, origin.data(), count, n, to);
        });
    for (int64_t i = 0; i < n; ++i) {
      const double distance = sums[i] / pixels;
      mean.mutable_data_ptr<Acc>()[norm.from + i] = origin[i] + distance;
      variance.mutable_data_ptr<Acc>()[norm.from + i] =
          std::max(sums[n + i] / pixels - distance * distance, 0.0);
    }
    norm.use(mean, variance, eps, weight, bias);
    apply_norm<scalar_t>(maps, norm, factor, output);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor* y, const Tensor& weight, const Tensor& bias,
    const Tensor* factor, double eps) {
  check(x, y, weight, bias, factor);
  Tensor output = at::empty(x.sizes(), x.options().memory_format(kLast));
  Tensor mean = at::empty(weight.sizes(), weight.options());
  Tensor variance = at::empty(weight.sizes(), weight.options());
  const Maps maps(x, y);
  const Tensor w = weight.contiguous(), b = bias.contiguous();
  const Tensor f = factor ? factor->flatten().contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "batch_norm", [&] {
    forward_of<scalar_t>(maps, w, b, f, eps, output, mean, variance);
  });
  return {output.contiguous(format_of(x)), mean, variance};
}

// Writes the gradients of the maps, and those of weight, bias and factor.
template <typename T>
void backward_of(
    const Tensor& grad, const Maps& maps, const Tensor& weight, const Tensor& bias,
    const Tensor& factor, const Tensor& mean, const Tensor& variance, double eps,
    const std::vector<Tensor>& grads, const std::vector<Tensor>& of_parameters) {
  const int64_t n = maps.channels(), pixels = pixels_of(grad), step = grad.size(1);
  const Parts parts(1, pixels, n);
  for (size_t number = 0; number < maps.all.size(); ++number) {
    const T* x = maps.all[number].const_data_ptr<T>();
    const T* g = grad.const_data_ptr<T>() + number * n / 2;
    Norm<T> norm(maps, number);
    norm.use(mean, variance, eps, weight, bias);
    const auto factors = maps.pairs() ? norm.of(factor) : std::vector<T>();
    std::vector<T> constant(n), linear(n);
    const Channels<T> of{
        norm.means.data(), norm.scale.data(), norm.shift.data(), constant.data(), linear.data(),
        factors.data()};
    const auto sums = parts.sums<T>(
        (maps.pairs() ? 3 : 2) * n, [&](int64_t, int64_t first, int64_t count, T* to) {
          if (maps.pairs()) {
            add_sums_of_pairs(g + first * step, x + first * n, of, count, n, step, to);
          } else {
            add_sums(g + first * step, x + first * n, of, count, n, to);
          }
        });
    for (int64_t k = 0; k < n; ++k) {
      const double product = sums[n + k] * norm.inverse[k];
      const double of_terms[] = {product, sums[k], maps.pairs() ? sums[2 * n + k] : 0};
      for (int64_t i = 0; i < 3; ++i) {
        of_parameters[i].mutable_data_ptr<T>()[norm.channel[k]] = static_cast<T>(of_terms[i]);
      }
      constant[k] = static_cast<T>(-norm.scale[k] * sums[k] / pixels);
      linear[k] = static_cast<T>(-norm.scale[k] * norm.inverse[k] * product / pixels);
    }
    T* to = grads[number].mutable_data_ptr<T>();
    at::parallel_for(0, pixels, grain_of(n), [&](int64_t begin, int64_t end) {
      const T *grad_here = g + begin * step, *x_here = x + begin * n;
      if (maps.pairs()) {
        write_grad_of_pairs(grad_here, x_here, of, end - begin, n, step, to + begin * n);
      } else {
        write_grad(grad_here, x_here, of, end - begin, n, to + begin * n);
      }
    });
  }
}

// The gradients of the maps, and of weight, bias and factor.
std::pair<std::vector<Tensor>, std::vector<Tensor>> backward(
    const Tensor& grad, const Tensor& x, const Tensor* y, const Tensor& weight, const Tensor& bias,
    const Tensor* factor, const Tensor& mean, const Tensor& variance, double eps) {
  check(x, y, weight, bias, factor);
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() &&
          mean.sizes() == weight.sizes() && variance.sizes() == weight.sizes() &&
          mean.scalar_type() == x.scalar_type() && variance.scalar_type() == x.scalar_type(),
      "batch norm: the output's gradient and the statistics must be as the forward pass gave them");
  const Maps maps(x, y);
  std::vector<Tensor> grads, of_parameters(3);
  for (const Tensor& map : maps.all) {
    grads.push_back(at::empty(map.sizes(), map.options().memory_format(kLast)));
  }
  for (Tensor& t : of_parameters) t = at::empty(weight.sizes(), weight.options());
  const Tensor w = weight.contiguous(), b = bias.contiguous();
  const Tensor f = factor ? factor->flatten().contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_backward", [&] {
    backward_of<scalar_t>(
        grad.contiguous(kLast), maps, w, b, f, mean.contiguous(), variance.contiguous(), eps,
        grads, of_parameters);
  });
  grads[0] = grads[0].contiguous(format_of(x));
  if (y) grads[1] = grads[1].contiguous(format_of(*y));
  return {grads, of_parameters};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(
    const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  return forward(input, nullptr, weight, bias, nullptr, eps);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& variance, double eps) {
  const auto [maps, terms] =
      backward(grad, input, nullptr, weight, bias, nullptr, mean, variance, eps);
  return {maps[0], terms[0], terms[1]};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_concat(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
    const Tensor& factor, double eps) {
  return forward(x, &y, weight, bias, &factor, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_concat_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
    const Tensor& factor, const Tensor& mean, const Tensor& variance, double eps) {
  const auto [maps, terms] = backward(grad, x, &y, weight, bias, &factor, mean, variance, eps);
  Tensor grad_factor = at::empty_like(factor).copy_(terms[2].view(factor.sizes()));
  return {maps[0], maps[1], terms[0], terms[1], grad_factor};
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
  Tensor output = at::empty(x.sizes(), x.options().memory_format(kLast));
  if (output.numel() == 0) return output;
  const Maps maps(x, &y);
  const Tensor factor = weight.contiguous(), scales = scale.contiguous(),
               shifts = shift.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "fused_concat", [&] {
    for (int64_t number = 0; number < 2; ++number) {
      Norm<at::opmath_type<scalar_t>> norm(maps, number);
      norm.scale = norm.of(scales), norm.shift = norm.of(shifts);
      apply_norm<scalar_t>(maps, norm, factor, output);
    }
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("fused_concat", TORCH_FN(fused_concat));
  m.impl("batch_norm_relu", TORCH_FN(batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_FN(batch_norm_relu_backward));
  m.impl("batch_norm_concat", TORCH_FN(batch_norm_concat));
  m.impl("batch_norm_concat_backward", TORCH_FN(batch_norm_concat_backward));
}
