"""A detector as one program of tensors, for where it is used without its config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..transfer import to_device
from .heads.cells import STRIDES
from .heads.post_process import MOST_IN_NMS, Ranked
from .inference import InferenceDetector


def export_detector(model: InferenceDetector, images: Tensor) -> torch.export.ExportedProgram:
    """The whole way from images to detections as a program of fixed shapes.

    The program takes a batch like `images` and returns ``boxes`` [N, D, 4] (legacy xyxy in pixels),
    ``scores`` [N, D] and ``labels`` [N, D] from 1, best first, and ``counts`` [N] of each image's
    detections; behind these all is 0. D is TEST.DETECTIONS_PER_IMAGE (no ties beyond it).
    `torch.export.save` writes it, and it is loaded where this package was imported, which brings
    the operators.

    Args:
        model: a detector of `optimize_for_inference`.
        images: [N, 3, H, W] RGB, float in 0..1 or uint8, on the detector's device: of the size and
            type that the program will be given. The values do not matter.

    Raises:
        ValueError: `images` is no such batch, or TEST.PRE_NMS_TOP_N is too large for NMS in fixed
            shapes.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], not {list(images.shape)}")
    most = MOST_IN_NMS // len(STRIDES)
    if model.head.post_process.pre_nms_top_n > most:
        raise ValueError(f"a detector with TEST.PRE_NMS_TOP_N above {most} cannot be exported")
    with torch.no_grad():
        return torch.export.export(_FixedShapes(model), (images,), strict=False)


class _FixedShapes(nn.Module):
    """Images [N, 3, H, W] to detections whose number does not depend on values."""

    def __init__(self, model: InferenceDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        model = self.model
        batch, sizes = model.preprocess(list(images))
        batch = batch.to(dtype=model.dtype, memory_format=torch.channels_last)
        outputs = model.head(model.neck(model.backbone(batch)))
        sizes = to_device(torch.tensor(sizes), images.device)
        return _first(model.head.rank(outputs, sizes), model.head.post_process.detections_per_image)


def _first(ranked: Ranked, most: int) -> dict[str, Tensor]:
    order = ranked.kept.sort(dim=1, descending=True, stable=True).indices[:, :most]
    kept = ranked.kept.gather(1, order)
    boxes = ranked.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return {
        "boxes": torch.where(kept[..., None], boxes, 0),
        "scores": torch.where(kept, ranked.scores.gather(1, order), 0),
        "labels": torch.where(kept, ranked.labels.gather(1, order), 0),
        "counts": kept.sum(1),
    }
