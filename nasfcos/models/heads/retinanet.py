"""The RetinaNet head (Lin et al., 2017) as the release trains and tests it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ...boxes import legacy_iou, legacy_sizes
from ..registry import HEADS
from .cells import STRIDES, Cells, all_cells, take
from .dense import (
    Assignment,
    DenseHead,
    LossTerm,
    Targets,
    padded_targets,
    prediction_layer,
    prior_bias,
)
from .post_process import PostProcess
from .towers import Tower, build_towers

CENTRE_WEIGHT, SIZE_WEIGHT = 10.0, 5.0  # of box codes
LARGEST_LOG_SCALE = math.log(1000 / 16)
IGNORED = -1


class RetinaNetHead(DenseHead):
    """Per anchor: class logits and the offset of a box.

    Args:
        channels: of the pyramid levels.
        num_classes: object classes, background not counted.
        cls_tower, box_tower: the layers before the predictions.
        anchor_size: side of P3's anchors in pixels (doubles by level).
        scales_per_octave, aspect_ratios: the anchors of each place, ratio-major; a ratio is
            height / width.
        fg_iou, bg_iou: see `match_anchors`.
        smooth_l1_beta: where the box loss turns from square to linear.
        box_loss_divisor: the box loss is summed over this many times the positives.
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
        anchor_size: float,
        scales_per_octave: int,
        aspect_ratios: Sequence[float],
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
        # Kept in the state dict, as in the released one: weights only mean something with the
        # anchors that they were trained for.
        for level, stride in enumerate(STRIDES):
            sizes = [
                anchor_size * 2 ** (level + octave / scales_per_octave)
                for octave in range(scales_per_octave)
            ]
            self.register_buffer(f"anchors{level}", cell_anchors(stride, sizes, aspect_ratios))
        num_anchors = scales_per_octave * len(aspect_ratios)
        self.cls_logits = prediction_layer(
            channels, num_anchors * num_classes, prior_bias(prior_prob)
        )
        self.box_pred = prediction_layer(channels, num_anchors * 4)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """P3..P7 [N, C, H, W] to logits [N, anchors * classes, H, W] and box codes
        [N, anchors * 4, H, W], by level."""
        logits = [self.cls_logits(x) for x in self.cls_tower(pyramid)]
        codes = [self.box_pred(x) for x in self.box_tower(pyramid)]
        return logits, codes

    def anchors(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Legacy boxes [height * width * anchors, 4] of each level, in the order (y, x, anchor)."""
        cells = all_cells(shapes, self.cls_logits.weight.device)
        anchors = self.places(cells)
        per_cell = len(anchors) // len(cells.index)
        return list(anchors.split([count * per_cell for count in cells.counts]))

    @torch.no_grad()
    def assign(self, shapes: Sequence[tuple[int, int]], targets: Targets) -> Assignment:
        """`match_anchors` of each image; wanted are the box codes."""
        anchors = torch.cat(self.anchors(shapes))
        boxes, box_labels = padded_targets(targets, anchors.device)
        match = torch.stack(
            [
                match_anchors(anchors, own[: len(target["boxes"])], self.fg_iou, self.bg_iou)
                for own, target in zip(boxes, targets, strict=True)
            ]
        )
        box = match.clamp(min=0)
        labels = torch.where(match == BETWEEN, IGNORED, 0)
        labels = torch.where(match >= 0, box_labels.gather(1, box), labels)
        return Assignment(labels, encode(take(boxes, box), anchors))

    def loss_terms(
        self, outputs: tuple[list[Tensor], ...], assignment: Assignment
    ) -> dict[str, LossTerm]:
        """``loss_cls`` (focal, over positives + images) and ``loss_box`` (smooth L1)."""
        logits, codes = outputs
        predicted, wanted = assignment.pairs(codes, fill=0.0)
        box_weight = (assignment.labels > 0).sum() * self.box_loss_divisor
        loss_box = nn.functional.smooth_l1_loss(
            predicted, wanted, beta=self.smooth_l1_beta, reduction="sum"
        )
        return {
            "loss_cls": self.class_loss(logits, assignment.labels),
            "loss_box": LossTerm(loss_box / box_weight.clamp(min=1), box_weight),
        }

    def places(self, cells: Cells) -> Tensor:
        anchors = torch.stack([self.get_buffer(f"anchors{level}") for level in range(len(STRIDES))])
        return (cells.corner.repeat(1, 2)[:, None] + anchors[cells.level]).flatten(0, 1)

    def decode(self, predictions: Tensor, places: Tensor) -> Tensor:
        return decode(predictions, places)


def cell_anchors(stride: int, sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """The anchors [ratios * sizes, 4] of the place at the origin, as legacy boxes, ratio-major.

    For each ratio (height / width) a window of the stride's area is rounded to whole pixels, and
    then scaled to each size (pixels).
    """
    centre = (stride - 1) / 2
    anchors = []
    for ratio in aspect_ratios:
        width = np.round(np.sqrt(stride**2 / ratio))
        height = np.round(width * ratio)
        for size in sizes:
            half = (np.array([width, height]) * (size / stride) - 1) / 2
            anchors.append([*(centre - half), *(centre + half)])
    return torch.tensor(np.array(anchors), dtype=torch.float32)


BACKGROUND, BETWEEN = -1, -2
# A CPU's caches hold few boxes' overlaps; a GPU computes many before it is told what is next.
BOXES_AT_ONCE_ON_CPU, BOXES_AT_ONCE_ELSEWHERE = 4, 64


def match_anchors(anchors: Tensor, boxes: Tensor, fg_iou: float, bg_iou: float) -> Tensor:
    """The box [A] that each anchor [A, 4] answers for: an index into boxes [M, 4], or
    `BACKGROUND` (best IoU below `bg_iou`), or `BETWEEN` (below `fg_iou`).

    Every anchor that attains a box's best IoU is matched all the same, to its own best box (the
    first of several). Memory does not grow with M.
    """
    on_cpu = anchors.device.type == "cpu"
    at_once = BOXES_AT_ONCE_ON_CPU if on_cpu else BOXES_AT_ONCE_ELSEWHERE
    anchors = anchors.t().contiguous().t()  # what `legacy_iou` would do again and again
    best_iou = torch.full_like(anchors[:, 0], -1)
    best_box = torch.full_like(best_iou, BACKGROUND, dtype=torch.int64)
    closest = torch.zeros_like(best_iou, dtype=torch.bool)
    for first in range(0, len(boxes), at_once):
        iou = legacy_iou(boxes[first : first + at_once], anchors)
        largest = iou.amax(dim=1)
        attained = torch.where(largest > 0, largest, torch.inf)
        closest |= (iou == attained[:, None]).any(dim=0)
        top, which = iou.max(dim=0)  # the first of several
        best_box = torch.where(top > best_iou, which + first, best_box)
        best_iou = torch.maximum(best_iou, top)
    match = torch.where(best_iou < fg_iou, BETWEEN, best_box)
    match = torch.where(best_iou < bg_iou, BACKGROUND, match)
    return torch.where(closest, best_box, match)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, each [..., 2] (x, y), of legacy boxes [..., 4]."""
    sizes = torch.stack(legacy_sizes(boxes), dim=-1)
    return boxes[..., :2] + 0.5 * sizes, sizes


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Box codes [..., 4]: weighted relative shift of the centre and log ratio of the sizes."""
    centre, size = _centres(boxes)
    anchor_centre, anchor_size = _centres(anchors)
    shift = (centre - anchor_centre) / anchor_size * CENTRE_WEIGHT
    return torch.cat((shift, torch.log(size / anchor_size) * SIZE_WEIGHT), dim=-1)


def decode(codes: Tensor, anchors: Tensor) -> Tensor:
    """Legacy boxes [..., 4] from codes [..., 4]; sizes grow at most 62.5-fold."""
    anchor_centre, anchor_size = _centres(anchors)
    centre = codes[..., :2] / CENTRE_WEIGHT * anchor_size + anchor_centre
    scale = (codes[..., 2:] / SIZE_WEIGHT).clamp(max=LARGEST_LOG_SCALE).exp()
    half = 0.5 * scale * anchor_size
    return torch.cat((centre - half, centre + half - 1), dim=-1)


@HEADS.register("retinanet")
def build_retinanet_head(
    cfg: CfgNode, num_classes: int, post_process: PostProcess
) -> RetinaNetHead:
    head, retinanet = cfg.MODEL.HEAD, cfg.MODEL.RETINANET
    cls_tower, box_tower = build_towers(cfg, plain_norm=None)
    return RetinaNetHead(
        cfg.MODEL.NECK.CHANNELS,
        num_classes,
        cls_tower,
        box_tower,
        anchor_size=retinanet.ANCHOR_SIZE,
        scales_per_octave=retinanet.SCALES_PER_OCTAVE,
        aspect_ratios=retinanet.ASPECT_RATIOS,
        fg_iou=retinanet.FG_IOU,
        bg_iou=retinanet.BG_IOU,
        smooth_l1_beta=retinanet.SMOOTH_L1_BETA,
        box_loss_divisor=retinanet.BOX_LOSS_DIVISOR,
        prior_prob=head.PRIOR_PROB,
        focal_gamma=head.FOCAL_GAMMA,
        focal_alpha=head.FOCAL_ALPHA,
        post_process=post_process,
    )
