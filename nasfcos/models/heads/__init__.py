"""Heads: from the pyramid P3..P7 to predictions, losses and detections."""

from .fcos import FCOSHead
from .retinanet import RetinaNetHead

__all__ = ["FCOSHead", "RetinaNetHead"]
