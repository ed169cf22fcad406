"""The contents of the caches: C2..C5 of all crops, and P3..P7 that a frozen neck makes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from ...data import DataError, build_dataset, class_names
from ...data.build import BatchLoader, collate, start_worker
from ...engine.logging import progress
from ...models import Detector
from ..crops import Crops
from .features import FeatureCache
from .keys import feature_key, pyramid_key
from .store import (
    check_space,
    is_whole,
    mention_unused,
    open_or_lock,
    remove_partial,
    write_cache,
)

logger = logging.getLogger(__name__)


def build_caches(
    cfg: CfgNode,
    model: Detector,
    folder: str | Path,
    accept: Callable[[str, str], None] = lambda train, val: None,
) -> tuple[FeatureCache, FeatureCache]:
    """C2..C5 of meta-train and meta-val, from existing caches or computed.

    Args:
        cfg: config with the split (`split_training_data`): of each image of DATASETS.TRAIN,
            SEARCH.CACHE.CROPS random crops are cached, of each of DATASETS.TEST the central one.
        model: detector on its device; its preprocessing and backbone compute the maps.
        folder: directory that holds all caches (SEARCH.CACHE.FOLDER, or ``cache`` in OUTPUT_DIR).
        accept: called with the keys of the two caches before either is made; may raise.

    Returns:
        The caches of meta-train and of meta-val.

    Raises:
        CacheError: the disk is too small for both, or the maps do not fit into half precision.
        DataError: the data are unusable, or too many images cannot be read.
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
    keys = {part: feature_key(model, crops, folder) for part, crops in parts.items()}
    accept(*keys.values())
    remove_partial(folder)
    if missing := [part for part, key in keys.items() if not is_whole(folder / key)]:
        shapes = feature_shapes(model, settings.SIZE)
        check_space(folder, {p: (len(parts[p]) * parts[p].per_image, shapes) for p in missing})
    train, val = (
        cache_features(
            folder, model, crops, workers=cfg.DATALOADER.NUM_WORKERS, title=part, key=keys[part]
        )
        for part, crops in parts.items()
    )
    names = class_names(cfg)
    _check_boxes("meta-train", train, names, "more of them (SEARCH.CACHE.CROPS)")
    _check_boxes("meta-val", val, names, "more images (SEARCH.META_VAL) or another split (SEED)")
    mention_unused(folder, lambda meta: {meta["key"], meta["source"]} & set(keys.values()))
    return train, val


def _check_boxes(part: str, cache: FeatureCache, names: Sequence[str], remedy: str) -> None:
    """Check that some crop has a box, as the losses need; warn about classes without any."""
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
    """C2..C5 of all crops, from the cache of this model, data and settings if it exists.

    Args:
        folder: directory that holds all caches.
        model: detector on its device; its training or evaluation mode is kept.
        crops: the crops to compute the maps of.
        batch_size: number of crops computed at a time.
        workers: number of processes that load images.
        title: name in the log.
        key: the key of the cache, if the caller knows it already.

    Raises:
        CacheError, DataError: as for `build_caches`.
    """
    folder = Path(folder).resolve()
    path = folder / (key or feature_key(model, crops, folder))
    count = len(crops) * crops.per_image
    with _evaluating(model), open_or_lock(path, title) as cache:
        if cache is not None:
            return cache
        loader = DataLoader(
            crops,
            batch_size=max(1, batch_size // crops.per_image),
            num_workers=workers,
            collate_fn=_collate_images,
            worker_init_fn=start_worker,
        )
        shapes = feature_shapes(model, crops.size)
        with write_cache(path, title, count, shapes, crops.size) as writer:
            for images, targets in progress(
                BatchLoader(loader), count, f"cache {title}", "crops", lambda batch: len(batch[1])
            ):
                batch, _ = model.preprocess(images)
                writer.add(model.backbone(batch), targets)
        return FeatureCache.open(path)


def cache_pyramid(
    folder: str | Path,
    neck: nn.Module,
    source: FeatureCache,
    batch_size: int = 16,
    title: str = "pyramid",
) -> FeatureCache:
    """P3..P7 that a frozen neck makes of cached C2..C5, from their cache if it exists.

    The targets are those of C2..C5.

    Args:
        folder: directory that holds all caches.
        neck: neck on its device; its training or evaluation mode is kept.
        source: cache of C2..C5.
        batch_size: number of crops computed at a time.
        title: name in the log.

    Raises:
        CacheError: as for `build_caches`.
    """
    folder = Path(folder).resolve()
    device = next(neck.parameters()).device
    key = pyramid_key(neck, source.folder.name)

    def pyramid(rows: Sequence[int]) -> list[Tensor]:
        return neck([level.float() for level in source.read(rows, device)])

    with _evaluating(neck), open_or_lock(folder / key, title) as cache:
        if cache is None:
            count = len(source)
            shapes = _shapes(pyramid([0]))
            with write_cache(
                folder / key, title, count, shapes, source.size, source.folder.name
            ) as writer:
                batches = [range(count)[i : i + batch_size] for i in range(0, count, batch_size)]
                for rows in progress(batches, count, f"cache {title}", "crops", len):
                    writer.add(pyramid(rows), [source.targets[row] for row in rows])
            cache = FeatureCache.open(folder / key)
    mention_unused(folder, lambda meta: meta["key"] == key or meta["source"] != source.folder.name)
    return cache


def _collate_images(images: list[list[tuple[Tensor, dict]]]) -> tuple[list[Tensor], list[dict]]:
    return collate([sample for samples in images for sample in samples])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of each submodule is restored afterwards."""
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
    """(C, H, W) of C2..C5 for a crop of `size` x `size` pixels, found with a dummy crop."""
    with _evaluating(model):
        batch, _ = model.preprocess([torch.zeros(3, size, size, dtype=torch.uint8)])
        return _shapes(model.backbone(batch))
