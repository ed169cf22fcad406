"""The FCOS head (Tian et al., 2019) with the numerics of the released models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ..layers import Scale, group_norm
from ..registry import HEADS
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
from .fcos_assignment import assign_fcos
from .locations import STRIDES, Locations, all_locations, flatten_levels, take
from .post_process import PostProcess
from .towers import Tower, build_towers

UNBOUNDED = 1e8
"""Upper limit of P7's distances, in pixels."""


class FCOSHead(DenseHead):
    """Per location: class logits, the distances to the four sides of a box, and centerness.

    Args:
        channels: number of channels of the pyramid levels.
        num_classes: number of object classes, without background.
        cls_tower, box_tower: layers before the predictions; centerness is predicted from the
            classification tower.
        size_limits: the largest distance to a box side, in pixels, for which P3, P4, P5 and P6 are
            trained.
        prior_prob: foreground probability that the initial classifier predicts.
        focal_gamma, focal_alpha: parameters of the classification loss.
        post_process: settings of post-processing.
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
        """Raw outputs for P3..P7 [N, C, H, W].

        Returns:
            lists over the levels: logits [N, classes, H, W], distances [N, 4, H, W] in pixels
            (left, top, right, bottom; after the exponential) and centerness logits [N, 1, H, W].
        """
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
        """The assignment of `assign_fcos`; box targets are distances in pixels."""
        device = self.cls_logits.weight.device
        boxes, box_labels = padded_targets(targets, device)
        winner = assign_fcos(shapes, self.size_ranges, boxes)
        box = winner.clamp(min=0)
        labels = torch.where(winner < 0, 0, box_labels.gather(1, box))
        points = self.priors(all_locations(shapes, device))
        corners = take(boxes, box)
        distances = torch.cat((points - corners[..., :2], corners[..., 2:] - points), dim=2)
        return Assignment(labels, distances)

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """``loss_cls``, ``loss_box`` and ``loss_centerness``, normalised as in the release.

        Focal loss over positives + images; IoU loss, weighted by the centerness targets, over the
        sum of its weights; binary cross-entropy of centerness over positives.
        """
        logits, distances, centerness = outputs
        positive = assignment.labels > 0
        predicted, targets = assignment.box_pairs(distances, fill=1.0)
        weight = torch.where(positive, centerness_targets(targets), 0.0)
        box_weight, count = weight.sum(), positive.sum()
        loss_box = (iou_loss(predicted, targets) * weight).sum()
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

    def priors(self, locations: Locations) -> Tensor:
        """The points (x, y) [K, 2] of K locations, in pixels (FCOS, section 3.1)."""
        return locations.corner + (locations.stride // 2)[:, None]

    def decode(self, predictions: Tensor, priors: Tensor) -> Tensor:
        """Boxes [..., 4] from distances [..., 4] and points [..., 2], all in pixels."""
        return torch.cat((priors - predictions[..., :2], priors + predictions[..., 2:]), dim=-1)


def centerness_targets(distances: Tensor) -> Tensor:
    """Centerness [...] (FCOS, equation 3) of positive distances [..., 4] in pixels.

    ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``
    """
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    return (horizontal * (torch.minimum(top, bottom) / torch.maximum(top, bottom))).sqrt()


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """IoU loss [...] (UnitBox, Yu et al., 2016) of boxes given by distances [..., 4] from a point.

    ``-log((I + 1) / (U + 1))``, with I the intersection and U the union in square pixels; adding
    one is the release's.
    """

    def area(distances: Tensor) -> Tensor:
        left, top, right, bottom = distances.unbind(-1)
        return (left + right) * (top + bottom)

    intersection = area(torch.minimum(predicted, target))
    union = area(predicted) + area(target) - intersection
    return -torch.log((intersection + 1) / (union + 1))


@HEADS.register("fcos")
def build_fcos_head(cfg: CfgNode, num_classes: int, post_process: PostProcess) -> FCOSHead:
    """The FCOS head that MODEL.HEAD, MODEL.FCOS and MODEL.NECK.CHANNELS describe."""
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
