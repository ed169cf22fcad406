"""The first stage of a search: a backbone fine-tuned once with the plain detector."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from yacs.config import CfgNode

from ..config import ConfigError, override_config
from ..engine.checkpoint import FINAL, differing_keys, load_checkpoint
from ..engine.train import build_model, train
from ..models import Detector, load_weights

logger = logging.getLogger(__name__)

PLAIN = ("MODEL.NECK.NAME", "fpn", "MODEL.HEAD.TOWER", "plain", "MODEL.GENOTYPE", [])
"""Overrides that take the searched parts out of a detector."""


def prepare_config(cfg: CfgNode, folder: Path) -> CfgNode:
    """The config of the fine-tuning: the plain FPN and head, SEARCH.PREPARE.OVERRIDES on top.

    Args:
        cfg: whose DATASETS.TRAIN is meta-train.
        folder: of the training run.
    """
    plain = override_config(cfg, [*PLAIN, "OUTPUT_DIR", str(folder)], "the search")
    return override_config(plain, cfg.SEARCH.PREPARE.OVERRIDES, "SEARCH.PREPARE.OVERRIDES")


def prepare_backbone(cfg: CfgNode, device: torch.device, folder: Path) -> Detector:
    """The plain detector whose backbone the trials' features come from, in evaluation mode.

    Takes SEARCH.PREPARE.WEIGHT as it is, or else trains in `folder`; goes on with a training that
    was stopped, and does nothing where it is finished.

    Raises:
        ConfigError: the weights that the config names do not hold the whole backbone.
    """
    plain = prepare_config(cfg, folder)
    source = cfg.SEARCH.PREPARE.WEIGHT
    if not source:
        final = folder / FINAL
        same = is_run_of(plain, folder)
        if not (same and _is_finished(final, plain.SOLVER.MAX_ITER)):
            logger.info("fine-tuning the backbone with the plain detector in %s", folder)
            train(plain, device, resume=same, skip_test=True)
        source = str(final)
    model = build_model(plain, device)
    report = load_weights(model, source, strict=False)
    absent = [name for name in report.missing + report.misshapen if name.startswith("backbone.")]
    if absent:
        raise ConfigError(
            f"SEARCH.PREPARE.WEIGHT {source} does not hold this backbone: "
            f"{len(absent)} of its tensors are missing or of another shape, {absent[0]} among them"
        )
    return model.eval().requires_grad_(False)


def is_run_of(cfg: CfgNode, folder: Path) -> bool:
    """Whether the training run in a folder, if there is any, is one of this config.

    The SEARCH section and OUTPUT_DIR may differ. What differs otherwise is logged.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return True
    changes = [
        change
        for change in differing_keys(cfg, path.read_text(encoding="utf-8"))
        if not change.startswith(("SEARCH.", "OUTPUT_DIR"))
    ]
    if changes:
        logger.warning("%s holds a run of another config: %s", folder, "; ".join(changes))
    return not changes


def _is_finished(final: Path, iterations: int) -> bool:
    return final.exists() and load_checkpoint(final)["iteration"] >= iterations
