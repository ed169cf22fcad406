"""Caches on the disk: found again, or made whole, by one process at a time."""

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
from ...engine.logging import progress
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
# Of the free disk space, what a cache may take.
DISK_SHARE = 0.95
# Of the operating system, where a disk, a quota or the longest file is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def estimate_bytes(shapes: Sequence[tuple[int, ...]], count: int) -> int:
    """Of the maps of `count` crops in half precision, exactly (headers and targets apart).

    Args:
        shapes: (C, H, W) of each level.
        count: of the crops.
    """
    return 2 * count * sum(int(np.prod(shape)) for shape in shapes)


def check_space(folder: Path, planned: dict[str, tuple[int, Sequence[tuple[int, ...]]]]) -> None:
    """Refuse caches, given by title as (crops, shapes), that do not fit on the disk together.

    Raises:
        CacheError: they do not; with the remedy.
    """
    needed = sum(estimate_bytes(shapes, count) for count, shapes in planned.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > DISK_SHARE * free:
        crops = " and ".join(f"{count:,} ({title})" for title, (count, _) in planned.items())
        raise CacheError(
            f"the feature maps of {crops} crops take {gigabytes(needed)}, but the disk of "
            f"{folder} has only {gigabytes(free)} free, of which {100 * (1 - DISK_SHARE):.0f}% "
            "are to stay so: make SEARCH.CACHE.SIZE (the side of the crops) or "
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
    """Whether a folder has all files of a cache, in their sizes."""
    try:
        read_meta(folder)
    except CacheError:
        return False
    return True


def find_or_build(
    folder: Path,
    key: str,
    title: str,
    count: int,
    shapes: Callable[[], list[tuple[int, ...]]],
    batches: Callable[[], Iterator[tuple[Sequence[Tensor], list[dict]]]],
    size: int,
    source: str | None = None,
) -> FeatureCache:
    """The cache `folder`/`key`; built, by one process at a time, unless it is there.

    Args:
        folder: of all caches.
        key: of this one.
        title: for the log.
        count: of crops, at most.
        shapes: gives (C, H, W) of the levels.
        batches: gives the maps, and targets with `boxes`, `labels` and perhaps `dropped`.
        size: of the crops in pixels.
        source: key of the cache from which this one is computed.

    Raises:
        CacheError: the disk is too small, or the maps do not fit into half precision.
        DataError: none of the images can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key
    # Of this process: where there are no locks, another one may be at it.
    partial = path.with_name(f"{key}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}")
    remove_partial(folder)
    with _locked(path):
        if path.exists():
            try:
                _verify(path)
                cache = FeatureCache.open(path)
                logger.info("cache %s: %d crops found in %s", title, len(cache), path)
                return cache
            except (CacheError, OSError, ValueError) as error:
                logger.warning("cache %s is made anew: %s", title, error)
                shutil.rmtree(path)
        levels = shapes()
        needed = estimate_bytes(levels, count)
        check_space(folder, {title: (count, levels)})
        logger.info("cache %s: %s crops, %s, in %s", title, f"{count:,}", gigabytes(needed), path)
        # What is there is of a process of the same number, before the machine was started anew.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            start = time.perf_counter()
            meta = {"key": key, "size": size, "source": source}
            meta |= _fill(partial, title, count, levels, batches())
            write_json(partial / META, meta, indent=2)
            os.replace(partial, path)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise CacheError(_too_full(title, folder, needed, error)) from error
            raise
        seconds = time.perf_counter() - start
        logger.info(
            "cache %s: done in %s, %.1f crops/s",
            title, format_duration(seconds), meta["count"] / seconds,
        )  # fmt: skip
    return FeatureCache.open(path)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: against damage, and as fast as disks are."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def _verify(folder: Path) -> None:
    """Compare the content of a cache's files, whose sizes are right, with their checksums.

    Raises:
        CacheError: a file is another one.
    """
    meta = read_meta(folder)
    if (size := sum(meta["files"].values())) > 1e10:
        logger.info("comparing the checksums of %s in %s", gigabytes(size), folder)
    for name in meta["files"]:
        if _checksum(folder / name) != meta.get("checksums", {}).get(name):
            raise CacheError(f"{folder / name} is damaged: its checksum is wrong; delete {folder}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time makes the cache `path`."""
    file = Path(f"{path}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file, timeout=0))
        except Timeout:
            logger.info("another process makes the cache %s; waiting for it", path)
            stack.enter_context(locked(file))
        yield


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of caches that they were making."""
    for partial in folder.glob(f"*{_PARTIAL}"):
        with unless_held(folder / f"{partial.name.split('.')[0]}.lock") as free:
            if free:
                logger.info("removing %s, left by a build that was killed", partial)
                shutil.rmtree(partial, ignore_errors=True)


def _fill(
    folder: Path,
    title: str,
    count: int,
    shapes: Sequence[tuple[int, ...]],
    batches: Iterator[tuple[Sequence[Tensor], list[dict]]],
) -> dict[str, Any]:
    """Write the files of a cache but for ``cache.json``, whose facts about them are returned."""
    paths = [folder / level_file(level) for level in range(len(shapes))]
    targets: list[dict] = []
    # Plain writing, since a full disk kills a process that writes to memory-mapped files.
    files = [path.open("wb") for path in paths]
    try:
        for file, shape in zip(files, shapes, strict=True):
            channels, height, width = shape
            header = {
                "descr": "<f2",
                "fortran_order": False,
                "shape": (count, height, width, channels),
            }
            np.lib.format.write_array_header_1_0(file, header)
        ends = [
            file.tell() + estimate_bytes([shape], count)
            for file, shape in zip(files, shapes, strict=True)
        ]
        # A generator that an exception's traceback keeps alive would keep its workers alive.
        with closing(batches):
            for maps, found in progress(
                batches, count, f"cache {title}", "crops", lambda batch: len(batch[1])
            ):
                for level, (file, values) in enumerate(zip(files, maps, strict=True)):
                    file.write(_half(values, title, level).cpu().numpy().data)
                targets += found
        for file, end in zip(files, ends, strict=True):
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    if not targets:
        raise DataError(f"{title}: none of the images can be read")
    _log_boxes(title, targets, count)
    np.savez(
        folder / TARGETS,
        boxes=np.concatenate([np.asarray(t["boxes"], np.float32) for t in targets]),
        labels=np.concatenate([np.asarray(t["labels"], np.int64) for t in targets]),
        counts=np.array([len(t["labels"]) for t in targets], np.int64),
    )
    paths.append(folder / TARGETS)
    return {
        "count": len(targets),
        "shapes": [list(shape) for shape in shapes],
        "files": {path.name: path.stat().st_size for path in paths},
        "checksums": {path.name: _checksum(path) for path in paths},
    }


def _half(maps: Tensor, title: str, level: int) -> Tensor:
    """As they are stored, [N, H, W, C]."""
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
    """Log the caches that this search does not use, which the user may want to delete."""
    unused = []
    for path in sorted(folder.glob(f"*/{META}")):
        with suppress(TypeError, KeyError):  # it cannot be read
            meta = read_json(path)
            if not used(meta):
                unused.append((path.parent.name, sum(meta["files"].values())))
    if unused:
        logger.info(
            "%s has caches of other weights, data or settings, which may be deleted: %s",
            folder, ", ".join(f"{name} ({gigabytes(size)})" for name, size in unused),
        )  # fmt: skip
