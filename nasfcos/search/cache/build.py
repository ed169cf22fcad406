"""What is cached: C2..C5 of all crops, and P3..P7 that a frozen neck makes of them."""

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
from ...models import Detector
from ..crops import Crops
from .features import FeatureCache
from .keys import feature_key, pyramid_key
from .store import check_space, find_or_build, is_whole, mention_unused, remove_partial

logger = logging.getLogger(__name__)


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
    key = key or feature_key(model, crops, folder)
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
        return find_or_build(
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
    key = pyramid_key(neck, source.folder.name)

    def batches() -> Iterator[tuple[list[Tensor], list[dict]]]:
        for first in range(0, len(source), batch_size):
            rows = range(first, min(first + batch_size, len(source)))
            maps = [level.float() for level in source.read(rows, device)]
            yield neck(maps), [source.targets[row] for row in rows]

    with _evaluating(neck):
        cache = find_or_build(
            folder,
            key,
            title,
            count=len(source),
            shapes=lambda: _shapes(neck([level.float() for level in source.read([0], device)])),
            batches=batches,
            size=source.size,
            source=source.folder.name,
        )
    mention_unused(folder, lambda meta: meta["key"] == key or meta["source"] != source.folder.name)
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
