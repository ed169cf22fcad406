"""The first stage of a search: the backbone is fine-tuned once, in the plain detector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from ..config import ConfigError, override_config
from ..config.run_file import RUN_CONFIG, is_of_run
from ..config.tree import get_setting
from ..engine.checkpoint import (
    FINAL,
    CheckpointError,
    differing_keys,
    load_checkpoint,
    newest_checkpoint,
)
from ..engine.train import train
from ..models import Detector, build_detector, load_weights
from .split import without_paths

logger = logging.getLogger(__name__)

PLAIN = ("MODEL.NECK.NAME", "fpn", "MODEL.HEAD.TOWER", "plain", "MODEL.GENOTYPE", [])
"""Overrides that replace the searched parts of a detector by plain ones."""

NEUTRAL = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.IMPORTS",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.KEEP_CHECKPOINTS",
    "SOLVER.LOG_PERIOD",
    "TEST.EVAL_PERIOD",
)
"""Keys that do not influence a training, besides those of SEARCH."""

OTHER_RUN = "%s holds a run of another config: %s"


def prepare_config(cfg: CfgNode, folder: Path) -> CfgNode:
    """The config of the fine-tuning: plain FPN and head, and SEARCH.PREPARE.OVERRIDES on top.

    Args:
        cfg: config of the search with meta-train as DATASETS.TRAIN.
        folder: directory of the training run.
    """
    return with_overrides(cfg, [*PLAIN, "OUTPUT_DIR", str(folder)], "SEARCH.PREPARE.OVERRIDES")


def with_overrides(cfg: CfgNode, own: Sequence[Any], key: str) -> CfgNode:
    """The config of a training that is part of a search.

    Args:
        cfg: config of the search.
        own: alternating keys and values that the search itself decides.
        key: key of the config's list of overrides by the user.

    Raises:
        ConfigError: the user overrides a key that the search decides.
    """
    overrides = get_setting(cfg, key)
    if taken := sorted({str(name) for name in overrides[::2]} & set(own[::2])):
        raise ConfigError(f"{key} sets {', '.join(taken)}, which the search itself decides")
    return override_config(override_config(cfg, own, "the search"), overrides, key)


def prepare_backbone(cfg: CfgNode, device: torch.device, folder: Path) -> Detector:
    """The plain detector with the fine-tuned backbone of the trials, in evaluation mode.

    Its weights are SEARCH.PREPARE.WEIGHT or, if that is empty, the result of a training in
    `folder`. A training that was stopped is resumed; a finished one is not repeated.

    Args:
        cfg: config of the search with meta-train as DATASETS.TRAIN.
        device: device of the training and of the detector.
        folder: directory of the training run.

    Raises:
        ConfigError: SEARCH.PREPARE.WEIGHT does not hold the whole backbone.
    """
    plain = prepare_config(cfg, folder)
    source = cfg.SEARCH.PREPARE.WEIGHT
    if not source:
        final = folder / FINAL
        if changes := backbone_changes(plain, folder):
            logger.warning(OTHER_RUN, folder, "; ".join(changes))
        same = not changes
        if not (same and _is_finished(final, plain.SOLVER.MAX_ITER)):
            logger.info("fine-tuning the backbone with the plain detector in %s", folder)
            train(plain, device, resume=same, skip_test=True)
        source = str(final)
    model = build_detector(plain).to(device)
    report = load_weights(model, source, strict=False)
    absent = [name for name in report.missing + report.misshapen if name.startswith("backbone.")]
    if absent:
        raise ConfigError(
            f"SEARCH.PREPARE.WEIGHT {source} does not hold this backbone: "
            f"{len(absent)} of its tensors are missing or of another shape, {absent[0]} among them"
        )
    return model.eval().requires_grad_(False)


def is_run_of(cfg: CfgNode, folder: Path) -> bool:
    """Whether a folder has no training run of another config.

    Differences (see `changes_since`) are logged.
    """
    if changes := changes_since_run(cfg, folder):
        logger.warning(OTHER_RUN, folder, "; ".join(changes))
    return not changes


def backbone_changes(plain: CfgNode, folder: Path) -> list[str]:
    """Differences between the config of a fine-tuning and that of the run in a folder, if any."""
    # The settings of testing do not influence the weights.
    return [c for c in changes_since_run(plain, folder) if not c.startswith("TEST.")]


def changes_since_run(cfg: CfgNode, folder: Path) -> list[str]:
    """`changes_since` the training run in a folder; none if there is no run."""
    then = _config_of_run(folder)
    return [] if then is None else changes_since(then, cfg)


def _config_of_run(folder: Path) -> str | None:
    """Config of the training run in a folder, as YAML text; None if there is no run.

    Its config file may be missing or damaged, if the machine crashed or a process was killed while
    the run was set aside. Then the config is taken from the newest checkpoint.
    """
    try:
        content = (folder / RUN_CONFIG).read_bytes()
    except OSError:
        content = b""
    if is_of_run(content):
        return content.decode()
    found = newest_checkpoint(folder)
    return None if found is None else found[1]["config"]


def changes_since(then: str, cfg: CfgNode) -> list[str]:
    """Differences between two configs that influence a training, as ``KEY: then -> now``.

    Args:
        then: the earlier config, as YAML text.
        cfg: the present config.
    """
    before, now = (_comparable(text) for text in (then, cfg.dump()))
    return [
        change
        for change in differing_keys(now, before.dump())
        if not change.startswith(("SEARCH.", *(f"{key}:" for key in NEUTRAL)))
    ]


def _comparable(text: str) -> CfgNode:
    tree = yaml.safe_load(text)
    return CfgNode(tree | {"DATASETS": without_paths(tree["DATASETS"])})


def _is_finished(final: Path, iterations: int) -> bool:
    try:
        return final.exists() and load_checkpoint(final)["iteration"] >= iterations
    except CheckpointError as error:
        logger.warning("%s; the training goes on from what is left of it", error)
        return False
