"""Heads: the pyramid P3..P7 in, predictions, losses and detections out."""

from .fcos import FCOSHead
from .retinanet import RetinaNetHead

__all__ = ["FCOSHead", "RetinaNetHead"]
