"""Inputs of the benchmarks: synthetic images, targets and head outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.heads.locations import STRIDES

NUM_CLASSES = 80
OBJECTS = 10
"""Number of objects in a typical image; COCO has seven on average."""


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator: its numbers are the same on every machine and for every device."""
    return torch.Generator().manual_seed(seed)


def smooth_image(height: int, width: int, seed: int = 0) -> Tensor:
    """An image [3, height, width], float32 in 0..1: noise at all scales, mostly coarse."""
    random = generator(seed)
    total = torch.zeros(1, 3, height, width)
    for octave in range(1, 8):
        grid = torch.rand(1, 3, 2**octave + 1, 2**octave + 1, generator=random) - 0.5
        size = (height, width)
        total += F.interpolate(grid, size, mode="bicubic", align_corners=True) / octave
    total += 0.2 * (torch.rand(1, 3, height, width, generator=random) - 0.5)
    return (0.5 + 0.6 * total[0]).clamp(0, 1)


def random_target(
    height: int,
    width: int,
    objects: int = OBJECTS,
    classes: int = NUM_CLASSES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """A random target: `boxes` [objects, 4] float32 xyxy in the image, `labels` [objects] from 1.

    Sides are distributed log-uniformly from 16 pixels to two thirds of the short side of the image.
    """
    random = generator(seed)
    short = min(height, width)
    largest = math.log(max(2 / 3 * short / 16, 1.0))
    sides = 16 * torch.exp(largest * torch.rand(objects, 2, generator=random))
    sides = sides.clamp(max=short - 2)
    room = torch.tensor([width - 1.0, height - 1.0]) - sides
    corner = room * torch.rand(objects, 2, generator=random)
    return {
        "boxes": torch.cat((corner, corner + sides), dim=1).to(device),
        "labels": torch.randint(1, classes + 1, (objects,), generator=random).to(device),
    }


def map_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of P3..P7 for an image of this size."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]


def head_outputs(
    height: int,
    width: int,
    images: int = 1,
    objects: int = 30,
    classes: int = NUM_CLASSES,
    anchors: int = 1,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Maps like those of a trained head: confident in the middle of objects, low elsewhere.

    Each object looks a little like a second class.

    Returns:
        Three lists by level (P3 first), float32: class logits [images, anchors * classes, H, W],
        distances to the sides of the box [images, 4, H, W] in pixels, and centerness logits
        [images, 1, H, W].
    """
    random = generator(seed)
    logits, distances, centerness = [], [], []
    for stride, shape in zip(STRIDES, map_shapes(height, width), strict=True):
        size = (images, anchors * classes, *shape)
        logits.append(-7 + torch.randn(size, generator=random))
        noise = torch.randn((images, 4, *shape), generator=random)
        distances.append(4 * stride * torch.exp(0.3 * noise))
        centerness.append(torch.randn((images, 1, *shape), generator=random))
    for image in range(images):
        target = random_target(height, width, objects, classes, seed + 1 + image)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            reach = max(box[2] - box[0], box[3] - box[1])
            level = min(max(math.ceil(math.log2(reach / 128)), 0), len(STRIDES) - 1)
            stride = STRIDES[level]
            columns, rows = (
                slice(int((box[i] * 3 + box[i + 2]) / 4 / stride),
                      int((box[i] + box[i + 2] * 3) / 4 / stride) + 1)
                for i in (0, 1)
            )  # fmt: skip
            for anchor in range(anchors):
                for similar, mean in ((label - 1, -1), (label % classes, -3)):
                    place = logits[level][image, anchor * classes + similar, rows, columns]
                    place.copy_(mean + 2 * torch.randn(place.shape, generator=random))
            y, x = (
                (torch.arange(n, dtype=torch.float32) + 0.5)[part] * stride
                for n, part in zip(logits[level].shape[-2:], (rows, columns), strict=True)
            )
            there = distances[level][image, :, rows, columns]
            exact = torch.stack(
                (
                    (x - box[0])[None].expand(len(y), -1),
                    (y - box[1])[:, None].expand(-1, len(x)),
                    (box[2] - x)[None].expand(len(y), -1),
                    (box[3] - y)[:, None].expand(-1, len(x)),
                )
            )
            jitter = 1 + 0.05 * torch.randn(there.shape, generator=random)
            there.copy_(exact.clamp(min=1) * jitter)
            centerness[level][image, 0, rows, columns] += 2
    return logits, distances, centerness


def count_candidates(logits: list[Tensor], threshold: float = 0.05) -> int:
    """Number of class probabilities above the threshold, in the maps of all levels."""
    return sum(int((x.sigmoid() > threshold).sum()) for x in logits)
