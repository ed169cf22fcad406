#pragma once

// What the non-maximum suppressions of both devices do around their kernels.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <tuple>

namespace nasfcos {

// Checks the arguments of nms_mask: boxes [N, K, 4], labels [N, K], counts [N].
inline void check_nms_mask(
    const at::Tensor& boxes, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& counts) {
  TORCH_CHECK_VALUE(
      boxes.dim() == 3 && boxes.size(2) == 4, "nms_mask: boxes must be [N, K, 4]");
  TORCH_CHECK_VALUE(
      !labels || (labels->sizes() == boxes.sizes().slice(0, 2) &&
                  labels->device() == boxes.device()),
      "nms_mask: labels must be [N, K], on the device of boxes");
  TORCH_CHECK_VALUE(
      !counts || (counts->sizes() == boxes.sizes().slice(0, 1) &&
                  counts->device() == boxes.device()),
      "nms_mask: counts must be [N], on the device of boxes");
}

// The operator nms, for boxes [N, 4] in any order, by means of nms_mask. On a GPU, the host waits
// only for the number of boxes that are kept.
template <typename Mask>
at::Tensor nms_by_mask(
    const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& labels,
    double iou_threshold, bool legacy, const Mask& nms_mask) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4]");
  for (const auto* row : {&scores, labels ? &*labels : nullptr}) {
    TORCH_CHECK_VALUE(
        !row || (row->sizes() == boxes.sizes().slice(0, 1) && row->device() == boxes.device()),
        "nms: scores and labels must be [N], on the device of boxes");
  }
  const at::Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  std::optional<at::Tensor> sorted_labels;
  if (labels) sorted_labels = labels->index_select(0, order).unsqueeze(0);
  const at::Tensor keep = nms_mask(
      boxes.index_select(0, order).unsqueeze(0), sorted_labels, std::nullopt, iou_threshold,
      legacy);
  return order.masked_select(keep.squeeze(0));
}

}  // namespace nasfcos
