"""The standard feature pyramid (Lin et al., 2017), for comparison with the searched one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ..layers import Conv3x3
from ..registry import NECKS
from .top import TopLevels


class FPN(nn.Module):
    """1x1 convs on C3..C5, a top-down path of nearest upsampling and sums, 3x3 convs, P6 and P7.

    Args:
        in_channels: number of channels of C2..C5; C2 is not used.
        channels: number of channels of every level.

    Attributes:
        deepest_input: index of the deepest backbone map that is used (3: C5).
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[1:])
        self.output = nn.ModuleList(Conv3x3(channels, channels) for _ in in_channels[1:])
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        self.top = TopLevels(channels)
        self.deepest_input = len(in_channels) - 1

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5 to P3..P7, each [N, C, H, W]."""
        sums = [lateral(x) for lateral, x in zip(self.lateral, features[1:], strict=True)]
        for level in range(len(sums) - 2, -1, -1):
            size = sums[level].shape[-2:]
            sums[level] = sums[level] + F.interpolate(sums[level + 1], size=size, mode="nearest")
        levels = [output(x) for output, x in zip(self.output, sums, strict=True)]
        return levels + self.top(levels[-1])


@NECKS.register("fpn")
def build_fpn(cfg: CfgNode, in_channels: Sequence[int]) -> FPN:
    """The FPN with MODEL.NECK.CHANNELS channels."""
    return FPN(in_channels, cfg.MODEL.NECK.CHANNELS)
