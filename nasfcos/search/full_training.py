"""The full training of an architecture, done once for a config and its data."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.tree import get_setting, with_settings
from ..data import build_dataset, build_train_loader
from ..data.catalog import find_dataset
from ..data.voc import voc_names
from ..download import local_path, sha256
from ..engine import distributed
from ..engine.train import check_training, train
from ..files import read_json, write_json
from ..models import build_detector
from .prepare import changes_since_run, is_run_of, with_overrides

logger = logging.getLogger(__name__)

SUMMARY = "selected.json"
"""File in the directory of a full training: its metrics, and hashes of the annotations used."""

METRICS = ("AP", "AP50")
_DATA = TRAIN, TEST = "DATASETS.TRAIN", "DATASETS.TEST"


def full_config(
    cfg: CfgNode, stage: str, genotype: Sequence, folder: Path, seed_offset: int = 0
) -> CfgNode:
    """The config of the full training of a genotype, with SEARCH.SELECT.OVERRIDES on top.

    Args:
        cfg: config of the search, with the whole training data.
        stage: "fpn" (with the plain head) or "head".
        genotype: the decoder.
        folder: directory of the training run.
        seed_offset: is added to the config's seed.
    """
    tower = "searched" if stage == "head" else "plain"
    searched = [
        *("MODEL.NECK.NAME", "nas_fpn", "MODEL.HEAD.TOWER", tower),
        *("MODEL.GENOTYPE", list(genotype), "OUTPUT_DIR", str(folder)),
    ]
    full = with_overrides(cfg, searched, "SEARCH.SELECT.OVERRIDES")
    if full.SEED < 0:  # each training draws a new seed
        return full
    return with_settings(full, {"SEED": full.SEED + seed_offset})


def check_full_training(cfg: CfgNode, device: torch.device, weights: bool = True) -> None:
    """Find what would stop a full training or its test before any time is spent on others.

    Args:
        cfg: config of the training.
        device: device of training and test.
        weights: whether the file that MODEL.WEIGHT names must exist.

    Raises:
        ConfigError: there is nothing to test on, a part does not exist, the batch size does not
            divide, the classes do not fit the data, the weight file is missing, or the device does
            not suit.
        DataError: a data set cannot be read.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: what is trained is compared on data")
    for name in cfg.DATASETS.TEST:
        dataset = build_dataset(cfg, name)
        if not any((~record.ignored).any() for record in dataset.records):
            raise ConfigError(
                f"DATASETS.TEST {name} has no object to find: comparing needs annotations"
            )
    check_training(cfg, device, tests=True)
    build_train_loader(with_settings(cfg, {"SEED": max(0, cfg.SEED)}))
    build_detector(cfg)
    source = local_path(cfg.MODEL.WEIGHT) if weights and cfg.MODEL.WEIGHT else None
    if source is not None and not source.is_file():
        raise ConfigError(f"the weight file {source} does not exist (MODEL.WEIGHT)")


def train_in_full(cfg: CfgNode, device: torch.device) -> dict[str, float]:
    """Train and test the detector of a config, or return the metrics of an earlier call.

    A training of another config in the same directory is set aside (`is_run_of`), and so is one
    whose training annotations have changed since. If only the test annotations have changed, the
    detector is tested again.

    Returns:
        AP and AP50 on the first of DATASETS.TEST.

    Raises:
        ConfigError: called in one of several processes.
        NonFiniteLossError: the training diverged.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            "architectures are trained and compared by one process; train one config with several "
            "by tools/train_net.py"
        )
    if (known := finished(cfg)) is not None:
        return known
    folder = Path(cfg.OUTPUT_DIR)
    summary = folder / SUMMARY
    same = is_run_of(cfg, folder)
    before = _read_summary(summary) if same else {}
    data = {key: _annotations_hash(cfg, key) for key in _DATA}
    changed = [key for key in _DATA if before.get(key, data[key]) != data[key]]
    if changed:
        logger.warning("%s: the annotations have changed since (%s)", folder, ", ".join(changed))
    retrain = TRAIN in changed
    # Record the training data first, so that an interrupted training is recognised.
    write_json(summary, {TRAIN: before[TRAIN] if retrain else data[TRAIN]})
    metrics = train(cfg, device, resume=same and not retrain)[cfg.DATASETS.TEST[0]]
    found = {name: metrics[name] for name in METRICS}
    write_json(summary, found | data)
    return found


def finished(cfg: CfgNode) -> dict[str, float] | None:
    """The metrics of an earlier `train_in_full` of this config, if it ended and they still hold."""
    before = _read_summary(Path(cfg.OUTPUT_DIR) / SUMMARY)
    if not before.keys() >= set(METRICS) or outdated(cfg):
        return None
    return {name: before[name] for name in METRICS}


def outdated(cfg: CfgNode) -> list[str]:
    """Why the metrics of an earlier `train_in_full` in the config's directory no longer hold.

    Empty if neither the config nor its data have changed, or if there was no such call.
    """
    folder = Path(cfg.OUTPUT_DIR)
    before = _read_summary(folder / SUMMARY)
    changed = [key for key in _DATA if key in before and before[key] != _annotations_hash(cfg, key)]
    return changes_since_run(cfg, folder) + [f"annotations of {key}" for key in changed]


def _read_summary(path: Path) -> dict[str, Any]:
    """The content of a summary; empty if it is missing or damaged: then the test is repeated."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _annotations_hash(cfg: CfgNode, key: str) -> str:
    """A hash of the annotations of all data sets that a config key names."""
    digest = hashlib.sha256()
    for spec in (find_dataset(cfg, name) for name in get_setting(cfg, key)):
        files = [spec.annotations]
        if spec.annotations.is_dir():
            names = voc_names(spec.annotations, spec.split)
            files = [spec.annotations / f"{name}.xml" for name in names]
        for file in filter(Path.exists, files):
            status = file.stat()
            digest.update(os.fsencode(file.name))
            digest.update(_file_hash(file, status.st_size, status.st_mtime_ns).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1 << 18)
def _file_hash(path: Path, size: int, time: int) -> str:
    """The hash of a file's content; size and time of modification only serve the cache."""
    return sha256(path)
