"""A detector as one tensor program (`torch.export`), to be used without its config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..transfer import to_device
from .detector import check_image
from .heads import static
from .heads.locations import STRIDES
from .inference import InferenceDetector

MIN_SIDE = 129
"""Smallest height and width, in pixels, that a program for any size accepts: from here on P7 has
two rows and columns, and is treated like larger maps."""


def export_detector(
    model: InferenceDetector, images: Tensor, any_size: bool = False
) -> torch.export.ExportedProgram:
    """Export everything from images to detections as one program.

    The program takes ``images``, canvases like those given here, and ``sizes`` [N, 2] int64, the
    height and width of the image in the upper left corner of each canvas. The pixels outside the
    image have no effect, but the size of the canvas has a small one, as in a batch with larger
    images: group norms average over the whole map. So images should nearly fill their canvas.

    The program returns ``boxes`` [N, D, 4] float32 (legacy xyxy in pixels), ``scores`` [N, D]
    float32 and ``labels`` [N, D] int64 from 1, by descending score, and ``counts`` [N] int64, the
    number of detections of each image; entries beyond it are 0. D is TEST.DETECTIONS_PER_IMAGE
    (without ties beyond it), or less where maps of a fixed size hold fewer predictions.

    `torch.export.save` writes the program. To load it, import this package first, for its
    operators; a file of `export_onnx` does not need the package.

    Args:
        model: a detector of `optimize_for_inference`, compiled or not.
        images: [N, 3, H, W] RGB, float in 0..1 or uint8, with the size and type of the canvases
            that the program will be given. The values do not matter.
        any_size: the program takes canvases of any height and width from `MIN_SIDE` up, so that
            an image can be its own canvas; N is fixed.

    Raises:
        TypeError: `model` is another model, or `images` is a list.
        ValueError: `images` is not such a batch, or TEST.PRE_NMS_TOP_N is too large for NMS in
            fixed shapes.
    """
    if not isinstance(model, InferenceDetector):
        raise TypeError(
            f"what is exported is the inference form, not a {type(model).__name__}: "
            "export_detector(optimize_for_inference(model), images)"
        )
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [N, 3, H, W], not a {type(images).__name__}")
    shape = list(images.shape)
    if len(shape) != 4 or shape[0] == 0:
        raise ValueError(f"images must be a tensor [N, 3, H, W] of one or more, not {shape}")
    check_image(images[0], 0)
    most = static.MAX_NMS_BOXES // len(STRIDES)
    if model.head.post_process.pre_nms_top_n > most:
        raise ValueError(f"a detector with TEST.PRE_NMS_TOP_N above {most} cannot be exported")
    dynamic = None
    if any_size:
        shape[2:] = MIN_SIDE + 61, MIN_SIDE + 38  # different from each other and from the minimum
        dynamic = {"images": dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC), "sizes": None}
    # The saved program contains this example input: expanded, it is stored as one value.
    images = images.new_zeros(()).expand(shape)
    sizes = torch.tensor([shape[2:]] * shape[0], device=images.device)
    with torch.no_grad():
        return torch.export.export(
            _Program(model), (images, sizes), dynamic_shapes=dynamic, strict=False
        )


class _Program(nn.Module):
    """Maps images and their sizes to detections in fixed shapes; see `export_detector`."""

    def __init__(self, model: InferenceDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        model = self.model
        device = model.preprocess.mean.device
        images, sizes = to_device(images, device), to_device(sizes, device)
        batch = model.preprocess.canvases(images, sizes)
        batch = batch.to(dtype=model.dtype, memory_format=torch.channels_last)
        outputs = model.head(model.neck(model.backbone(batch)))
        found = static.detect(model.head, outputs, sizes)
        boxes, scores, labels, kept = found.top(model.head.post_process.detections_per_image)
        return {
            "boxes": torch.where(kept[..., None], boxes, 0),
            "scores": torch.where(kept, scores, 0),
            "labels": torch.where(kept, labels, 0),
            "counts": kept.sum(1),
        }
