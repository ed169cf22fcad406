"""The decoder that a trial trains, built from the ordinary registries.

:mod:`.proxy` explains the choice of the initial weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..config.tree import with_settings
from ..genotype import Genotype
from ..models import NECKS
from ..models.build import build_head
from ..models.heads.dense import DenseHead
from ..models.registry import import_parts


def proxy_config(cfg: CfgNode, stage: str, genotype: list) -> CfgNode:
    """The config with which the ordinary builders make the decoder of a trial.

    Args:
        cfg: config of the search.
        stage: "fpn" (the genotype's cells with the plain head) or "head" (the genotype's head; the
            outputs of the neck are cached).
        genotype: genotype of the whole decoder, as a nested list.

    Raises:
        GenotypeError: the genotype cannot be built.
        ValueError: the stage is unknown, or it is "head" and the genotype has no head.
    """
    parsed = Genotype.parse(genotype)
    if stage == "head" and not parsed.head_ops:
        raise ValueError(f"the head stage needs a genotype with a head, not {genotype}")
    return with_settings(stage_config(cfg, stage), {"MODEL.GENOTYPE": genotype})


def stage_config(cfg: CfgNode, stage: str) -> CfgNode:
    """The part of `proxy_config` that is the same for all genotypes of a stage."""
    widths = {"fpn": cfg.SEARCH.PROXY.FPN_CHANNELS, "head": cfg.SEARCH.PROXY.HEAD_CHANNELS}
    if stage not in widths:
        raise ValueError(f"the stages are 'fpn' and 'head', not {stage!r}")
    # Object sizes shrink with the images: crops are smaller than the images of testing.
    scale = cfg.SEARCH.CACHE.SIZE / cfg.INPUT.MIN_SIZE_TEST
    settings = {
        "MODEL.NECK.NAME": "nas_fpn",
        "MODEL.NECK.CHANNELS": widths[stage],
        "MODEL.HEAD.TOWER": {"fpn": "plain", "head": "searched"}[stage],
        "MODEL.FCOS.SIZE_LIMITS": [limit * scale for limit in cfg.MODEL.FCOS.SIZE_LIMITS],
        "MODEL.RETINANET.ANCHOR_SIZE": cfg.MODEL.RETINANET.ANCHOR_SIZE * scale,
    }
    return with_settings(cfg, settings)


class Decoder(nn.Module):
    """The model of a trial: ``head(neck(maps))``, or the head alone on cached outputs of a neck."""

    def __init__(self, neck: nn.Module | None, head: DenseHead) -> None:
        super().__init__()
        self.neck = nn.Identity() if neck is None else neck
        self.head = head

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """The raw outputs of the head for maps [N, C, H, W] by level."""
        return self.head(self.neck(maps))


def build_decoder(
    cfg: CfgNode, in_channels: Sequence[int] | None, num_classes: int, seed: int
) -> Decoder:
    """A new decoder on the CPU, in training mode.

    Args:
        cfg: config from `proxy_config`.
        in_channels: channels of C2..C5; None: no neck.
        num_classes: number of object classes, without background.
        seed: seed of the search. The weights are determined by it and, in searched parts, by the
            genotype. The global random state is neither used nor changed.
    """
    import_parts(cfg.MODEL.IMPORTS)
    own = weight_seed(seed, cfg.MODEL.GENOTYPE)
    plain = cfg.MODEL.HEAD.TOWER == "plain"
    generator = torch.random.default_generator
    with torch.random.fork_rng(devices=[]):
        neck = None
        if in_channels is not None:
            generator.manual_seed(own)
            neck = NECKS[cfg.MODEL.NECK.NAME](cfg, in_channels)
        generator.manual_seed(weight_seed(seed, []) if plain else own)
        return Decoder(neck, build_head(cfg, num_classes))


def weight_seed(seed: int, genotype: list) -> int:
    """Seed of initial weights, from the seed of the search and a genotype; []: no genotype."""
    text = json.dumps([seed, genotype])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
