// Batch norm fused with what follows it in the searched layers. In training, with the statistics of
// the batch:
//   batch_norm_relu    out[i] = h[i],                                             h = relu(norm(x))
//   batch_norm_concat  out[c] = factor[2c] * h[2c] + factor[2c + 1] * h[2c + 1],  h = relu(norm(z))
// and in inference, with given scale and shift:
//   fused_concat       as batch_norm_concat
// where z is the concatenation of the channels of x and y. Both have an even number of channels, so
// the first half of the output's channels depends on x alone and the second on y alone, and z need
// not be built.
//
// In training, the forward pass reads every map twice (statistics, output), and so does the
// backward pass (sums, gradient). All maps are channels-last. Statistics are computed in double.

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

namespace nasfcos {
namespace {

using at::Tensor;

// ------------------------------------------------------------------------------- loops over pixels
// For pairs of channels, terms such as `scale` are stored for all first channels and then for all
// second ones, so that only the maps are read and written in pairs. Consecutive pixels of `out`
// (and `grad`) are `step` values apart.
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

// Adds to sums [3, n]: as add_slope, and the output's gradient times h.
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

#define NASFCOS_PAIRS_FORWARD(CLONES, T, ACC)                                                    \
  CLONES void apply_pairs(                                                                       \
      const T* x, const ACC* scale, const ACC* shift, const ACC* factor, int64_t pixels,         \
      int64_t n, int64_t step, T* out) {                                                         \
    pairs_loop(x, scale, shift, factor, pixels, n, step, out);                                   \
  }
NASFCOS_FOR_MAP_TYPES(NASFCOS_PAIRS_FORWARD)

#define NASFCOS_PAIRS_BACKWARD(CLONES, T)                                                        \
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
NASFCOS_FOR_GRAD_TYPES(NASFCOS_PAIRS_BACKWARD)

// -------------------------------------------------------------------------------------- operators
// The maps to normalise: x, and for a concatenation also y.
struct Inputs {
  Inputs(const Tensor& x, const Tensor* y) : maps{x.contiguous(kLast)} {
    if (y) maps.push_back(y->contiguous(kLast));
  }
  std::vector<Tensor> maps;
  bool pairs() const { return maps.size() == 2; }
  int64_t channels() const { return maps[0].size(1); }  // of one of them
};

struct Parameters : NormParameters {
  Tensor factor;  // [2 * C], of the concatenation
};

struct Gradients {
  std::vector<Tensor> maps;
  Tensor weight, bias, factor;
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

// The terms of the norm of one of the maps, per channel in the order of the loops: for pairs, all
// first channels, then all second ones.
template <typename Acc>
struct BatchNormTerms {
  BatchNormTerms(const Inputs& inputs, int64_t number)
      : n(inputs.channels()), first(number * n), channel(n) {
    for (int64_t k = 0; k < n; ++k) {
      const bool second = k >= n / 2;
      channel[k] = first + (inputs.pairs() ? 2 * (k - second * (n / 2)) + second : k);
    }
  }

  void compute(const Parameters& parameters, const Statistics& statistics) {
    means = of(statistics.mean), inverse = of(statistics.variance);
    scale = of(parameters.weight), shift = of(parameters.bias);
    for (int64_t k = 0; k < n; ++k) {
      inverse[k] = static_cast<Acc>(1 / std::sqrt(inverse[k] + parameters.eps));
      scale[k] *= inverse[k];
      shift[k] -= means[k] * scale[k];
    }
  }

  // The values of these channels, from the values of all.
  std::vector<Acc> of(const Tensor& values) const {
    std::vector<Acc> found(n);
    for (int64_t k = 0; k < n; ++k) found[k] = values.const_data_ptr<Acc>()[channel[k]];
    return found;
  }

  int64_t n, first;
  std::vector<int64_t> channel;
  std::vector<Acc> means, inverse, scale, shift;  // inverse standard deviations
};

// Writes the part of the output that depends on map number `number`.
template <typename scalar_t>
void apply_norm(
    const Inputs& inputs, int64_t number, const BatchNormTerms<at::opmath_type<scalar_t>>& norm,
    const Tensor& factor, Tensor& output) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = norm.n, step = output.size(1);
  const B* x = reinterpret_cast<const B*>(inputs.maps[number].const_data_ptr<scalar_t>());
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>()) + number * n / 2;
  const auto factors = inputs.pairs() ? norm.of(factor) : std::vector<Acc>();
  const Acc *scale = norm.scale.data(), *shift = norm.shift.data();
  at::parallel_for(0, pixels_of(output), pixel_grain(n), [&](int64_t begin, int64_t end) {
    const B* from = x + begin * n;
    if (inputs.pairs()) {
      apply_pairs(
          from, scale, shift, factors.data(), end - begin, n, step, out + begin * step);
    } else {
      apply(from, scale, shift, end - begin, n, out + begin * step);
    }
  });
}

template <typename scalar_t>
void forward_of(
    const Inputs& inputs, const Parameters& parameters, Tensor& output, Statistics& statistics) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = inputs.channels(), pixels = pixels_of(output);
  const Parts parts(1, pixels, n);
  for (size_t number = 0; number < inputs.maps.size(); ++number) {
    const B* x = reinterpret_cast<const B*>(inputs.maps[number].const_data_ptr<scalar_t>());
    BatchNormTerms<Acc> norm(inputs, number);
    // The first pixel is close enough to the mean to avoid cancellation.
    std::vector<double> origin(n);
    for (int64_t i = 0; i < n; ++i) origin[i] = load(x + i);
    const auto sums =
        parts.sums<double>(2 * n, [&](int64_t, int64_t first, int64_t count, double* to) {
          moments(x + first * n, origin.data(), count, n, to);
        });
    Acc* mean = statistics.mean.mutable_data_ptr<Acc>() + norm.first;
    Acc* variance = statistics.variance.mutable_data_ptr<Acc>() + norm.first;
    for (int64_t i = 0; i < n; ++i) {
      const double distance = sums[i] / pixels;
      mean[i] = origin[i] + distance;
      variance[i] = std::max(sums[n + i] / pixels - distance * distance, 0.0);
    }
    norm.compute(parameters, statistics);
    apply_norm<scalar_t>(inputs, number, norm, parameters.factor, output);
  }
}

Parameters contiguous_parameters(
    const Tensor& weight, const Tensor& bias, const Tensor* factor, double eps) {
  return {
      {weight.contiguous(), bias.contiguous(), eps},
      factor ? factor->flatten().contiguous() : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor* y, const Tensor& weight, const Tensor& bias,
    const Tensor* factor, double eps) {
  check(x, y, weight, bias, factor);
  Tensor output = at::empty(x.sizes(), x.options().memory_format(kLast));
  Statistics statistics{
      at::empty(weight.sizes(), weight.options()), at::empty(weight.sizes(), weight.options())};
  const Inputs inputs(x, y);
  const Parameters parameters = contiguous_parameters(weight, bias, factor, eps);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "batch_norm", [&] {
    forward_of<scalar_t>(inputs, parameters, output, statistics);
  });
  return {output.contiguous(format_of(x)), statistics.mean, statistics.variance};
}

template <typename T>
void backward_of(
    const Tensor& grad, const Inputs& inputs, const Parameters& parameters,
    const Statistics& statistics, Gradients& gradients) {
  const int64_t n = inputs.channels(), pixels = pixels_of(grad), step = grad.size(1);
  const bool pairs = inputs.pairs();
  const Parts parts(1, pixels, n);
  for (size_t number = 0; number < inputs.maps.size(); ++number) {
    const T* x = inputs.maps[number].const_data_ptr<T>();
    const T* g = grad.const_data_ptr<T>() + number * n / 2;
    BatchNormTerms<T> norm(inputs, number);
    norm.compute(parameters, statistics);
    const auto factors = pairs ? norm.of(parameters.factor) : std::vector<T>();
    std::vector<T> constant(n), linear(n);
    const Channels<T> of{
        norm.means.data(), norm.scale.data(), norm.shift.data(), constant.data(), linear.data(),
        factors.data()};
    const auto sums =
        parts.sums<T>((pairs ? 3 : 2) * n, [&](int64_t, int64_t first, int64_t count, T* to) {
          if (pairs) {
            add_sums_of_pairs(g + first * step, x + first * n, of, count, n, step, to);
          } else {
            add_sums(g + first * step, x + first * n, of, count, n, to);
          }
        });
    T* grad_weight = gradients.weight.mutable_data_ptr<T>();
    T* grad_bias = gradients.bias.mutable_data_ptr<T>();
    T* grad_factor = pairs ? gradients.factor.mutable_data_ptr<T>() : nullptr;
    for (int64_t k = 0; k < n; ++k) {
      const double product = sums[n + k] * norm.inverse[k];
      grad_weight[norm.channel[k]] = static_cast<T>(product);
      grad_bias[norm.channel[k]] = static_cast<T>(sums[k]);
      if (pairs) grad_factor[norm.channel[k]] = static_cast<T>(sums[2 * n + k]);
      constant[k] = static_cast<T>(-norm.scale[k] * sums[k] / pixels);
      linear[k] = static_cast<T>(-norm.scale[k] * norm.inverse[k] * product / pixels);
    }
    T* to = gradients.maps[number].mutable_data_ptr<T>();
    at::parallel_for(0, pixels, pixel_grain(n), [&](int64_t begin, int64_t end) {
      const T *grad_here = g + begin * step, *x_here = x + begin * n;
      if (pairs) {
        write_grad_of_pairs(grad_here, x_here, of, end - begin, n, step, to + begin * n);
      } else {
        write_grad(grad_here, x_here, of, end - begin, n, to + begin * n);
      }
    });
  }
}

Gradients backward(
    const Tensor& grad, const Tensor& x, const Tensor* y, const Tensor& weight, const Tensor& bias,
    const Tensor* factor, const Tensor& mean, const Tensor& variance, double eps) {
  check(x, y, weight, bias, factor);
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() &&
          mean.sizes() == weight.sizes() && variance.sizes() == weight.sizes() &&
          mean.scalar_type() == x.scalar_type() && variance.scalar_type() == x.scalar_type(),
      "batch norm: the output's gradient and the statistics must be as the forward pass gave them");
  const Inputs inputs(x, y);
  const Parameters parameters = contiguous_parameters(weight, bias, factor, eps);
  const Statistics statistics{mean.contiguous(), variance.contiguous()};
  Gradients gradients;
  for (const Tensor& map : inputs.maps) {
    gradients.maps.push_back(at::empty(map.sizes(), map.options().memory_format(kLast)));
  }
  gradients.weight = at::empty(weight.sizes(), weight.options());
  gradients.bias = at::empty(weight.sizes(), weight.options());
  if (factor) gradients.factor = at::empty(weight.sizes(), weight.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_backward", [&] {
    backward_of<scalar_t>(grad.contiguous(kLast), inputs, parameters, statistics, gradients);
  });
  gradients.maps[0] = gradients.maps[0].contiguous(format_of(x));
  if (y) gradients.maps[1] = gradients.maps[1].contiguous(format_of(*y));
  if (factor) {
    gradients.factor = at::empty_like(*factor).copy_(gradients.factor.view(factor->sizes()));
  }
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(
    const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  return forward(input, nullptr, weight, bias, nullptr, eps);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& variance, double eps) {
  const Gradients gradients =
      backward(grad, input, nullptr, weight, bias, nullptr, mean, variance, eps);
  return {gradients.maps[0], gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_concat(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
    const Tensor& factor, double eps) {
  return forward(x, &y, weight, bias, &factor, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_concat_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
    const Tensor& factor, const Tensor& mean, const Tensor& variance, double eps) {
  const Gradients gradients =
      backward(grad, x, &y, weight, bias, &factor, mean, variance, eps);
  return {
      gradients.maps[0], gradients.maps[1], gradients.weight, gradients.bias, gradients.factor};
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
  const Inputs inputs(x, &y);
  const Tensor factor = weight.contiguous(), scales = scale.contiguous(),
               shifts = shift.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "fused_concat", [&] {
    for (int64_t number = 0; number < 2; ++number) {
      BatchNormTerms<at::opmath_type<scalar_t>> norm(inputs, number);
      norm.scale = norm.of(scales), norm.shift = norm.of(shifts);
      apply_norm<scalar_t>(inputs, number, norm, factor, output);
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

}  // namespace nasfcos
