"""Builds a detector from the config tree."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn
from yacs.config import CfgNode

from .. import data
from ..genotype import Genotype
from . import backbones, heads, necks  # noqa: F401  (importing registers them)
from .detector import Detector, Preprocess
from .heads.dense import DenseHead
from .heads.post_process import PostProcess
from .registry import BACKBONES, HEADS, NECKS, import_parts

logger = logging.getLogger(__name__)


def build_detector(cfg: CfgNode, num_classes: int | None = None) -> Detector:
    """The detector that a config describes, freshly initialised, on the CPU, in training mode.

    Args:
        cfg: the config tree.
        num_classes: number of object classes, without background. None: MODEL.NUM_CLASSES, or
            where this is 0 the number of classes of DATASETS.TRAIN.

    Raises:
        ConfigError: a part that is not registered, or a module (MODEL.IMPORTS) or data set that
            does not exist.
        DataError: the classes of the training data cannot be read.
    """
    if num_classes is None:
        num_classes = data.num_classes(cfg)
    build_backbone, build_neck, _ = find_parts(cfg)
    if cfg.MODEL.GENOTYPE:
        logger.debug("genotype:\n%s", Genotype.parse(cfg.MODEL.GENOTYPE).describe())
    backbone = build_backbone(cfg)
    neck = build_neck(cfg, backbone.out_channels)
    # A distributed job would wait for gradients of the stages that the neck does not use.
    backbone.freeze_after(neck.deepest_input)
    head = build_head(cfg, num_classes)
    model = Detector(Preprocess(cfg.DATALOADER.SIZE_DIVISIBILITY), backbone, neck, head)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.MODEL.SYNC_BN else model


def find_parts(cfg: CfgNode) -> tuple[Callable, Callable, Callable]:
    """The builders of the backbone, the neck and the head that a config names.

    Raises:
        ConfigError: a part is not registered, or a module (MODEL.IMPORTS) does not exist.
    """
    import_parts(cfg.MODEL.IMPORTS)
    model = cfg.MODEL
    return BACKBONES[model.BACKBONE.NAME], NECKS[model.NECK.NAME], HEADS[model.HEAD.NAME]


def build_head(cfg: CfgNode, num_classes: int) -> DenseHead:
    """The head that a config describes.

    Args:
        cfg: the config tree.
        num_classes: number of object classes, without background.

    Raises:
        ConfigError: the head is not registered.
    """
    post_process = PostProcess(
        score_threshold=cfg.TEST.SCORE_THRESHOLD,
        pre_nms_top_n=cfg.TEST.PRE_NMS_TOP_N,
        nms_iou=cfg.TEST.NMS_IOU,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return HEADS[cfg.MODEL.HEAD.NAME](cfg, num_classes, post_process)
