"""The two coarsest pyramid levels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TopLevels(nn.Module):
    """P6 and P7: strided 3x3 convs on P5 and on relu(P6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(F.relu(p6))]
