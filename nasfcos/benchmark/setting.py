"""What the person who runs the benchmarks chose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import FULL, QUICK, Effort


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        device: where tensors live.
        folder: for temporary files; the caller removes it.
        quick: small work and few repetitions.
        size: (height, width) of images in pixels instead of each benchmark's own.
        images: folder of pictures for data loading; None: they are made up.
        compile: also measure models that `torch.compile` made faster (starting takes minutes).
    """

    device: torch.device
    folder: Path
    quick: bool = False
    size: tuple[int, int] | None = None
    images: Path | None = None
    compile: bool = False

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def image_size(self, full: tuple[int, int] = (800, 1088)) -> tuple[int, int]:
        """(height, width) of the images to work on."""
        return self.size or ((128, 160) if self.quick else full)
