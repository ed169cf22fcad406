"""The examples that trials train on: cached maps with the targets of a head."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from ..config.tree import with_settings
from ..models.heads.dense import Assignment, DenseHead
from ..models.heads.locations import STRIDES
from ..transfer import to_device
from .cache import FeatureCache
from .decoder import build_decoder

logger = logging.getLogger(__name__)


class Examples:
    """Cached maps with the targets of a head.

    The boxes of a cached crop never change, so they are assigned to the head's priors once, not in
    every iteration.

    Args:
        cache: cache of the maps.
        head: head that assigns the boxes; all heads of a search assign them alike.
        device: device of the batches.
    """

    def __init__(self, cache: FeatureCache, head: DenseHead, device: torch.device) -> None:
        self.cache = cache
        self.device = device
        shapes = _pyramid_shapes([level.shape[2:] for level in cache.maps])
        head = head.to(device)
        assigned = []
        for target in cache.targets:
            one = head.assign(shapes, [target])
            positive = (one.labels[0] > 0).nonzero().squeeze(1)
            # Half a million labels an image (RetinaNet at 800 pixels) deserve less than int64.
            assigned.append((one.labels.to(torch.int16), positive, one.box_targets[0, positive]))
        labels, positive, wanted = zip(*assigned, strict=True)
        self._labels = torch.cat(labels)
        self._positive, self._wanted = list(positive), list(wanted)
        self._memory: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def channels(self) -> list[int]:
        """Number of channels of the maps, by level."""
        return [level.shape[1] for level in self.cache.maps]

    def batch(
        self, indices: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], Assignment]:
        """A batch of crops; it is made without waiting for a GPU.

        On a CPU, the next batch may overwrite the maps of this one.

        Args:
            indices: [B] int64 on the CPU.
            dtype: data type of the maps.

        Returns:
            The maps [B, C, H, W] by level, channels last, and the assignment, on the device.
        """
        maps = self._in_precision(dtype, self.cache.read(indices.numpy(), self.device))
        rows = indices.tolist()
        counts = torch.tensor([len(self._positive[row]) for row in rows])
        first = torch.arange(len(rows)) * self._labels.shape[1]
        offset = to_device(first.repeat_interleave(counts), self.device)
        labels = self._labels[to_device(indices, self.device)].long()
        wanted = torch.zeros(labels.numel(), 4, device=self.device)
        positive = torch.cat([self._positive[row] for row in rows]) + offset
        wanted[positive] = torch.cat([self._wanted[row] for row in rows])
        return maps, Assignment(labels, wanted.view(*labels.shape, 4))

    def _in_precision(self, dtype: torch.dtype, maps: list[Tensor]) -> list[Tensor]:
        """Convert the maps; on a CPU, into the memory of the previous batch if it is large enough.

        New memory has to be cleared by the system, which takes several times as long as the
        conversion itself.
        """
        if self.device.type != "cpu":
            return [x.to(dtype, memory_format=torch.channels_last) for x in maps]
        memory = self._memory
        if not memory or memory[0].dtype != dtype or len(memory[0]) < len(maps[0]):
            self._memory = memory = [
                torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last) for x in maps
            ]
        return [place[: len(x)].copy_(x) for place, x in zip(memory, maps, strict=True)]


def _pyramid_shapes(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) of P3..P7, given those of C2..C5 or of P3..P7 themselves."""
    if len(shapes) == len(STRIDES):
        return [tuple(shape) for shape in shapes]
    levels = [tuple(shape) for shape in shapes[1:]]
    while len(levels) < len(STRIDES):
        levels.append(tuple(math.ceil(side / 2) for side in levels[-1]))
    return levels


def open_examples(
    cfg: CfgNode, folder: Path, num_classes: int, device: torch.device
) -> Examples:
    """The examples of a cache, held in the GPU's memory if they fit.

    Args:
        cfg: config from `stage_config`.
        folder: directory of the cache.
        num_classes: number of object classes, without background.
        device: device of the batches.

    Raises:
        CacheError: the cache cannot be opened.
    """
    cache = FeatureCache.open(folder)
    cache.to_device(device)
    return Examples(cache, assigning_head(cfg, num_classes), device)


def assigning_head(cfg: CfgNode, num_classes: int) -> DenseHead:
    """A head that assigns boxes to priors just as the heads of all trials of a stage do.

    Args:
        cfg: config from `stage_config`.
        num_classes: number of object classes, without background.
    """
    plain = with_settings(cfg, {"MODEL.HEAD.TOWER": "plain"})
    return build_decoder(plain, None, num_classes, 0).head


def make_room(train: Examples, val: Examples) -> bool:
    """Free the GPU's memory of one of the caches, which is read from the disk from then on.

    Meta-val goes first, because it is read only once per trial. A cache does not return to the GPU:
    other trials may need the memory as well, and would fail although they are as good as any.

    Returns:
        Whether a cache was in the GPU's memory.
    """
    for name, examples in (("meta-val", val), ("meta-train", train)):
        if examples.cache.release():
            logger.info("the GPU's memory is needed: %s is read from the disk now", name)
            return True
    return False
