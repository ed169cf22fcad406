"""Base of the dense heads: their interface, prediction layers and classification loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops import sigmoid_focal_loss
from ...transfer import to_device
from ..layers import Conv3x3
from . import sparse, static
from .locations import Locations, flatten_levels, flatten_map
from .post_process import Detections, PostProcess

Targets = Sequence[dict[str, Tensor]]
"""Each image's ``boxes`` [N, 4] legacy xyxy in pixels and ``labels`` [N] int64 from 1."""


@dataclass(frozen=True)
class Assignment:
    """What a head should predict for N images, at the L priors of all levels.

    Attributes:
        labels: [N, L] int64; 0 is background, -1 is ignored.
        box_targets: [N, L, 4], the values that the box branch should predict; undefined where the
            label is not positive.
    """

    labels: Tensor
    box_targets: Tensor

    def box_pairs(self, maps: Sequence[Tensor], fill: float) -> tuple[Tensor, Tensor]:
        """Box predictions and targets, [N, L, 4] each, at least float32.

        Entries that are not positive are `fill` in both, so they add nothing to a loss; a boolean
        mask would make the host wait for a GPU.

        Args:
            maps: predictions [N, A * 4, H, W] of each level, for A priors per location.
            fill: a value at which the loss of equal boxes is zero.
        """
        positive = (self.labels > 0)[..., None]
        predicted = at_least_single(flatten_levels(maps, 4))
        targets = self.box_targets.to(predicted.dtype)
        return torch.where(positive, predicted, fill), torch.where(positive, targets, fill)


class LossTerm(NamedTuple):
    """A loss of a batch, and the divisor that normalised it (0 where nothing contributes).

    The loss of several batches as one is the mean of their losses, weighted by `weight`.
    """

    loss: Tensor
    weight: Tensor


class DenseHead(nn.Module, ABC):
    """Base of the heads: `forward` gives raw outputs, `losses` and `detect` use them.

    Args:
        num_classes: number of object classes, without background.
        focal_gamma, focal_alpha: parameters of the focal loss (Lin et al., 2017, equation 5).
        post_process: settings of post-processing.
    """

    def __init__(
        self, num_classes: int, focal_gamma: float, focal_alpha: float, post_process: PostProcess
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.focal_gamma = focal_gamma
        self.focal_alpha = focal_alpha
        self.post_process = post_process

    @abstractmethod
    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """The raw outputs for P3..P7 [N, C, H, W], with A priors per location.

        Returns:
            lists over the levels: class logits [N, A * classes, H, W], box predictions
            [N, A * 4, H, W] (see `decode`) and, optionally, logits of a factor of the scores
            [N, A, H, W].
        """

    @abstractmethod
    def priors(self, locations: Locations) -> Tensor:
        """The priors [K * A, D] of K locations: what their predictions are relative to."""

    @abstractmethod
    def decode(self, predictions: Tensor, priors: Tensor) -> Tensor:
        """Legacy boxes [..., 4] from predictions [..., 4] and their priors [..., D]."""

    @abstractmethod
    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """What to predict on maps with the given (height, width). Does not wait for a GPU."""

    @abstractmethod
    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """The named loss terms of a batch, normalised over this process's images."""

    def class_loss(self, logits: Sequence[Tensor], labels: Tensor) -> LossTerm:
        """The focal loss over all levels, divided by the number of positives plus images.

        Args:
            logits: [N, A * classes, H, W] of each level.
            labels: [N, L] as in `Assignment`.
        """
        # Level by level, so that channels-last maps need no copy.
        parts = labels.split([x[0].numel() // self.num_classes for x in logits], dim=1)
        total = sum(
            sigmoid_focal_loss(
                flatten_map(x, self.num_classes).flatten(0, 1),
                part.flatten(),
                gamma=self.focal_gamma,
                alpha=self.focal_alpha,
            )
            for x, part in zip(logits, parts, strict=True)
        )
        examples = (labels > 0).sum() + len(labels)
        return LossTerm(total / examples, examples)

    def losses(self, outputs: tuple[list[Tensor], ...], targets: Targets) -> dict[str, Tensor]:
        """The named losses (scalars) of a batch, from the raw outputs."""
        shapes = [tuple(x.shape[-2:]) for x in outputs[0]]
        terms = self.loss_terms(outputs, self.assign(shapes, targets))
        return {name: term.loss for name, term in terms.items()}

    def detect(
        self, outputs: tuple[list[Tensor], ...], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Each image's detections, from the raw outputs. The host waits for a GPU once.

        Args:
            outputs: as `forward` returns them.
            sizes: (height, width) of the images before padding.
        """
        device = outputs[0][0].device
        if device.type == "cpu":
            return sparse.detect(self, outputs, sizes)
        return static.detect(self, outputs, to_device(torch.tensor(sizes), device)).to_list()


def padded_targets(targets: Targets, device: torch.device) -> tuple[Tensor, Tensor]:
    """The boxes [N, M, 4] and labels [N, M] of all images on `device`.

    M is the largest number of boxes of an image, at least one. Padding has label 0 and empty boxes,
    which contain no location and overlap nothing.
    """
    most = max(1, *(len(target["boxes"]) for target in targets))
    source = targets[0]["boxes"].device
    boxes = torch.zeros(len(targets), most, 4, device=source)
    boxes[..., 2:] = -1
    labels = torch.zeros(len(targets), most, dtype=torch.int64, device=source)
    for index, target in enumerate(targets):
        boxes[index, : len(target["boxes"])] = target["boxes"]
        labels[index, : len(target["labels"])] = target["labels"]
    return to_device(boxes, device), to_device(labels, device)


def prediction_layer(in_channels: int, out_channels: int, bias: float = 0.0) -> Conv3x3:
    """A 3x3 conv [N, C, H, W] to [N, C', H, W] whose initial outputs are close to `bias`."""
    conv = Conv3x3(in_channels, out_channels)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def prior_bias(probability: float) -> float:
    """The logit of a probability."""
    return -math.log((1 - probability) / probability)


def at_least_single(x: Tensor) -> Tensor:
    """`x` in float32 if its precision is lower: boxes and losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
