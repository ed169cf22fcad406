"""Feature maps computed once: C2..C5 of all crops, or P3..P7 of a frozen neck, on the disk.

A trial trains a decoder only, so the backbone need not run in it (paper, section 4). Each cache is
a folder, called by a hash over everything that its content follows from: the weights that computed
it, the annotations and the content of the image files, the settings. So a stale one is never used.
It holds ``level0.npy`` ... (float16 [N, H, W, C], channels last as decoders want them),
``targets.npz``, and ``cache.json``, which says what the rest is. ``images.json`` beside the caches
remembers the hashes of the image files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from ..data import DataError, DetectionDataset, build_dataset, class_names
from ..data.build import BatchLoader, collate, start_worker
from ..engine.logging import PERIODIC, on_terminal
from ..engine.metrics import format_duration
from ..files import write_json
from ..locks import locked, unless_held
from ..models import Detector
from ..transfer import free_gpu_memory, to_device
from .crops import MIN_VISIBLE, Crops

logger = logging.getLogger(__name__)

Targets = list[dict[str, Tensor]]

_VERSION = 3  # of the crops and files; raise it whenever they change
_META, _TARGETS, _IMAGES = "cache.json", "targets.npz", "images.json"
_PARTIAL = ".partial"
# Of the free disk space, what a cache may take; and of the free GPU memory.
DISK_SHARE = 0.95
GPU_SHARE = 0.6
# Seconds between two lines about the progress.
LOG_EVERY = 10.0
# Bytes that go to the GPU at a time.
_TRANSFER = 2**28
# Image files that are read at a time for their hashes.
_READERS = 8
# Of the operating system, where a disk, a quota or the longest file is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH_DIGITS = 16


class CacheError(DataError):
    """A cache that cannot be made or read; the message says why and what to do."""


# ---------------------------------------------------------------------------------------- reading
class FeatureCache:
    """The maps and targets of N crops.

    Attributes:
        folder: of the files; `FeatureCache.open(folder)` gives the same cache in another process.
        targets: per crop a dict of `boxes` [M, 4] float32 (legacy xyxy in pixels of the crop) and
            `labels` [M] int64; M may be 0.
        size: side of the crops, in pixels.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        """For `open`; `meta` is the content of ``cache.json``."""
        self.folder = folder
        self.size: int = meta["size"]
        # Rows of images that could not be read are left over at the end.
        self._arrays = [
            np.load(folder / _level_file(level), mmap_mode="r")[: meta["count"]]
            for level in range(len(meta["shapes"]))
        ]
        with np.load(folder / _TARGETS) as arrays:
            boxes, labels = torch.from_numpy(arrays["boxes"]), torch.from_numpy(arrays["labels"])
            counts = arrays["counts"].tolist()
        self.targets: Targets = [
            {"boxes": b, "labels": n}
            for b, n in zip(boxes.split(counts), labels.split(counts), strict=True)
        ]
        self._held: list[Tensor] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> FeatureCache:
        """The cache in a folder.

        Raises:
            CacheError: there is none, or its files are not those that were written.
        """
        folder = Path(folder).resolve()
        return cls(folder, _read_meta(folder))

    def __len__(self) -> int:
        return len(self.targets)

    def __reduce__(self) -> tuple:
        return FeatureCache.open, (self.folder,)

    @property
    def maps(self) -> list[np.ndarray]:
        """One read-only float16 array [N, C, H, W] (memory-mapped) per level."""
        return [array.transpose(0, 3, 1, 2) for array in self._arrays]

    @property
    def nbytes(self) -> int:
        """Of all maps."""
        return sum(array.nbytes for array in self._arrays)

    def read(
        self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """The maps of some crops, in the order of `indices`: a float16 tensor [B, C, H, W],
        channels-last, per level, on the device."""
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
        """Hold all maps in the memory of a GPU, in half precision, if `GPU_SHARE` of what is free
        there is enough; `read` then takes them from there.

        Returns:
            whether they are held; False on the CPU, where the file cache of the system does this.
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
                self.folder.name, _gigabytes(self.nbytes), _gigabytes(free), device,
                100 * GPU_SHARE,
            )  # fmt: skip
            return False
        held = []
        for array in self._arrays:
            try:
                tensor = torch.empty(array.shape, dtype=torch.float16, device=device)
            except torch.OutOfMemoryError:  # another worker was faster
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
        """Undo `to_device`; gives whether there was anything to undo."""
        held, self._held = self._held, None
        return held is not None


def _rows(array: np.ndarray, indices: np.ndarray, device: torch.device) -> Tensor:
    """Some rows of a memory-mapped array, read in the order in which they lie on the disk."""
    rows = torch.empty(
        (len(indices), *array.shape[1:]), dtype=torch.float16, pin_memory=device.type == "cuda"
    )
    target = rows.numpy()
    for place in np.argsort(indices, kind="stable"):
        target[place] = array[indices[place]]
    return rows


def _checksum(path: Path) -> int:
    """CRC-32 of a file: against damage, and as fast as disks are."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _verify(folder: Path) -> None:
    """Compare the content of a cache's files, whose sizes are right, with their checksums."""
    meta = _read_meta(folder)
    if (size := sum(meta["files"].values())) > 1e10:
        logger.info("comparing the checksums of %s in %s", _gigabytes(size), folder)
    for name in meta["files"]:
        if _checksum(folder / name) != meta.get("checksums", {}).get(name):
            raise CacheError(f"{folder / name} is damaged: its checksum is wrong; delete {folder}")


def _level_file(level: int) -> str:
    return f"level{level}.npy"


def _read_meta(folder: Path) -> dict[str, Any]:
    """``cache.json``, with the sizes of the other files checked."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        files = meta["files"]
    except FileNotFoundError:
        raise CacheError(f"{folder} is no feature cache: it has no {_META}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{folder / _META} is damaged ({error}); delete {folder}") from None
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise CacheError(f"{path} {state}; delete {folder}")
    return meta


# ------------------------------------------------------------------------------------------- keys
def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_HASH_DIGITS]


def _module_hash(module: nn.Module) -> str:
    """Of the weights and buffers, and of the layers' settings (strides are no weights)."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _data_hash(datasets: Sequence[DetectionDataset], folder: Path) -> str:
    """Of the annotations, and of the name and content of each image file."""
    digest = hashlib.sha256()
    for dataset in datasets:
        images = dataset.spec.images.resolve()
        files = _image_hashes(folder, [images / record.file_name for record in dataset.records])
        for record, file in zip(dataset.records, files, strict=True):
            fields = (record.file_name, file, record.height, record.width, len(record.boxes))
            digest.update(repr(fields).encode())
            for array in (record.boxes, record.labels, record.ignored):
                digest.update(array.tobytes())
    return digest.hexdigest()


def _image_hashes(folder: Path, paths: Sequence[Path]) -> list[str | None]:
    """Of the content of each image file; None where it cannot be read.

    Remembered in `folder`: a file is read again only after its size or one of its times changed.
    """
    memory = folder / _IMAGES
    known = _remembered(memory)

    def identify(path: Path) -> list | None:
        try:
            found = path.stat()
            stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            before = known.get(str(path))
            if before is not None and before[:-1] == stamp:
                return before
            return [*stamp, hashlib.sha256(path.read_bytes()).hexdigest()[: 2 * _HASH_DIGITS]]
        except OSError:
            return None

    entries: list[list | None] = []
    last_line = time.perf_counter()
    step = 16 * _READERS  # what is begun is finished, and an interrupt should not wait for long
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(paths), step):
            entries += pool.map(identify, paths[first : first + step])
            if time.perf_counter() - last_line > LOG_EVERY:
                last_line = time.perf_counter()
                logger.info("image files read to know their content: %d of %d",
                            len(entries), len(paths), extra=PERIODIC)  # fmt: skip
    new = {
        str(path): entry for path, entry in zip(paths, entries, strict=True) if entry is not None
    }
    if not new.items() <= known.items():
        try:
            write_json(memory, known | new)
        except OSError as error:
            logger.warning("%s cannot be written, so the images will be read again: %s",
                           memory, error)  # fmt: skip
    return [None if entry is None else entry[-1] for entry in entries]


def _remembered(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {path: entry for path, entry in known.items() if isinstance(entry, list) and entry}
    except (OSError, ValueError, AttributeError):
        return {}


def _feature_key(model: Detector, crops: Crops, folder: Path) -> str:
    return _hash(
        _VERSION,
        _module_hash(model.preprocess),
        model.preprocess.size_divisibility,
        _module_hash(model.backbone),
        _data_hash(crops.datasets, folder),
        crops.settings,
    )


# --------------------------------------------------------------------------------------- building
def build_caches(
    cfg: CfgNode,
    model: Detector,
    folder: str | Path,
    accept: Callable[[str, str], None] = lambda train, val: None,
) -> tuple[FeatureCache, FeatureCache]:
    """C2..C5 of meta-train and meta-val: found again, or computed.

    Args:
        cfg: the config with the split (`split_training_data`): DATASETS.TRAIN gives
            SEARCH.CACHE.CROPS random crops of each image, DATASETS.TEST the one in the centre.
        model: its preprocessing and backbone compute the maps, on its device.
        folder: of the caches (SEARCH.CACHE.FOLDER, or ``cache`` in OUTPUT_DIR).
        accept: called with the names of the two before any of them is made; may raise.

    Returns:
        The caches of meta-train and of meta-val.

    Raises:
        CacheError: the disk is too small (for both together), or the maps do not fit into half
            precision.
        DataError: unusable data, or too many images that cannot be read.
    """
    folder = Path(folder).resolve()
    settings = cfg.SEARCH.CACHE
    parts = {}
    for part, names, crops in (
        ("meta-train", cfg.DATASETS.TRAIN, settings.CROPS),
        ("meta-val", cfg.DATASETS.TEST, 0),
    ):
        datasets = [build_dataset(cfg, name) for name in names]
        parts[part] = Crops(datasets, settings.SIZE, crops, cfg.SEED)
    keys = {part: _feature_key(model, crops, folder) for part, crops in parts.items()}
    accept(*keys.values())
    _remove_partial(folder)
    if missing := [part for part, key in keys.items() if not _is_whole(folder / key)]:
        shapes = feature_shapes(model, settings.SIZE)
        _check_space(folder, {p: (len(parts[p]) * parts[p].per_image, shapes) for p in missing})
    train, val = (
        cache_features(
            folder, model, crops, workers=cfg.DATALOADER.NUM_WORKERS, title=part, key=keys[part]
        )
        for part, crops in parts.items()
    )
    names = class_names(cfg)
    _check_boxes("meta-train", train, names, "more of them (SEARCH.CACHE.CROPS)")
    _check_boxes("meta-val", val, names, "more images (SEARCH.META_VAL) or another split (SEED)")
    _mention_unused(folder, lambda meta: {meta["key"], meta["source"]} & set(keys.values()))
    return train, val


def _check_boxes(part: str, cache: FeatureCache, names: Sequence[str], remedy: str) -> None:
    """Refuse crops without a box, of which a loss says nothing; tell of classes without one."""
    labels = torch.cat([target["labels"] for target in cache.targets])
    counts = torch.bincount(labels, minlength=len(names) + 1)[1:].tolist()
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if len(absent) == len(names):
        raise DataError(
            f"no crop of {part} has a box, so trials would learn nothing of objects: crops are "
            f"squares of the short side of an image. Take {remedy}, or cut long images up"
        )
    if absent:
        logger.warning(
            "cache %s: no crop has a box of %s; take %s, if they matter",
            part, ", ".join(map(repr, absent)), remedy,
        )  # fmt: skip


def cache_features(
    folder: str | Path,
    model: Detector,
    crops: Crops,
    batch_size: int = 16,
    workers: int = 0,
    title: str = "features",
    key: str | None = None,
) -> FeatureCache:
    """C2..C5 of all crops, from the cache of this model, data and settings if there is one.

    Args:
        folder: of all caches; this one's own folder is made in it.
        model: on its device; comes back in the mode that it was in.
        crops: of which images.
        batch_size: crops computed at a time.
        workers: processes that load images.
        title: for the log.
        key: the cache's name, where that is known already.

    Raises:
        CacheError, DataError: as for `build_caches`.
    """
    folder = Path(folder).resolve()
    key = key or _feature_key(model, crops, folder)
    preprocess, backbone = model.preprocess, model.backbone

    def batches() -> Iterator[tuple[list[Tensor], list[dict]]]:
        loader = DataLoader(
            crops,
            batch_size=max(1, batch_size // crops.per_image),
            num_workers=workers,
            collate_fn=_collate_images,
            worker_init_fn=start_worker,
        )
        for images, targets in BatchLoader(loader):
            batch, _ = preprocess(images)
            yield backbone(batch), targets

    with _evaluating(model):
        return _find_or_build(
            folder,
            key,
            title,
            count=len(crops) * crops.per_image,
            shapes=lambda: feature_shapes(model, crops.size),
            batches=batches,
            size=crops.size,
        )


def cache_pyramid(
    folder: str | Path,
    neck: nn.Module,
    source: FeatureCache,
    batch_size: int = 16,
    title: str = "pyramid",
) -> FeatureCache:
    """P3..P7 that a frozen neck makes of cached C2..C5, with the same targets; or the cache of it.

    Args:
        folder: of all caches; this one's own folder is made in it.
        neck: on its device; comes back in the mode that it was in.
        source: the cache of C2..C5.
        batch_size: crops computed at a time.
        title: for the log.

    Raises:
        CacheError: as for `build_caches`.
    """
    folder = Path(folder).resolve()
    device = next(neck.parameters()).device
    # How the cells are connected is neither in the weights nor in the layers.
    wiring = getattr(neck, "genotype", None)
    key = _hash(_VERSION, source.folder.name, _module_hash(neck), wiring)

    def batches() -> Iterator[tuple[list[Tensor], list[dict]]]:
        for first in range(0, len(source), batch_size):
            rows = range(first, min(first + batch_size, len(source)))
            maps = [level.float() for level in source.read(rows, device)]
            yield neck(maps), [source.targets[row] for row in rows]

    with _evaluating(neck):
        cache = _find_or_build(
            folder,
            key,
            title,
            count=len(source),
            shapes=lambda: _shapes(neck([level.float() for level in source.read([0], device)])),
            batches=batches,
            size=source.size,
            source=source.folder.name,
        )
    _mention_unused(folder, lambda meta: meta["key"] == key or meta["source"] != source.folder.name)
    return cache


def _collate_images(images: list[list[tuple[Tensor, dict]]]) -> tuple[list[Tensor], list[dict]]:
    return collate([sample for samples in images for sample in samples])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _shapes(maps: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(level.shape[1:]) for level in maps]


def feature_shapes(model: Detector, size: int) -> list[tuple[int, ...]]:
    """(C, H, W) of C2..C5 for a crop of side `size`, from a dummy crop."""
    with _evaluating(model):
        batch, _ = model.preprocess([torch.zeros(3, size, size, dtype=torch.uint8)])
        return _shapes(model.backbone(batch))


def estimate_bytes(shapes: Sequence[tuple[int, ...]], count: int) -> int:
    """Of the maps of `count` crops in half precision, exactly (headers and targets apart).

    Args:
        shapes: (C, H, W) of each level.
        count: of the crops.
    """
    return 2 * count * sum(int(np.prod(shape)) for shape in shapes)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _check_space(folder: Path, planned: dict[str, tuple[int, Sequence[tuple[int, ...]]]]) -> None:
    """Refuse caches, given by title as (crops, shapes), that do not fit on the disk together."""
    needed = sum(estimate_bytes(shapes, count) for count, shapes in planned.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > DISK_SHARE * free:
        crops = " and ".join(f"{count:,} ({title})" for title, (count, _) in planned.items())
        raise CacheError(
            f"the feature maps of {crops} crops take {_gigabytes(needed)}, but the disk of "
            f"{folder} has only {_gigabytes(free)} free, of which {100 * (1 - DISK_SHARE):.0f}% "
            "are to stay so: make SEARCH.CACHE.SIZE (the side of the crops) or "
            "SEARCH.CACHE.CROPS smaller, delete caches that are not needed any more, or set "
            "SEARCH.CACHE.FOLDER to a folder on a larger disk"
        )


def _too_full(title: str, folder: Path, needed: int, error: OSError) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"cache {title}: writing to {folder} failed ({error.strerror}): {_gigabytes(needed)} are "
        f"needed, and {_gigabytes(free)} are free on its disk now that what was written is removed "
        "(there may be a quota or a limit for single files, too). Make room, or set "
        "SEARCH.CACHE.FOLDER to a folder on a larger disk"
    )


def _is_whole(folder: Path) -> bool:
    try:
        _read_meta(folder)
    except CacheError:
        return False
    return True


def _find_or_build(
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
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key
    # Of this process: where there are no locks, another one may be at it.
    partial = path.with_name(f"{key}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}")
    _remove_partial(folder)
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
        _check_space(folder, {title: (count, levels)})
        logger.info("cache %s: %s crops, %s, in %s", title, f"{count:,}", _gigabytes(needed), path)
        # What is there is of a process of the same number, before the machine was started anew.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            start = time.perf_counter()
            meta = {"key": key, "title": title, "size": size, "source": source}
            meta |= _fill(partial, title, count, levels, batches())
            write_json(partial / _META, meta, indent=2)
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


def _remove_partial(folder: Path) -> None:
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
    paths = [folder / _level_file(level) for level in range(len(shapes))]
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
            for maps, found in _progress(batches, count, title):
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
        folder / _TARGETS,
        boxes=np.concatenate([np.asarray(t["boxes"], np.float32) for t in targets]),
        labels=np.concatenate([np.asarray(t["labels"], np.int64) for t in targets]),
        counts=np.array([len(t["labels"]) for t in targets], np.int64),
    )
    paths.append(folder / _TARGETS)
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


def _progress(batches: Iterator, count: int, title: str) -> Iterator:
    """The batches, with a bar on a terminal and lines in the log; `count` crops in all."""
    start = last_line = time.perf_counter()
    done = 0
    with tqdm(total=count, desc=title, unit="crop", leave=False, disable=not on_terminal()) as bar:
        for maps, targets in batches:
            yield maps, targets
            bar.update(len(targets))
            done += len(targets)
            now = time.perf_counter()
            if now - last_line > LOG_EVERY:
                last_line = now
                rest = (count - done) * (now - start) / done
                logger.info(
                    "cache %s: %d of %d crops, %.1f crops/s, %s to go",
                    title, done, count, done / (now - start), format_duration(rest),
                    extra=PERIODIC,
                )  # fmt: skip


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


def _mention_unused(folder: Path, used: Callable[[dict], Any]) -> None:
    """Log the caches that this search does not use, which the user may want to delete."""
    unused = []
    for path in sorted(folder.glob(f"*/{_META}")):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if not used(meta):
                unused.append((path.parent.name, sum(meta["files"].values())))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    if unused:
        logger.info(
            "%s has caches of other weights, data or settings, which may be deleted: %s",
            folder, ", ".join(f"{name} ({_gigabytes(size)})" for name, size in unused),
        )  # fmt: skip
