// Modulated deformable convolution, forward and backward.
//
// The input is read channels-last (an input of another format is converted once), so that a sample
// (one tap at one output position) is a blend of four contiguous runs of channels. Samples are
// taken for a block of output positions at a time into `columns` [positions, taps * channels],
// small enough to stay in cache until a matrix product with the weight consumes them. The output
// and the gradients have the memory format of the tensors that they belong to.
//
// The forward pass also takes bfloat16: samples are then blended in float32, and stored and
// multiplied as bfloat16. Offsets and masks are float32, because pixel positions need the
// precision.
//
// Threads share nothing while they work, not even the matrix products, so they synchronise once or
// twice per call instead of once per block: on a busy machine every synchronisation can cost
// milliseconds. The forward pass divides the output positions. The backward pass divides the
// channels: samples of different positions may add to the same pixel of the input's gradient,
// samples of different channels never do.
//
// Corners outside the image have the index of an extra pixel after the last one, so the loops need
// no conditions. It reads as zeros, and in the gradient of the input it collects what is discarded.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../deform_conv.h"
#include "../dispatch.h"
#include "../macros.h"
#include "../memory_format.h"
#include "parts.h"
#include "values.h"

namespace nasfcos {
namespace {

using at::IntArrayRef;
using at::Tensor;

// The number of positions per block, for so many columns: about a megabyte, but not so few that the
// matrix products become inefficient.
int64_t block_of(int64_t columns, int64_t positions) {
  const int64_t rows = (int64_t{1} << 18) / std::max<int64_t>(1, columns) / 16 * 16;
  return std::min(positions, std::clamp<int64_t>(rows, 64, 512));
}

// Copying fewer elements than this can take less time than synchronising with another thread.
constexpr int64_t kSmall = int64_t{1} << 18;

// Locates the samples of one group at one output position; `offset` and `mask` start at that group.
template <typename T>
NASFCOS_INLINE void locate_taps(
    const Geometry& g, MapView<const T> offset, MapView<const T> mask, int64_t position,
    Sample<T>* samples) {
  const T y0 = static_cast<T>(position / g.out_width * g.stride_h - g.pad_h);
  const T x0 = static_cast<T>(position % g.out_width * g.stride_w - g.pad_w);
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
      const int64_t tap = ky * g.kernel_w + kx;
      samples[tap] = locate(
          g, y0 + static_cast<T>(ky * g.dilation_h) + offset(2 * tap, position),
          x0 + static_cast<T>(kx * g.dilation_w) + offset(2 * tap + 1, position),
          mask(tap, position));
    }
  }
}

// out = sum of w[i] * corner[i], for n channels.
template <typename T>
NASFCOS_INLINE void sample(const T* const* corner, const T* w, int64_t n, T* out) {
  const T *a = corner[0], *b = corner[1], *c = corner[2], *d = corner[3];
  const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i];
}

// The same with bfloat16 in memory.
NASFCOS_INLINE void sample(
    const at::BFloat16* const* corner, const float* w, int64_t n, at::BFloat16* out) {
  const uint16_t* bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = reinterpret_cast<const uint16_t*>(corner[i]);
  const uint16_t *a = bits[0], *b = bits[1], *c = bits[2], *d = bits[3];
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = narrow(w0 * widen(a[i]) + w1 * widen(b[i]) + w2 * widen(c[i]) + w3 * widen(d[i]));
  }
}

// dots[i] = <grad, corner[i]>
template <typename T>
NASFCOS_INLINE void dot(const T* const* corner, const T* grad, int64_t n, T* dots) {
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
NASFCOS_INLINE void scatter(const T* grad, T w, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += w * grad[i];
}

// What the forward pass samples from, for one image.
template <typename T>
struct Samples {
  const Geometry& g;
  MapView<const at::opmath_type<T>> offset, mask;  // of the image
  const T* image;
  int64_t pixel_stride;
  const T* zeros;  // as many as a group has channels
  Sample<at::opmath_type<T>>* buffer;  // taps
};

// Fills the columns of some output positions, [count, taps * channels].
template <typename T>
NASFCOS_INLINE void sample_positions_loop(
    const Samples<T>& from, int64_t start, int64_t count, T* column) {
  using Acc = at::opmath_type<T>;
  const Geometry& g = from.g;
  const int64_t taps = g.taps(), columns = taps * g.channels, outside = g.pixels();
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t channel = group * g.group_channels;
      locate_taps(
          g, from.offset.at(0, 2 * group * taps), from.mask.at(0, group * taps), start + i,
          from.buffer);
      for (int64_t t = 0; t < taps; ++t) {
        const Sample<Acc>& s = from.buffer[t];
        const T* corner[4];
        Acc w[4];
        for (int c = 0; c < 4; ++c) {
          corner[c] = s.pixel[c] == outside
                          ? from.zeros
                          : from.image + s.pixel[c] * from.pixel_stride + channel;
        }
        s.blend(w);
        for (Acc& value : w) value *= s.mask;
        sample(corner, w, g.group_channels, column + i * columns + t * g.channels + channel);
      }
    }
  }
}

NASFCOS_CLONES void sample_positions(
    const Samples<float>& from, int64_t start, int64_t count, float* column) {
  sample_positions_loop(from, start, count, column);
}
NASFCOS_CLONES void sample_positions(
    const Samples<at::BFloat16>& from, int64_t start, int64_t count, at::BFloat16* column) {
  sample_positions_loop(from, start, count, column);
}
void sample_positions(
    const Samples<double>& from, int64_t start, int64_t count, double* column) {
  sample_positions_loop(from, start, count, column);
}

// What the backward pass samples from and adds to: a slice of the channels of one image and group.
template <typename T>
struct Gradients {
  const Geometry& g;
  int64_t channels;
  MapView<const T> offset, mask;  // of the image's group
  MapView<T> grad_offset, grad_mask;
  const T* image;  // [pixels + 1, channels], the last of zeros
  T* grad_image;
  Sample<T>* buffer;  // taps
};

// Fills the columns of some output positions, [count, taps * channels], and computes the gradients
// of everything that was sampled from the gradients of the columns.
template <typename T>
NASFCOS_INLINE void differentiate_positions_loop(
    const Gradients<T>& to, int64_t start, int64_t count, const T* grad_column, T* column) {
  const int64_t n = to.channels, taps = to.g.taps();
  for (int64_t position = start; position < start + count; ++position) {
    locate_taps(to.g, to.offset, to.mask, position, to.buffer);
    for (int64_t t = 0; t < taps; ++t, grad_column += n, column += n) {
      const Sample<T>& s = to.buffer[t];
      const T* corner[4];
      T w[4], d[4];
      for (int c = 0; c < 4; ++c) corner[c] = to.image + s.pixel[c] * n;
      dot(corner, grad_column, n, d);
      s.blend(w);
      to.grad_mask(t, position) = w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
      to.grad_offset(2 * t, position) =
          s.mask * ((1 - s.x) * (d[2] - d[0]) + s.x * (d[3] - d[1]));
      to.grad_offset(2 * t + 1, position) =
          s.mask * ((1 - s.y) * (d[1] - d[0]) + s.y * (d[3] - d[2]));
      for (T& value : w) value *= s.mask;
      sample(corner, w, n, column);
      for (int c = 0; c < 4; ++c) {
        scatter(grad_column, w[c], n, to.grad_image + s.pixel[c] * n);
      }
    }
  }
}

NASFCOS_CLONES void differentiate_positions(
    const Gradients<float>& to, int64_t start, int64_t count, const float* grad_column,
    float* column) {
  differentiate_positions_loop(to, start, count, grad_column, column);
}
void differentiate_positions(
    const Gradients<double>& to, int64_t start, int64_t count, const double* grad_column,
    double* column) {
  differentiate_positions_loop(to, start, count, grad_column, column);
}

// to[row * to_stride + column] = from[row * row_stride + column * column_stride], in square tiles
// with sides of one cache line, which makes transpositions fast.
template <typename T>
void copy_matrix(
    const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* to,
    int64_t to_stride) {
  constexpr int64_t tile = 64 / sizeof(T);
  for (int64_t r0 = 0; r0 < rows; r0 += tile) {
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      for (int64_t r = r0; r < std::min(rows, r0 + tile); ++r) {
        for (int64_t c = c0; c < std::min(columns, c0 + tile); ++c) {
          to[r * to_stride + c] = from[r * row_stride + c * column_stride];
        }
      }
    }
  }
}

// A run of input channels; in the backward pass all of one offset group.
struct Slice {
  int64_t first, count;
};

// The weight [Cout, C, kh, kw] of a slice of the channels as the matrix [Cout, taps * channels]
// that matches its columns. A whole channels-last weight has this layout already.
template <typename T>
Tensor weight_matrix(const Geometry& g, const Tensor& given, Slice slice) {
  const int64_t taps = g.taps();
  if (slice.count == g.channels && given.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return given.permute({0, 2, 3, 1}).view({g.out_channels, taps * g.channels});
  }
  const Tensor weight = given.contiguous();
  Tensor matrix = at::empty({g.out_channels, taps * slice.count}, weight.options());
  const T* from = weight.const_data_ptr<T>();
  T* to = matrix.mutable_data_ptr<T>();
  for (int64_t o = 0; o < g.out_channels; ++o) {
    copy_matrix(
        from + (o * g.channels + slice.first) * taps, 1, taps, taps, slice.count,
        to + o * taps * slice.count, slice.count);
  }
  return matrix;
}

// The images of a batch, channels-last: in place if possible, else converted, some at a time.
template <typename T>
class ChannelsLast {
 public:
  ChannelsLast(const Geometry& g, const Tensor& flat) : g_(g), maps_(view_of<T>(flat)) {
    in_place_ = maps_.channel == 1 || g.channels == 1;
    // Enough images to keep all threads busy on small maps, without much memory on large ones.
    const int64_t size = std::max<int64_t>(1, g.pixels() * g.channels);
    together = std::max<int64_t>(1, g.images);
    if (!in_place_) together = std::clamp<int64_t>((1 << 22) / size, 1, together);
    if (!in_place_) buffer_ = at::empty({together, g.pixels(), g.channels}, flat.options());
  }

  // The number of images that are available at a time.
  int64_t together;

  // Makes `together` images from `first` on available.
  void prepare(int64_t first) {
    first_ = first;
    if (in_place_) return;
    T* buffer = buffer_.mutable_data_ptr<T>();
    const int64_t count = std::min(together, g_.images - first);
    const int64_t strips = (g_.pixels() + 63) / 64;
    const int64_t grain = kSmall / (64 * g_.channels) + 1;
    at::parallel_for(0, count * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / strips, pixel = i % strips * 64;
        copy_matrix(
            maps_.data + (first + n) * maps_.image + pixel * maps_.position, maps_.position,
            maps_.channel, std::min<int64_t>(64, g_.pixels() - pixel), g_.channels,
            buffer + (n * g_.pixels() + pixel) * g_.channels, g_.channels);
      }
    });
  }

  const T* image(int64_t n) const {
    if (in_place_) return maps_.data + n * maps_.image;
    return buffer_.const_data_ptr<T>() + (n - first_) * g_.pixels() * g_.channels;
  }
  int64_t pixel_stride() const { return in_place_ ? maps_.position : g_.channels; }

 private:
  const Geometry& g_;
  MapView<const T> maps_;
  bool in_place_;
  Tensor buffer_;
  int64_t first_ = 0;
};

template <typename T>
void forward(
    const Geometry& g, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const Tensor& weight, const Tensor& bias, Tensor& output) {
  using Acc = at::opmath_type<T>;
  const int64_t taps = g.taps(), plane = g.positions(), columns = taps * g.channels;
  const Tensor matrix = weight_matrix<T>(g, weight, {0, g.channels});
  const Tensor flat = flatten_pixels(input), flat_offset = flatten_pixels(offset),
               flat_mask = flatten_pixels(mask);
  const auto offsets = view_of<Acc>(flat_offset), masks = view_of<Acc>(flat_mask);
  const Tensor flat_output = output.view({g.images, g.out_channels, plane});
  const bool rows_of_channels = flat_output.stride(1) == 1;
  const std::vector<T> zeros(g.group_channels, T(0));
  ChannelsLast<T> images(g, flat);

  for (int64_t n0 = 0; n0 < g.images; n0 += images.together) {
    images.prepare(n0);
    const int64_t count = std::min(images.together, g.images - n0);
    const int64_t even = (count * plane + available_threads() - 1) / available_threads();
    const int64_t block = std::min(block_of(columns, plane), std::max<int64_t>(16, even));
    const int64_t blocks = (plane + block - 1) / block;
    at::parallel_for(0, count * blocks, 1, [&](int64_t begin, int64_t end) {
      const PlainDispatch dispatch;
      Tensor column_block = at::empty({block, columns}, input.options());
      T* column = column_block.mutable_data_ptr<T>();
      std::vector<Sample<Acc>> samples(taps);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = n0 + task / blocks, start = task % blocks * block;
        const int64_t positions = std::min(block, plane - start);
        sample_positions(
            Samples<T>{
                g, offsets.at(n, 0), masks.at(n, 0), images.image(n), images.pixel_stride(),
                zeros.data(), samples.data()},
            start, positions, column);
        const Tensor used = column_block.narrow(0, 0, positions);
        Tensor out = flat_output[n].narrow(1, start, positions);
        if (rows_of_channels) {
          out = out.t();
          if (bias.defined()) {
            at::addmm_out(out, bias, used, matrix.t());
          } else {
            at::mm_out(out, used, matrix.t());
          }
        } else if (bias.defined()) {
          at::addmm_out(out, bias.view({-1, 1}), matrix, used.t());
        } else {
          at::mm_out(out, matrix, used.t());
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
  Tensor output = at::empty(
      {g.images, g.out_channels, g.out_height, g.out_width},
      input.options().memory_format(format_of(input)));
  AT_DISPATCH_FLOATING_TYPES_AND(
      at::kBFloat16, input.scalar_type(), "modulated_deform_conv2d", [&] {
        forward<scalar_t>(
            g, input, offset, mask, weight, bias ? bias->contiguous() : Tensor(),
            output);
      });
  return output;
}

// The number of slices into which to divide the channels of each offset group, so that the units of
// work (images * groups * slices) occupy the threads evenly. No slice is narrower than a cache
// line.
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
  // offset, mask and their gradients are those of the image's group, grad [Cout, positions] that of
  // the image, input and grad_input those of the image's slice.
  struct Arguments {
    MapView<const T> offset, mask;
    MapView<T> grad_offset, grad_mask;
    Tensor grad;
    MapView<const T> input;
    MapView<T> grad_input;
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

  // Adds to grad_matrix, which has the shape of matrix.
  void run(const Arguments& a, const Tensor& matrix, Tensor& grad_matrix) {
    copy_matrix(
        a.input.data, a.input.position, a.input.channel, g_.pixels(), channels_,
        image_.mutable_data_ptr<T>(), channels_);
    grad_image_.zero_();
    const Gradients<T> to{
        g_, channels_, a.offset, a.mask, a.grad_offset, a.grad_mask, image_.const_data_ptr<T>(),
        grad_image_.mutable_data_ptr<T>(), samples_.data()};
    for (int64_t start = 0; start < g_.positions(); start += block_) {
      const int64_t count = std::min(block_, g_.positions() - start);
      const Tensor grad = a.grad.narrow(1, start, count);
      Tensor grad_columns = grad_columns_.narrow(0, 0, count);
      at::mm_out(grad_columns, grad.t(), matrix);
      differentiate_positions(
          to, start, count, grad_columns.const_data_ptr<T>(), columns_.mutable_data_ptr<T>());
      at::addmm_out(grad_matrix, grad_matrix, grad, columns_.narrow(0, 0, count));
    }
    const T* grad_image = grad_image_.const_data_ptr<T>();
    const MapView<T>& maps = a.grad_input;
    if (maps.channel == 1) {
      copy_matrix(grad_image, channels_, 1, g_.pixels(), channels_, maps.data, maps.position);
    } else {
      copy_matrix(grad_image, 1, channels_, channels_, g_.pixels(), maps.data, maps.channel);
    }
  }

 private:
  const Geometry& g_;
  int64_t channels_, width_, block_;
  Tensor image_, grad_image_, columns_, grad_columns_;
  std::vector<Sample<T>> samples_;
};

// The gradient of the weight, from matrices [Cout, taps * channels]: grad_matrix[unit], if defined,
// is a summand for the channels of slice[unit / images].
template <typename T>
Tensor sum_weight_gradients(
    const Geometry& g, const std::vector<Slice>& slice, const std::vector<Tensor>& grad_matrix,
    const Tensor& weight) {
  const int64_t taps = g.taps(), units = static_cast<int64_t>(grad_matrix.size());
  Tensor grad_weight = empty_as(weight).zero_();
  T* to = grad_weight.mutable_data_ptr<T>();
  const bool last = format_of(weight) == at::MemoryFormat::ChannelsLast;
  const int64_t per_channel = last ? 1 : taps, per_tap = last ? g.channels : 1;
  int64_t row_work = 1;
  for (const Tensor& matrix : grad_matrix) {
    if (matrix.defined()) row_work += matrix.size(1);
  }
  at::parallel_for(0, g.out_channels, 4 * kSmall / row_work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = 0; unit < units; ++unit) {
      if (!grad_matrix[unit].defined()) continue;
      const Slice& s = slice[unit / g.images];
      const T* from = grad_matrix[unit].const_data_ptr<T>();
      for (int64_t o = begin; o < end; ++o) {
        T* row = to + o * g.channels * taps;
        for (int64_t c = 0; c < s.count; ++c) {
          for (int64_t t = 0; t < taps; ++t) {
            row[(s.first + c) * per_channel + t * per_tap] += from[(o * taps + t) * s.count + c];
          }
        }
      }
    }
  });
  return grad_weight;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Geometry& g, const Tensor& grad, const Tensor& input, const Tensor& offset,
    const Tensor& mask, const Tensor& weight) {
  const int64_t taps = g.taps();
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

  const Tensor flat = flatten_pixels(input), flat_grad = flatten_pixels(grad),
               flat_offset = flatten_pixels(offset), flat_mask = flatten_pixels(mask);
  const auto inputs = view_of<T>(flat), offsets = view_of<T>(flat_offset),
             masks = view_of<T>(flat_mask);
  Tensor grad_input = empty_as(input);
  const auto grad_inputs = mutable_view_of<T>(grad_input);
  // Each slice of a group computes a summand of the group's gradients of offset and mask.
  std::vector<Tensor> grad_offset(per_group), grad_mask(per_group);
  for (Tensor& summand : grad_offset) summand = empty_as(offset);
  for (Tensor& summand : grad_mask) summand = empty_as(mask);

  // Units are ordered by slice, then image. Each thread gets a run of units and computes one
  // summand of the weight's gradient per slice, kept at the run's first unit of that slice.
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
        const auto part_offset = mutable_view_of<T>(grad_offset[part]);
        const auto part_mask = mutable_view_of<T>(grad_mask[part]);
        work.run(
            {offsets.at(n, 2 * group * taps), masks.at(n, group * taps),
             part_offset.at(n, 2 * group * taps), part_mask.at(n, group * taps), flat_grad[n],
             inputs.at(n, slice[k].first), grad_inputs.at(n, slice[k].first)},
            matrix[k], sum);
      }
    }
  });

  Tensor grad_weight = sum_weight_gradients<T>(g, slice, grad_matrix, weight);
  for (int64_t part = 1; part < per_group; ++part) {
    grad_offset[0].add_(grad_offset[part]);
    grad_mask[0].add_(grad_mask[part]);
  }
  return {grad_input, grad_offset[0], grad_mask[0], grad_weight};
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
    grads = backward<scalar_t>(g, grad, input, offset, mask, weight);
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("modulated_deform_conv2d", TORCH_FN(modulated_deform_conv2d));
  m.impl("modulated_deform_conv2d_backward", TORCH_FN(modulated_deform_conv2d_backward));
}

}  // namespace nasfcos
