"""The FCOS head (Tian et al., 2019) as the released models train and test it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ...boxes import legacy_areas
from ...transfer import to_device
from ..layers import Scale, group_norm
from ..registry import HEADS
from .cells import STRIDES, Cells, all_cells, flatten_levels, take
from .dense import (
    Assignment,
    DenseHead,
    LossTerm,
    Targets,
    at_least_single,
    padded_targets,
    prediction_layer,
    prior_bias,
)
from .post_process import PostProcess
from .towers import Tower, build_towers

UNBOUNDED = 1e8


class FCOSHead(DenseHead):
    """Per location: class logits, the distances to the four sides of a box, and centerness.

    Args:
        channels: of the pyramid levels.
        num_classes: object classes, background not counted.
        cls_tower, box_tower: the layers before the predictions; centerness is predicted from the
            classification tower.
        size_limits: the largest box distance in pixels that P3, P4, P5 and P6 answer for.
        prior_prob: foreground probability that the fresh classifier predicts.
        focal_gamma, focal_alpha: of the classification loss.
        post_process: how predictions become detections.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        cls_tower: Tower,
        box_tower: Tower,
        size_limits: Sequence[float],
        prior_prob: float,
        focal_gamma: float,
        focal_alpha: float,
        post_process: PostProcess,
    ) -> None:
        super().__init__(num_classes, focal_gamma, focal_alpha, post_process)
        self.cls_tower = cls_tower
        self.box_tower = box_tower
        self.cls_logits = prediction_layer(channels, num_classes, prior_bias(prior_prob))
        self.box_pred = prediction_layer(channels, 4)
        self.centerness = prediction_layer(channels, 1)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)
        self.size_ranges = list(
            zip((-1.0, *size_limits), (*size_limits, UNBOUNDED), strict=True)
        )

    def forward(
        self, pyramid: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """P3..P7 [N, C, H, W] to logits [N, classes, H, W], distances [N, 4, H, W] in pixels
        (left, top, right, bottom; after the exponential) and centerness [N, 1, H, W], by level."""
        cls_maps = self.cls_tower(pyramid)
        box_maps = self.box_tower(pyramid)
        logits = [self.cls_logits(x) for x in cls_maps]
        centerness = [self.centerness(x) for x in cls_maps]
        distances = [
            torch.exp(at_least_single(scale(self.box_pred(x))))
            for scale, x in zip(self.scales, box_maps, strict=True)
        ]
        return logits, distances, centerness

    @torch.no_grad()
    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """`assign_fcos`; wanted are the distances."""
        device = self.cls_logits.weight.device
        boxes, box_labels = padded_targets(targets, device)
        winner = assign_fcos(shapes, self.size_ranges, boxes)
        box = winner.clamp(min=0)
        labels = torch.where(winner < 0, 0, box_labels.gather(1, box))
        points = self.places(all_cells(shapes, device))
        corners = take(boxes, box)
        distances = torch.cat((points - corners[..., :2], corners[..., 2:] - points), dim=2)
        return Assignment(labels, distances)

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """``loss_cls``, ``loss_box`` and ``loss_centerness`` (numerics of the release: focal loss
        over positives + images, centerness-weighted IoU loss over the sum of its weights, mean
        cross-entropy of centerness over positives)."""
        logits, distances, centerness = outputs
        positive = assignment.labels > 0
        predicted, wanted = assignment.pairs(distances, fill=1.0)
        weight = torch.where(positive, centerness_targets(wanted), 0.0)
        box_weight, count = weight.sum(), positive.sum()
        loss_box = (iou_loss(predicted, wanted) * weight).sum()
        loss_centerness = F.binary_cross_entropy_with_logits(
            at_least_single(flatten_levels(centerness, 1)).squeeze(2),
            weight,
            weight=positive.to(weight.dtype),
            reduction="sum",
        )
        return {
            "loss_cls": self.class_loss(logits, assignment.labels),
            "loss_box": LossTerm(loss_box / torch.where(count > 0, box_weight, 1.0), box_weight),
            "loss_centerness": LossTerm(loss_centerness / count.clamp(min=1), count),
        }

    def places(self, cells: Cells) -> Tensor:
        return cells.corner + (cells.stride // 2)[:, None]

    def decode(self, predictions: Tensor, places: Tensor) -> Tensor:
        return decode_fcos(places, predictions)


def decode_fcos(locations: Tensor, distances: Tensor) -> Tensor:
    """Boxes xyxy [..., 4] from points [..., 2] and distances (left, top, right, bottom)."""
    return torch.cat((locations - distances[..., :2], locations + distances[..., 2:]), dim=-1)


# Boxes are handled by words of as many as a float32 has bits to tell apart.
WORD = 24


def assign_fcos(
    shapes: Sequence[tuple[int, int]], size_ranges: Sequence[tuple[float, float]], boxes: Tensor
) -> Tensor:
    """The box that each location answers for.

    A location is positive for a box when it lies strictly inside and the largest of its distances
    lies in its level's range (both ends included). Of several boxes the one of least legacy area
    wins, the first on a tie.

    All of that is asked for each column and each row of a map, which gives a bit for each box; at a
    location those of its column and its row come together. So M boxes cost M / 24 words a location.

    Args:
        shapes: (height, width) of each level.
        size_ranges: per level (lowest, highest) of the largest distance, in pixels.
        boxes: [N, M, 4], M at least one.

    Returns:
        [N, sum of height * width] indices into M, -1 for background.
    """
    # From small to large: the winner is the first that fits.
    order = legacy_areas(boxes).argsort(dim=1, stable=True)
    padding = -boxes.shape[1] % WORD
    boxes = F.pad(take(boxes, order), (0, 0, 0, padding))
    columns = _along([width for _, width in shapes], size_ranges, boxes[..., 0::2])
    rows = _along([height for height, _ in shapes], size_ranges, boxes[..., 1::2])
    fits = []
    for (inside_x, far_x), (inside_y, far_y) in zip(columns, rows, strict=True):
        far = far_y[..., None] | far_x[..., None, :]
        fits.append((inside_y[..., None] & inside_x[..., None, :] & far).flatten(2))
    words = torch.cat(fits, dim=2)
    # The first box of a word is its highest bit, which the exponent of a float32 tells.
    exponent = words.float().view(torch.int32) >> 23
    first = 126 + WORD - exponent
    first += WORD * torch.arange(len(words[0]), dtype=torch.int32, device=words.device)[:, None]
    first = torch.where(words > 0, first, len(order[0])).amin(dim=1)
    return F.pad(order, (0, 1), value=-1).gather(1, first.long())


def _along(
    lengths: Sequence[int], size_ranges: Sequence[tuple[float, float]], sides: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """`assign_fcos` along one axis.

    Args:
        lengths: cells of each level along the axis.
        size_ranges: as there.
        sides: [N, M, 2] where boxes begin and end on the axis, M a multiple of `WORD`.

    Returns:
        for each level two words of bits [N, M / WORD, length]: which boxes a place lies inside, no
        side farther than the highest distance, and from which some side is at least as far as the
        lowest.
    """
    centres = [np.arange(n) * s + s // 2 for n, s in zip(lengths, STRIDES, strict=True)]
    limits = np.repeat(np.array(size_ranges).T, lengths, axis=1)
    table = np.stack((np.concatenate(centres), *limits)).astype(np.float32)
    table = to_device(torch.from_numpy(table), sides.device)
    centres, lowest, highest = table.unbind()
    before, after = centres - sides[..., :1], sides[..., 1:] - centres
    farthest = torch.maximum(before, after)
    inside = (torch.minimum(before, after) > 0) & (farthest <= highest)
    words = (_pack(x).split(list(lengths), dim=2) for x in (inside, farthest >= lowest))
    return list(zip(*words, strict=True))


def _pack(bits: Tensor) -> Tensor:
    """[N, M, S] bool as words [N, M / WORD, S] int32, the first bit highest."""
    value = 2 ** torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=bits.device)
    return (bits.unflatten(1, (-1, WORD)) * value[:, None]).sum(dim=2, dtype=torch.int32)


def centerness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) [...] of positive distances [..., 4]."""
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    return (horizontal * (torch.minimum(top, bottom) / torch.maximum(top, bottom))).sqrt()


def iou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """-log((I + 1) / (U + 1)) [...] of boxes given by their distances [..., 4] from a point."""

    def area(distances: Tensor) -> Tensor:
        left, top, right, bottom = distances.unbind(-1)
        return (left + right) * (top + bottom)

    intersection = area(torch.minimum(predicted, wanted))
    union = area(predicted) + area(wanted) - intersection
    return -torch.log((intersection + 1) / (union + 1))


@HEADS.register("fcos")
def build_fcos_head(cfg: CfgNode, num_classes: int, post_process: PostProcess) -> FCOSHead:
    head = cfg.MODEL.HEAD
    cls_tower, box_tower = build_towers(cfg, plain_norm=group_norm)
    return FCOSHead(
        cfg.MODEL.NECK.CHANNELS,
        num_classes,
        cls_tower,
        box_tower,
        size_limits=cfg.MODEL.FCOS.SIZE_LIMITS,
        prior_prob=head.PRIOR_PROB,
        focal_gamma=head.FOCAL_GAMMA,
        focal_alpha=head.FOCAL_ALPHA,
        post_process=post_process,
    )
