"""Which box each location of the pyramid is trained on (FCOS, sections 3.1 and 3.2).

Checking M boxes at every location separately would take memory for M * H * W answers. But every
condition is an "and" or an "or" of one that depends on the column and one that depends on the row:

- inside the box, and all distances at most the level's upper limit: true for the column (left and
  right distance) AND true for the row (top and bottom distance);
- some distance at least the lower limit: true for the column OR true for the row.

So the conditions are computed per column and per row, W + H answers per box, and packed into
integers with one bit per box. At a location one AND of two words answers for `WORD` boxes at once.
Boxes are sorted by area first, so the box of least area is the highest bit that is set.

Example with a 4-bit word, three boxes A, B, C by rising area (bits ``ABC0``) and a level without a
lower limit. Column x lies inside A and C: ``1010``. Row y lies inside B and C: ``0110``. At (y, x)
``1010 & 0110 = 0010``: the location lies inside C only, and is trained on C. With the row
``1110``, ``1010 & 1110 = 1010``: it lies inside A and C, and A wins, because A comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...boxes import legacy_areas
from ...transfer import to_device
from .locations import STRIDES, take

WORD = 24
"""Boxes per word: a float32 represents integers of up to 24 bits exactly."""


def assign_fcos(
    shapes: Sequence[tuple[int, int]], size_ranges: Sequence[tuple[float, float]], boxes: Tensor
) -> Tensor:
    """The box that each location is trained on.

    A location is positive for a box if it lies strictly inside and its largest distance to a side
    lies in the range of its level (both ends included). Of several boxes the one with the least
    legacy area wins, the first one on a tie.

    Args:
        shapes: (height, width) of each level.
        size_ranges: (lowest, highest) largest distance of each level, in pixels.
        boxes: [N, M, 4] xyxy in pixels, M at least one.

    Returns:
        [N, sum of height * width] int64 indices into M, -1 for background.
    """
    order = legacy_areas(boxes).argsort(dim=1, stable=True)
    padding = -boxes.shape[1] % WORD
    boxes = F.pad(take(boxes, order), (0, 0, 0, padding))
    columns = _axis_conditions([width for _, width in shapes], size_ranges, boxes[..., 0::2])
    rows = _axis_conditions([height for height, _ in shapes], size_ranges, boxes[..., 1::2])
    fits = []
    for (inside_x, far_x), (inside_y, far_y) in zip(columns, rows, strict=True):
        far = far_y[..., None] | far_x[..., None, :]
        fits.append((inside_y[..., None] & inside_x[..., None, :] & far).flatten(2))
    words = torch.cat(fits, dim=2)
    # The highest bit that is set follows from the exponent of the word as a float32: bit 23 (the
    # first box) has exponent 127 + 23 = 126 + WORD.
    exponent = words.float().view(torch.int32) >> 23
    first = 126 + WORD - exponent
    first += WORD * torch.arange(len(words[0]), dtype=torch.int32, device=words.device)[:, None]
    first = torch.where(words > 0, first, len(order[0])).amin(dim=1)
    return F.pad(order, (0, 1), value=-1).gather(1, first.long())


def _axis_conditions(
    lengths: Sequence[int], size_ranges: Sequence[tuple[float, float]], sides: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The conditions of `assign_fcos` along one axis.

    Args:
        lengths: number of rows or columns of each level.
        size_ranges: as in `assign_fcos`.
        sides: [N, M, 2], where the boxes begin and end on the axis; M is a multiple of `WORD`.

    Returns:
        two words [N, M / WORD, length] per level, with a bit per box: whether the row or column
        lies inside the box with both distances at most the upper limit, and whether one of the
        distances is at least the lower limit.
    """
    centres = [np.arange(n) * s + s // 2 for n, s in zip(lengths, STRIDES, strict=True)]
    limits = np.repeat(np.array(size_ranges).T, lengths, axis=1)
    table = np.stack((np.concatenate(centres), *limits)).astype(np.float32)
    table = to_device(torch.from_numpy(table), sides.device)
    centres, lowest, highest = table.unbind()
    before, after = centres - sides[..., :1], sides[..., 1:] - centres
    farthest = torch.maximum(before, after)
    inside = (torch.minimum(before, after) > 0) & (farthest <= highest)
    words = (_pack(x).split(list(lengths), dim=2) for x in (inside, farthest >= lowest))
    return list(zip(*words, strict=True))


def _pack(bits: Tensor) -> Tensor:
    """[N, M, S] bool as words [N, M / WORD, S] int32; the first box is the highest bit."""
    value = 2 ** torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=bits.device)
    return (bits.unflatten(1, (-1, WORD)) * value[:, None]).sum(dim=2, dtype=torch.int32)
