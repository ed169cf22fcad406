"""The FCOS head (Tian et al., 2019) as the released models train and test it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ...boxes import legacy_areas
from ...ops import sigmoid_focal_loss
from ..layers import Scale, group_norm
from ..registry import HEADS
from .dense import (
    STRIDES,
    Assignment,
    Cells,
    DenseHead,
    LossTerm,
    PostProcess,
    Targets,
    flatten_levels,
    prediction_layer,
    prior_bias,
)
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
        size_limits: Sequence[float] = (64, 128, 256, 512),
        prior_prob: float = 0.01,
        focal_gamma: float = 2.0,
        focal_alpha: float = 0.25,
        post_process: PostProcess | None = None,
    ) -> None:
        super().__init__(num_classes, focal_gamma, focal_alpha, post_process or PostProcess())
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
            torch.exp(scale(self.box_pred(x)).float())
            for scale, x in zip(self.scales, box_maps, strict=True)
        ]
        return logits, distances, centerness

    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """`assign_fcos` of each image; wanted are the distances."""
        device = self.cls_logits.weight.device
        locations = [
            fcos_locations(*shape, stride, device)
            for shape, stride in zip(shapes, STRIDES, strict=True)
        ]
        assigned = [assign_fcos(locations, self.size_ranges, target) for target in targets]
        labels, distances = map(torch.stack, zip(*assigned, strict=True))
        positive = labels.flatten().nonzero().squeeze(1)
        return Assignment(labels, positive, distances.flatten(0, 1)[positive])

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """``loss_cls``, ``loss_box`` and ``loss_centerness`` (numerics of the release: focal loss
        over positives + images, centerness-weighted IoU loss over the sum of its weights, mean
        cross-entropy of centerness over positives)."""
        logits, distances, centerness = outputs
        positive, wanted = assignment.positive, assignment.wanted
        examples = len(positive) + len(assignment.labels)
        loss_cls = sigmoid_focal_loss(
            flatten_levels(logits, self.num_classes).flatten(0, 1),
            assignment.labels.flatten(),
            gamma=self.focal_gamma,
            alpha=self.focal_alpha,
        ) / examples

        predicted = flatten_levels(distances, 4).flatten(0, 1)[positive]
        center_logits = flatten_levels(centerness, 1).flatten()[positive].float()
        if len(positive) == 0:  # empty sums: zero, and every parameter keeps its gradient
            box_weight, loss_box, loss_centerness = 0.0, predicted.sum(), center_logits.sum()
        else:
            weight = centerness_targets(wanted)
            box_weight = weight.sum()
            loss_box = (iou_loss(predicted, wanted) * weight).sum() / box_weight
            loss_centerness = F.binary_cross_entropy_with_logits(center_logits, weight)
        return {
            "loss_cls": LossTerm(loss_cls, examples),
            "loss_box": LossTerm(loss_box, box_weight),
            "loss_centerness": LossTerm(loss_centerness, len(positive)),
        }

    def places(self, cells: Cells) -> Tensor:
        return cells.corner + (cells.stride // 2)[:, None]

    def decode(self, predictions: Tensor, places: Tensor) -> Tensor:
        return decode_fcos(places, predictions)


def fcos_locations(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """The image points (x, y) [height * width, 2] of a map's cells, row by row, in pixels."""
    x = torch.arange(width, device=device, dtype=torch.float32) * stride + stride // 2
    y = torch.arange(height, device=device, dtype=torch.float32) * stride + stride // 2
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x.flatten(), grid_y.flatten()), dim=1)


def decode_fcos(locations: Tensor, distances: Tensor) -> Tensor:
    """Boxes xyxy [..., 4] from points [..., 2] and distances (left, top, right, bottom)."""
    return torch.cat((locations - distances[..., :2], locations + distances[..., 2:]), dim=-1)


def assign_fcos(
    locations: Sequence[Tensor],
    size_ranges: Sequence[tuple[float, float]],
    target: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """What each location of one image should predict.

    A location is positive for a box when it lies strictly inside and the largest of its distances
    lies in its level's range (both ends included). Of several boxes the one of least legacy area
    wins, the first on a tie.

    Args:
        locations: per level [L, 2].
        size_ranges: per level (lowest, highest) of the largest distance, in pixels.
        target: ``boxes`` [M, 4], ``labels`` [M].

    Returns:
        labels [sum of L] (0: background) and distances [sum of L, 4]; those of background locations
        mean nothing.
    """
    points = torch.cat(list(locations))
    boxes, box_labels = target["boxes"], target["labels"]
    if len(boxes) == 0:
        return (
            torch.zeros(len(points), dtype=torch.int64, device=points.device),
            torch.zeros(len(points), 4, device=points.device),
        )
    counts = torch.tensor([len(x) for x in locations], device=points.device)
    limits = torch.tensor(size_ranges, device=points.device)
    lowest, highest = limits.repeat_interleave(counts, dim=0)[:, None].unbind(dim=2)
    to_sides = (points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None])
    distances = torch.cat(to_sides, dim=2)
    largest = distances.amax(dim=2)
    fits = (distances.amin(dim=2) > 0) & (largest >= lowest) & (largest <= highest)
    areas = legacy_areas(boxes)[None].expand(len(points), -1)
    areas = torch.where(fits, areas, torch.inf)
    winner = areas.argmin(dim=1)
    rows = torch.arange(len(points), device=points.device)
    labels = torch.where(fits[rows, winner], box_labels[winner], 0)
    return labels, distances[rows, winner]


def centerness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) [N] of positive distances [N, 4]."""
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]
    ratio = horizontal.amin(1) / horizontal.amax(1) * (vertical.amin(1) / vertical.amax(1))
    return ratio.sqrt()


def iou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """-log((I + 1) / (U + 1)) [N] of boxes given by their distances [N, 4] from one point each."""

    def area(distances: Tensor) -> Tensor:
        return (distances[:, 0] + distances[:, 2]) * (distances[:, 1] + distances[:, 3])

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
