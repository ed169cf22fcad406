"""Keys of caches: hashes of everything that determines a cache's content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from ...data import DetectionDataset
from ...engine.logging import progress
from ...files import read_json, write_json
from ...models import Detector
from ..crops import Crops
from .features import VERSION

logger = logging.getLogger(__name__)

_IMAGES = "images.json"
# Number of image files that are hashed in parallel.
_READERS = 8
_HASH_DIGITS = 16


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_HASH_DIGITS]


def _module_hash(module: nn.Module) -> str:
    """Hash of a module's weights, buffers and layer settings (strides, say, are no weights)."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _data_hash(datasets: Sequence[DetectionDataset], folder: Path) -> str:
    """Hash of the annotations, and of the name and content of each image file."""
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
    """Hash of the content of each image file; None for a file that cannot be read.

    The hashes are stored in `folder`: a file is read again only if its size or one of its times has
    changed.
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
    step = 16 * _READERS  # small blocks, because an interrupt waits for the end of the current one
    blocks = (paths[first : first + step] for first in range(0, len(paths), step))
    with ThreadPoolExecutor(_READERS) as pool:
        for block in progress(blocks, len(paths), "content of the images", "files", len):
            entries += pool.map(identify, block)
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
    known = read_json(memory)
    if not isinstance(known, dict):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, list) and entry}


def feature_key(model: Detector, crops: Crops, folder: Path) -> str:
    """Key of the cache of C2..C5 of some crops, as computed by a model.

    The hashes of the image files take long, so they are stored in `folder`.
    """
    return _hash(
        VERSION,
        _module_hash(model.preprocess),
        model.preprocess.size_divisibility,
        _module_hash(model.backbone),
        _data_hash(crops.datasets, folder),
        crops.settings,
    )


def pyramid_key(neck: nn.Module, source: str) -> str:
    """Key of the cache of P3..P7 that a neck makes of the cache with the key `source`."""
    # Neither the weights nor the layers show how the cells are connected.
    wiring = getattr(neck, "genotype", None)
    return _hash(VERSION, source, _module_hash(neck), wiring)
