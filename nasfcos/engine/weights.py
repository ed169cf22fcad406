"""The choice of the trained weights for testing and prediction."""

from __future__ import annotations

import os
from dataclasses import replace

from yacs.config import CfgNode

from ..config import ConfigError, is_weight_given
from ..models.weights import Weights, read_weights
from .checkpoint import newest_checkpoint

NEEDS_DETECTOR = (
    "testing and prediction need the weights of a trained detector. Name a checkpoint or a "
    "released model by MODEL.WEIGHT (such as MODEL.WEIGHT output/model_final.pth)."
)


def newest_weights(output_dir: str | os.PathLike[str]) -> Weights | None:
    """The weights of the newest checkpoint, named by its path; the file is read once.

    Returns:
        None if the folder holds no readable checkpoint.
    """
    found = newest_checkpoint(output_dir)
    return None if found is None else replace(read_weights(found[1]), name=str(found[0]))


def find_weights(cfg: CfgNode) -> Weights:
    """Read the trained detector that a config stands for.

    The first of these that exists:

    1. MODEL.WEIGHT, if it was set on purpose: on the command line, in the overrides of
       `load_config`, or in the tree;
    2. the newest checkpoint in OUTPUT_DIR;
    3. MODEL.WEIGHT of the config file, from which the run in OUTPUT_DIR may have started.

    An ImageNet backbone as MODEL.WEIGHT does not count.

    Raises:
        ConfigError: there is none.
        WeightsError: MODEL.WEIGHT cannot be read.
    """
    given = is_weight_given(cfg)
    weights = None if given else newest_weights(cfg.OUTPUT_DIR)
    weights = _read_detector(cfg.MODEL.WEIGHT) if weights is None else weights
    if weights is not None:
        return weights
    source = cfg.MODEL.WEIGHT
    lacks = f"MODEL.WEIGHT {f'{source} is a backbone' if source else 'is empty'}"
    if not given:
        lacks = f"{cfg.OUTPUT_DIR} (OUTPUT_DIR) has no checkpoint and {lacks}"
    raise ConfigError(f"{lacks}: {NEEDS_DETECTOR}")


def _read_detector(source: str) -> Weights | None:
    """The weights of `source`; None if it is empty or a backbone (which is not downloaded)."""
    if not source or source.startswith(("catalog://", "torchvision://")):
        return None
    weights = read_weights(source)
    return weights if weights.kind == "detector" else None
