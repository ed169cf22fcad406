// Modulated deformable convolution on CUDA, forward and backward; where a tap reads is in
// ../deform_conv.h.
//
// The output pixels of all images, one image after the other, are processed in chunks. The samples
// of a chunk are taken into `columns` [pixels, taps, channels], which serve as maps with taps *
// channels channels for a 1x1 convolution: the product is PyTorch's own, in the precision of its
// settings for convolutions (TF32, cuDNN). Maps are channels-last throughout; other layouts are
// copied.
//
// Samples are numbered in the order of the columns, by pixel, then tap, then group: sample i has
// the channels from i * group_channels on. The forward pass also takes half precision: samples are
// then blended in float32, and stored and multiplied in half precision. Offsets and masks are
// float32, because pixel positions need the precision. In the backward pass several samples add to
// one pixel of the input's gradient concurrently, so the order of summation is not fixed.
//
// No chunk has 2^31 or more values in its columns and no grid 2^31 or more threads, so that these
// counts, even one step past the end, fit into 32 unsigned bits.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../deform_conv.h"
#include "../dispatch.h"
#include "../memory_format.h"

namespace nasfcos {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;
constexpr int64_t kColumnBytes = int64_t{1} << 28;

template <typename T>
struct Chunk {
  Geometry g;
  MapView<const T> offset, mask;
  int64_t image;      // of the first pixel
  uint32_t position;  // of the first pixel, within its image
};

template <typename T>
struct LocatedSample {
  int64_t image;
  uint32_t group, tap, position;  // tap: index over all groups
  Sample<T> sample;
};

template <typename T>
__device__ __forceinline__ LocatedSample<T> locate_sample(const Chunk<T>& chunk, uint32_t number) {
  const Geometry& g = chunk.g;
  const uint32_t groups = static_cast<uint32_t>(g.groups), taps = static_cast<uint32_t>(g.taps());
  const uint32_t positions = static_cast<uint32_t>(g.positions());
  const uint32_t out_width = static_cast<uint32_t>(g.out_width);
  const uint32_t kernel_w = static_cast<uint32_t>(g.kernel_w);
  const uint32_t tap = number / groups % taps;
  const uint32_t pixel = chunk.position + number / groups / taps;
  LocatedSample<T> located;
  located.image = chunk.image + pixel / positions;
  located.group = number % groups;
  located.tap = located.group * taps + tap;
  located.position = pixel % positions;
  const int64_t y = located.position / out_width * g.stride_h - g.pad_h;
  const int64_t x = located.position % out_width * g.stride_w - g.pad_w;
  const auto offset = chunk.offset.at(located.image, 2 * static_cast<int64_t>(located.tap));
  located.sample = locate(
      g, static_cast<T>(y + tap / kernel_w * g.dilation_h) + offset(0, located.position),
      static_cast<T>(x + tap % kernel_w * g.dilation_w) + offset(1, located.position),
      chunk.mask.at(located.image, located.tap)(0, located.position));
  return located;
}

// V channels that are read and written together.
template <typename T, int V>
struct alignas(V * sizeof(T)) Run {
  T values[V];
};

// One thread per run of channels; `count` runs.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) sample_kernel(
    Chunk<at::opmath_type<T>> chunk, const T* __restrict__ input, uint32_t count,
    T* __restrict__ columns) {
  using Acc = at::opmath_type<T>;
  const Geometry& g = chunk.g;
  const uint32_t runs = static_cast<uint32_t>(g.group_channels) / V;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const LocatedSample<Acc> located = locate_sample(chunk, i / runs);
    const T* from = input + located.image * g.pixels() * g.channels +
                    located.group * g.group_channels + i % runs * V;
    Acc weights[4], sums[V] = {};
    located.sample.blend(weights);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int32_t pixel = located.sample.pixel[corner];
      const Acc weight = weights[corner] * located.sample.mask;
      Run<T, V> run{};  // zeros outside the image, which a NaN weight still makes NaN
      if (pixel != g.pixels()) {
        run = *reinterpret_cast<const Run<T, V>*>(from + pixel * g.channels);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += weight * static_cast<Acc>(run.values[v]);
    }
    Run<T, V> blend;
#pragma unroll
    for (int v = 0; v < V; ++v) blend.values[v] = static_cast<T>(sums[v]);
    *reinterpret_cast<Run<T, V>*>(columns + static_cast<int64_t>(i) * V) = blend;
  }
}

// One warp for each of `count` samples. `columns` holds gradients at first and samples at the end;
// each thread reads and writes only its own values.
template <typename T>
__global__ void __launch_bounds__(kThreads) differentiate_kernel(
    Chunk<T> chunk, const T* __restrict__ input, uint32_t count, T* columns, T* grad_input,
    MapView<T> grad_offset, MapView<T> grad_mask) {
  const Geometry& g = chunk.g;
  const uint32_t lane = threadIdx.x % kWarp, warps = kThreads / kWarp;
  const uint32_t n = static_cast<uint32_t>(g.group_channels);
  // `i` is the same for the whole warp, so that all lanes take part in the shuffles.
  for (uint32_t i = blockIdx.x * warps + threadIdx.x / kWarp; i < count; i += gridDim.x * warps) {
    const LocatedSample<T> located = locate_sample(chunk, i);
    const Sample<T>& s = located.sample;
    const int64_t first =
        located.image * g.pixels() * g.channels + located.group * g.group_channels;
    T* column = columns + i * g.group_channels;
    T w[4], d[4] = {};  // weights of the corners; dot products of their values with the gradient
    s.blend(w);
    for (uint32_t c = lane; c < n; c += kWarp) {
      const T grad = column[c];
      T sum = 0;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        T value = 0;
        if (s.pixel[corner] != g.pixels()) {
          const int64_t at = first + s.pixel[corner] * g.channels + c;
          value = input[at];
          atomicAdd(grad_input + at, w[corner] * s.mask * grad);
        }
        d[corner] += grad * value;
        sum += w[corner] * s.mask * value;
      }
      column[c] = sum;
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        d[corner] += __shfl_xor_sync(0xffffffffu, d[corner], lanes);
      }
    }
    if (lane == 0) {
      const auto to = grad_offset.at(located.image, 2 * static_cast<int64_t>(located.tap));
      to(0, located.position) = s.mask * ((1 - s.x) * (d[2] - d[0]) + s.x * (d[3] - d[1]));
      to(1, located.position) = s.mask * ((1 - s.y) * (d[1] - d[0]) + s.y * (d[3] - d[2]));
      grad_mask.at(located.image, located.tap)(0, located.position) =
          w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
    }
  }
}

unsigned int blocks_for(int64_t threads) {
  return static_cast<unsigned int>(
      std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

// Calls body(chunk, first, pixels) for equal parts of the output pixels, of which there must be
// some.
template <typename T, typename Body>
void for_each_chunk(
    const Geometry& g, const Tensor& offset, const Tensor& mask, int64_t pixel_bytes,
    const Body& body) {
  const Tensor flat_offset = flatten_pixels(offset), flat_mask = flatten_pixels(mask);
  const int64_t total = g.images * g.positions();
  const int64_t most = std::max<int64_t>(1, kColumnBytes / pixel_bytes);
  const int64_t parts = (total + most - 1) / most, part = (total + parts - 1) / parts;
  for (int64_t first = 0; first < total; first += part) {
    const Chunk<T> chunk{
        g, view_of<T>(flat_offset), view_of<T>(flat_mask), first / g.positions(),
        static_cast<uint32_t>(first % g.positions())};
    body(chunk, first, std::min(part, total - first));
  }
}

// [N, C, H, W] as [N * H * W, C].
Tensor rows_of(const Tensor& maps) {
  return maps.permute({0, 2, 3, 1})
      .reshape({maps.size(0) * maps.size(2) * maps.size(3), maps.size(1)})
      .contiguous();
}

// [N * H * W, C] as [N, C, H, W].
Tensor maps_from(const Tensor& rows, int64_t images, int64_t height, int64_t width) {
  return rows.view({images, height, width, rows.size(1)}).permute({0, 3, 1, 2});
}

// [pixels, C] as one image with one row, [1, C, 1, pixels].
Tensor row_from(const Tensor& rows) { return maps_from(rows, 1, 1, rows.size(0)); }

// The weight [Cout, C, kh, kw] as that of the columns, [Cout, taps * C, 1, 1].
Tensor column_weight(const Geometry& g, const Tensor& weight) {
  return weight.permute({0, 2, 3, 1}).reshape({g.out_channels, g.taps() * g.channels, 1, 1});
}

Geometry checked_geometry(
    const Tensor& input, const Tensor& offset, const Tensor& mask, const Tensor& weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t offset_groups) {
  const Geometry g =
      geometry_of(input, offset, mask, weight, stride, padding, dilation, offset_groups);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      g.positions() < limit && g.taps() * g.channels < limit,
      "modulated_deform_conv2d: too many output pixels or weights for the CUDA kernel");
  return g;
}

template <typename T>
Tensor sample_and_multiply(
    const Geometry& g, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr int V = 16 / sizeof(T);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t channels = g.taps() * g.channels;
  const T* from = input.const_data_ptr<T>();
  const bool aligned =
      g.group_channels % V == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Run<T, V>) == 0;
  Tensor buffer;
  std::vector<Tensor> parts;
  for_each_chunk<at::opmath_type<T>>(
      g, offset, mask, channels * sizeof(T), [&](const auto& chunk, int64_t, int64_t pixels) {
        if (!buffer.defined()) buffer = at::empty({pixels, channels}, input.options());
        const Tensor columns = buffer.narrow(0, 0, pixels);
        const int64_t runs = columns.numel() / (aligned ? V : 1);
        const auto kernel = aligned ? sample_kernel<T, V> : sample_kernel<T, 1>;
        kernel<<<blocks_for(runs), kThreads, 0, stream>>>(
            chunk, from, static_cast<uint32_t>(runs), columns.mutable_data_ptr<T>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        parts.push_back(rows_of(at::conv2d(row_from(columns), weight, bias)));
      });
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

Tensor modulated_deform_conv2d(
    const Tensor& input, const Tensor& offset, const Tensor& mask, const Tensor& weight,
    const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t offset_groups) {
  const PlainDispatch dispatch;
  const c10::cuda::CUDAGuard guard(input.device());
  const Geometry g =
      checked_geometry(input, offset, mask, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == g.out_channels &&
                bias->scalar_type() == input.scalar_type() && bias->device() == input.device()),
      "modulated_deform_conv2d: bias must be [Cout], of the input's dtype and on its device");
  const auto format = format_of(input);
  if (g.images * g.out_channels == 0) {
    return at::empty(
        {g.images, g.out_channels, g.out_height, g.out_width},
        input.options().memory_format(format));
  }
  const Tensor last = input.permute({0, 2, 3, 1}).contiguous();
  Tensor rows;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "modulated_deform_conv2d", [&] {
        rows = sample_and_multiply<scalar_t>(
            g, last, offset, mask, column_weight(g, weight), bias);
      });
  return maps_from(rows, g.images, g.out_height, g.out_width).contiguous(format);
}

// Adds to grad_input [N, H, W, C] and to grad_weight (in the shape of weight), and writes the other
// gradients.
template <typename T>
void differentiate(
    const Geometry& g, const Tensor& grad, const Tensor& input, const Tensor& offset,
    const Tensor& mask, const Tensor& weight, Tensor& grad_input, Tensor& grad_offset,
    Tensor& grad_mask, Tensor& grad_weight) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t channels = g.taps() * g.channels;
  const Tensor transposed = weight.transpose(0, 1).contiguous(), grad_rows = rows_of(grad);
  for_each_chunk<T>(
      g, offset, mask, channels * sizeof(T),
      [&](const auto& chunk, int64_t first, int64_t pixels) {
        const Tensor row = row_from(grad_rows.narrow(0, first, pixels));
        const Tensor columns = rows_of(at::conv2d(row, transposed));
        const int64_t samples = pixels * g.taps() * g.groups;
        differentiate_kernel<T><<<blocks_for(samples * kWarp), kThreads, 0, stream>>>(
            chunk, input.const_data_ptr<T>(), static_cast<uint32_t>(samples),
            columns.mutable_data_ptr<T>(), grad_input.mutable_data_ptr<T>(),
            mutable_view_of<T>(grad_offset), mutable_view_of<T>(grad_mask));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        grad_weight.add_(std::get<1>(at::convolution_backward(
            row, row_from(columns), weight, std::nullopt, {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 1,
            {false, true, false})));
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t offset_groups) {
  at::globalContext().alertNotDeterministic("modulated_deform_conv2d_backward");
  const PlainDispatch dispatch;
  const c10::cuda::CUDAGuard guard(input.device());
  const Geometry g =
      checked_geometry(input, offset, mask, weight, stride, padding, dilation, offset_groups);
  TORCH_CHECK_VALUE(
      grad.scalar_type() == input.scalar_type() && grad.device() == input.device() &&
          grad.sizes() == IntArrayRef({g.images, g.out_channels, g.out_height, g.out_width}),
      "modulated_deform_conv2d_backward: grad must have the output's shape, dtype and device");
  const Tensor last = input.permute({0, 2, 3, 1}).contiguous();
  const Tensor matrix = column_weight(g, weight);
  Tensor grad_input = at::zeros(last.sizes(), last.options());
  Tensor grad_matrix = at::zeros(matrix.sizes(), matrix.options());
  Tensor grad_offset = empty_as(offset), grad_mask = empty_as(mask);
  if (g.out_channels == 0) {
    grad_offset.zero_();
    grad_mask.zero_();
  } else if (g.images > 0) {
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "modulated_deform_conv2d_backward", [&] {
      differentiate<scalar_t>(
          g, grad, last, offset, mask, matrix, grad_input, grad_offset, grad_mask, grad_matrix);
    });
  }
  const Tensor grad_weight =
      grad_matrix.view({g.out_channels, g.kernel_h, g.kernel_w, g.channels}).permute({0, 3, 1, 2});
  return {
      grad_input.permute({0, 3, 1, 2}).contiguous(format_of(input)), grad_offset, grad_mask,
      grad_weight.contiguous(format_of(weight))};
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CUDA, m) {
  m.impl("modulated_deform_conv2d", TORCH_FN(modulated_deform_conv2d));
  m.impl("modulated_deform_conv2d_backward", TORCH_FN(modulated_deform_conv2d_backward));
}

}  // namespace nasfcos
