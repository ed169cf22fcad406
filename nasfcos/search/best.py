"""The result of a search: ``best.yaml``, with the weights ``best.pth`` beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from ..config import load_config
from ..config.tree import get_setting, nested
from ..engine.checkpoint import FINAL, load_checkpoint
from ..files import replacing
from ..torch_files import read_saved
from .full_training import SUMMARY, full_config, train_in_full
from .prepare import changes_since
from .ranking import Selected

logger = logging.getLogger(__name__)

WEIGHTS = "best.pth"


def best_weights(
    cfg: CfgNode, device: torch.device, folder: Path, best: Selected
) -> tuple[Selected, dict[str, Any]]:
    """The weights of the best architecture, from its full training.

    If the files of that training have been deleted, the weights are those of the existing
    ``best.pth``. If this is gone, too, the architecture is trained again.

    Args:
        cfg: config of the search.
        device: device of the training.
        folder: directory of the search.
        best: the architecture, trained in full.

    Returns:
        `best`, with new metrics if it was trained again; and the content of ``best.pth``.
    """
    run = folder / best.folder
    full = full_config(cfg, best.stage, best.genotype, run, best.best_seed)
    names = ("model", "classes", "config")
    for path in (run / FINAL, folder / WEIGHTS):
        saved = read_saved(path)
        if saved and not changes_since(saved["config"], full):
            return best, {name: saved[name] for name in names}
    logger.warning("weights of this config are not in %s any more; they are trained again", run)
    (run / SUMMARY).unlink(missing_ok=True)
    found = train_in_full(full, device)
    if len(best.APs) == 1:  # otherwise the mean is kept: a training repeats itself on a machine
        best = replace(best, **found, APs=[found["AP"]])
    saved = load_checkpoint(run / FINAL)
    return best, {name: saved[name] for name in names}


def write_best(
    cfg: CfgNode,
    folder: Path,
    best: Selected,
    weights: dict[str, Any],
    base: Path,
    keys: Sequence[str],
) -> Path:
    """Write ``best.yaml``, if it can be loaded, and ``best.pth``.

    Args:
        cfg: config of the search.
        folder: directory of the search.
        best, weights: what `best_weights` returned.
        base: config file in `folder` that ``best.yaml`` inherits from.
        keys: keys in which the search's config differs from `base`.

    Returns:
        The path of ``best.yaml``.
    """
    full = full_config(cfg, best.stage, best.genotype, folder / "best", best.best_seed)
    keys = [*keys, *cfg.SEARCH.SELECT.OVERRIDES[::2]]
    keys += ["MODEL.NECK.NAME", "MODEL.HEAD.TOWER", "MODEL.GENOTYPE", "OUTPUT_DIR"]
    keys += ["SEED"] if best.best_seed else []
    settings = yaml.safe_load(full.dump())
    tree = {"_BASE_": base.relative_to(folder).as_posix()} | nested(
        {key: get_setting(settings, key) for key in keys if not key.startswith("SEARCH.")}
    )
    path = folder / "best.yaml"
    with replacing(path) as temporary:
        text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
        temporary.write_text(_title(best, full.DATASETS.TEST[0]) + text, encoding="utf-8")
        load_config(temporary)
    with replacing(folder / WEIGHTS) as temporary:
        torch.save(weights, temporary)
    return path


def _title(best: Selected, data: str) -> str:
    """A comment for the first line of ``best.yaml``; `data` is the data set of the AP."""
    found = "given, and not surpassed" if best.given else f"{best.stage} stage"
    of = ""
    if len(best.APs) > 1:
        of = f" (mean of {len(best.APs)} trainings, the best of which left {WEIGHTS})"
    return f"# Found by a search: {found}, AP {best.AP:.4f} on {data}{of}.\n"
