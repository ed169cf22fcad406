"""Necks: the backbone maps C2..C5 in, the pyramid P3..P7 (strides 8..128) out."""

from .fpn import FPN
from .nas_fpn import NASFPN

__all__ = ["FPN", "NASFPN"]
