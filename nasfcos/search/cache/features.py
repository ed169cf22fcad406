"""Feature maps on disk, computed once: C2..C5 of all crops, or P3..P7 of a frozen neck.

A cache is a directory with the files ``level0.npy`` ... (float16 [N, H, W, C], channels last as
decoders need them), ``targets.npz`` and ``cache.json``, which describes the others. :mod:`.store`
writes them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import DataError
from ...models.heads.dense import Targets
from ...transfer import free_gpu_memory, to_device

logger = logging.getLogger(__name__)

VERSION = 3  # of the crops and of the files; raise it whenever they change
META, TARGETS = "cache.json", "targets.npz"
# Share of a GPU's free memory that a cache may take.
GPU_SHARE = 0.6
# Bytes that are copied to the GPU at a time.
_TRANSFER = 2**28


class CacheError(DataError):
    """A cache cannot be made or read; the message says why and what to do."""


class FeatureCache:
    """Feature maps and targets of N crops.

    Attributes:
        folder: directory of the cache; `FeatureCache.open(folder)` opens it in another process.
        targets: for each crop, a dict of `boxes` [M, 4] float32 (legacy xyxy in pixels of the crop)
            and `labels` [M] int64; M may be 0.
        size: side of the crops, in pixels.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        """Used by `open`; `meta` is the content of ``cache.json``."""
        self.folder = folder
        self.size: int = meta["size"]
        # The files have room for all crops; unreadable images leave unused rows at the end.
        self._arrays = [
            np.load(folder / level_file(level), mmap_mode="r")[: meta["count"]]
            for level in range(len(meta["shapes"]))
        ]
        with np.load(folder / TARGETS) as arrays:
            boxes, labels = torch.from_numpy(arrays["boxes"]), torch.from_numpy(arrays["labels"])
            counts = arrays["counts"].tolist()
        self.targets: Targets = [
            {"boxes": b, "labels": n}
            for b, n in zip(boxes.split(counts), labels.split(counts), strict=True)
        ]
        self._held: list[Tensor] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> FeatureCache:
        """Open the cache in a directory.

        Raises:
            CacheError: there is none, or files are missing or of another size than was written.
        """
        folder = Path(folder).resolve()
        return cls(folder, read_meta(folder))

    def __len__(self) -> int:
        return len(self.targets)

    def __reduce__(self) -> tuple:
        return FeatureCache.open, (self.folder,)

    @property
    def maps(self) -> list[np.ndarray]:
        """A memory-mapped, read-only float16 array [N, C, H, W] per level."""
        return [array.transpose(0, 3, 1, 2) for array in self._arrays]

    @property
    def nbytes(self) -> int:
        """Size of all maps, in bytes."""
        return sum(array.nbytes for array in self._arrays)

    def read(
        self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """The maps of some crops, in the order of `indices`.

        Returns:
            A channels-last float16 tensor [B, C, H, W] per level, on the device.
        """
        device = torch.device(device)
        indices = np.asarray(indices, dtype=np.int64)
        if self._held is not None:
            rows = to_device(torch.from_numpy(indices), self._held[0].device)
            found = [held.index_select(0, rows).to(device) for held in self._held]
        else:
            found = [
                _rows(array, indices, device).to(device, non_blocking=True)
                for array in self._arrays
            ]
        return [rows.permute(0, 3, 1, 2) for rows in found]

    def to_device(self, device: torch.device | str) -> bool:
        """Copy all maps to a GPU, where `read` takes them from then on.

        This needs the maps to fit into `GPU_SHARE` of the GPU's free memory.

        Returns:
            Whether the maps are on the GPU. False on the CPU, where the system's file cache serves
            the same purpose.
        """
        device = torch.device(device)
        if device.type != "cuda":
            return False
        free_gpu_memory()
        free, _ = torch.cuda.mem_get_info(device)
        if self.nbytes > GPU_SHARE * free:
            logger.info(
                "%s stays on the disk: it takes %s, and of the %s that are free on %s at most "
                "%.0f%% are used for it",
                self.folder.name, gigabytes(self.nbytes), gigabytes(free), device,
                100 * GPU_SHARE,
            )  # fmt: skip
            return False
        held = []
        for array in self._arrays:
            try:
                tensor = torch.empty(array.shape, dtype=torch.float16, device=device)
            except torch.OutOfMemoryError:  # another worker has taken the memory meanwhile
                logger.info("%s stays on the disk: %s is full by now", self.folder.name, device)
                return False
            step = max(1, _TRANSFER // array[0].nbytes)
            for first in range(0, len(array), step):
                rows = np.arange(first, min(first + step, len(array)))
                tensor[first : first + step].copy_(_rows(array, rows, device))
            held.append(tensor)
        self._held = held
        return True

    def release(self) -> bool:
        """Undo `to_device`; returns whether there was anything to undo."""
        held, self._held = self._held, None
        return held is not None


def _rows(array: np.ndarray, indices: np.ndarray, device: torch.device) -> Tensor:
    """Some rows of a memory-mapped array, read in their order on the disk."""
    rows = torch.empty(
        (len(indices), *array.shape[1:]), dtype=torch.float16, pin_memory=device.type == "cuda"
    )
    target = rows.numpy()
    for place in np.argsort(indices, kind="stable"):
        target[place] = array[indices[place]]
    return rows


def level_file(level: int) -> str:
    """Name of the file with the maps of a level."""
    return f"level{level}.npy"


def read_meta(folder: Path) -> dict[str, Any]:
    """Read ``cache.json`` and check the sizes of the other files.

    Raises:
        CacheError: a file is missing or damaged.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        files = meta["files"]
    except FileNotFoundError:
        raise CacheError(f"{folder} is no feature cache: it has no {META}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{folder / META} is damaged ({error}); delete {folder}") from None
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise CacheError(f"{path} {state}; delete {folder}")
    return meta


def gigabytes(size: float) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
