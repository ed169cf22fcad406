"""Cells of maps: where they lie, and what maps hold there.

A *cell* is one position of a map. It holds one *place* (FCOS) or as many as it has anchors; the
predictions of a map [N, places * C, H, W] are those of its places in the order (y, x, place).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...transfer import to_device

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3..P7 in pixels."""


class Cells(NamedTuple):
    """Some cells of the maps of N images, level after level, in order.

    Attributes:
        counts: how many there are of each level.
        index: [K] int64 into the N * H * W of each one's level.
        image, level, stride: [K] int64.
        corner: [K, 2] float32, the upper left corner (x, y) in pixels.
    """

    counts: list[int]
    index: Tensor
    image: Tensor
    level: Tensor
    stride: Tensor
    corner: Tensor


def locate_cells(index: Tensor, counts: list[int], shapes: Sequence[torch.Size]) -> Cells:
    """Cells by their indices [K] into those of all maps [N, C, H, W], one map after the other."""
    rows, start = [], 0
    for level, (images, _, height, width) in enumerate(shapes):
        rows.append((start, height * width, width, level, STRIDES[level]))
        start += images * height * width
    table = torch.from_numpy(np.repeat(np.array(rows), counts, axis=0))
    start, size, width, level, stride = to_device(table, index.device).unbind(1)
    index = index - start
    cell = index % size
    corner = torch.stack((cell % width * stride, cell // width * stride), dim=1).float()
    return Cells(counts, index, index // size, level, stride, corner)


def all_cells(shapes: Sequence[tuple[int, int]], device: torch.device) -> Cells:
    """All cells of maps of these (height, width) for one image."""
    parts = []
    for level, (height, width) in enumerate(shapes):
        # In operations that an export takes for sizes that are not known yet.
        y, x = (STRIDES[level] * torch.arange(side, device=device) for side in (height, width))
        corner = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=2)
        index = torch.arange(height * width, device=device)
        levels, strides = (torch.full_like(index, n) for n in (level, STRIDES[level]))
        parts.append((index, levels, strides, corner.flatten(0, 1).float()))
    index, level, stride, corner = (torch.cat(x) for x in zip(*parts, strict=True))
    counts = [height * width for height, width in shapes]
    return Cells(counts, index, torch.zeros_like(index), level, stride, corner)


def cells_above(logits: Sequence[Tensor], limit: float) -> Cells:
    """The cells of each map [N, C, H, W], on the CPU, in which any channel is above `limit`."""
    best = torch.cat([x.amax(dim=1).flatten() for x in logits])
    index = nonzero(best.float() > limit)
    ends = np.cumsum([len(x) * x.shape[2] * x.shape[3] for x in logits])
    counts = np.diff(np.searchsorted(index.numpy(), ends), prepend=0).tolist()
    return locate_cells(index, counts, [x.shape for x in logits])


def read_cells(maps: Sequence[Tensor], cells: Cells, channels: int) -> Tensor:
    """The values of maps [N, places * channels, H, W] at some cells: [K * places, channels]
    float32."""
    rows = []
    for x, index in zip(maps, cells.index.split(cells.counts), strict=True):
        x = x.flatten(2).transpose(1, 2)
        if x.is_contiguous():  # then whole rows can be copied
            rows.append(x.flatten(0, 1).index_select(0, index))
        else:
            rows.append(x[index // x.shape[1], index % x.shape[1]])
    return torch.cat(rows).unflatten(1, (-1, channels)).flatten(0, 1).float()


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Of each image's rows [N, L, D] those at its indices [N, K]: [N, K, D]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def nonzero(mask: Tensor) -> Tensor:
    """The indices [K] of the true elements of a mask [L] on the CPU, in a tenth of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def flatten_levels(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Maps [N, places * C, H, W] of all levels as [N, sum of H * W * places, C]."""
    return torch.cat([flatten_map(x, channels) for x in maps], dim=1)


def flatten_map(x: Tensor, channels: int) -> Tensor:
    """A map [N, places * C, H, W] as [N, H * W * places, C]."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, channels)
