// Modulated deformable convolution, forward and backward. Its plain version is torchvision's.
//
// The input is turned to channels-last once, so that a sample (one tap of one output position) is a
// blend of four contiguous runs of channels. Samples are taken for a block of output positions at a
// time into `columns` [positions, taps * channels], small enough to stay in cache until a matrix
// product with the weight consumes them.
//
// Threads share nothing while they work, not even the matrix products, so they wait for each other
// once or twice a call and not once a block: on a busy machine every such wait can cost
// milliseconds. The forward pass divides the output positions. The backward pass divides the
// channels (samples of different positions may add to one pixel of the input's gradient, those of
// different channels never).
//
// One more pixel of zeros follows the image. All corners outside the image point to it, so that
// nothing below needs to ask; in the gradient of the input it collects what is thrown away.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
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
};

// Positions of a block, for rows of so many columns: about a megabyte, but never so few rows that
// the matrix products become inefficient.
int64_t block_of(int64_t columns, int64_t positions) {
  const int64_t rows = (int64_t{1} << 18) / std::max<int64_t>(1, columns) / 16 * 16;
  return std::min(positions, std::clamp<int64_t>(rows, 64, 512));
}

// Copying fewer elements than this takes less time than waiting for another thread may.
constexpr int64_t kSmall = int64_t{1} << 18;

int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

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
      offset_groups >= 1 && input.size(1) > 0 && input.size(1) % offset_groups == 0, op,
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

// The samples of one group at one output position. `offset` and `mask` are those of an image's
// group.
template <typename T>
void locate_taps(
    const Geometry& g, const T* offset, const T* mask, int64_t position, Sample<T>* samples) {
  const int64_t plane = g.positions();
  const T y0 = static_cast<T>(position / g.out_width * g.stride_h - g.pad_h);
  const T x0 = static_cast<T>(position % g.out_width * g.stride_w - g.pad_w);
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
      const int64_t tap = ky * g.kernel_w + kx;
      const T dy = offset[2 * tap * plane + position];
      const T dx = offset[(2 * tap + 1) * plane + position];
      samples[tap] = locate(
          g, y0 + static_cast<T>(ky * g.dilation_h) + dy,
          x0 + static_cast<T>(kx * g.dilation_w) + dx, mask[tap * plane + position]);
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

// `image` holds so many channels a pixel.
template <typename T>
NASFCOS_INLINE void corners_of(
    const Sample<T>& s, const T* image, int64_t channels, const T** corner) {
  for (int i = 0; i < 4; ++i) corner[i] = image + s.pixel[i] * channels;
}

// to[row, column] = from[row * row_stride + column * column_stride], `to` being contiguous. By
// tiles of whole cache lines on either side, so that a transposition is not slower than it need be.
template <typename T>
void copy_matrix(
    const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
    T* to) {
  constexpr int64_t tile = 64 / sizeof(T);
  for (int64_t r0 = 0; r0 < rows; r0 += tile) {
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      for (int64_t r = r0; r < std::min(rows, r0 + tile); ++r) {
        for (int64_t c = c0; c < std::min(columns, c0 + tile); ++c) {
          to[r * columns + c] = from[r * row_stride + c * column_stride];
        }
      }
    }
  }
}

// [N, C, H, W] as [N, C, pixels]; a view for the usual memory formats.
Tensor flatten_pixels(const Geometry& g, const Tensor& input) {
  return input.reshape({g.images, g.channels, g.pixels()});
}

// A run of input channels, all of one offset group in the backward pass.
struct Slice {
  int64_t first, count;
};

// The weight [Cout, C, kh, kw] of a slice as the matrix [Cout, taps * channels] that goes with its
// columns.
template <typename T>
Tensor weight_matrix(const Geometry& g, const Tensor& weight, Slice slice) {
  const int64_t taps = g.taps();
  Tensor matrix = at::empty({g.out_channels, taps * slice.count}, weight.options());
  const T* from = weight.const_data_ptr<T>();
  T* to = matrix.mutable_data_ptr<T>();
  for (int64_t o = 0; o < g.out_channels; ++o) {
    copy_matrix(
        from + (o * g.channels + slice.first) * taps, 1, taps, taps, slice.count,
        to + o * taps * slice.count);
  }
  return matrix;
}

// For code that calls tensor operators from the threads of a parallel region, which know nothing of
// the caller's dispatch state: no autograd, and no autocast, whose dtype is decided by now.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

template <typename T>
void forward(
    const Geometry& g, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const Tensor& weight, const Tensor& bias, Tensor& output) {
  const Tensor flat = flatten_pixels(g, input);
  const Tensor matrix = weight_matrix<T>(g, weight, {0, g.channels});
  const T* flat_data = flat.const_data_ptr<T>();
  const T* offset_data = offset.const_data_ptr<T>();
  const T* mask_data = mask.const_data_ptr<T>();
  const int64_t taps = g.taps(), plane = g.positions(), columns = taps * g.channels;

  // As many images at once as keep all threads busy on small maps without much memory on large
  // ones.
  const int64_t image_size = (g.pixels() + 1) * g.channels;
  const int64_t together =
      std::clamp<int64_t>((int64_t{1} << 22) / image_size, 1, std::max<int64_t>(1, g.images));
  Tensor buffer = at::empty({together, g.pixels() + 1, g.channels}, input.options());
  T* images = buffer.mutable_data_ptr<T>();

  for (int64_t n0 = 0; n0 < g.images; n0 += together) {
    const int64_t count = std::min(together, g.images - n0);
    const int64_t strips = (g.pixels() + 63) / 64;
    const int64_t grain = kSmall / (64 * g.channels) + 1;
    at::parallel_for(0, count * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / strips, first = i % strips * 64;
        T* image = images + n * image_size;
        copy_matrix(
            flat_data + (n0 + n) * flat.stride(0) + first * flat.stride(2), flat.stride(2),
            flat.stride(1), std::min<int64_t>(64, g.pixels() - first), g.channels,
            image + first * g.channels);
        if (first == 0) {
          std::fill(image + g.pixels() * g.channels, image + image_size, T(0));
        }
      }
    });

    const int64_t even = (count * plane + available_threads() - 1) / available_threads();
    const int64_t block = std::min(block_of(columns, plane), std::max<int64_t>(16, even));
    const int64_t blocks = (plane + block - 1) / block;
    at::parallel_for(0, count * blocks, 1, [&](int64_t begin, int64_t end) {
      const PlainDispatch dispatch;
      Tensor column_block = at::empty({block, columns}, input.options());
      T* column = column_block.mutable_data_ptr<T>();
      std::vector<Sample<T>> samples(taps);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / blocks, start = task % blocks * block;
        const int64_t positions = std::min(block, plane - start);
        const T* image = images + n * image_size;
        for (int64_t i = 0; i < positions; ++i) {
          for (int64_t group = 0; group < g.groups; ++group) {
            const int64_t plane0 = ((n0 + n) * g.groups + group) * taps * plane;
            const int64_t channel = group * g.group_channels;
            locate_taps(
                g, offset_data + 2 * plane0, mask_data + plane0, start + i, samples.data());
            for (int64_t t = 0; t < taps; ++t) {
              const T* corner[4];
              T w[4];
              corners_of(samples[t], image + channel, g.channels, corner);
              samples[t].blend(w);
              for (T& value : w) value *= samples[t].mask;
              sample(
                  corner, w, g.group_channels,
                  column + i * columns + t * g.channels + channel);
            }
          }
        }
        Tensor out =
            output[n0 + n].view({g.out_channels, plane}).narrow(1, start, positions);
        const Tensor used = column_block.narrow(0, 0, positions).t();
        if (bias.defined()) {
          at::addmm_out(out, bias.view({-1, 1}), matrix, used);
        } else {
          at::mm_out(out, matrix, used);
        }
      }
    });
  }
}

Tensor modulated_deform_conv2d(
    const Tensor& input, const Tensor& offset, const Tensor& mask, const Tensor& weight,
    const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t offset_groups) {
  const PlainDispatch dispatch;
  const Geometry g =
      geometry_of(input, offset, mask, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == g.out_channels &&
                bias->scalar_type() == input.scalar_type()),
      "modulated_deform_conv2d: bias must be [Cout], of the input's dtype");
  Tensor output =
      at::empty({g.images, g.out_channels, g.out_height, g.out_width}, input.options());
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "modulated_deform_conv2d", [&] {
    forward<scalar_t>(
        g, input, offset.contiguous(), mask.contiguous(), weight.contiguous(),
        bias ? bias->contiguous() : Tensor(), output);
  });
  return output;
}

// How many slices to make of each offset group's channels, so that images * groups * slices units
// of work occupy the threads evenly. A slice is not narrower than a cache line.
template <typename T>
int64_t slices_per_group(const Geometry& g) {
  constexpr int64_t narrowest = 64 / sizeof(T);
  const int64_t threads = available_threads();
  const int64_t most = std::max<int64_t>(1, g.group_channels / narrowest);
  int64_t best = 1;
  double best_use = 0;
  for (int64_t slices = 1; slices <= most; ++slices) {
    const int64_t units = std::max<int64_t>(1, g.images * g.groups * slices);
    const double use =
        static_cast<double>(units) / static_cast<double>((units + threads - 1) / threads * threads);
    if (use > best_use + 0.05) {
      best = slices;
      best_use = use;
    }
  }
  return best;
}

// The backward pass of one image and slice.
template <typename T>
class BackwardUnit {
 public:
  // Of the image's group: offset, mask and where their gradients go. Of the image: grad [Cout,
  // positions]. Of the image's slice, by channel and pixel: input and grad_input.
  struct Arguments {
    const T *offset, *mask;
    T *grad_offset, *grad_mask;
    Tensor grad;
    const T* input;
    int64_t channel_stride, pixel_stride;
    T* grad_input;
  };

  BackwardUnit(const Geometry& g, Slice slice, const at::TensorOptions& options)
      : g_(g),
        channels_(slice.count),
        width_(g.taps() * slice.count),
        block_(block_of(width_, g.positions())),
        image_(at::empty({g.pixels() + 1, channels_}, options)),
        grad_image_(at::empty({g.pixels() + 1, channels_}, options)),
        columns_(at::empty({block_, width_}, options)),
        grad_columns_(at::empty({block_, width_}, options)),
        samples_(g.taps()) {
    image_[g.pixels()].zero_();
  }

  // Adds to grad_matrix, which is shaped like matrix.
  void run(const Arguments& a, const Tensor& matrix, Tensor& grad_matrix) {
    copy_matrix(
        a.input, a.pixel_stride, a.channel_stride, g_.pixels(), channels_,
        image_.mutable_data_ptr<T>());
    grad_image_.zero_();
    for (int64_t start = 0; start < g_.positions(); start += block_) {
      const int64_t count = std::min(block_, g_.positions() - start);
      const Tensor grad = a.grad.narrow(1, start, count);
      Tensor grad_columns = grad_columns_.narrow(0, 0, count);
      at::mm_out(grad_columns, grad.t(), matrix);
      for (int64_t i = 0; i < count; ++i) position(a, start + i, i * width_);
      at::addmm_out(grad_matrix, grad_matrix, grad, columns_.narrow(0, 0, count));
    }
    copy_matrix(
        grad_image_.const_data_ptr<T>(), 1, channels_, channels_, g_.pixels(), a.grad_input);
  }

 private:
  void position(const Arguments& a, int64_t position, int64_t place) {
    const int64_t plane = g_.positions();
    const T* image = image_.const_data_ptr<T>();
    T* grad_image = grad_image_.mutable_data_ptr<T>();
    const T* grad_column = grad_columns_.const_data_ptr<T>() + place;
    T* column = columns_.mutable_data_ptr<T>() + place;
    locate_taps(g_, a.offset, a.mask, position, samples_.data());
    for (int64_t t = 0; t < g_.taps(); ++t, grad_column += channels_, column += channels_) {
      const Sample<T>& s = samples_[t];
      const T* corner[4];
      T w[4], d[4];
      corners_of(s, image, channels_, corner);
      dot(corner, grad_column, channels_, d);
      s.blend(w);
      a.grad_mask[t * plane + position] = w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
      a.grad_offset[2 * t * plane + position] =
          s.mask * ((1 - s.x) * (d[2] - d[0]) + s.x * (d[3] - d[1]));
      a.grad_offset[(2 * t + 1) * plane + position] =
          s.mask * ((1 - s.y) * (d[1] - d[0]) + s.y * (d[3] - d[2]));
      for (T& value : w) value *= s.mask;
      sample(corner, w, channels_, column);
      for (int c = 0; c < 4; ++c) {
        scatter(grad_column, w[c], channels_, grad_image + s.pixel[c] * channels_);
      }
    }
  }

  const Geometry& g_;
  int64_t channels_, width_, block_;
  Tensor image_, grad_image_, columns_, grad_columns_;
  std::vector<Sample<T>> samples_;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Geometry& g, const Tensor& grad, const Tensor& input, const Tensor& offset,
    const Tensor& mask, const Tensor& weight) {
  const int64_t taps = g.taps(), plane = g.positions();
  const int64_t per_group = slices_per_group<T>(g), slices = g.groups * per_group;
  std::vector<Slice> slice(slices);
  std::vector<Tensor> matrix(slices);
  for (int64_t k = 0; k < slices; ++k) {
    const int64_t group = k / per_group, part = k % per_group;
    const int64_t first = g.group_channels * part / per_group;
    slice[k] = {
        group * g.group_channels + first, g.group_channels * (part + 1) / per_group - first};
    matrix[k] = weight_matrix<T>(g, weight, slice[k]);
  }

  const Tensor flat = flatten_pixels(g, input);
  const Tensor flat_grad = grad.view({g.images, g.out_channels, plane});
  Tensor grad_input = at::empty(input.sizes(), input.options());
  // Each slice of a group has its share of the group's gradients of offset and mask.
  const int64_t n_taps = g.groups * taps;
  Tensor grad_offset =
      at::empty({per_group, g.images, 2 * n_taps, g.out_height, g.out_width}, offset.options());
  Tensor grad_mask =
      at::empty({per_group, g.images, n_taps, g.out_height, g.out_width}, mask.options());
  const T* flat_data = flat.const_data_ptr<T>();
  const T* offset_data = offset.const_data_ptr<T>();
  const T* mask_data = mask.const_data_ptr<T>();
  T* grad_input_data = grad_input.mutable_data_ptr<T>();
  T* grad_offset_data = grad_offset.mutable_data_ptr<T>();
  T* grad_mask_data = grad_mask.mutable_data_ptr<T>();

  // Units are ordered by slice, then image. A thread's run of them gives one gradient of the weight
  // for each slice it meets, kept at the run's first unit of that slice.
  const int64_t units = slices * g.images;
  std::vector<Tensor> grad_matrix(units);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch dispatch;
    for (int64_t unit = begin; unit < end;) {
      const int64_t k = unit / g.images, group = k / per_group, part = k % per_group;
      Tensor& sum = grad_matrix[unit];
      sum = at::zeros(matrix[k].sizes(), weight.options());
      BackwardUnit<T> work(g, slice[k], input.options());
      for (; unit < end && unit / g.images == k; ++unit) {
        const int64_t n = unit % g.images;
        const int64_t from = (n * g.groups + group) * taps * plane;
        const int64_t to = part * g.images * n_taps * plane + from;
        work.run(
            {offset_data + 2 * from, mask_data + from, grad_offset_data + 2 * to,
             grad_mask_data + to, flat_grad[n],
             flat_data + n * flat.stride(0) + slice[k].first * flat.stride(1), flat.stride(1),
             flat.stride(2), grad_input_data + (n * g.channels + slice[k].first) * g.pixels()},
            matrix[k], sum);
      }
    }
  });

  Tensor grad_weight = at::zeros(weight.sizes(), weight.options());
  T* grad_weight_data = grad_weight.mutable_data_ptr<T>();
  int64_t row_work = 1;
  for (int64_t unit = 0; unit < units; ++unit) {
    if (grad_matrix[unit].defined()) row_work += grad_matrix[unit].size(1);
  }
  at::parallel_for(0, g.out_channels, 4 * kSmall / row_work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = 0; unit < units; ++unit) {
      if (!grad_matrix[unit].defined()) continue;
      const Slice& s = slice[unit / g.images];
      const T* sum = grad_matrix[unit].const_data_ptr<T>();
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t c = 0; c < s.count; ++c) {
          for (int64_t t = 0; t < taps; ++t) {
            grad_weight_data[(o * g.channels + s.first + c) * taps + t] +=
                sum[(o * taps + t) * s.count + c];
          }
        }
      }
    }
  });
  return {
      grad_input, per_group == 1 ? grad_offset[0] : grad_offset.sum(0),
      per_group == 1 ? grad_mask[0] : grad_mask.sum(0), grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t offset_groups) {
  const PlainDispatch dispatch;
  const Geometry g =
      geometry_of(input, offset, mask, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      grad.scalar_type() == input.scalar_type() &&
          grad.sizes() == IntArrayRef({g.images, g.out_channels, g.out_height, g.out_width}),
      "modulated_deform_conv2d_backward: grad must have the output's shape and dtype");
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads;
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "modulated_deform_conv2d_backward", [&] {
    grads = backward<scalar_t>(
        g, grad.contiguous(), input, offset.contiguous(), mask.contiguous(), weight.contiguous());
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("modulated_deform_conv2d", TORCH_FN(modulated_deform_conv2d));
  m.impl("modulated_deform_conv2d_backward", TORCH_FN(modulated_deform_conv2d_backward));
}
