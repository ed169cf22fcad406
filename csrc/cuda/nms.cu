// Greedy non-maximum suppression on CUDA, in two steps: every pair of boxes is compared at once,
// each box getting a bit for each later box that it would suppress; then one block walks through
// the boxes by score and keeps those that no kept box suppresses.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "../iou.h"

namespace {

using at::Tensor;
using nasfcos::Box;
using nasfcos::exclusive_limit;
using nasfcos::iou;
using nasfcos::load_box;

// Boxes are handled by tiles of as many as a word has bits.
constexpr int kTile = 64;
constexpr int kWalkThreads = 512;

// Boxes (and labels, or null) by descending score. Bit j of hits[i * tiles + column] says that box
// i suppresses box 64 * column + j. Words left of box i's own tile are not written.
template <typename T>
__global__ void __launch_bounds__(kTile) compare_kernel(
    const T* boxes, const int64_t* labels, int64_t n, int64_t tiles, T extra, T limit,
    uint64_t* hits) {
  const int64_t row = blockIdx.y, column = blockIdx.x;
  if (column < row) return;
  __shared__ Box<T> others[kTile];
  __shared__ int64_t other_labels[kTile];
  const int64_t first = column * kTile;
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

// One block. `removed`, zero at first, collects the bits of the boxes suppressed so far; bits of a
// tile are final once all tiles before it are done.
__global__ void __launch_bounds__(kWalkThreads) walk_kernel(
    const uint64_t* hits, int64_t n, int64_t tiles, uint64_t* removed, bool* keep) {
  __shared__ uint64_t own[kTile];  // what the boxes of the tile suppress within it
  __shared__ uint64_t kept;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kTile;
    const int count = static_cast<int>(n - first < kTile ? n - first : kTile);
    if (threadIdx.x < count) own[threadIdx.x] = hits[(first + threadIdx.x) * tiles + tile];
    __syncthreads();  // also ends the last tile's updates of `removed`
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
    for (int64_t column = tile + 1 + threadIdx.x; column < tiles; column += blockDim.x) {
      uint64_t gone = removed[column];
      for (uint64_t rest = alive; rest; rest &= rest - 1) {
        const int j = __ffsll(static_cast<long long>(rest)) - 1;
        gone |= hits[(first + j) * tiles + column];
      }
      removed[column] = gone;
    }
    // `own` is overwritten at the next turn only after thread 0 has passed the second barrier,
    // `kept` only after every thread has passed the next turn's first one.
  }
}

template <typename T>
Tensor keep_mask(
    const Tensor& boxes, const Tensor& labels, double iou_threshold, bool legacy) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = boxes.size(0), tiles = (n + kTile - 1) / kTile;
  TORCH_CHECK(tiles <= 65535, "nms: ", n, " boxes are too many for the CUDA kernel");
  const auto words = boxes.options().dtype(at::kLong);
  const Tensor hits = at::empty({n, tiles}, words);
  const Tensor removed = at::zeros({tiles}, words);
  const Tensor keep = at::empty({n}, boxes.options().dtype(at::kBool));
  auto* hit_words = reinterpret_cast<uint64_t*>(hits.mutable_data_ptr<int64_t>());
  auto* removed_words = reinterpret_cast<uint64_t*>(removed.mutable_data_ptr<int64_t>());
  const dim3 grid(static_cast<unsigned int>(tiles), static_cast<unsigned int>(tiles));
  compare_kernel<T><<<grid, kTile, 0, stream>>>(
      boxes.const_data_ptr<T>(), labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr, n,
      tiles, static_cast<T>(legacy ? 1 : 0), exclusive_limit<T>(iou_threshold, legacy), hit_words);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  walk_kernel<<<1, kWalkThreads, 0, stream>>>(
      hit_words, n, tiles, removed_words, keep.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return keep;
}

Tensor nms(
    const Tensor& boxes_, const Tensor& scores, const std::optional<Tensor>& labels_,
    double iou_threshold, bool legacy) {
  TORCH_CHECK_VALUE(boxes_.dim() == 2 && boxes_.size(1) == 4, "nms: boxes must be [N, 4]");
  const int64_t n = boxes_.size(0);
  TORCH_CHECK_VALUE(
      scores.dim() == 1 && scores.size(0) == n && scores.device() == boxes_.device(),
      "nms: scores must be [N], on the device of boxes");
  TORCH_CHECK_VALUE(
      !labels_ || (labels_->dim() == 1 && labels_->size(0) == n &&
                   labels_->device() == boxes_.device()),
      "nms: labels must be [N], on the device of boxes");
  const c10::cuda::CUDAGuard guard(boxes_.device());
  if (n == 0) return at::empty({0}, boxes_.options().dtype(at::kLong));
  const Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  const bool wide = boxes_.scalar_type() == at::kDouble;
  const Tensor boxes =
      boxes_.to(wide ? at::kDouble : at::kFloat).index_select(0, order).contiguous();
  const Tensor labels =
      labels_ ? labels_->to(at::kLong).index_select(0, order).contiguous() : Tensor();
  const Tensor keep = wide ? keep_mask<double>(boxes, labels, iou_threshold, legacy)
                           : keep_mask<float>(boxes, labels, iou_threshold, legacy);
  return order.masked_select(keep);  // the only synchronisation: how many are kept
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CUDA, m) {
  m.impl("nms", TORCH_FN(nms));
}
