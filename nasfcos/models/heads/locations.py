"""Locations of feature maps: where they lie in the image, and what the maps hold there.

A *location* is one position (y, x) of a map. A head predicts one box per *prior*: FCOS has one
prior per location (its point), RetinaNet several (its anchors). The predictions for A priors per
location are a map [N, A * C, H, W]; flattened, they are ordered (y, x, prior).
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


class Locations(NamedTuple):
    """K locations of the maps of N images, ordered by level.

    Attributes:
        counts: number of locations on each level.
        index: [K] int64, index into the N * H * W locations of its level.
        image, level, stride: [K] int64.
        corner: [K, 2] float32, upper left corner (x, y) in pixels.
    """

    counts: list[int]
    index: Tensor
    image: Tensor
    level: Tensor
    stride: Tensor
    corner: Tensor


def locate(index: Tensor, counts: list[int], shapes: Sequence[torch.Size]) -> Locations:
    """The locations with the given indices.

    Args:
        index: [K] int64, ascending, into the locations of all maps, one map after the other.
        counts: number of these indices on each level.
        shapes: shape [N, C, H, W] of each level's map.
    """
    rows, start = [], 0
    for level, (images, _, height, width) in enumerate(shapes):
        rows.append((start, height * width, width, level, STRIDES[level]))
        start += images * height * width
    table = torch.from_numpy(np.repeat(np.array(rows), counts, axis=0))
    start, size, width, level, stride = to_device(table, index.device).unbind(1)
    index = index - start
    position = index % size
    corner = torch.stack((position % width * stride, position // width * stride), dim=1).float()
    return Locations(counts, index, index // size, level, stride, corner)


def all_locations(shapes: Sequence[tuple[int, int]], device: torch.device) -> Locations:
    """All locations of one image's maps, given the (height, width) of each level."""
    parts = []
    for level, (height, width) in enumerate(shapes):
        # Only operations that torch.export accepts for symbolic sizes.
        y, x = (STRIDES[level] * torch.arange(side, device=device) for side in (height, width))
        corner = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=2)
        index = torch.arange(height * width, device=device)
        levels, strides = (torch.full_like(index, n) for n in (level, STRIDES[level]))
        parts.append((index, levels, strides, corner.flatten(0, 1).float()))
    index, level, stride, corner = (torch.cat(x) for x in zip(*parts, strict=True))
    counts = [height * width for height, width in shapes]
    return Locations(counts, index, torch.zeros_like(index), level, stride, corner)


def locations_above(logits: Sequence[Tensor], limit: float) -> Locations:
    """The locations of CPU maps [N, C, H, W] at which any channel exceeds `limit`."""
    best = torch.cat([x.amax(dim=1).flatten() for x in logits])
    index = nonzero(best.float() > limit)
    ends = np.cumsum([len(x) * x.shape[2] * x.shape[3] for x in logits])
    counts = np.diff(np.searchsorted(index.numpy(), ends), prepend=0).tolist()
    return locate(index, counts, [x.shape for x in logits])


def values_at(maps: Sequence[Tensor], locations: Locations, channels: int) -> Tensor:
    """The values of maps [N, A * channels, H, W] at K locations: [K * A, channels] float32."""
    rows = []
    for x, index in zip(maps, locations.index.split(locations.counts), strict=True):
        x = x.flatten(2).transpose(1, 2)
        if x.is_contiguous():  # channels-last maps: whole rows can be copied
            rows.append(x.flatten(0, 1).index_select(0, index))
        else:
            rows.append(x[index // x.shape[1], index % x.shape[1]])
    return torch.cat(rows).unflatten(1, (-1, channels)).flatten(0, 1).float()


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Select rows per image: [N, L, D] at indices [N, K] gives [N, K, D]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def nonzero(mask: Tensor) -> Tensor:
    """Indices [K] of the true elements of a CPU mask [L]; takes a tenth of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def flatten_levels(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Maps [N, A * C, H, W] of all levels as one tensor [N, sum of H * W * A, C]."""
    return torch.cat([flatten_map(x, channels) for x in maps], dim=1)


def flatten_map(x: Tensor, channels: int) -> Tensor:
    """A map [N, A * C, H, W] as [N, H * W * A, C]."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, channels)
