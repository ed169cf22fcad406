"""ResNet and ResNeXt with bottleneck blocks, in the form of the released models."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ..layers import Conv3x3, FrozenBatchNorm2d, Norm
from ..registry import BACKBONES

NORMS: dict[str, Norm] = {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d}


class Stem(nn.Module):
    """7x7 conv with stride 2, norm, ReLU, 3x3 max-pooling with stride 2."""

    def __init__(self, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, out_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """A batch [N, 3, H, W] to a map [N, C, H / 4, W / 4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 conv with norms, and a shortcut.

    Args:
        in_channels, out_channels: numbers of channels.
        width: number of channels of the 3x3 conv.
        groups: groups of the 3x3 conv.
        stride: stride of the block.
        stride_in_1x1: whether the first 1x1 conv has the stride, not the 3x3 conv.
        norm: creates each norm layer.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        groups: int,
        stride: int,
        stride_in_1x1: bool,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.downsample = None
        if in_channels != out_channels or stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                norm(out_channels),
            )
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride_1x1, bias=False)
        self.bn1 = norm(width)
        if stride_3x3 == groups == 1:
            self.conv2 = Conv3x3(width, width, bias=False)
        else:
            self.conv2 = nn.Conv2d(
                width, width, 3, stride=stride_3x3, padding=1, groups=groups, bias=False
            )
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        # Last, as in the release: the gradients of x are summed in that order.
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut, inplace=True)


class ResNet(nn.Module):
    """ResNet (He et al., 2016) or ResNeXt (Xie et al., 2017).

    Args:
        blocks: number of bottlenecks in each of the four stages.
        stem_channels: number of channels of the stem; stage s (from 0) has ``4 * 2**s`` times as
            many.
        groups, width_per_group: groups of the 3x3 convs, and channels per group in the first stage;
            these double with every stage.
        stride_in_1x1: whether the first 1x1 conv of a downsampling block has the stride, not the
            3x3 conv.
        norm: creates each norm layer.
        freeze_at: number of leading stages that are not trained, counting the stem as the first.

    Attributes:
        out_channels: numbers of channels of C2..C5.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        stem_channels: int,
        groups: int,
        width_per_group: int,
        stride_in_1x1: bool,
        norm: Norm,
        freeze_at: int,
    ) -> None:
        super().__init__()
        self.stride_in_1x1 = stride_in_1x1
        self.stem = Stem(stem_channels, norm)
        self.stages = []
        in_channels = stem_channels
        for index, depth in enumerate(blocks):
            out_channels = 4 * stem_channels * 2**index
            width = groups * width_per_group * 2**index
            stage = nn.Sequential()
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(
                    Bottleneck(
                        in_channels, width, out_channels, groups, stride, stride_in_1x1, norm
                    )
                )
                in_channels = out_channels
            name = f"layer{index + 1}"
            self.add_module(name, stage)
            self.stages.append(name)
        self.out_channels = [4 * stem_channels * 2**index for index in range(len(blocks))]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name in ["stem", *self.stages][:freeze_at]:
            self.get_submodule(name).requires_grad_(False)

    def freeze_after(self, index: int) -> None:
        """Exclude the stages behind map `index` (0: C2), which nothing uses, from training."""
        for name in self.stages[index + 1 :]:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A batch [N, 3, H, W] to the maps C2..C5."""
        x = self.stem(x)
        maps = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps


@BACKBONES.register("resnet")
def build_resnet(cfg: CfgNode) -> ResNet:
    """The ResNet that MODEL.RESNET and MODEL.BACKBONE.FREEZE_AT describe."""
    node = cfg.MODEL.RESNET
    return ResNet(
        blocks=node.BLOCKS,
        stem_channels=node.STEM_CHANNELS,
        groups=node.NUM_GROUPS,
        width_per_group=node.WIDTH_PER_GROUP,
        stride_in_1x1=node.STRIDE_IN_1X1,
        norm=NORMS[node.NORM],
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
