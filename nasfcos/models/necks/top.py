"""The two coarsest pyramid levels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _HalvingConv(nn.Conv2d):
    """A 3x3 conv with stride two."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 1:
            # For maps of one column, oneDNN (as of PyTorch 2.14, on processors with AMX) leaves
            # parts of the weight's bfloat16 gradient unwritten. Another column of zeros avoids
            # that and changes nothing else.
            x = F.pad(x, (0, 1))
        return super().forward(x)


class TopLevels(nn.Module):
    """P6 and P7: strided 3x3 convs on P5 and on relu(P6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = _HalvingConv(channels)
        self.p7 = _HalvingConv(channels)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, p5: Tensor) -> list[Tensor]:
        """P5 [N, C, H, W] to [P6, P7], of half and a quarter of its size (rounded up)."""
        p6 = self.p6(p5)
        return [p6, self.p7(F.relu(p6))]
