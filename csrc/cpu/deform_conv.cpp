// Modulated deformable convolution, forward and backward. Its plain version is torchvision's.
//
// The input is turned to channels-last once, so that a sample (one tap of one output position) is a
// blend of four contiguous runs of channels. Samples are taken for a few hundred output positions at
// a time into `columns` [positions, taps * channels], small enough to stay in cache until a matrix
// product with the weight consumes them.
//
// One more pixel of zeros follows the image. All corners outside the image point to it, so that
// nothing below needs to ask; in the gradient of the input it collects what is thrown away.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../macros.h"

namespace {

using at::IntArrayRef;
using at::Tensor;

struct Geometry {
  int64_t images, channels, height, width;
  int64_t out_channels, out_height, out_width, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, group_channels;

  int64_t pixels() const { return height * width; }
  int64_t positions() const { return out_height * out_width; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t columns() const { return taps() * channels; }
  // Positions handled at a time: enough of them for an efficient product on every thread.
  int64_t chunk() const {
    return std::min(positions(), std::max<int64_t>(256, 64 * at::get_num_threads()));
  }
};

Geometry geometry_of(
    const Tensor& input, const Tensor& offset, const Tensor& mask, const Tensor& weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t offset_groups) {
  const char* op = "modulated_deform_conv2d: ";
  TORCH_CHECK_VALUE(
      input.dim() == 4 && offset.dim() == 4 && mask.dim() == 4 && weight.dim() == 4, op,
      "input, offset, mask and weight must have four dimensions");
  TORCH_CHECK_VALUE(
      offset.scalar_type() == input.scalar_type() && mask.scalar_type() == input.scalar_type() &&
          weight.scalar_type() == input.scalar_type(),
      op, "input, offset, mask and weight must have one dtype");
  TORCH_CHECK_VALUE(
      offset_groups >= 1 && input.size(1) % offset_groups == 0, op,
      "offset_groups must divide the input channels");
  TORCH_CHECK_VALUE(weight.size(1) == input.size(1), op, "weight and input differ in channels");
  TORCH_CHECK_VALUE(
      stride[0] >= 1 && stride[1] >= 1 && dilation[0] >= 1 && dilation[1] >= 1 && padding[0] >= 0 &&
          padding[1] >= 0,
      op, "stride and dilation must be positive, padding must not be negative");
  Geometry g;
  g.images = input.size(0);
  g.channels = input.size(1);
  g.height = input.size(2);
  g.width = input.size(3);
  g.out_channels = weight.size(0);
  g.kernel_h = weight.size(2);
  g.kernel_w = weight.size(3);
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.pad_h = padding[0];
  g.pad_w = padding[1];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.groups = offset_groups;
  g.group_channels = g.channels / offset_groups;
  g.out_height =
      (g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1) / g.stride_h + 1;
  g.out_width = (g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1) / g.stride_w + 1;
  const int64_t taps = g.groups * g.taps();
  TORCH_CHECK_VALUE(
      g.pixels() < std::numeric_limits<int32_t>::max(), op, "the input image is too large");
  TORCH_CHECK_VALUE(
      g.out_height >= 1 && g.out_width >= 1 &&
          offset.sizes() == IntArrayRef({g.images, 2 * taps, g.out_height, g.out_width}) &&
          mask.sizes() == IntArrayRef({g.images, taps, g.out_height, g.out_width}),
      op, "offset or mask do not fit the other arguments");
  return g;
}

// Where one tap of one output position reads.
template <typename T>
struct Sample {
  int32_t pixel[4];  // top left, top right, bottom left, bottom right
  T y, x;            // fractions towards bottom and right
  T mask;

  // Bilinear weights of the four corners.
  NASFCOS_INLINE void blend(T* w) const {
    w[0] = (1 - y) * (1 - x);
    w[1] = (1 - y) * x;
    w[2] = y * (1 - x);
    w[3] = y * x;
  }
};

template <typename T>
Sample<T> locate(const Geometry& g, T y, T x, T mask) {
  const int32_t nowhere = static_cast<int32_t>(g.pixels());
  Sample<T> s{{nowhere, nowhere, nowhere, nowhere}, 0, 0, mask};
  if (std::isnan(y) || std::isnan(x)) {
    s.y = s.x = std::numeric_limits<T>::quiet_NaN();
    return s;
  }
  // Before any conversion to an integer, which might not fit.
  if (!(y > -1 && x > -1 && y < T(g.height) && x < T(g.width))) return s;
  const T top = std::floor(y), left = std::floor(x);
  s.y = y - top;
  s.x = x - left;
  const int32_t y0 = static_cast<int32_t>(top), x0 = static_cast<int32_t>(left);
  const int32_t height = static_cast<int32_t>(g.height), width = static_cast<int32_t>(g.width);
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t yc = y0 + corner / 2, xc = x0 + corner % 2;
    if (yc >= 0 && yc < height && xc >= 0 && xc < width) s.pixel[corner] = yc * width + xc;
  }
  return s;
}

// The samples of one output position, taps of group 0 first. `offset` and `mask` are an image's.
template <typename T>
void locate_all(
    const Geometry& g, const T* offset, const T* mask, int64_t position, Sample<T>* samples) {
  const int64_t plane = g.positions();
  const T y0 = static_cast<T>(position / g.out_width * g.stride_h - g.pad_h);
  const T x0 = static_cast<T>(position % g.out_width * g.stride_w - g.pad_w);
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
        const int64_t tap = (group * g.kernel_h + ky) * g.kernel_w + kx;
        const T dy = offset[2 * tap * plane + position];
        const T dx = offset[(2 * tap + 1) * plane + position];
        samples[tap] = locate(
            g, y0 + static_cast<T>(ky * g.dilation_h) + dy,
            x0 + static_cast<T>(kx * g.dilation_w) + dx, mask[tap * plane + position]);
      }
    }
  }
}

// out = sum of w[i] * corner[i], over n channels.
template <typename T>
NASFCOS_INLINE void sample_loop(const T* const* corner, const T* w, int64_t n, T* out) {
  const T *a = corner[0], *b = corner[1], *c = corner[2], *d = corner[3];
  const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i];
}

// dots[i] = <grad, corner[i]>
template <typename T>
NASFCOS_INLINE void dot_loop(const T* const* corner, const T* grad, int64_t n, T* dots) {
  const T *a = corner[0], *b = corner[1], *c = corner[2], *d = corner[3];
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < n; ++i) {
    s0 += grad[i] * a[i];
    s1 += grad[i] * b[i];
    s2 += grad[i] * c[i];
    s3 += grad[i] * d[i];
  }
  dots[0] = s0;
  dots[1] = s1;
  dots[2] = s2;
  dots[3] = s3;
}

// out += w * grad
template <typename T>
NASFCOS_INLINE void scatter_loop(const T* grad, T w, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += w * grad[i];
}

NASFCOS_CLONES void sample(const float* const* corner, const float* w, int64_t n, float* out) {
  sample_loop(corner, w, n, out);
}
NASFCOS_CLONES void dot(const float* const* corner, const float* grad, int64_t n, float* dots) {
  dot_loop(corner, grad, n, dots);
}
NASFCOS_CLONES void scatter(const float* grad, float w, int64_t n, float* out) {
  scatter_loop(grad, w, n, out);
}
void sample(const double* const* corner, const double* w, int64_t n, double* out) {
  sample_loop(corner, w, n, out);
}
void dot(const double* const* corner, const double* grad, int64_t n, double* dots) {
  dot_loop(corner, grad, n, dots);
}
void scatter(const double* grad, double w, int64_t n, double* out) {
  scatter_loop(grad, w, n, out);
}

template <typename T>
NASFCOS_INLINE void corners_of(
    const Geometry& g, const Sample<T>& s, const T* image, int64_t channel, const T** corner) {
  for (int i = 0; i < 4; ++i) corner[i] = image + s.pixel[i] * g.channels + channel;
}

// to[row, column] = from[row * row_stride + column * column_stride], `to` being contiguous. By tiles of
// whole cache lines on either side, so that a transposition is not slower than it need be.
template <typename T>
void copy_matrix(
    const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t tile = 64 / sizeof(T);
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, columns));
  at::parallel_for(0, (rows + tile - 1) / tile, grain, [&](int64_t first, int64_t last) {
    for (int64_t r0 = first * tile; r0 < std::min(rows, last * tile); r0 += tile) {
      for (int64_t c0 = 0; c0 < columns; c0 += tile) {
        for (int64_t r = r0; r < std::min(rows, r0 + tile); ++r) {
          for (int64_t c = c0; c < std::min(columns, c0 + tile); ++c) {
            to[r * columns + c] = from[r * row_stride + c * column_stride];
          }
        }
      }
    }
  });
}

// One image [C, H, W] into buffer [pixels + 1, channels], whose last row is left alone.
template <typename T>
void to_channels_last(const Geometry& g, const Tensor& image, Tensor& buffer) {
  const Tensor flat = image.reshape({g.channels, g.pixels()});  // a view of the usual layouts
  copy_matrix(
      flat.const_data_ptr<T>(), flat.stride(1), flat.stride(0), g.pixels(), g.channels,
      buffer.mutable_data_ptr<T>());
}

Tensor image_buffer(const Geometry& g, const Tensor& input) {
  Tensor buffer = at::empty({g.pixels() + 1, g.channels}, input.options());
  buffer[g.pixels()].zero_();
  return buffer;
}

// [Cout, C, kh, kw] as the matrix [Cout, taps * C] that goes with the columns.
Tensor weight_matrix(const Geometry& g, const Tensor& weight) {
  return weight.permute({0, 2, 3, 1}).reshape({g.out_channels, g.columns()});
}

// The autocast of the caller is over: the dtype is decided, products in here must not change it.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

Tensor modulated_deform_conv2d(
    const Tensor& input, const Tensor& offset_, const Tensor& mask_, const Tensor& weight,
    const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t offset_groups) {
  const NoAutocast no_autocast;
  const Geometry g =
      geometry_of(input, offset_, mask_, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == g.out_channels),
      "modulated_deform_conv2d: bias must be [Cout]");
  const Tensor offset = offset_.contiguous(), mask = mask_.contiguous();
  const Tensor matrix = weight_matrix(g, weight);
  Tensor output =
      at::empty({g.images, g.out_channels, g.out_height, g.out_width}, input.options());
  Tensor image = image_buffer(g, input);
  Tensor columns = at::empty({g.chunk(), g.columns()}, input.options());
  const int64_t taps = g.groups * g.taps();

  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "modulated_deform_conv2d", [&] {
    using T = scalar_t;
    for (int64_t n = 0; n < g.images; ++n) {
      to_channels_last<T>(g, input[n], image);
      const T* pixel = image.const_data_ptr<T>();
      const T* offset_n = offset.const_data_ptr<T>() + n * 2 * taps * g.positions();
      const T* mask_n = mask.const_data_ptr<T>() + n * taps * g.positions();
      Tensor output_n = output[n].view({g.out_channels, g.positions()});
      for (int64_t start = 0; start < g.positions(); start += g.chunk()) {
        const int64_t count = std::min(g.chunk(), g.positions() - start);
        T* column = columns.mutable_data_ptr<T>();
        at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
          std::vector<Sample<T>> samples(taps);
          for (int64_t i = begin; i < end; ++i) {
            locate_all(g, offset_n, mask_n, start + i, samples.data());
            for (int64_t t = 0; t < taps; ++t) {
              const int64_t channel = t / g.taps() * g.group_channels;
              const T* corner[4];
              T w[4];
              corners_of(g, samples[t], pixel, channel, corner);
              samples[t].blend(w);
              for (T& value : w) value *= samples[t].mask;
              sample(
                  corner, w, g.group_channels,
                  column + i * g.columns() + t % g.taps() * g.channels + channel);
            }
          }
        });
        Tensor out = output_n.narrow(1, start, count);
        const Tensor used = columns.narrow(0, 0, count).t();
        if (bias) {
          at::addmm_out(out, bias->view({-1, 1}), matrix, used);
        } else {
          at::mm_out(out, matrix, used);
        }
      }
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad_, const Tensor& input, const Tensor& offset_, const Tensor& mask_,
    const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t offset_groups) {
  const NoAutocast no_autocast;
  const Geometry g =
      geometry_of(input, offset_, mask_, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      grad_.scalar_type() == input.scalar_type() &&
          grad_.sizes() == IntArrayRef({g.images, g.out_channels, g.out_height, g.out_width}),
      "modulated_deform_conv2d_backward: grad must have the output's shape and dtype");
  const Tensor grad = grad_.contiguous(), offset = offset_.contiguous(), mask = mask_.contiguous();
  const Tensor matrix = weight_matrix(g, weight);
  Tensor grad_input = at::empty(input.sizes(), input.options());
  Tensor grad_offset = at::empty(offset.sizes(), offset.options());
  Tensor grad_mask = at::empty(mask.sizes(), mask.options());
  Tensor grad_matrix = at::zeros({g.out_channels, g.columns()}, weight.options());
  Tensor image = image_buffer(g, input);
  Tensor grad_image = at::empty({g.pixels() + 1, g.channels}, input.options());
  Tensor columns = at::empty({g.chunk(), g.columns()}, input.options());
  Tensor grad_columns = at::empty({g.chunk(), g.columns()}, input.options());
  const int64_t taps = g.groups * g.taps();

  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "modulated_deform_conv2d_backward", [&] {
    using T = scalar_t;
    std::vector<Sample<T>> samples(g.chunk() * taps);
    for (int64_t n = 0; n < g.images; ++n) {
      to_channels_last<T>(g, input[n], image);
      grad_image.zero_();
      const T* pixel = image.const_data_ptr<T>();
      T* grad_pixel = grad_image.mutable_data_ptr<T>();
      const int64_t plane = g.positions();
      const T* offset_n = offset.const_data_ptr<T>() + n * 2 * taps * plane;
      const T* mask_n = mask.const_data_ptr<T>() + n * taps * plane;
      T* grad_offset_n = grad_offset.mutable_data_ptr<T>() + n * 2 * taps * plane;
      T* grad_mask_n = grad_mask.mutable_data_ptr<T>() + n * taps * plane;
      const Tensor grad_n = grad[n].view({g.out_channels, plane});
      for (int64_t start = 0; start < plane; start += g.chunk()) {
        const int64_t count = std::min(g.chunk(), plane - start);
        const Tensor grad_out = grad_n.narrow(1, start, count);
        Tensor grad_used = grad_columns.narrow(0, 0, count);
        at::mm_out(grad_used, grad_out.t(), matrix);
        T* column = columns.mutable_data_ptr<T>();
        const T* grad_column = grad_columns.const_data_ptr<T>();

        at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Sample<T>* s = samples.data() + i * taps;
            locate_all(g, offset_n, mask_n, start + i, s);
            for (int64_t t = 0; t < taps; ++t, ++s) {
              const int64_t channel = t / g.taps() * g.group_channels;
              const int64_t place = i * g.columns() + t % g.taps() * g.channels + channel;
              const T* corner[4];
              T w[4], d[4];
              corners_of(g, *s, pixel, channel, corner);
              dot(corner, grad_column + place, g.group_channels, d);
              s->blend(w);
              grad_mask_n[t * plane + start + i] =
                  w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
              grad_offset_n[2 * t * plane + start + i] =
                  s->mask * ((1 - s->x) * (d[2] - d[0]) + s->x * (d[3] - d[1]));
              grad_offset_n[(2 * t + 1) * plane + start + i] =
                  s->mask * ((1 - s->y) * (d[1] - d[0]) + s->y * (d[3] - d[2]));
              for (T& value : w) value *= s->mask;
              sample(corner, w, g.group_channels, column + place);
            }
          }
        });
        at::addmm_out(grad_matrix, grad_matrix, grad_out, columns.narrow(0, 0, count));

        // Samples of different positions may add to one pixel, those of different channels never:
        // each thread takes a slice of the channels, whole cache lines of it.
        constexpr int64_t line = 64 / sizeof(T);
        at::parallel_for(0, (g.channels + line - 1) / line, 1, [&](int64_t first, int64_t last) {
          const int64_t from = first * line, to = std::min(last * line, g.channels);
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t t = 0; t < taps; ++t) {
              const int64_t group = t / g.taps();
              const int64_t begin = std::max(from, group * g.group_channels);
              const int64_t n_channels = std::min(to, (group + 1) * g.group_channels) - begin;
              if (n_channels <= 0) continue;
              const Sample<T>& s = samples[i * taps + t];
              const T* source =
                  grad_column + i * g.columns() + t % g.taps() * g.channels + begin;
              T w[4];
              s.blend(w);
              for (int c = 0; c < 4; ++c) {
                scatter(
                    source, w[c] * s.mask, n_channels,
                    grad_pixel + s.pixel[c] * g.channels + begin);
              }
            }
          }
        });
      }
      copy_matrix(
          grad_pixel, 1, g.channels, g.channels, g.pixels(),
          grad_input.mutable_data_ptr<T>() + n * g.channels * g.pixels());
    }
  });
  Tensor grad_weight =
      grad_matrix.view({g.out_channels, g.kernel_h, g.kernel_w, g.channels})
          .permute({0, 3, 1, 2})
          .contiguous();
  return {grad_input, grad_offset, grad_mask, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("modulated_deform_conv2d", TORCH_FN(modulated_deform_conv2d));
  m.impl("modulated_deform_conv2d_backward", TORCH_FN(modulated_deform_conv2d_backward));
}
