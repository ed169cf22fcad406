"""Backbones: from a batch [N, 3, H, W] to the maps C2..C5 (strides 4 to 32)."""

from .mobilenet_v2 import MobileNetV2
from .resnet import ResNet

__all__ = ["MobileNetV2", "ResNet"]
