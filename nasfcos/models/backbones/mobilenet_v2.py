"""MobileNetV2 (Sandler et al., 2018), in the form of the released models."""

from __future__ import annotations

from torch import Tensor, nn
from yacs.config import CfgNode

from ..registry import BACKBONES

# Expansion, channels, blocks and stride of each group of blocks (table 2 of the paper).
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
OUTPUTS = (3, 6, 13, 17)
"""Indices of the `features` whose outputs are C2..C5."""


def _scaled(channels: int, width: float) -> int:
    """Channels times the width multiplier, rounded to a multiple of 8 but not below 90 %."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
    ]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise conv, 1x1 projection without activation.

    There is a shortcut where the shape of the map stays.

    Args:
        in_channels, out_channels: numbers of channels.
        stride: stride of the depthwise conv.
        expansion: hidden channels per input channel.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = []
        if expansion > 1:
            layers += [*_conv(in_channels, hidden, 1, 1, 1), nn.ReLU6(inplace=True)]
        layers += [*_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        layers += _conv(hidden, out_channels, 1, 1, 1)
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 without its classifier and last 1x1 conv.

    Args:
        width: multiplier of all numbers of channels.
        freeze_at: number of leading `features` (of 18) that are not trained; the running statistics
            of their batch norms are still updated in training mode.

    Attributes:
        out_channels: numbers of channels of C2..C5.
    """

    def __init__(self, width: float, freeze_at: int) -> None:
        super().__init__()
        channels = _scaled(STEM_CHANNELS, width)
        stem = nn.Sequential(*_conv(3, channels, 3, 2, 1), nn.ReLU6(inplace=True))
        self.features = nn.ModuleList([stem])
        outputs = [channels]
        for expansion, out_channels, blocks, stride in GROUPS:
            out_channels = _scaled(out_channels, width)
            for block in range(blocks):
                self.features.append(
                    InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion)
                )
                channels = out_channels
                outputs.append(channels)
        self.out_channels = [outputs[index] for index in OUTPUTS]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.features[:freeze_at].requires_grad_(False)

    def freeze_after(self, index: int) -> None:
        """Exclude the layers behind map `index` (0: C2), which nothing uses, from training."""
        self.features[OUTPUTS[index] + 1 :].requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A batch [N, 3, H, W] to the maps C2..C5."""
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in OUTPUTS:
                maps.append(x)
        return maps


@BACKBONES.register("mobilenet_v2")
def build_mobilenet_v2(cfg: CfgNode) -> MobileNetV2:
    """The MobileNetV2 that MODEL.MOBILENET and MODEL.BACKBONE.FREEZE_AT describe."""
    return MobileNetV2(width=cfg.MODEL.MOBILENET.WIDTH, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
