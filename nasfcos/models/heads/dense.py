"""What dense heads share: prediction layers, the classification loss, and how they detect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops import sigmoid_focal_loss
from ...transfer import to_device
from ..layers import Conv3x3
from .cells import (
    Cells,
    all_cells,
    cells_above,
    flatten_levels,
    flatten_map,
    nonzero,
    read_cells,
    take,
)
from .post_process import Candidates, Detections, PostProcess, Ranked

Targets = Sequence[dict[str, Tensor]]
"""For each image ``boxes`` [N, 4] legacy xyxy in pixels and ``labels`` [N] int64 from 1."""


@dataclass(frozen=True)
class Assignment:
    """What a head should predict for N images, at the L places of all their levels.

    Attributes:
        labels: [N, L] int64, 0 background, -1 ignored.
        wanted: [N, L, 4] what the head should predict of the boxes; means nothing but where there
            is an object.
    """

    labels: Tensor
    wanted: Tensor

    def pairs(self, maps: Sequence[Tensor], fill: float) -> tuple[Tensor, Tensor]:
        """What all levels' maps [N, places * 4, H, W] predict of the boxes, and what is wanted,
        [N, L, 4] each, in single precision or double.

        Places without an object hold `fill` in both: all take part, since how many have one, and
        which, only the device knows.
        """
        positive = (self.labels > 0)[..., None]
        predicted = at_least_single(flatten_levels(maps, 4))
        wanted = self.wanted.to(predicted.dtype)
        return torch.where(positive, predicted, fill), torch.where(positive, wanted, fill)


class LossTerm(NamedTuple):
    """A loss of a batch, and what its sum over the batch was divided by (0: it has no places).

    The term of several batches as one is the mean of theirs with these weights.
    """

    loss: Tensor
    weight: Tensor


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
        """The raw outputs, each a list over the levels P3..P7: the class logits
        [N, places * classes, H, W], what the boxes are decoded from [N, places * 4, H, W], and
        perhaps the logits of a factor of the scores [N, places, H, W]."""
        raise NotImplementedError

    def places(self, cells: Cells) -> Tensor:
        """What boxes are decoded with, [K * places, D], of K cells."""
        raise NotImplementedError

    def decode(self, predictions: Tensor, places: Tensor) -> Tensor:
        """The boxes [P, 4] that are predicted [P, 4] at places [P, D]."""
        raise NotImplementedError

    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """What to predict on maps of these (height, width). Nothing waits for a GPU."""
        raise NotImplementedError

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """The named loss terms of a batch, normalised over this process's images."""
        raise NotImplementedError

    def class_loss(self, logits: Sequence[Tensor], labels: Tensor) -> LossTerm:
        """The focal loss of all levels' logits, over positives + images.

        Level by level, so that maps that lie channels last are not copied.
        """
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
        """The named losses (scalars) of a batch: its `loss_terms` for what `assign` says."""
        shapes = [tuple(x.shape[-2:]) for x in outputs[0]]
        terms = self.loss_terms(outputs, self.assign(shapes, targets))
        return {name: term.loss for name, term in terms.items()}

    def detect(
        self, outputs: tuple[list[Tensor], ...], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Each image's detections; `sizes` are (height, width) before padding. A GPU is waited for
        once."""
        device = outputs[0][0].device
        if device.type == "cpu":
            return self.post_process.finish(self.candidates(outputs, len(sizes)), sizes)
        return self.rank(outputs, to_device(torch.tensor(sizes), device)).detections()

    def candidates(self, outputs: tuple[list[Tensor], ...], images: int) -> Candidates:
        """What may become detections, from outputs on the CPU.

        The maps are read once and as they lie, channels last or not: most cells have no class
        above the threshold, and only the others are looked at closer.
        """
        logits, box_maps, *factor_maps = outputs
        limit = self.post_process.limit
        cells = cells_above(logits, limit)
        classes = read_cells(logits, cells, self.num_classes)
        found = nonzero((classes > limit).flatten())
        row, label = found // self.num_classes, found % self.num_classes
        scores = classes.flatten()[found].sigmoid()
        for maps in factor_maps:
            scores = scores * read_cells(maps, cells, 1).flatten()[row].sigmoid()
        numbers = nonzero(scores >= 0)
        if len(numbers) < len(scores):  # a factor is NaN
            row, label, scores = (x[numbers] for x in (row, label, scores))
        cell = row // (logits[0].shape[1] // self.num_classes)
        image, level = cells.image[cell], cells.level[cell]
        selected = self.post_process.select(scores, level * images + image, len(logits) * images)
        if selected is not None:
            image, row, label, scores = (x[selected] for x in (image, row, label, scores))
        boxes = self.decode(read_cells(box_maps, cells, 4)[row], self.places(cells)[row])
        return Candidates(image, boxes, scores, label + 1)

    def rank(self, outputs: tuple[list[Tensor], ...], sizes: Tensor) -> Ranked:
        """What may become detections, and which do: the same as of `candidates`, but in shapes that
        do not depend on values, so that nothing waits for a GPU. `sizes` [N, 2] are as in
        `detect`."""
        logits, box_maps, *factor_maps = outputs
        counts = [x[0].numel() // self.num_classes for x in logits]
        flat = flatten_levels(logits, self.num_classes)
        factor = torch.ones_like(flat[..., 0], dtype=torch.float32)
        for maps in factor_maps:
            factor = factor * flatten_levels(maps, 1).squeeze(2).float().sigmoid()
        place, label, scores = self.post_process.best_of_levels(flat, factor, counts)
        predictions = take(flatten_levels(box_maps, 4), place)
        places = self.places(all_cells([tuple(x.shape[-2:]) for x in logits], place.device))
        boxes = self.decode(predictions.float(), places[place])
        return self.post_process.rank(boxes, scores, label + 1, sizes)


def padded_targets(targets: Targets, device: torch.device) -> tuple[Tensor, Tensor]:
    """The boxes [N, M, 4] and labels [N, M] of all images, M the most of any (at least one): empty
    boxes of label 0, which hold no place and overlap with nothing, make up the rest."""
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
    """A 3x3 conv that starts by predicting `bias` nearly everywhere."""
    conv = Conv3x3(in_channels, out_channels)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def prior_bias(probability: float) -> float:
    """The logit of a probability."""
    return -math.log((1 - probability) / probability)


def at_least_single(x: Tensor) -> Tensor:
    """In float32 where the precision is lower: boxes and losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
