// Group norm and ReLU of channels-last maps: out = relu(scale * x + shift), with scale and shift
// per sample and channel. The forward pass reads the maps twice (statistics, output), and so does
// the backward pass (sums, gradient). Statistics are computed in double. The forward pass also
// takes bfloat16.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../memory_format.h"
#include "norm.h"
#include "parts.h"
#include "values.h"

namespace nasfcos {
namespace {

using at::Tensor;

struct Shape {
  Shape(const Tensor& x, int64_t groups)
      : samples(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)), groups(groups),
        width(channels / groups) {}
  Parts parts() const { return Parts(samples, pixels, channels); }
  int64_t samples, channels, pixels, groups;
  int64_t width;  // channels per group
};

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.numel() > 0,
      "group_norm_relu: maps must be [N, C, H, W] and not empty, not ", x.sizes());
  TORCH_CHECK_VALUE(
      groups > 0 && x.size(1) % groups == 0, "group_norm_relu: ", groups,
      " groups do not divide the ", x.size(1), " channels");
  for (const Tensor* t : {&weight, &bias}) {
    TORCH_CHECK_VALUE(
        t->dim() == 1 && t->size(0) == x.size(1) &&
            t->scalar_type() == at::toOpMathType(x.scalar_type()),
        "group_norm_relu: weight and bias must be [", x.size(1),
        "], in the dtype of the maps or, for bfloat16, in float32");
  }
}

struct Gradients {
  Tensor input, weight, bias;
};

// The terms of the norm per sample and channel, [samples * channels].
template <typename Acc>
struct GroupNormTerms {
  GroupNormTerms(
      const Shape& shape, const NormParameters& parameters, const Statistics& statistics)
      : means(shape.samples * shape.channels), inverse(means), scale(means), shift(means) {
    const Acc* m = statistics.mean.const_data_ptr<Acc>();
    const Acc* v = statistics.variance.const_data_ptr<Acc>();
    const Acc* w = parameters.weight.const_data_ptr<Acc>();
    const Acc* b = parameters.bias.const_data_ptr<Acc>();
    for (size_t i = 0; i < means.size(); ++i) {
      const int64_t group = i / shape.width, channel = i % shape.channels;
      means[i] = m[group];
      inverse[i] = static_cast<Acc>(1 / std::sqrt(v[group] + parameters.eps));
      scale[i] = w[channel] * inverse[i];
      shift[i] = b[channel] - means[i] * scale[i];
    }
  }

  std::vector<Acc> means, inverse, scale, shift;  // inverse standard deviations
};

template <typename scalar_t>
void forward_of(
    const Tensor& maps, const Shape& shape, const NormParameters& parameters, Tensor& output,
    Statistics& statistics) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = shape.channels, sample_size = shape.pixels * n;
  const B* x = reinterpret_cast<const B*>(maps.const_data_ptr<scalar_t>());
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>());
  const Parts parts = shape.parts();
  // The first pixel is close enough to the mean to avoid cancellation.
  std::vector<double> origin(shape.samples * n);
  for (int64_t i = 0; i < shape.samples * n; ++i) {
    origin[i] = load(x + i / n * sample_size + i % n);
  }
  const auto sums = parts.sums<double>(
      2 * n, [&](int64_t sample, int64_t first, int64_t count, double* to) {
        moments(x + sample * sample_size + first * n, origin.data() + sample * n, count, n, to);
      });
  for (int64_t group = 0; group < shape.samples * shape.groups; ++group) {
    const int64_t first = group * shape.width, sample = first / n;
    const double* group_sums = sums.data() + sample * 2 * n + first % n;
    // From the means and variances of the channels, which may be far from one another.
    double total = 0, within = 0, between = 0;
    for (int64_t i = 0; i < shape.width; ++i) {
      total += origin[first + i] + group_sums[i] / shape.pixels;
    }
    const double mean = total / shape.width;
    for (int64_t i = 0; i < shape.width; ++i) {
      const double distance = group_sums[i] / shape.pixels;
      within += std::max(group_sums[n + i] / shape.pixels - distance * distance, 0.0);
      between += std::pow(origin[first + i] + distance - mean, 2.0);
    }
    statistics.mean.mutable_data_ptr<Acc>()[group] = mean;
    statistics.variance.mutable_data_ptr<Acc>()[group] = (within + between) / shape.width;
  }
  const GroupNormTerms<Acc> norm(shape, parameters, statistics);
  parts.each([&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    const int64_t start = sample * sample_size + begin * n;
    apply(
        x + start, norm.scale.data() + sample * n, norm.shift.data() + sample * n, end - begin, n,
        out + start);
  });
}

template <typename T>
void backward_of(
    const Tensor& grad, const Tensor& maps, const Shape& shape, const NormParameters& parameters,
    const Statistics& statistics, Gradients& gradients) {
  const int64_t n = shape.channels, sample_size = shape.pixels * n;
  const T *g = grad.const_data_ptr<T>(), *x = maps.const_data_ptr<T>();
  const GroupNormTerms<T> norm(shape, parameters, statistics);
  std::vector<T> constant(shape.samples * n), linear(shape.samples * n);
  const auto channels_of = [&](int64_t sample) {
    const int64_t first = sample * n;
    return Channels<T>{
        norm.means.data() + first, norm.scale.data() + first, norm.shift.data() + first,
        constant.data() + first, linear.data() + first};
  };
  const Parts parts = shape.parts();
  const auto sums =
      parts.sums<T>(2 * n, [&](int64_t sample, int64_t first, int64_t count, T* to) {
        const int64_t start = sample * sample_size + first * n;
        add_sums(g + start, x + start, channels_of(sample), count, n, to);
      });
  std::vector<double> grad_weight(n), grad_bias(n);
  const T* w = parameters.weight.const_data_ptr<T>();
  for (int64_t first = 0; first < shape.samples * n; first += shape.width) {
    const double* group_sums = sums.data() + first / n * 2 * n + first % n;
    const double inverse = norm.inverse[first];
    double slopes = 0, products = 0;
    for (int64_t i = 0; i < shape.width; ++i) {
      const int64_t channel = first % n + i;
      slopes += w[channel] * group_sums[i];
      products += w[channel] * group_sums[n + i];
      grad_weight[channel] += inverse * group_sums[n + i];
      grad_bias[channel] += group_sums[i];
    }
    const double count = static_cast<double>(shape.width) * shape.pixels;
    for (int64_t i = first; i < first + shape.width; ++i) {
      constant[i] = static_cast<T>(-inverse * slopes / count);
      linear[i] = static_cast<T>(-std::pow(inverse, 3) * products / count);
    }
  }
  std::copy(grad_weight.begin(), grad_weight.end(), gradients.weight.mutable_data_ptr<T>());
  std::copy(grad_bias.begin(), grad_bias.end(), gradients.bias.mutable_data_ptr<T>());
  T* to = gradients.input.mutable_data_ptr<T>();
  parts.each([&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    const int64_t start = sample * sample_size + begin * n;
    write_grad(g + start, x + start, channels_of(sample), end - begin, n, to + start);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu(
    const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  check(input, weight, bias, groups);
  Tensor output = at::empty(input.sizes(), input.options().memory_format(kLast));
  Statistics statistics{
      at::empty({input.size(0), groups}, weight.options()),
      at::empty({input.size(0), groups}, weight.options())};
  const NormParameters parameters{weight.contiguous(), bias.contiguous(), eps};
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, input.scalar_type(), "group_norm_relu", [&] {
    forward_of<scalar_t>(
        input.contiguous(kLast), Shape(input, groups), parameters, output, statistics);
  });
  return {output.contiguous(format_of(input)), statistics.mean, statistics.variance};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& variance, double eps) {
  TORCH_CHECK_VALUE(mean.dim() == 2, "group_norm_relu: means must be [N, groups]");
  check(input, weight, bias, mean.size(1));
  TORCH_CHECK_VALUE(
      mean.sizes() == variance.sizes() && mean.size(0) == input.size(0) &&
          mean.scalar_type() == input.scalar_type() &&
          variance.scalar_type() == input.scalar_type() && grad.sizes() == input.sizes() &&
          grad.scalar_type() == input.scalar_type(),
      "group_norm_relu: the output's gradient and the statistics must be as the forward pass gave "
      "them");
  const NormParameters parameters{weight.contiguous(), bias.contiguous(), eps};
  const Statistics statistics{mean.contiguous(), variance.contiguous()};
  Gradients gradients{
      at::empty(input.sizes(), input.options().memory_format(kLast)),
      at::empty(weight.sizes(), weight.options()), at::empty(bias.sizes(), bias.options())};
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "group_norm_relu_backward", [&] {
    backward_of<scalar_t>(
        grad.contiguous(kLast), input.contiguous(kLast), Shape(input, mean.size(1)), parameters,
        statistics, gradients);
  });
  return {gradients.input.contiguous(format_of(input)), gradients.weight, gradients.bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("group_norm_relu", TORCH_FN(group_norm_relu));
  m.impl("group_norm_relu_backward", TORCH_FN(group_norm_relu_backward));
}

}  // namespace nasfcos
