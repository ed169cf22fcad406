"""The searched feature pyramid (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ...genotype import AGGREGATIONS, FPN_OPS, NUM_INPUTS, Cell, Genotype
from ...ops import batch_norm_concat, memory_format, rectified_pairs, weighted_sum
from ..layers import (
    OPERATIONS,
    ConvNormAct,
    Norm,
    fused_batch_norm_applies,
    resize_to,
    update_statistics,
)
from ..registry import NECKS
from .top import TopLevels


class WeightedSum(nn.Module):
    """``a * x + b * y`` with learned factors per channel, initially one.

    Args:
        channels: number of channels.
        norm: unused; every aggregation takes the same arguments.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(channels, 1, 1))
        self.b = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two maps [N, C, H, W] to one of the same shape."""
        return weighted_sum(x, y, self.a, self.b)


class _Concatenate(torch.autograd.Function):
    """`torch.cat` of two maps along the channels, with contiguous gradients.

    PyTorch's gradients are slices of one tensor, with which the backward pass of a bilinear resize
    takes ten times as long on the CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.channels = (x.shape[1], y.shape[1])
        return torch.cat((x, y), dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        layout = memory_format(grad)
        x, y = grad.split(ctx.channels, dim=1)
        return x.contiguous(memory_format=layout), y.contiguous(memory_format=layout)


class Concat(nn.Module):
    """Concatenation, norm, ReLU, 1x1 conv without bias and with one group per output channel."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(2 * channels)
        self.conv = nn.Conv2d(2 * channels, channels, 1, groups=channels, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two maps [N, C, H, W] to one of the same shape."""
        norm = self.norm
        if x.shape[1] % 2 or not fused_batch_norm_applies(norm, x):
            return rectified_pairs(norm(_Concatenate.apply(x, y)), self.conv.weight)
        output, mean, variance = batch_norm_concat(
            x, y, norm.weight, norm.bias, self.conv.weight, norm.eps
        )
        update_statistics(norm, mean, variance, x.numel() // x.shape[1])
        return output


AGGREGATION_LAYERS = {"psum": WeightedSum, "cat": Concat}


def _enlarge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The two maps, the smaller one (by height, then width) resized to the size of the other."""
    size = max(x.shape[-2:], y.shape[-2:])
    return resize_to(x, size), resize_to(y, size)


class FPNCell(nn.Module):
    """A unary operation on each of two maps, then their aggregation (paper, section 3.2)."""

    def __init__(self, cell: Cell, channels: int, norm: Norm) -> None:
        super().__init__()
        self.op0, self.op1 = (OPERATIONS[FPN_OPS[op]](channels, norm) for op in cell.ops)
        self.aggregate = AGGREGATION_LAYERS[AGGREGATIONS[cell.aggregation]](channels, norm)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two maps [N, C, H, W] and [N, C, H', W'] to one with the larger size."""
        return self.aggregate(*_enlarge(self.op0(x), self.op1(y)))


class NASFPN(nn.Module):
    """The pyramid that a genotype's cells compute.

    A backbone map that no cell uses keeps its adapter, as in the released checkpoints, but the
    adapter is neither computed nor trained.

    Args:
        in_channels: number of channels of C2..C5.
        channels: number of channels of every node and level.
        genotype: the architecture; its head is ignored.

    Attributes:
        deepest_input: index of the deepest backbone map that some cell uses (0: C2).
    """

    def __init__(self, in_channels: Sequence[int], channels: int, genotype: Genotype) -> None:
        super().__init__()
        self.genotype = genotype
        norm = nn.BatchNorm2d
        self.adapt = nn.ModuleList(
            ConvNormAct(c, channels, 1, norm, bias=False) for c in in_channels
        )
        self.cells = nn.ModuleList(FPNCell(cell, channels, norm) for cell in genotype.cells)
        for node, adapt in enumerate(self.adapt):
            if node not in genotype.consumed:
                adapt.requires_grad_(False)
        self.top = TopLevels(channels)
        self.deepest_input = max(node for node in genotype.consumed if node < NUM_INPUTS)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5 to P3..P7, each [N, C, H, W]; P3..P5 have the sizes of C3..C5."""
        genotype = self.genotype
        nodes: list[Tensor | None] = [
            adapt(x) if node in genotype.consumed else None
            for node, (adapt, x) in enumerate(zip(self.adapt, features, strict=True))
        ]
        for cell, module in zip(genotype.cells, self.cells, strict=True):
            nodes.append(module(*(nodes[node] for node in cell.inputs)))
        extra = [nodes[node] for node in genotype.extra_nodes]
        # P5 first, as in the release: the gradients of an extra node are summed in that order.
        levels = []
        for node, feature in zip(genotype.pyramid_nodes[::-1], features[:0:-1], strict=True):
            level = nodes[node]
            for other in extra:
                level = level + resize_to(other, level.shape[-2:])
            levels.insert(0, resize_to(level, feature.shape[-2:]))
        return levels + self.top(levels[-1])


@NECKS.register("nas_fpn")
def build_nas_fpn(cfg: CfgNode, in_channels: Sequence[int]) -> NASFPN:
    """The pyramid of MODEL.GENOTYPE with MODEL.NECK.CHANNELS channels.

    Raises:
        GenotypeError: MODEL.GENOTYPE is invalid.
    """
    return NASFPN(in_channels, cfg.MODEL.NECK.CHANNELS, Genotype.parse(cfg.MODEL.GENOTYPE))
