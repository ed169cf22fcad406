"""Towers: the layers of a head before its predictions, plain or searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from yacs.config import CfgNode

from ...genotype import HEAD_OPS, Genotype
from ..layers import OPERATIONS, ConvNormAct, Norm, group_norm
from .locations import STRIDES


class PerLevel(nn.Module):
    """A layer with separate weights for each pyramid level.

    Args:
        make: creates the layer of one level.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(make() for _ in STRIDES)


class Tower(nn.Module):
    """Layers in sequence, each shared by all levels unless it is a `PerLevel`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, C, H, W] of P3..P7 to maps of the same shapes."""
        maps = list(pyramid)
        for layer in self.layers:
            at_level = layer.levels if isinstance(layer, PerLevel) else [layer] * len(maps)
            maps = [module(x) for module, x in zip(at_level, maps, strict=True)]
        return maps


def plain_tower(channels: int, num_convs: int, norm: Norm | None) -> Tower:
    """`num_convs` times a 3x3 conv with bias, an optional norm and ReLU."""
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
    """A classification and a box tower with the same structure and separate weights.

    Args:
        cfg: the config tree.
        plain_norm: norm of plain towers; searched ones have GroupNorm.
    """
    channels = cfg.MODEL.NECK.CHANNELS
    if cfg.MODEL.HEAD.TOWER == "plain":
        num_convs = cfg.MODEL.HEAD.NUM_CONVS
        return tuple(plain_tower(channels, num_convs, plain_norm) for _ in range(2))
    genotype = Genotype.parse(cfg.MODEL.GENOTYPE)
    return tuple(searched_tower(channels, genotype) for _ in range(2))
