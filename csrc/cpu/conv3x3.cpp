// 3x3 convolution of stride 1 that preserves the size of the maps, and its gradients, by Winograd's
// minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
// 2016): a tile of 4x4 outputs, computed from 6x6 inputs, takes 36 instead of 144 multiplications
// per pair of channels.
//
// Maps are read and written channels-last (maps of other formats are converted, and the result
// back), so that a vector holds adjacent channels of one pixel. The multiplications are one matrix
// product per point, for as many tiles at a time as stay in cache. Threads divide the tiles, the
// output channels or both (see Division), and write to separate memory.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "../macros.h"
#include "../memory_format.h"
#include "parts.h"
#include "product.h"
#include "vectors.h"
#include "winograd.h"

namespace nasfcos {
namespace {

using at::Tensor;

// The arguments of a transform: for each position of a tile, a pointer to its channels.
template <typename T>
struct Transformation {
  const T* const* from;
  T* const* to;  // null where the result is not needed
  int64_t channels;
  const T* bias = nullptr;
  bool relu = false;
  bool add = false;  // add to `to` instead of overwriting it
};

template <typename Transform, typename V, typename T>
NASFCOS_INLINE void transform_channels(const Transformation<T>& a, int64_t c) {
  constexpr int from = Transform::from * Transform::from, to = Transform::to * Transform::to;
  V tile[from], result[to], other;
  for (int i = 0; i < from; ++i) load(a.from[i] + c, tile[i]);
  transform<Transform, T, V>(tile, result);
  for (int i = 0; i < to; ++i) {
    if (!a.to[i]) continue;
    if (a.bias || a.add) {
      load(a.add ? a.to[i] + c : a.bias + c, other);
      result[i] += other;
    }
    // A maximum might turn NaN into zero.
    if (a.relu) result[i] = result[i] < T(0) ? V{} : result[i];
    store(result[i], a.to[i] + c);
  }
}

template <typename Transform, int Bytes, typename T>
NASFCOS_INLINE void transform_loop(const Transformation<T>& a) {
  using Vector = Lanes<T, Bytes>;
  int64_t c = 0;
  for (; c + Vector::count <= a.channels; c += Vector::count) {
    transform_channels<Transform, typename Vector::type>(a, c);
  }
  for (; c < a.channels; ++c) transform_channels<Transform, T>(a, c);
}

#define NASFCOS_TRANSFORM(NAME, TRANSFORM)                                                \
  NASFCOS_BY_WIDTH(                                                                       \
      NAME##_float, Transformation<float>, (transform_loop<TRANSFORM, kBytes>(a)))        \
  void NAME(const Transformation<float>& a) { NAME##_float(a); }                          \
  void NAME(const Transformation<double>& a) { transform_loop<TRANSFORM, 16>(a); }
NASFCOS_TRANSFORM(input_to_points, InputToPoints)
NASFCOS_TRANSFORM(kernel_to_points, KernelToPoints)
NASFCOS_TRANSFORM(points_to_output, PointsToOutput)
NASFCOS_TRANSFORM(output_to_points, OutputToPoints)
NASFCOS_TRANSFORM(points_to_kernel, PointsToKernel)
#undef NASFCOS_TRANSFORM

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of maps, ordered by image, row and column.
struct Tiles {
  int64_t images, height, width, down, across;

  explicit Tiles(const Tensor& maps)
      : images(maps.size(0)),
        height(maps.size(2)),
        width(maps.size(3)),
        down(divide_up(height, kOut)),
        across(divide_up(width, kOut)) {}

  int64_t count() const { return images * down * across; }

  // Pointers to the `side` by `side` pixels of a tile in channels-last `maps`, of which the first
  // is `margin` pixels above and left of the tile's outputs; `outside` for pixels outside the
  // image.
  template <typename T>
  void pixels(
      T* maps, int64_t channels, int64_t tile, int side, int margin, T* outside, T** found) const {
    const int64_t top = tile / across % down * kOut - margin, left = tile % across * kOut - margin;
    maps += tile / (down * across) * height * width * channels;
    for (int i = 0; i < side; ++i) {
      for (int j = 0; j < side; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        found[i * side + j] = inside ? maps + (y * width + x) * channels : outside;
      }
    }
  }
};

// A matrix [rows, columns] for each point. The strides of rows and points are odd numbers of cache
// lines: with powers of two all would compete for the same part of the cache. Rows are padded to
// whole panels.
template <typename T>
class PointMatrices {
 public:
  PointMatrices(int64_t rows, int64_t columns, const at::TensorOptions& options)
      : stride_(odd_lines(divide_up(columns, kPanel) * kPanel)),
        apart_(odd_lines(rows * stride_)),
        values_(at::empty({kPoints, apart_}, options)),
        data_(values_.mutable_data_ptr<T>()) {}

  // For rows that are not written to the end: products read the padding too, and what happens to be
  // in memory there, such as denormal numbers, might slow them down.
  void zero() { values_.zero_(); }

  int64_t stride() const { return stride_; }
  T* row(int p, int64_t row) const { return data_ + p * apart_ + row * stride_; }

  // Pointers to one row at each point.
  void rows(int64_t row, T** found) const {
    for (int p = 0; p < kPoints; ++p) found[p] = this->row(p, row);
  }

 private:
  static int64_t odd_lines(int64_t values) {
    constexpr int64_t line = 64 / sizeof(T);
    return (divide_up(values, line) | 1) * line;
  }

  int64_t stride_, apart_;
  Tensor values_;
  T* data_;
};

// How threads divide the tiles and the panels of output channels: into a grid of parts, chosen so
// that the largest part takes as little time as possible.
struct Division {
  int64_t tiles, panels, tile_parts = 1, panel_parts = 1;

  Division(int64_t tiles, int64_t out_channels)
      : tiles(tiles), panels(divide_up(out_channels, kPanel)) {
    const int64_t threads = available_threads();
    // The costs of transforming a tile and of fetching a kernel, in multiply-adds per point and
    // input channel.
    constexpr int64_t per_tile = 24, per_kernel = 4;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t split = 1; split <= std::min(threads, panels); ++split) {
      const int64_t parts = std::min(threads / split, tiles);
      const int64_t most_tiles = divide_up(tiles, parts);
      const int64_t most_kernels = divide_up(panels, split) * kPanel;
      const int64_t time = most_tiles * (most_kernels + per_tile) + most_kernels * per_kernel;
      if (time < least) {
        least = time;
        tile_parts = parts;
        panel_parts = split;
      }
    }
  }

  int64_t parts() const { return tile_parts * panel_parts; }
  int64_t most_columns() const { return divide_up(panels, panel_parts) * kPanel; }
  int64_t first_tile(int64_t part) const { return tiles * (part / panel_parts) / tile_parts; }
  int64_t end_tile(int64_t part) const { return tiles * (part / panel_parts + 1) / tile_parts; }
  int64_t first_panel(int64_t part) const { return panels * (part % panel_parts) / panel_parts; }
  int64_t end_panel(int64_t part) const { return panels * (part % panel_parts + 1) / panel_parts; }
};

// How many rows of so many values at each point to process at a time. More rows amortise reading
// the kernels, fewer stay in a faster cache; 2 MiB was the best compromise where it was measured.
template <typename T>
int64_t fitting(int64_t columns) {
  constexpr int64_t bytes = int64_t{1} << 21;
  constexpr int64_t rows = 12;  // that a product processes at a time
  return std::max<int64_t>(1, bytes / (kPoints * columns * sizeof(T)) / rows) * rows;
}

// A weight [3, 3, C, Cout] at the points, [panels * C, kPanel]: one row per panel and input
// channel. The output channels must be adjacent in memory. `rotated`: by 180 degrees.
template <typename T>
PointMatrices<T> kernels_at_points(const Tensor& weight, bool rotated) {
  const int64_t channels = weight.size(2), out_channels = weight.size(3);
  const int64_t rows = divide_up(out_channels, kPanel) * channels;
  const T* kernel = weight.const_data_ptr<T>();
  PointMatrices<T> result(rows, kPanel, weight.options());
  if (out_channels % kPanel) result.zero();
  at::parallel_for(0, rows, 1 << 8, [&](int64_t begin, int64_t end) {
    const T* taps[9];
    T* at_points[kPoints];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = row / channels * kPanel;
      for (int tap = 0; tap < 9; ++tap) {
        taps[rotated ? 8 - tap : tap] = kernel + tap / 3 * weight.stride(0) +
                                       tap % 3 * weight.stride(1) +
                                       row % channels * weight.stride(2) + column;
      }
      result.rows(row, at_points);
      kernel_to_points({taps, at_points, std::min(kPanel, out_channels - column)});
    }
  });
  return result;
}

// Transforms `count` tiles of channels-last maps from `first` on, one row each.
template <typename T>
void inputs_at_points(
    const Tiles& tiles, const T* maps, int64_t channels, int64_t first, int64_t count,
    const T* zeros, const PointMatrices<T>& result) {
  const T* from[kPoints];
  T* at_points[kPoints];
  for (int64_t i = 0; i < count; ++i) {
    tiles.pixels(maps, channels, first + i, kIn, 1, zeros, from);
    result.rows(i, at_points);
    input_to_points({from, at_points, channels});
  }
}

// Convolves channels-last maps.
template <typename T>
void convolve(
    const Tensor& input, const PointMatrices<T>& kernels, const Tensor& bias, bool relu,
    Tensor& output) {
  const int64_t channels = input.size(1), out_channels = output.size(1);
  const Tiles tiles(input);
  const Division division(tiles.count(), out_channels);
  const int64_t most_columns = division.most_columns();
  const int64_t most_tiles = fitting<T>(channels + most_columns);
  const std::vector<T> zeros(channels, T(0));
  const T* in = input.const_data_ptr<T>();
  const T* added = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  T* out = output.mutable_data_ptr<T>();

  at::parallel_for(0, division.parts(), 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch dispatch;
    const PointMatrices<T> inputs(most_tiles, channels, input.options());
    const PointMatrices<T> products(most_tiles, most_columns, input.options());
    T *at_points[kPoints], *to[kOut * kOut];
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first_panel = division.first_panel(part), end_tile = division.end_tile(part);
      const int64_t panels = division.end_panel(part) - first_panel;
      const int64_t first = first_panel * kPanel;
      const int64_t columns = std::min(panels * kPanel, out_channels - first);
      for (int64_t tile = division.first_tile(part); tile < end_tile; tile += most_tiles) {
        const int64_t count = std::min(most_tiles, end_tile - tile);
        inputs_at_points(tiles, in, channels, tile, count, zeros.data(), inputs);
        for (int p = 0; p < kPoints; ++p) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            multiply(Product<T>{
                inputs.row(p, 0), inputs.stride(), 1,
                kernels.row(p, (first_panel + panel) * channels), kernels.stride(), count, channels,
                products.row(p, 0) + panel * kPanel, products.stride()});
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          products.rows(i, at_points);
          tiles.pixels<T>(out + first, out_channels, tile + i, kOut, 0, nullptr, to);
          points_to_output({at_points, to, columns, added ? added + first : nullptr, relu});
        }
      }
    }
  });
}

// The gradient of the weight, [Cout, 3, 3, C], from channels-last maps.
template <typename T>
Tensor weight_gradient(const Tensor& grad, const Tensor& input) {
  const int64_t channels = input.size(1), out_channels = grad.size(1);
  const Tiles tiles(input);
  const Division division(tiles.count(), out_channels);
  const int64_t most_columns = division.most_columns();
  const int64_t most_tiles = fitting<T>(channels + most_columns);
  const int64_t most_kernels = std::min(most_columns, fitting<T>(2 * channels));
  const std::vector<T> zeros(std::max(channels, out_channels), T(0));
  const T *in = input.const_data_ptr<T>(), *out = grad.const_data_ptr<T>();
  // Each part of the tiles has its own sum.
  Tensor sums = at::zeros({division.tile_parts, out_channels, 3, 3, channels}, input.options());
  T* all = sums.mutable_data_ptr<T>();

  at::parallel_for(0, division.parts(), 1, [&](int64_t begin, int64_t end) {
    const PlainDispatch dispatch;
    PointMatrices<T> inputs(most_tiles, channels, input.options());
    if (channels % kPanel) inputs.zero();
    const PointMatrices<T> grads(most_tiles, most_columns, input.options());
    const PointMatrices<T> kernels(most_kernels, channels, input.options());
    const T* from[kPoints];
    T *at_points[kPoints], *taps[9];
    for (int64_t part = begin; part < end; ++part) {
      T* sum = all + part / division.panel_parts * out_channels * 9 * channels;
      const int64_t end_tile = division.end_tile(part);
      const int64_t first_kernel = division.first_panel(part) * kPanel;
      const int64_t end_kernel = std::min(out_channels, division.end_panel(part) * kPanel);
      for (int64_t tile = division.first_tile(part); tile < end_tile; tile += most_tiles) {
        const int64_t count = std::min(most_tiles, end_tile - tile);
        inputs_at_points(tiles, in, channels, tile, count, zeros.data(), inputs);
        for (int64_t i = 0; i < count; ++i) {
          tiles.pixels(
              out + first_kernel, out_channels, tile + i, kOut, 0, zeros.data(), from);
          grads.rows(i, at_points);
          output_to_points({from, at_points, end_kernel - first_kernel});
        }
        for (int64_t k = first_kernel; k < end_kernel; k += most_kernels) {
          const int64_t rows = std::min(most_kernels, end_kernel - k);
          for (int p = 0; p < kPoints; ++p) {
            for (int64_t c = 0; c < channels; c += kPanel) {
              multiply(Product<T>{
                  grads.row(p, 0) + k - first_kernel, 1, grads.stride(), inputs.row(p, 0) + c,
                  inputs.stride(), rows, count, kernels.row(p, 0) + c, kernels.stride()});
            }
          }
          for (int64_t row = 0; row < rows; ++row) {
            kernels.rows(row, at_points);
            for (int tap = 0; tap < 9; ++tap) {
              taps[tap] = sum + ((k + row) * 9 + tap) * channels;
            }
            points_to_kernel({at_points, taps, channels, nullptr, false, true});
          }
        }
      }
    }
  });
  return sums.sum(0);
}

// Whether transforming tiles and kernels costs more than it saves.
bool is_small(const Tensor& input, const Tensor& weight) {
  constexpr int64_t few_tiles = 48;
  return std::min(weight.size(0), weight.size(1)) < kPanel || Tiles(input).count() < few_tiles;
}

void check(const Tensor& input, const Tensor& weight) {
  const char* op = "conv3x3: ";
  TORCH_CHECK_VALUE(input.dim() == 4, op, "the input must be [N, C, H, W], not ", input.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) == input.size(1) && weight.size(2) == 3 &&
          weight.size(3) == 3,
      op, "the weight must be [Cout, C, 3, 3] with the C of the input, ", input.size(1), ", not ",
      weight.sizes());
  TORCH_CHECK_VALUE(
      input.scalar_type() == weight.scalar_type(), op, "input and weight must have one dtype, not ",
      input.scalar_type(), " and ", weight.scalar_type());
}

Tensor conv3x3(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  const PlainDispatch dispatch;
  check(input, weight);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                bias->scalar_type() == input.scalar_type()),
      "conv3x3: the bias must be [Cout], of the input's dtype");
  if (is_small(input, weight)) {
    Tensor output = at::conv2d(input, weight, bias, 1, 1);
    if (relu) output.relu_();
    return output.contiguous(format_of(input));
  }
  Tensor output = at::empty(
      {input.size(0), weight.size(0), input.size(2), input.size(3)},
      input.options().memory_format(kLast));
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv3x3", [&] {
    const auto kernels =
        kernels_at_points<scalar_t>(weight.permute({2, 3, 1, 0}).contiguous(), false);
    convolve(
        input.contiguous(kLast), kernels, bias ? bias->contiguous() : Tensor(), relu, output);
  });
  return output.contiguous(format_of(input));
}

void check_gradient(const Tensor& grad, const Tensor& input, const Tensor& weight) {
  check(input, weight);
  TORCH_CHECK_VALUE(
      grad.dim() == 4 && grad.size(0) == input.size(0) && grad.size(1) == weight.size(0) &&
          grad.size(2) == input.size(2) && grad.size(3) == input.size(3) &&
          grad.scalar_type() == input.scalar_type(),
      "conv3x3: the output's gradient must have the output's shape and dtype");
}

// PyTorch's gradient of the input or of the weight; the other one is undefined.
std::tuple<Tensor, Tensor> small_gradients(
    const Tensor& grad, const Tensor& input, const Tensor& weight, bool of_input) {
  const auto [grad_input, grad_weight, _] = at::convolution_backward(
      grad, input, weight, std::nullopt, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1,
      {of_input, !of_input, false});
  return {grad_input, grad_weight};
}

Tensor conv3x3_input_backward(const Tensor& grad, const Tensor& input, const Tensor& weight) {
  const PlainDispatch dispatch;
  check_gradient(grad, input, weight);
  if (is_small(input, weight)) {
    return std::get<0>(small_gradients(grad, input, weight, true)).contiguous(format_of(input));
  }
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(kLast));
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv3x3_input_backward", [&] {
    // This is a convolution as well, with input and output channels exchanged.
    const auto kernels =
        kernels_at_points<scalar_t>(weight.contiguous(kLast).permute({2, 3, 0, 1}), true);
    convolve(grad.contiguous(kLast), kernels, Tensor(), false, grad_input);
  });
  return grad_input.contiguous(format_of(input));
}

Tensor conv3x3_weight_backward(const Tensor& grad, const Tensor& input, const Tensor& weight) {
  const PlainDispatch dispatch;
  check_gradient(grad, input, weight);
  Tensor grad_weight;
  if (is_small(input, weight)) {
    grad_weight = std::get<1>(small_gradients(grad, input, weight, false));
  } else {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv3x3_weight_backward", [&] {
      grad_weight = weight_gradient<scalar_t>(grad.contiguous(kLast), input.contiguous(kLast));
    });
    grad_weight = grad_weight.permute({0, 3, 1, 2});
  }
  return at::empty_like(weight).copy_(grad_weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("conv3x3", TORCH_FN(conv3x3));
  m.impl("conv3x3_input_backward", TORCH_FN(conv3x3_input_backward));
  m.impl("conv3x3_weight_backward", TORCH_FN(conv3x3_weight_backward));
}

}  // namespace nasfcos
