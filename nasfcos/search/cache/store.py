"""Caches on disk: opened if they exist, or written whole, by one process at a time."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from torch import Tensor

from ...data import DataError
from ...engine.metrics import format_duration
from ...files import read_json, write_json
from ...locks import locked, unless_held
from ..crops import MIN_VISIBLE
from .features import (
    META,
    TARGETS,
    CacheError,
    FeatureCache,
    gigabytes,
    level_file,
    read_meta,
)

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
# Share of the free disk space that caches may take.
DISK_SHARE = 0.95
# Errors of the operating system: the disk, a quota or the limit of a file's size is exhausted.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def estimate_bytes(shapes: Sequence[tuple[int, ...]], count: int) -> int:
    """Exact size of the maps in half precision, in bytes, without file headers and targets.

    Args:
        shapes: (C, H, W) of each level.
        count: number of crops.
    """
    return 2 * count * sum(int(np.prod(shape)) for shape in shapes)


def check_space(folder: Path, planned: dict[str, tuple[int, Sequence[tuple[int, ...]]]]) -> None:
    """Check that some caches fit on the disk together.

    Args:
        folder: directory that holds all caches; it is created.
        planned: (number of crops, shapes of the levels) of each cache, by title.

    Raises:
        CacheError: they do not fit; the message says what to do.
    """
    needed = sum(estimate_bytes(shapes, count) for count, shapes in planned.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > DISK_SHARE * free:
        crops = " and ".join(f"{count:,} ({title})" for title, (count, _) in planned.items())
        raise CacheError(
            f"the feature maps of {crops} crops take {gigabytes(needed)}, but the disk of "
            f"{folder} has only {gigabytes(free)} free, of which {100 * (1 - DISK_SHARE):.0f}% "
            "must stay free: make SEARCH.CACHE.SIZE (the side of the crops) or "
            "SEARCH.CACHE.CROPS smaller, delete caches that are not needed any more, or set "
            "SEARCH.CACHE.FOLDER to a folder on a larger disk"
        )


def _too_full(title: str, folder: Path, needed: int, error: OSError) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"cache {title}: writing to {folder} failed ({error.strerror}): {gigabytes(needed)} are "
        f"needed, and {gigabytes(free)} are free on its disk now that what was written is removed "
        "(there may be a quota or a limit for single files, too). Make room, or set "
        "SEARCH.CACHE.FOLDER to a folder on a larger disk"
    )


def is_whole(folder: Path) -> bool:
    """Whether a folder has all files of a cache, with the right sizes."""
    try:
        read_meta(folder)
    except CacheError:
        return False
    return True


@contextmanager
def open_or_lock(path: Path, title: str) -> Iterator[FeatureCache | None]:
    """Hold the lock of the cache `path` within the block: one process at a time makes it.

    Yields:
        The cache if it exists and is intact; None if it has to be written, by `write_cache`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path.parent)
    with _locked(path):
        yield _open_intact(path, title) if path.exists() else None


def _open_intact(path: Path, title: str) -> FeatureCache | None:
    """The cache `path`; None if it is damaged, and therefore removed."""
    try:
        _verify(path)
        cache = FeatureCache.open(path)
    except (CacheError, OSError, ValueError) as error:
        logger.warning("cache %s is made anew: %s", title, error)
        shutil.rmtree(path)
        return None
    logger.info("cache %s: %d crops found in %s", title, len(cache), path)
    return cache


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it finds damage, and is as fast as disks are."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def _verify(folder: Path) -> None:
    """Check the sizes and checksums of a cache's files.

    Raises:
        CacheError: a file is missing or damaged.
    """
    meta = read_meta(folder)
    if (size := sum(meta["files"].values())) > 1e10:
        logger.info("comparing the checksums of %s in %s", gigabytes(size), folder)
    for name in meta["files"]:
        if _checksum(folder / name) != meta.get("checksums", {}).get(name):
            raise CacheError(f"{folder / name} is damaged: its checksum is wrong; delete {folder}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the cache `path`; log if another process holds it, and wait."""
    file = Path(f"{path}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file, timeout=0))
        except Timeout:
            logger.info("another process makes the cache %s; waiting for it", path)
            stack.enter_context(locked(file))
        yield


def remove_partial(folder: Path) -> None:
    """Remove unfinished caches of processes that were killed."""
    for partial in folder.glob(f"*{_PARTIAL}"):
        with unless_held(folder / f"{partial.name.split('.')[0]}.lock") as free:
            if free:
                logger.info("removing %s, left by a build that was killed", partial)
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def write_cache(
    path: Path,
    title: str,
    count: int,
    shapes: Sequence[tuple[int, ...]],
    size: int,
    source: str | None = None,
) -> Iterator[CacheWriter]:
    """Write the cache `path`: it appears, whole, when the block ends, and not at all on an error.

    Args:
        path: directory of the cache; its name is the cache's key.
        title: name in the log.
        count: number of crops, at most.
        shapes: (C, H, W) of each level.
        size: side of the crops, in pixels.
        source: key of the cache that this one is computed from.

    Raises:
        CacheError: the disk is too small, or the maps do not fit into half precision.
        DataError: no crop was added, because none of the images can be read.
    """
    needed = estimate_bytes(shapes, count)
    check_space(path.parent, {title: (count, shapes)})
    logger.info("cache %s: %s crops, %s, in %s", title, f"{count:,}", gigabytes(needed), path)
    # Named after the process: without locks, another one may be writing the same cache.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}")
    # A leftover of an earlier process with the same pid.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    start = time.perf_counter()
    try:
        with closing(CacheWriter(partial, title, count, shapes)) as writer:
            yield writer
            meta = {"key": path.name, "size": size, "source": source} | writer.finish()
        write_json(partial / META, meta, indent=2)
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise CacheError(_too_full(title, path.parent, needed, error)) from error
        raise
    seconds = time.perf_counter() - start
    logger.info(
        "cache %s: done in %s, %.1f crops/s",
        title, format_duration(seconds), meta["count"] / seconds,
    )  # fmt: skip


class CacheWriter:
    """The files of a cache that is being written; made by `write_cache`."""

    def __init__(
        self, folder: Path, title: str, count: int, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._folder, self._title, self._count, self._shapes = folder, title, count, shapes
        self._targets: list[dict] = []
        # Plain writes, because a full disk kills a process that writes to memory-mapped files.
        self._files = [(folder / level_file(i)).open("wb") for i in range(len(shapes))]
        for file, (channels, height, width) in zip(self._files, shapes, strict=True):
            header = {
                "descr": "<f2",
                "fortran_order": False,
                "shape": (count, height, width, channels),
            }
            np.lib.format.write_array_header_1_0(file, header)
        self._starts = [file.tell() for file in self._files]

    def add(self, maps: Sequence[Tensor], targets: Sequence[dict]) -> None:
        """Append some crops.

        Args:
            maps: [B, C, H, W] per level.
            targets: B dicts of `boxes`, `labels` and perhaps `dropped`, as `Crops` gives them.

        Raises:
            CacheError: the maps do not fit into half precision.
        """
        for level, (file, values) in enumerate(zip(self._files, maps, strict=True)):
            file.write(_half(values, self._title, level).cpu().numpy().data)
        self._targets += targets

    def finish(self) -> dict[str, Any]:
        """Complete the files, and return what ``cache.json`` says about them."""
        for file, start, shape in zip(self._files, self._starts, self._shapes, strict=True):
            file.truncate(start + estimate_bytes([shape], self._count))
            file.flush()
            os.fsync(file.fileno())
        self.close()
        targets = self._targets
        if not targets:
            raise DataError(f"{self._title}: none of the images can be read")
        _log_boxes(self._title, targets, self._count)
        np.savez(
            self._folder / TARGETS,
            boxes=np.concatenate([np.asarray(t["boxes"], np.float32) for t in targets]),
            labels=np.concatenate([np.asarray(t["labels"], np.int64) for t in targets]),
            counts=np.array([len(t["labels"]) for t in targets], np.int64),
        )
        paths = [*(Path(file.name) for file in self._files), self._folder / TARGETS]
        return {
            "count": len(targets),
            "shapes": [list(shape) for shape in self._shapes],
            "files": {path.name: path.stat().st_size for path in paths},
            "checksums": {path.name: _checksum(path) for path in paths},
        }

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _half(maps: Tensor, title: str, level: int) -> Tensor:
    """Maps [N, C, H, W] as they are stored: float16 [N, H, W, C]."""
    half = maps.half()
    if not half.isfinite().all():
        largest = maps.abs().max().item()
        raise CacheError(
            f"{title}: map {level} reaches {largest:.3g}, which half precision (up to 65504) does "
            "not hold; features of a trained model are far smaller, so look at the weights that "
            "compute them (SEARCH.PREPARE) and the log of their training"
        )
    return half.permute(0, 2, 3, 1).contiguous()


def _log_boxes(title: str, targets: list[dict], count: int) -> None:
    if len(targets) < count:
        logger.warning(
            "cache %s: %d of %d crops are missing, of images that cannot be read",
            title, count - len(targets), count,
        )  # fmt: skip
    if "dropped" in targets[0]:
        logger.info(
            "cache %s: %d boxes in %d crops (%d crops without any); %d boxes are dropped, since "
            "less than %.0f%% of them lies in their crop",
            title, sum(len(t["labels"]) for t in targets), len(targets),
            sum(not len(t["labels"]) for t in targets), sum(t["dropped"] for t in targets),
            100 * MIN_VISIBLE,
        )  # fmt: skip


def mention_unused(folder: Path, used: Callable[[dict], Any]) -> None:
    """Log the caches that this search does not use, because the user may want to delete them.

    Args:
        folder: directory that holds all caches.
        used: whether the cache with a given ``cache.json`` is in use.
    """
    unused = []
    for path in sorted(folder.glob(f"*/{META}")):
        with suppress(TypeError, KeyError):  # an unreadable file
            meta = read_json(path)
            if not used(meta):
                unused.append((path.parent.name, sum(meta["files"].values())))
    if unused:
        logger.info(
            "%s has caches of other weights, data or settings, which may be deleted: %s",
            folder, ", ".join(f"{name} ({gigabytes(size)})" for name, size in unused),
        )  # fmt: skip
