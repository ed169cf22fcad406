"""The neck of the head stage: the FPN found in the FPN stage, trained once and frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.tree import with_settings
from ..engine.monitor import NonFiniteLossError
from ..files import replacing
from ..genotype import Cell, Genotype
from ..torch_files import read_saved
from .cache import FeatureCache
from .decoder import Decoder, build_decoder, proxy_config
from .examples import Examples, make_room, open_examples
from .training import build_training

logger = logging.getLogger(__name__)

# Number of times that the reward is logged while the neck is trained.
NECK_REPORTS = 5


def train_neck(
    cfg: CfgNode,
    caches: tuple[FeatureCache, FeatureCache],
    cells: Sequence[Cell],
    num_classes: int,
    device: torch.device,
    folder: Path,
) -> nn.Module:
    """Train an FPN with the plain head, as in a trial, to be the neck of the head stage.

    It has the width of the head stage, and is trained for SEARCH.PROXY.NECK_ITERATIONS.

    Args:
        cfg: config of the search.
        caches: caches of C2..C5 of meta-train and meta-val.
        cells: cells of the FPN.
        num_classes: number of object classes, without background.
        device: device of the training and of the returned neck.
        folder: directory of ``neck.pth``, in which the neck is saved. If it holds this very neck,
            nothing is trained.

    Returns:
        The neck with averaged weights, in evaluation mode.

    Raises:
        NonFiniteLossError: the training diverged.
        ConfigError: the GPU does not have enough memory.
    """
    genotype = Genotype(tuple(cells)).to_list()
    cfg = with_settings(cfg, {"SEARCH.PROXY.FPN_CHANNELS": cfg.SEARCH.PROXY.HEAD_CHANNELS})
    config = proxy_config(cfg, "fpn", genotype)
    # Handles of its own, so that what they hold on a GPU is free again afterwards.
    train, val = (
        open_examples(config, cache.folder, num_classes, device) for cache in caches
    )
    path = Path(folder) / "neck.pth"
    sections = ["HEAD", "FCOS", "RETINANET", *(["CUSTOM"] if config.MODEL.CUSTOM else [])]
    made_from = {
        "genotype": genotype,
        "caches": [cache.folder.name for cache in caches],
        "seed": cfg.SEED,
        "num_classes": num_classes,
        "model": [config.MODEL[key].dump() for key in sections],
        "proxy": cfg.SEARCH.PROXY.dump(),
    }
    saved = read_saved(path)
    if saved.get("made_from") == made_from:
        logger.info("the FPN of the head stage is taken from %s", path)
        neck = build_decoder(config, train.channels, num_classes, cfg.SEED).neck
        neck.load_state_dict(saved["neck"])
        return neck.to(device, memory_format=torch.channels_last).eval()
    neck = None
    try:
        while neck is None:
            decoder = build_decoder(config, train.channels, num_classes, cfg.SEED)
            neck = _trained_neck(cfg, decoder, train, val)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(
            f"the FPN of the head stage cannot be trained: {error}; fewer "
            "SEARCH.PROXY.NECK_ITERATIONS or a lower SEARCH.PROXY.LR may help"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the FPN of the head stage cannot be trained in the GPU's memory. A search of the head "
            "alone (SEARCH.STAGES (head,)), in another OUTPUT_DIR and on the FPN that was found "
            "(MODEL.GENOTYPE), may have a smaller SEARCH.PROXY.BATCH, or SEARCH.PROXY.AMP bf16. "
            f"{error}"
        ) from error
    with replacing(path) as temporary:
        torch.save({"neck": neck.state_dict(), "made_from": made_from}, temporary)
    return neck


def _trained_neck(
    cfg: CfgNode, decoder: Decoder, train: Examples, val: Examples
) -> nn.Module | None:
    """Train a decoder and return its averaged neck.

    None: the GPU ran out of memory, a cache has left it, and the training can be repeated.
    """
    iterations = cfg.SEARCH.PROXY.NECK_ITERATIONS
    logger.info("training the FPN of the head stage for %d iterations", iterations)
    try:
        training = build_training(cfg, decoder, train, iterations, cfg.SEED)
        for part in range(1, NECK_REPORTS + 1):
            training.advance(iterations * part // NECK_REPORTS)
            logger.info(
                "FPN of the head stage: iteration %d, reward %.4f",
                training.done, -sum(training.evaluate(val).values()),
            )  # fmt: skip
    except torch.OutOfMemoryError:
        if not make_room(train, val):
            raise
        return None
    return training.averaged.neck.eval()
