"""What a search is for: ``best.yaml``, and its weights ``best.pth`` beside it."""

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
from .prepare import changes_since
from .select import SUMMARY, Selected, full_config, train_in_full

logger = logging.getLogger(__name__)

WEIGHTS = "best.pth"


def best_weights(
    cfg: CfgNode, device: torch.device, folder: Path, best: Selected
) -> tuple[Selected, dict[str, Any]]:
    """The weights of the best architecture: from its full training, or, where the files of that
    have been deleted, from the ``best.pth`` that is there; trained again where that is gone, too.

    Args:
        cfg: the search's config.
        device: of a training.
        folder: of the search.
        best: the architecture, trained in full.

    Returns:
        `best`, with new figures if it was trained again; and the content of ``best.pth``.
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
    if len(best.APs) == 1:  # else the mean stays: on this machine the training gives the same
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
    """Write ``best.yaml`` and ``best.pth``; the former is read back, so that it is known to work.

    Args:
        cfg: the search's config.
        folder: of the search.
        best, weights: as `best_weights` gives them.
        base: the config that the file is to inherit from, in the search's folder.
        keys: in which the search's config differs from that.

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
    load_config(path)
    with replacing(folder / WEIGHTS) as temporary:
        torch.save(weights, temporary)
    return path


def _title(best: Selected, data: str) -> str:
    found = "given, and not surpassed" if best.given else f"{best.stage} stage"
    of = ""
    if len(best.APs) > 1:
        of = f" (mean of {len(best.APs)} trainings, the best of which left {WEIGHTS})"
    return f"# Found by a search: {found}, AP {best.AP:.4f} on {data}{of}.\n"
