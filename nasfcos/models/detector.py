"""The detector: preprocess, backbone, neck, head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError
from ..transfer import to_device
from .heads.dense import DenseHead, Targets
from .heads.post_process import Detections

CAFFE2_MEAN = (122.7717, 115.9465, 102.9801)
"""Pixel mean (RGB in 0..255) that the Caffe2 backbones and the released models were trained with;
they do not divide by a deviation."""

C5_STRIDE = 32
"""Stride of C5 in pixels."""


class Preprocess(nn.Module):
    """Turns images into one normalised batch.

    Channels are reversed to BGR, the mean is subtracted, and the result is divided by the
    deviation. Images are then padded with zeros on the right and bottom to the largest height and
    width of the batch, rounded up to a multiple of `size_divisibility`.

    The mean and deviation (RGB, in 0..255) are buffers because they belong to the weights:
    `nasfcos.models.weights` sets those of the weights that it loads.

    Args:
        size_divisibility: the batch's height and width are multiples of it, in pixels.
    """

    def __init__(self, size_divisibility: int) -> None:
        super().__init__()
        self.size_divisibility = size_divisibility
        self.register_buffer("mean", torch.tensor(CAFFE2_MEAN))
        self.register_buffer("std", torch.ones(3))

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalise and pad images.

        Args:
            images: [3, H, W] each, RGB, float in 0..1 or uint8 in 0..255, of any sizes.

        Returns:
            the batch [N, 3, H', W'] float32 on this module's device, and each image's (H, W).

        Raises:
            ValueError: an image has another shape or type.
        """
        for index, image in enumerate(images):
            check_image(image, index)
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (
            math.ceil(max(side) / self.size_divisibility) * self.size_divisibility
            for side in zip(*sizes, strict=True)
        )
        batch = self.mean.new_empty(len(images), 3, height, width)
        mean, std = (x.flip(0)[:, None, None] for x in (self.mean, self.std))
        for index, image in enumerate(images):
            # Transferred as it is (uint8 is small), then written once and changed in place.
            image = to_device(image, batch.device)
            _, h, w = image.shape
            padded = batch[index]  # not by iteration: autograd refuses in-place changes then
            pixels = padded[:, :h, :w].copy_(image.flip(0))
            if image.is_floating_point():
                pixels *= 255
            pixels.sub_(mean).div_(std)
            padded[:, h:] = 0
            padded[:, :h, w:] = 0
        return batch, sizes

    def canvases(self, images: Tensor, sizes: Tensor) -> Tensor:
        """As `forward`, for images in the upper left corners of canvases of one size.

        The operations do not depend on the images' own sizes, as an export needs it.

        Args:
            images: [N, 3, H, W], RGB, float in 0..1 or uint8 in 0..255, on this module's device.
            sizes: [N, 2] int64 on the same device, each image's (height, width). The pixels
                outside have no effect.

        Returns:
            the batch [N, 3, H', W'] float32.
        """
        row, column = (torch.arange(side, device=sizes.device) for side in images.shape[-2:])
        height, width = sizes[:, :, None, None].unbind(1)
        inside = (row[:, None] < height) & (column < width)
        pixels = images.float()
        if images.is_floating_point():
            pixels = pixels * 255
        mean, std = (x[:, None, None] for x in (self.mean, self.std))
        batch = torch.where(inside[:, None], (pixels - mean) / std, 0).flip(1)
        bottom, right = (-side % self.size_divisibility for side in images.shape[-2:])
        return F.pad(batch, (0, right, 0, bottom))


class Detector(nn.Module):
    """A one-stage detector.

    In training mode ``model(images, targets)`` returns the losses; in evaluation mode
    ``model(images)`` returns each image's detections in the pixels of that image.

    Args:
        preprocess: turns images into a batch.
        backbone: batch to C2..C5.
        neck: C2..C5 to P3..P7.
        head: P3..P7 to raw outputs.
    """

    def __init__(
        self, preprocess: Preprocess, backbone: nn.Module, neck: nn.Module, head: DenseHead
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.backbone = backbone
        self.neck = neck
        self.head = head

    def forward(
        self, images: Sequence[Tensor], targets: Targets | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses (training mode) or detections (evaluation mode).

        Args:
            images: tensors [3, H, W] each, RGB, float in 0..1 or uint8 in 0..255.
            targets: in training mode, each image's ``boxes`` [N, 4] float legacy xyxy in pixels
                and ``labels`` [N] int64 from 1.

        Raises:
            ValueError: no images, or an image or target of the wrong shape or type; in training
                also a missing target, a box that is not finite or ends before it begins, a label
                out of range, or (ConfigError) a batch that is too small for batch norms.
        """
        if len(images) == 0:
            raise ValueError("the list of images is empty")
        if self.training:
            targets = self._checked_targets(images, targets)
        batch, sizes = self.preprocess(images)
        if self.training:
            self._check_batch(batch)
        outputs = self.head(self.neck(self.backbone(batch)))
        if self.training:
            return self.head.losses(outputs, targets)
        return self.head.detect(outputs, sizes)

    def _checked_targets(
        self, images: Sequence[Tensor], targets: Targets | None
    ) -> list[dict[str, Tensor]]:
        """The targets, on their own device. Values are only checked on the CPU: reading those on a
        GPU would make the host wait."""
        if targets is None or len(targets) != len(images):
            given = "none" if targets is None else len(targets)
            raise ValueError(
                f"in training mode every image needs a target; {len(images)} images, {given} given"
            )
        checked = []
        for index, target in enumerate(targets):
            for key in ("boxes", "labels"):
                if not isinstance(target, Mapping) or not isinstance(target.get(key), Tensor):
                    raise ValueError(f"target {index}: {key!r} must be a tensor")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"target {index}: boxes must be [N, 4] and labels [N], not "
                    f"{list(boxes.shape)} and {list(labels.shape)}"
                )
            if labels.is_floating_point() and len(labels):
                raise ValueError(f"target {index}: labels must be integers, not {labels.dtype}")
            if boxes.device.type == "cpu" and len(boxes):
                self._check_values(boxes, labels, index)
            checked.append({"boxes": boxes.float(), "labels": labels.long()})
        return checked

    def _check_batch(self, batch: Tensor) -> None:
        """Refuse a batch whose C5 is a single position: a batch norm needs their deviation."""
        if len(batch) > 1 or max(batch.shape[-2:]) > C5_STRIDE:
            return
        if any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.modules()):
            raise ConfigError(
                f"training on a batch of one image of at most {C5_STRIDE} x {C5_STRIDE} pixels: "
                "batch norms need more than one position. Train on larger images "
                "(INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN) or on more of them at a time "
                "(SOLVER.IMS_PER_BATCH, SOLVER.ACCUMULATE)"
            )

    def _check_values(self, boxes: Tensor, labels: Tensor, index: int) -> None:
        good = torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
        if not good.all():
            bad = boxes[~good][0].tolist()
            raise ValueError(f"target {index}: box {bad} is not finite with x0 <= x1 and y0 <= y1")
        if labels.min() < 1 or labels.max() > self.head.num_classes:
            raise ValueError(
                f"target {index}: labels lie in {labels.min()}..{labels.max()}, but the model's "
                f"classes are 1..{self.head.num_classes}"
            )


def check_image(image: Tensor, index: int) -> None:
    """Check that an image is a tensor [3, H, W], float or uint8.

    Args:
        image: the image, RGB.
        index: its index in the batch, for messages.

    Raises:
        ValueError: it has another shape or type.
    """
    is_image = isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] == 3
    if not is_image or 0 in image.shape:
        what = f"shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image {index} must be a tensor [3, H, W], not {what}")
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ValueError(f"image {index} must be float in 0..1 or uint8, not {image.dtype}")
