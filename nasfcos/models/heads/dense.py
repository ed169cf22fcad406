"""What dense heads share: prediction layers, the choice of candidates, and their NMS.

A *cell* is one position of a map. It holds one *place* (FCOS) or as many as it has anchors; the
predictions of a map [N, places * C, H, W] are those of its places in the order (y, x, place).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...boxes import clip_boxes
from ...ops import batched_nms, sigmoid_focal_loss
from ...transfer import to_device

Detections = dict[str, Tensor]
"""``boxes`` [N, 4] legacy xyxy in pixels, ``scores`` [N], ``labels`` [N] from 1; best first."""

Targets = Sequence[dict[str, Tensor]]
"""For each image ``boxes`` [N, 4] legacy xyxy in pixels and ``labels`` [N] int64 from 1."""

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3..P7 in pixels."""


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


class LossTerm(NamedTuple):
    """A loss of a batch, and what its sum over the batch was divided by (0: it has no places).

    The term of several batches as one is the mean of theirs with these weights.
    """

    loss: Tensor
    weight: Tensor


class Cells(NamedTuple):
    """Some cells of the maps of N images, level after level, in order.

    Attributes:
        counts: how many there are of each level.
        index: [K] int64 into the N * H * W of each one's level.
        image, level, stride: [K] int64.
        corner: [K, 2] float32, the upper left corner (x, y) in pixels.
    """

    counts: list[int]
    index: Tensor
    image: Tensor
    level: Tensor
    stride: Tensor
    corner: Tensor


class Candidates(NamedTuple):
    """Predictions of some images that may become detections.

    Attributes:
        image: [P] int64, the image of each.
        boxes: [P, 4] xyxy in pixels.
        scores: [P].
        labels: [P] int64 from 1.
    """

    image: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


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

    def select(self, scores: Tensor, group: Tensor, groups: int) -> Tensor | None:
        """The candidates that are passed on: the best of each level of each image.

        A GPU is waited for once, where there are more than a level may pass on.

        Args:
            scores: [P] of the candidates.
            group: [P] int64, ascending: level and image of each candidate as one number.
            groups: how many such numbers there are.

        Returns:
            ascending indices, or None where all are passed on.
        """
        if len(scores) <= self.pre_nms_top_n:
            return None
        every = torch.arange(groups + 1, device=group.device)
        counts = torch.searchsorted(group, every).diff().tolist()
        if max(counts) <= self.pre_nms_top_n:
            return None
        selected, start = [], 0
        for part, count in zip(scores.split(counts), counts, strict=True):
            if count > self.pre_nms_top_n:
                best = part.topk(self.pre_nms_top_n, sorted=False).indices.sort().values
            else:
                best = torch.arange(count, device=scores.device)
            selected.append(best + start)
            start += count
        return torch.cat(selected)

    def finish(
        self, candidates: Candidates, sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """The detections among all images' candidates; `sizes` are the images' (height, width).

        A GPU is waited for twice, however many images there are.
        """
        image, boxes, scores, labels = candidates
        if len(scores) == 0:
            return [{"boxes": boxes, "scores": scores, "labels": labels} for _ in sizes]
        height, width = to_device(torch.tensor(sizes), boxes.device)[image].unbind(1)
        boxes = clip_boxes(boxes, height, width)
        class_of_image = image * 2**32 + labels
        keep = batched_nms(boxes, scores, class_of_image, self.nms_iou, legacy=True)

        image, by_image = image[keep].sort(stable=True)
        keep = keep[by_image]
        own = image == torch.arange(len(sizes), device=image.device)[:, None]
        found = own.sum(1)
        start = found.cumsum(0) - found
        ranked = scores[keep]
        last = ranked[(start + found.clamp(max=self.detections_per_image) - 1).clamp(min=0)]
        count = (own & (ranked >= last[:, None])).sum(1)
        results = []
        for first, length in torch.stack((start, count), dim=1).tolist():
            best = keep[first : first + length]
            results.append({"boxes": boxes[best], "scores": scores[best], "labels": labels[best]})
        return results


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
        """Each image's detections; `sizes` are (height, width) before padding.

        The maps are read once and as they lie, channels last or not: most cells have no class
        above the threshold, and only the others are looked at closer.
        """
        logits, box_maps, *factor_maps = outputs
        limit = threshold_logit(self.post_process.score_threshold)
        cells = cells_above(logits, limit)
        classes = read_cells(logits, cells, self.num_classes)
        found = nonzero((classes > limit).flatten())
        row, label = found // self.num_classes, found % self.num_classes
        scores = classes.flatten()[found].sigmoid()
        for maps in factor_maps:
            scores = scores * read_cells(maps, cells, 1).flatten()[row].sigmoid()
        cell = row // (logits[0].shape[1] // self.num_classes)
        image, level = cells.image[cell], cells.level[cell]
        groups = len(logits) * len(sizes)
        selected = self.post_process.select(scores, level * len(sizes) + image, groups)
        if selected is not None:
            image, row, label, scores = (x[selected] for x in (image, row, label, scores))
        boxes = self.decode(read_cells(box_maps, cells, 4)[row], self.places(cells)[row])
        return self.post_process.finish(Candidates(image, boxes, scores, label + 1), sizes)


@functools.cache
def threshold_logit(probability: float) -> float:
    """The largest float32 logit whose probability (in float32) is not above this one."""

    def logit(index: int) -> float:  # all float32 numbers in ascending order, 0 at 0
        return math.copysign(np.int32(abs(index)).view(np.float32), index)

    def is_above(index: int) -> bool:
        power = math.exp(-abs(logit(index)))
        return np.float32((power if index < 0 else 1) / (1 + power)) > np.float32(probability)

    infinity = int(np.float32(np.inf).view(np.int32))
    first = bisect.bisect_left(range(-infinity, infinity + 1), True, key=is_above) - infinity
    return logit(first - 1) if first > -infinity else -math.inf


def cells_above(logits: Sequence[Tensor], limit: float) -> Cells:
    """The cells of each map [N, C, H, W] in which any channel is above `limit`."""
    best = torch.cat([x.amax(dim=1).flatten() for x in logits])
    index = nonzero(best.float() > limit)
    ends = np.cumsum([len(x) * x.shape[2] * x.shape[3] for x in logits])
    bounds = torch.searchsorted(index, to_device(torch.from_numpy(ends), index.device))
    counts = np.diff(bounds.tolist(), prepend=0).tolist()
    return locate_cells(index, counts, [x.shape for x in logits])


def locate_cells(index: Tensor, counts: list[int], shapes: Sequence[torch.Size]) -> Cells:
    """Cells by their indices [K] into those of all maps [N, C, H, W], one map after the other."""
    rows, start = [], 0
    for level, (images, _, height, width) in enumerate(shapes):
        rows.append((start, height * width, width, level, STRIDES[level]))
        start += images * height * width
    table = torch.from_numpy(np.repeat(np.array(rows), counts, axis=0))
    start, size, width, level, stride = to_device(table, index.device).unbind(1)
    index = index - start
    cell = index % size
    corner = torch.stack((cell % width * stride, cell // width * stride), dim=1).float()
    return Cells(counts, index, index // size, level, stride, corner)


def read_cells(maps: Sequence[Tensor], cells: Cells, channels: int) -> Tensor:
    """The values of maps [N, places * channels, H, W] at some cells: [K * places, channels]
    float32."""
    rows = []
    for x, index in zip(maps, cells.index.split(cells.counts), strict=True):
        x = x.flatten(2).transpose(1, 2)
        if x.is_contiguous():  # then whole rows can be copied
            rows.append(x.flatten(0, 1).index_select(0, index))
        else:
            rows.append(x[index // x.shape[1], index % x.shape[1]])
    return torch.cat(rows).unflatten(1, (-1, channels)).flatten(0, 1).float()


def all_cells(shapes: Sequence[tuple[int, int]], device: torch.device) -> Cells:
    """All cells of maps of these (height, width) for one image."""
    counts = [height * width for height, width in shapes]
    index = torch.arange(sum(counts), device=device)
    return locate_cells(index, counts, [(1, 0, *shape) for shape in shapes])


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


def nonzero(mask: Tensor) -> Tensor:
    """The indices [K] of the true elements of a mask [L]."""
    if mask.device.type == "cpu":  # ten times as fast as torch's
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


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
    """Maps [N, A * C, H, W] of all levels as [N, sum of H * W * A, C], in the order (y, x, a) and
    at least in single precision."""
    return at_least_single(torch.cat([flatten_map(x, channels) for x in maps], dim=1))


def flatten_map(x: Tensor, channels: int) -> Tensor:
    """A map [N, A * C, H, W] as [N, H * W * A, C], in the order (y, x, a)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, channels)


def at_least_single(x: Tensor) -> Tensor:
    """In float32 where the precision is lower: boxes and losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
