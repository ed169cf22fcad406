// Greedy non-maximum suppression, separately for each class.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../iou.h"
#include "../macros.h"
#include "../nms.h"

// A fused multiply-add rounds once instead of twice, so processors with and without it would decide
// boxes exactly at the threshold differently.
#if defined(__clang__)
#pragma clang fp contract(off)
#define NASFCOS_NO_FMA
#else
#define NASFCOS_NO_FMA __attribute__((optimize("fp-contract=off")))
#endif

namespace nasfcos {
namespace {

using at::Tensor;

// Boxes as a structure of arrays, in the order in which they are considered.
template <typename T>
struct Boxes {
  std::vector<T> x0, y0, x1, y1, area;

  explicit Boxes(int64_t n) : x0(n), y0(n), x1(n), y1(n), area(n) {}
};

// Marks the boxes from `first` to n whose IoU with box a is above `limit`.
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

// Finds which of the boxes [n, 4], sorted by descending score, are kept; labels may be null.
template <typename T>
void keep_unsuppressed(
    const T* box, const int64_t* labels, int64_t n, T extra, T limit, bool* keep) {
  // Indices of the boxes, grouped by class.
  std::vector<int64_t> ranks(n);
  for (int64_t i = 0; i < n; ++i) ranks[i] = i;
  std::vector<int64_t> starts{0};
  if (labels) {
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) {
      return labels[a] < labels[b];
    });
    for (int64_t i = 1; i < n; ++i) {
      if (labels[ranks[i]] != labels[ranks[i - 1]]) starts.push_back(i);
    }
  }
  starts.push_back(n);

  Boxes<T> b(n);
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> one = load_box(box + 4 * ranks[i], extra);
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
  for (int64_t i = 0; i < n; ++i) keep[ranks[i]] = !suppressed[i];
}

template <typename T>
Tensor keep_mask(
    const Tensor& boxes, const Tensor& labels, const Tensor& counts, double threshold,
    bool legacy) {
  const int64_t images = boxes.size(0), most = boxes.size(1);
  const T limit = exclusive_limit<T>(threshold, legacy);
  const Tensor keep = at::zeros({images, most}, boxes.options().dtype(at::kBool));
  for (int64_t image = 0; image < images; ++image) {
    const int64_t given = counts.defined() ? counts.const_data_ptr<int64_t>()[image] : most;
    keep_unsuppressed<T>(
        boxes.const_data_ptr<T>() + image * most * 4,
        labels.defined() ? labels.const_data_ptr<int64_t>() + image * most : nullptr,
        std::clamp<int64_t>(given, 0, most), static_cast<T>(legacy ? 1 : 0), limit,
        keep.mutable_data_ptr<bool>() + image * most);
  }
  return keep;
}

Tensor nms_mask(
    const Tensor& boxes, const std::optional<Tensor>& labels_,
    const std::optional<Tensor>& counts_, double iou_threshold, bool legacy) {
  check_nms_mask(boxes, labels_, counts_);
  const Tensor labels = labels_ ? labels_->to(at::kLong).contiguous() : Tensor();
  const Tensor counts = counts_ ? counts_->to(at::kLong).contiguous() : Tensor();
  if (boxes.scalar_type() == at::kDouble) {
    return keep_mask<double>(boxes.contiguous(), labels, counts, iou_threshold, legacy);
  }
  return keep_mask<float>(
      boxes.to(at::kFloat).contiguous(), labels, counts, iou_threshold, legacy);
}

Tensor nms(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
    double iou_threshold, bool legacy) {
  return nms_by_mask(boxes, scores, labels, iou_threshold, legacy, nms_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CPU, m) {
  m.impl("nms", TORCH_FN(nms));
  m.impl("nms_mask", TORCH_FN(nms_mask));
}

}  // namespace nasfcos
