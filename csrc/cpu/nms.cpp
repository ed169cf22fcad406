// Greedy non-maximum suppression, each class by itself. The plain version is nasfcos/ops/plain.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../iou.h"
#include "../macros.h"

// A fused multiply-add rounds once instead of twice, which would decide boxes exactly at the
// threshold differently on different processors.
#if defined(__clang__)
#pragma clang fp contract(off)
#define NASFCOS_NO_FMA
#else
#define NASFCOS_NO_FMA __attribute__((optimize("fp-contract=off")))
#endif

namespace {

using at::Tensor;
using nasfcos::Box;
using nasfcos::exclusive_limit;
using nasfcos::iou;
using nasfcos::load_box;

// Structure of arrays, in the order in which boxes are considered.
template <typename T>
struct Boxes {
  std::vector<T> x0, y0, x1, y1, area;

  explicit Boxes(int64_t n) : x0(n), y0(n), x1(n), y1(n), area(n) {}
};

// Marks those of the n boxes from `first` on whose IoU with box a is above `limit`.
template <typename T>
NASFCOS_INLINE void suppress_loop(
    int64_t first, int64_t n, Box<T> a, T extra, T limit, const T* x0, const T* y0, const T* x1,
    const T* y1, const T* area, int32_t* suppressed) {
  for (int64_t j = first; j < n; ++j) {
    const Box<T> b{x0[j], y0[j], x1[j], y1[j], area[j]};
    suppressed[j] |= int32_t(iou(a, b, extra) > limit);
  }
}

NASFCOS_CLONES NASFCOS_NO_FMA void suppress(
    int64_t first, int64_t n, Box<float> a, float extra, float limit, const float* x0,
    const float* y0, const float* x1, const float* y1, const float* area, int32_t* suppressed) {
  suppress_loop(first, n, a, extra, limit, x0, y0, x1, y1, area, suppressed);
}

NASFCOS_NO_FMA void suppress(
    int64_t first, int64_t n, Box<double> a, double extra, double limit, const double* x0,
    const double* y0, const double* x1, const double* y1, const double* area,
    int32_t* suppressed) {
  suppress_loop(first, n, a, extra, limit, x0, y0, x1, y1, area, suppressed);
}

template <typename T>
Tensor nms_impl(
    const Tensor& boxes, const Tensor& order, const int64_t* labels, double threshold,
    bool legacy) {
  const int64_t n = boxes.size(0);
  const T* box = boxes.const_data_ptr<T>();
  const int64_t* by_score = order.const_data_ptr<int64_t>();
  const T extra = legacy ? 1 : 0;
  const T limit = exclusive_limit<T>(threshold, legacy);

  // Ranks (positions in the order of scores), brought together by class.
  std::vector<int64_t> ranks(n);
  for (int64_t i = 0; i < n; ++i) ranks[i] = i;
  std::vector<int64_t> starts{0};
  if (labels) {
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) {
      return labels[by_score[a]] < labels[by_score[b]];
    });
    for (int64_t i = 1; i < n; ++i) {
      if (labels[by_score[ranks[i]]] != labels[by_score[ranks[i - 1]]]) starts.push_back(i);
    }
  }
  starts.push_back(n);

  Boxes<T> b(n);
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> one = load_box(box + 4 * by_score[ranks[i]], extra);
    b.x0[i] = one.x0;
    b.y0[i] = one.y0;
    b.x1[i] = one.x1;
    b.y1[i] = one.y1;
    b.area[i] = one.area;
  }

  std::vector<int32_t> suppressed(n, 0);
  const int64_t classes = static_cast<int64_t>(starts.size()) - 1;
  at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = starts[k]; i < starts[k + 1]; ++i) {
        if (suppressed[i]) continue;
        suppress(
            i + 1, starts[k + 1], {b.x0[i], b.y0[i], b.x1[i], b.y1[i], b.area[i]}, extra, limit,
            b.x0.data(), b.y0.data(), b.x1.data(), b.y1.data(), b.area.data(), suppressed.data());
      }
    }
  });

  std::vector<uint8_t> kept(n, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    kept[ranks[i]] = !suppressed[i];
    count += !suppressed[i];
  }
  Tensor keep = at::empty({count}, order.options());
  int64_t* out = keep.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (kept[i]) *out++ = by_score[i];
  }
  return keep;
}

Tensor nms(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
    double iou_threshold, bool legacy) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4]");
  const int64_t n = boxes.size(0);
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == n, "nms: scores must be [N]");
  TORCH_CHECK_VALUE(
      !labels || (labels->dim() == 1 && labels->size(0) == n), "nms: labels must be [N]");
  const Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  const Tensor classes = labels ? labels->to(at::kLong).contiguous() : Tensor();
  const int64_t* label = labels ? classes.const_data_ptr<int64_t>() : nullptr;
  if (boxes.scalar_type() == at::kDouble) {
    return nms_impl<double>(boxes.contiguous(), order, label, iou_threshold, legacy);
  }
  return nms_impl<float>(boxes.to(at::kFloat).contiguous(), order, label, iou_threshold, legacy);
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("nms", TORCH_FN(nms));
}
