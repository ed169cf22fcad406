"""The caches of a search, and the task that runs a stage's trials on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.run_file import JOURNAL
from ..data.catalog import class_names
from ..genotype import Cell
from .cache import FeatureCache, cache_pyramid
from .journal import read_settings
from .neck import train_neck
from .proxy import ProxyTask
from .settings import FEATURES, PYRAMIDS


def reopen_task(cfg: CfgNode, device: torch.device, stage: str) -> ProxyTask:
    """The task of a stage of the search in OUTPUT_DIR, on its caches. Changes nothing.

    Args:
        cfg: config of the search.
        device: device of trials in this process.
        stage: "fpn" or "head".

    Raises:
        ConfigError, JournalError: there is no such search, or its caches are gone.
    """
    settings = read_settings(Path(cfg.OUTPUT_DIR) / JOURNAL, stage)
    names = FEATURES if stage == "fpn" else PYRAMIDS
    folders = [cache_folder(cfg) / str(settings.get(name)) for name in names]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"the cache {folder} of the search is gone (SEARCH.CACHE.FOLDER): make it anew by "
                "tools/search_net.py --resume"
            )
    return build_task(cfg, stage, tuple(map(FeatureCache.open, folders)), device)


def build_task(
    cfg: CfgNode, stage: str, caches: tuple[FeatureCache, FeatureCache], device: torch.device
) -> ProxyTask:
    """The task that runs the trials of a stage.

    Args:
        cfg: config of the search.
        stage: "fpn" or "head".
        caches: caches of meta-train and meta-val for that stage.
        device: device of trials in this process.
    """
    train, val = caches
    return ProxyTask(
        cfg=cfg,
        stage=stage,
        train=train.folder,
        val=val.folder,
        num_classes=len(class_names(cfg)),
        # Worker processes choose their own device.
        device=str(device) if cfg.SEARCH.EXECUTOR == "inline" else cfg.MODEL.DEVICE,
        seed=cfg.SEED,
    )


def cache_folder(cfg: CfgNode) -> Path:
    """The directory that holds all caches of a search."""
    given = cfg.SEARCH.CACHE.FOLDER
    return Path(given).expanduser() if given else Path(cfg.OUTPUT_DIR) / "cache"


def head_caches(
    cfg: CfgNode,
    caches: tuple[FeatureCache, FeatureCache],
    cells: Sequence[Cell],
    device: torch.device,
) -> tuple[FeatureCache, FeatureCache]:
    """Caches of the outputs of the head stage's FPN, which is trained once with the plain head.

    Args:
        cfg: config of the search.
        caches: features of meta-train and meta-val.
        cells: cells of the FPN.
        device: device of the training.
    """
    classes = len(class_names(cfg))
    neck = train_neck(cfg, caches, cells, classes, device, Path(cfg.OUTPUT_DIR) / "neck")
    return tuple(cache_pyramid(cache_folder(cfg), neck, cache) for cache in caches)
