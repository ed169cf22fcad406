"""What dense heads share: prediction layers, the choice of candidates, and their NMS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...boxes import clip_boxes
from ...ops import batched_nms

Detections = dict[str, Tensor]
"""``boxes`` [N, 4] legacy xyxy in pixels, ``scores`` [N], ``labels`` [N] from 1; best first."""

Targets = Sequence[dict[str, Tensor]]
"""For each image ``boxes`` [N, 4] legacy xyxy in pixels and ``labels`` [N] int64 from 1."""

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3..P7 in pixels."""


@dataclass(frozen=True)
class Assignment:
    """What a head should predict for N images, at the L places (or anchors) of all their levels.

    Attributes:
        labels: [N, L] int64, 0 background, -1 ignored.
        positive: [P] int64, the places of objects, ascending indices into the N * L.
        wanted: [P, 4] what the head should predict of the boxes there.
    """

    labels: Tensor
    positive: Tensor
    wanted: Tensor


class LossTerm(NamedTuple):
    """A loss of a batch, and what its sum over the batch was divided by (0: it has no places).

    The term of several batches as one is the mean of theirs with these weights.
    """

    loss: Tensor
    weight: Tensor | float


@dataclass(frozen=True)
class PostProcess:
    """How predictions become detections (numbers of the released models by default).

    Attributes:
        score_threshold: class probabilities at or below this are dropped.
        pre_nms_top_n: candidates that each level passes on.
        nms_iou: legacy IoU at which NMS suppresses within a class.
        detections_per_image: the best that are kept; ties with the last of them stay too.
    """

    score_threshold: float = 0.05
    pre_nms_top_n: int = 1000
    nms_iou: float = 0.6
    detections_per_image: int = 100

    def select(self, probabilities: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        """The best candidates of one image and level.

        Args:
            probabilities: [L, C] of each location (or anchor) and class.
            weight: [L] factor of the score, or None.

        Returns:
            scores [K], location indices [K] and labels [K] (from 1), best first.
        """
        location, label = (probabilities > self.score_threshold).nonzero(as_tuple=True)
        scores = probabilities[location, label]
        if weight is not None:
            scores = scores * weight[location]
        scores, best = scores.topk(min(self.pre_nms_top_n, len(scores)))
        return scores, location[best], label[best] + 1

    def finish(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> Detections:
        """The detections among one image's candidates of all levels; `size` is (height, width)."""
        boxes = clip_boxes(boxes, *size)
        keep = batched_nms(boxes, scores, labels, self.nms_iou, legacy=True)
        if len(keep) > self.detections_per_image:
            last = scores[keep[self.detections_per_image - 1]]
            keep = keep[scores[keep] >= last]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


class Candidates:
    """Collects a batch's candidates level by level, then makes them detections.

    Args:
        post_process: how predictions become detections.
        sizes: (height, width) of each image before padding.
    """

    def __init__(self, post_process: PostProcess, sizes: Sequence[tuple[int, int]]) -> None:
        self.post_process = post_process
        self.sizes = sizes
        self._levels: list[list[tuple[Tensor, ...]]] = [[] for _ in sizes]

    def add(
        self,
        probabilities: Tensor,
        decode: Callable[[int, Tensor], Tensor],
        weight: Tensor | None = None,
    ) -> None:
        """Choose among one level's predictions.

        Args:
            probabilities: [N, L, C] of each location (or anchor) and class.
            decode: gives the boxes [K, 4] of an image's (index) chosen locations [K].
            weight: [N, L] factor of the score, or None.
        """
        for image, levels in enumerate(self._levels):
            image_weight = None if weight is None else weight[image]
            scores, where, labels = self.post_process.select(probabilities[image], image_weight)
            levels.append((decode(image, where), scores, labels))

    def finish(self) -> list[Detections]:
        """Each image's detections."""
        return [
            self.post_process.finish(*map(torch.cat, zip(*levels, strict=True)), size)
            for levels, size in zip(self._levels, self.sizes, strict=True)
        ]


class DenseHead(nn.Module):
    """Base of the heads: `forward` gives raw outputs, `losses` and `detect` use them.

    Args:
        num_classes: object classes, background not counted.
        focal_gamma, focal_alpha: of the classification loss.
        post_process: how predictions become detections.
    """

    def __init__(
        self, num_classes: int, focal_gamma: float, focal_alpha: float, post_process: PostProcess
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.focal_gamma = focal_gamma
        self.focal_alpha = focal_alpha
        self.post_process = post_process

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """The raw outputs, each a list over the levels P3..P7."""
        raise NotImplementedError

    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """What to predict for targets on the head's device, on maps of these (height, width)."""
        raise NotImplementedError

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """The named loss terms of a batch, normalised over this process's images."""
        raise NotImplementedError

    def losses(self, outputs: tuple[list[Tensor], ...], targets: Targets) -> dict[str, Tensor]:
        """The named losses (scalars) of a batch: its `loss_terms` for what `assign` says."""
        shapes = [tuple(x.shape[-2:]) for x in outputs[0]]
        terms = self.loss_terms(outputs, self.assign(shapes, targets))
        return {name: term.loss for name, term in terms.items()}

    def detect(
        self, outputs: tuple[list[Tensor], ...], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Each image's detections; `sizes` are (height, width) before padding."""
        raise NotImplementedError


def prediction_layer(in_channels: int, out_channels: int, bias: float = 0.0) -> nn.Conv2d:
    """A 3x3 conv that starts by predicting `bias` nearly everywhere."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def prior_bias(probability: float) -> float:
    """The logit of a probability."""
    return -math.log((1 - probability) / probability)


def flatten_levels(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Maps [N, A * C, H, W] of all levels as [N, sum of H * W * A, C], in the order (y, x, a)."""
    return torch.cat([flatten_map(x, channels) for x in maps], dim=1)


def flatten_map(x: Tensor, channels: int) -> Tensor:
    """A map [N, A * C, H, W] as [N, H * W * A, C], in the order (y, x, a)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, channels)
