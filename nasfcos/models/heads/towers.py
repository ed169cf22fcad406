"""Towers: the layers of a head before its predictions, plain or searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from yacs.config import CfgNode

from ...genotype import HEAD_OPS, Genotype
from ..layers import OPERATIONS, ConvNormAct, Norm, group_norm
from .cells import STRIDES


class PerLevel(nn.Module):
    """A layer with weights of its own for each pyramid level."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(make() for _ in STRIDES)


class Tower(nn.Module):
    """Layers in sequence, each shared by all levels or (`PerLevel`) not.

    `forward` takes and gives a list of maps [N, C, H, W], P3 first.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        maps = list(pyramid)
        for layer in self.layers:
            at_level = layer.levels if isinstance(layer, PerLevel) else [layer] * len(maps)
            maps = [module(x) for module, x in zip(at_level, maps, strict=True)]
        return maps


def plain_tower(channels: int, num_convs: int, norm: Norm | None) -> Tower:
    """3x3 convs with bias, optional norm, ReLU."""
    layers = [ConvNormAct(channels, channels, 3, norm, bias=True) for _ in range(num_convs)]
    for layer in layers:
        nn.init.normal_(layer.conv.weight, std=0.01)
        nn.init.zeros_(layer.conv.bias)
    return Tower(layers)


def searched_tower(channels: int, genotype: Genotype) -> Tower:
    """The head operations of a genotype (paper, section 3.2), with GroupNorm."""

    def layer(index: int, op: int) -> nn.Module:
        make = lambda: OPERATIONS[HEAD_OPS[op]](channels, group_norm)  # noqa: E731
        return PerLevel(make) if index < genotype.head_split else make()

    return Tower([layer(index, op) for index, op in enumerate(genotype.head_ops)])


def build_towers(cfg: CfgNode, plain_norm: Norm | None) -> tuple[Tower, Tower]:
    """A classification and a box tower of one structure and separate weights.

    Args:
        plain_norm: the norm of plain towers; searched ones have GroupNorm.
    """
    channels = cfg.MODEL.NECK.CHANNELS
    if cfg.MODEL.HEAD.TOWER == "plain":
        num_convs = cfg.MODEL.HEAD.NUM_CONVS
        return tuple(plain_tower(channels, num_convs, plain_norm) for _ in range(2))
    genotype = Genotype.parse(cfg.MODEL.GENOTYPE)
    return tuple(searched_tower(channels, genotype) for _ in range(2))
