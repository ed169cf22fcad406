"""The RetinaNet head (Lin et al., 2017) with the numerics of the released models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..registry import HEADS
from .anchors import AMBIGUOUS, decode_boxes, encode_boxes, match_anchors, pyramid_anchors
from .dense import (
    Assignment,
    DenseHead,
    LossTerm,
    Targets,
    padded_targets,
    prediction_layer,
    prior_bias,
)
from .locations import STRIDES, Locations, all_locations, take
from .post_process import PostProcess
from .towers import Tower, build_towers

IGNORED = -1
"""Label of an anchor that is not trained."""


class RetinaNetHead(DenseHead):
    """Per anchor: class logits and the code of a box.

    Args:
        channels: number of channels of the pyramid levels.
        num_classes: number of object classes, without background.
        cls_tower, box_tower: layers before the predictions.
        anchors: [A, 4] for each level, the legacy boxes of the location at the origin.
        fg_iou, bg_iou: see `match_anchors`.
        smooth_l1_beta: difference of box codes at which the loss turns from quadratic to linear.
        box_loss_divisor: the box loss is divided by the number of positives times this.
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
        anchors: Sequence[Tensor],
        fg_iou: float,
        bg_iou: float,
        smooth_l1_beta: float,
        box_loss_divisor: float,
        prior_prob: float,
        focal_gamma: float,
        focal_alpha: float,
        post_process: PostProcess,
    ) -> None:
        super().__init__(num_classes, focal_gamma, focal_alpha, post_process)
        self.fg_iou = fg_iou
        self.bg_iou = bg_iou
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_divisor = box_loss_divisor
        self.cls_tower = cls_tower
        self.box_tower = box_tower
        # Part of the state dict, as in the release: weights only make sense with the anchors that
        # they were trained for.
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors{level}", boxes)
        num_anchors = len(anchors[0])
        self.cls_logits = prediction_layer(
            channels, num_anchors * num_classes, prior_bias(prior_prob)
        )
        self.box_pred = prediction_layer(channels, num_anchors * 4)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Raw outputs for P3..P7 [N, C, H, W].

        Returns:
            lists over the levels: logits [N, anchors * classes, H, W] and box codes
            [N, anchors * 4, H, W].
        """
        logits = [self.cls_logits(x) for x in self.cls_tower(pyramid)]
        codes = [self.box_pred(x) for x in self.box_tower(pyramid)]
        return logits, codes

    def anchors(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Legacy boxes [height * width * anchors, 4] of each level, in the order (y, x, anchor).

        Args:
            shapes: (height, width) of each level.
        """
        locations = all_locations(shapes, self.cls_logits.weight.device)
        anchors = self.priors(locations)
        per_location = len(anchors) // len(locations.index)
        return list(anchors.split([count * per_location for count in locations.counts]))

    @torch.no_grad()
    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """The matches of `match_anchors` for each image; box targets are box codes."""
        anchors = torch.cat(self.anchors(shapes))
        boxes, box_labels = padded_targets(targets, anchors.device)
        match = torch.stack(
            [
                match_anchors(anchors, own[: len(target["boxes"])], self.fg_iou, self.bg_iou)
                for own, target in zip(boxes, targets, strict=True)
            ]
        )
        box = match.clamp(min=0)
        labels = torch.where(match == AMBIGUOUS, IGNORED, 0)
        labels = torch.where(match >= 0, box_labels.gather(1, box), labels)
        return Assignment(labels, encode_boxes(take(boxes, box), anchors))

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """``loss_cls`` (focal, over positives + images) and ``loss_box`` (smooth L1)."""
        logits, codes = outputs
        predicted, targets = assignment.box_pairs(codes, fill=0.0)
        box_weight = (assignment.labels > 0).sum() * self.box_loss_divisor
        loss_box = nn.functional.smooth_l1_loss(
            predicted, targets, beta=self.smooth_l1_beta, reduction="sum"
        )
        return {
            "loss_cls": self.class_loss(logits, assignment.labels),
            "loss_box": LossTerm(loss_box / box_weight.clamp(min=1), box_weight),
        }

    def priors(self, locations: Locations) -> Tensor:
        """The anchors [K * A, 4] of K locations, as legacy boxes in pixels."""
        anchors = torch.stack([self.get_buffer(f"anchors{level}") for level in range(len(STRIDES))])
        return (locations.corner.repeat(1, 2)[:, None] + anchors[locations.level]).flatten(0, 1)

    def decode(self, predictions: Tensor, priors: Tensor) -> Tensor:
        """Legacy boxes [..., 4] from box codes [..., 4] and anchors [..., 4]."""
        return decode_boxes(predictions, priors)


@HEADS.register("retinanet")
def build_retinanet_head(
    cfg: CfgNode, num_classes: int, post_process: PostProcess
) -> RetinaNetHead:
    """The RetinaNet head that MODEL.HEAD, MODEL.RETINANET and MODEL.NECK.CHANNELS describe."""
    head, retinanet = cfg.MODEL.HEAD, cfg.MODEL.RETINANET
    cls_tower, box_tower = build_towers(cfg, plain_norm=None)
    return RetinaNetHead(
        cfg.MODEL.NECK.CHANNELS,
        num_classes,
        cls_tower,
        box_tower,
        anchors=pyramid_anchors(
            retinanet.ANCHOR_SIZE, retinanet.SCALES_PER_OCTAVE, retinanet.ASPECT_RATIOS
        ),
        fg_iou=retinanet.FG_IOU,
        bg_iou=retinanet.BG_IOU,
        smooth_l1_beta=retinanet.SMOOTH_L1_BETA,
        box_loss_divisor=retinanet.BOX_LOSS_DIVISOR,
        prior_prob=head.PRIOR_PROB,
        focal_gamma=head.FOCAL_GAMMA,
        focal_alpha=head.FOCAL_ALPHA,
        post_process=post_process,
    )
