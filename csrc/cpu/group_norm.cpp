// Group norm and ReLU of channels-last maps: out = relu(scale * x + shift), scale and shift being
// those of each sample's channels. Forward reads the maps twice (statistics, output), backward too
// (sums, gradient). Statistics are sums of doubles. The forward pass takes bfloat16 as well.

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

namespace {

using at::Tensor;
using namespace nasfcos;

struct Shape {
  Shape(const Tensor& x, int64_t groups)
      : samples(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)), groups(groups),
        width(channels / groups) {}
  Parts parts() const { return Parts(samples, pixels, channels); }
  int64_t samples, channels, pixels, groups;
  int64_t width;  // channels of a group
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

// Of each sample's channels [samples * channels], from the statistics [samples, groups].
template <typename Acc>
struct Norm {
  Norm(
      const Shape& shape, const Tensor& mean, const Tensor& variance, double eps,
      const Tensor& weight, const Tensor& bias)
      : means(shape.samples * shape.channels), inverse(means), scale(means), shift(means) {
    const Acc *m = mean.const_data_ptr<Acc>(), *v = variance.const_data_ptr<Acc>();
    const Acc *w = weight.const_data_ptr<Acc>(), *b = bias.const_data_ptr<Acc>();
    for (size_t i = 0; i < means.size(); ++i) {
      const int64_t group = i / shape.width, channel = i % shape.channels;
      means[i] = m[group];
      inverse[i] = static_cast<Acc>(1 / std::sqrt(v[group] + eps));
      scale[i] = w[channel] * inverse[i];
      shift[i] = b[channel] - means[i] * scale[i];
    }
  }

  std::vector<Acc> means, inverse, scale, shift;  // `inverse` of the standard deviations
};

template <typename scalar_t>
void forward_of(
    const Tensor& maps, const Tensor& weight, const Tensor& bias, const Shape& shape, double eps,
    Tensor& output, Tensor& mean, Tensor& variance) {
  using B = Bits<scalar_t>;
  using Acc = at::opmath_type<scalar_t>;
  const int64_t n = shape.channels, sample_size = shape.pixels * n;
  const B* x = reinterpret_cast<const B*>(maps.const_data_ptr<scalar_t>());
  B* out = reinterpret_cast<B*>(output.mutable_data_ptr<scalar_t>());
  const Parts parts = shape.parts();
  // The first pixel is near enough to the mean for little to be lost to cancellation.
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
    const double* own = sums.data() + sample * 2 * n + first % n;
    // From the channels' means and variances, so that channels may be far from one another.
    double total = 0, within = 0, between = 0;
    for (int64_t i = 0; i < shape.width; ++i) total += origin[first + i] + own[i] / shape.pixels;
    const double middle = total / shape.width;
    for (int64_t i = 0; i < shape.width; ++i) {
      const double distance = own[i] / shape.pixels;
      within += std::max(own[n + i] / shape.pixels - distance * distance, 0.0);
      between += std::pow(origin[first + i] + distance - middle, 2.0);
    }
    mean.mutable_data_ptr<Acc>()[group] = middle;
    variance.mutable_data_ptr<Acc>()[group] = (within + between) / shape.width;
  }
  const Norm<Acc> norm(shape, mean, variance, eps, weight, bias);
  parts.each([&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    const int64_t place = sample * sample_size + begin * n;
    apply(
        x + place, norm.scale.data() + sample * n, norm.shift.data() + sample * n, end - begin, n,
        out + place);
  });
}

template <typename T>
void backward_of(
    const Tensor& grad, const Tensor& maps, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& variance, const Shape& shape, double eps, Tensor& grad_input,
    Tensor& grad_weight, Tensor& grad_bias) {
  const int64_t n = shape.channels, sample_size = shape.pixels * n;
  const T *g = grad.const_data_ptr<T>(), *x = maps.const_data_ptr<T>();
  const Norm<T> norm(shape, mean, variance, eps, weight, bias);
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
        const int64_t place = sample * sample_size + first * n;
        add_sums(g + place, x + place, channels_of(sample), count, n, to);
      });
  std::vector<double> of_weight(n), of_bias(n);
  const T* w = weight.const_data_ptr<T>();
  for (int64_t first = 0; first < shape.samples * n; first += shape.width) {
    const double* own = sums.data() + first / n * 2 * n + first % n;
    const double inverse = norm.inverse[first];
    double slopes = 0, products = 0;
    for (int64_t i = 0; i < shape.width; ++i) {
      const int64_t channel = first % n + i;
      slopes += w[channel] * own[i];
      products += w[channel] * own[n + i];
      of_weight[channel] += inverse * own[n + i];
      of_bias[channel] += own[i];
    }
    const double count = static_cast<double>(shape.width) * shape.pixels;
    for (int64_t i = first; i < first + shape.width; ++i) {
      constant[i] = static_cast<T>(-inverse * slopes / count);
      linear[i] = static_cast<T>(-std::pow(inverse, 3) * products / count);
    }
  }
  std::copy(of_weight.begin(), of_weight.end(), grad_weight.mutable_data_ptr<T>());
  std::copy(of_bias.begin(), of_bias.end(), grad_bias.mutable_data_ptr<T>());
  T* to = grad_input.mutable_data_ptr<T>();
  parts.each([&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    const int64_t place = sample * sample_size + begin * n;
    write_grad(g + place, x + place, channels_of(sample), end - begin, n, to + place);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu(
    const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  check(input, weight, bias, groups);
  Tensor output = at::empty(input.sizes(), input.options().memory_format(kLast));
  Tensor mean = at::empty({input.size(0), groups}, weight.options());
  Tensor variance = at::empty({input.size(0), groups}, weight.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, input.scalar_type(), "group_norm_relu", [&] {
    forward_of<scalar_t>(
        input.contiguous(kLast), weight.contiguous(), bias.contiguous(), Shape(input, groups), eps,
        output, mean, variance);
  });
  return {output.contiguous(format_of(input)), mean, variance};
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
  const Shape shape(input, mean.size(1));
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(kLast));
  Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  Tensor grad_bias = at::empty(bias.sizes(), bias.options());
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "group_norm_relu_backward", [&] {
    backward_of<scalar_t>(
        grad.contiguous(kLast), input.contiguous(kLast), weight.contiguous(), bias.contiguous(),
        mean.contiguous(), variance.contiguous(), shape, eps, grad_input, grad_weight, grad_bias);
  });
  return {grad_input.contiguous(format_of(input)), grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("group_norm_relu", TORCH_FN(group_norm_relu));
  m.impl("group_norm_relu_backward", TORCH_FN(group_norm_relu_backward));
}
