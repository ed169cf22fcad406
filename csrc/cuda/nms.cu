// Greedy non-maximum suppression on CUDA, in two steps. First, all pairs of an image's boxes are
// compared in parallel; each box gets a bit for each later box that it would suppress. Then one
// block per image goes through the boxes by score and keeps those that no kept box suppresses.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>

#include "../iou.h"
#include "../nms.h"

namespace nasfcos {
namespace {

using at::Tensor;

// Boxes per tile: the number of bits in a word.
constexpr int kTile = 64;
constexpr int kWalkThreads = 512;

// The number of valid boxes of an image; counts may be null.
__device__ int64_t present(const int64_t* counts, int64_t image, int64_t most) {
  if (!counts) return most;
  const int64_t count = counts[image];
  return count < 0 ? 0 : count < most ? count : most;
}

// Boxes [images, most, 4] and labels [images, most] (or null) are sorted by descending score. Bit j
// of hits[(image * most + i) * tiles + column] tells whether box i suppresses box 64 * column + j.
// Words left of box i's own tile, and those of boxes beyond the image's count, are not written.
template <typename T>
__global__ void __launch_bounds__(kTile) compare_kernel(
    const T* boxes, const int64_t* labels, const int64_t* counts, int64_t most, int64_t tiles,
    T extra, T limit, uint64_t* hits) {
  const int64_t row = blockIdx.y, column = blockIdx.x, image = blockIdx.z;
  const int64_t n = present(counts, image, most), first = column * kTile;
  if (column < row || first >= n) return;
  boxes += 4 * image * most;
  hits += image * most * tiles;
  if (labels) labels += image * most;
  __shared__ Box<T> others[kTile];
  __shared__ int64_t other_labels[kTile];
  const int count = static_cast<int>(n - first < kTile ? n - first : kTile);
  if (threadIdx.x < count) {
    others[threadIdx.x] = load_box(boxes + 4 * (first + threadIdx.x), extra);
    other_labels[threadIdx.x] = labels ? labels[first + threadIdx.x] : 0;
  }
  __syncthreads();
  const int64_t i = row * kTile + threadIdx.x;
  if (i >= n) return;
  const Box<T> box = load_box(boxes + 4 * i, extra);
  const int64_t label = labels ? labels[i] : 0;
  uint64_t word = 0;
  for (int j = row == column ? threadIdx.x + 1 : 0; j < count; ++j) {
    if (other_labels[j] == label && iou(box, others[j], extra) > limit) {
      word |= uint64_t{1} << j;
    }
  }
  hits[i * tiles + column] = word;
}

// One block per image. `removed`, initially zero, collects the bits of the boxes suppressed so far;
// the bits of a tile are final once all tiles before it are done. Boxes beyond the image's count
// stay as initialised: not kept.
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(
    const uint64_t* hits, const int64_t* counts, int64_t most, int64_t tiles, uint64_t* removed,
    bool* keep) {
  const int64_t image = blockIdx.x, n = present(counts, image, most);
  const int64_t last = (n + kTile - 1) / kTile;
  hits += image * most * tiles;
  removed += image * tiles;
  keep += image * most;
  __shared__ uint64_t own[kTile];  // the boxes that each box of the tile suppresses within it
  __shared__ uint64_t kept;
  for (int64_t tile = 0; tile < last; ++tile) {
    const int64_t first = tile * kTile;
    const int count = static_cast<int>(n - first < kTile ? n - first : kTile);
    if (threadIdx.x < count) own[threadIdx.x] = hits[(first + threadIdx.x) * tiles + tile];
    __syncthreads();  // also completes the previous tile's updates of `removed`
    if (threadIdx.x == 0) {
      uint64_t gone = removed[tile], alive = 0;
      for (int j = 0; j < count; ++j) {
        if (!(gone >> j & 1)) {
          alive |= uint64_t{1} << j;
          gone |= own[j];
        }
      }
      kept = alive;
    }
    __syncthreads();
    const uint64_t alive = kept;
    if (threadIdx.x < count) keep[first + threadIdx.x] = alive >> threadIdx.x & 1;
    for (int64_t column = tile + 1 + threadIdx.x; column < last; column += blockDim.x) {
      uint64_t gone = removed[column];
      for (uint64_t rest = alive; rest; rest &= rest - 1) {
        const int j = __ffsll(static_cast<long long>(rest)) - 1;
        gone |= hits[(first + j) * tiles + column];
      }
      removed[column] = gone;
    }
    // The next iteration overwrites `own` only after thread 0 has passed the second barrier, and
    // `kept` only after all threads have passed that iteration's first barrier.
  }
}

template <typename T>
Tensor keep_mask(
    const Tensor& boxes, const Tensor& labels, const Tensor& counts, double iou_threshold,
    bool legacy) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t images = boxes.size(0), most = boxes.size(1), tiles = (most + kTile - 1) / kTile;
  TORCH_CHECK(tiles <= 65535, "nms: ", most, " boxes are too many for the CUDA kernel");
  TORCH_CHECK(images <= 65535, "nms: ", images, " images are too many for the CUDA kernel");
  const Tensor keep = at::zeros({images, most}, boxes.options().dtype(at::kBool));
  if (keep.numel() == 0) return keep;
  const auto words = boxes.options().dtype(at::kLong);
  const Tensor hits = at::empty({images, most, tiles}, words);
  const Tensor removed = at::zeros({images, tiles}, words);
  auto* hit_words = reinterpret_cast<uint64_t*>(hits.mutable_data_ptr<int64_t>());
  auto* removed_words = reinterpret_cast<uint64_t*>(removed.mutable_data_ptr<int64_t>());
  const auto* present = counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr;
  const auto side = static_cast<unsigned int>(tiles), depth = static_cast<unsigned int>(images);
  compare_kernel<T><<<dim3(side, side, depth), kTile, 0, stream>>>(
      boxes.const_data_ptr<T>(), labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr,
      present, most, tiles, static_cast<T>(legacy ? 1 : 0),
      exclusive_limit<T>(iou_threshold, legacy), hit_words);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  walk_kernel<<<depth, kWalkThreads, 0, stream>>>(
      hit_words, present, most, tiles, removed_words, keep.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return keep;
}

Tensor nms_mask(
    const Tensor& boxes_, const std::optional<Tensor>& labels_,
    const std::optional<Tensor>& counts_, double iou_threshold, bool legacy) {
  check_nms_mask(boxes_, labels_, counts_);
  const c10::cuda::CUDAGuard guard(boxes_.device());
  const bool wide = boxes_.scalar_type() == at::kDouble;
  const Tensor boxes = boxes_.to(wide ? at::kDouble : at::kFloat).contiguous();
  const Tensor labels = labels_ ? labels_->to(at::kLong).contiguous() : Tensor();
  const Tensor counts = counts_ ? counts_->to(at::kLong).contiguous() : Tensor();
  return wide ? keep_mask<double>(boxes, labels, counts, iou_threshold, legacy)
              : keep_mask<float>(boxes, labels, counts, iou_threshold, legacy);
}

Tensor nms(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
    double iou_threshold, bool legacy) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  return nms_by_mask(boxes, scores, labels, iou_threshold, legacy, nms_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CUDA, m) {
  m.impl("nms", TORCH_FN(nms));
  m.impl("nms_mask", TORCH_FN(nms_mask));
}

}  // namespace nasfcos
