"""Backbones: a batch [N, 3, H, W] in, the maps C2..C5 (strides 4..32) out."""

from .mobilenet_v2 import MobileNetV2
from .resnet import ResNet

__all__ = ["MobileNetV2", "ResNet"]
