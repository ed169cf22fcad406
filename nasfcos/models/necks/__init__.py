"""Necks: from the backbone maps C2..C5 to the pyramid P3..P7 (strides 8 to 128)."""

from .fpn import FPN
from .nas_fpn import NASFPN

__all__ = ["FPN", "NASFPN"]
