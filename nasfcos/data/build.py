"""Data sets and loaders from the config."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, get_worker_info
from yacs.config import CfgNode

from ..config import ConfigError
from ..signals import signals_deferred
from .catalog import class_names, find_dataset, with_training_classes
from .dataset import DetectionDataset, load_dataset
from .images import load_pixels
from .records import DataError, UnreadableImage
from .samplers import EvalBatchSampler, TrainBatchSampler, augmentation_rng
from .transforms import EvalTransform, TrainTransform

logger = logging.getLogger(__name__)

Batch = tuple[list[Tensor], list[dict]]


class _Pixels(Dataset):
    """A data set with arrays of its pictures, which may be smaller versions of them."""

    def __init__(self, dataset: DetectionDataset, enough: int):
        self.dataset = dataset
        self.load = partial(load_pixels, enough=enough)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict]:
        return self.dataset.read(index, self.load)


class _TrainingView(Dataset):
    """Some images of a joined data set, augmented. Items are asked for by (index, position)."""

    def __init__(
        self, dataset: ConcatDataset, indices: Sequence[int], transform: TrainTransform, seed: int
    ):
        self.dataset = dataset
        self.indices = indices
        self.transform = transform
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, dict]:
        index, position = item
        image, target = self._load(index)
        return _apply(self.transform, image, target, augmentation_rng(self.seed, position))

    def _load(self, index: int):
        """The image, or the next one that can be read (the same one whenever it is asked for)."""
        for step in range(len(self.indices)):
            try:
                return self.dataset[self.indices[(index + step) % len(self.indices)]]
            except UnreadableImage:
                continue
        raise DataError("none of the training images can be read")


class _EvalView(Dataset):
    """Resized images; None for one that cannot be read."""

    def __init__(self, dataset: DetectionDataset, transform: EvalTransform):
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, dict] | None:
        try:
            image, target = self.dataset[index]
        except UnreadableImage:
            return None
        return _apply(self.transform, image, target)


def _apply(transform, image, target: dict, *args) -> tuple[Tensor, dict]:
    try:
        return transform(image, target, *args)
    except Exception as error:
        raise DataError(f"{target['file_name']}: {type(error).__name__}: {error}") from error


def collate(samples: list[tuple[Tensor, dict] | None]) -> tuple[list[Tensor], list[dict]]:
    """A batch in the form in which workers hand it on (`BatchLoader` undoes that)."""
    samples = [sample for sample in samples if sample is not None]
    # Small arrays travel from the workers by value: each tensor would cost an open file.
    for _, target in samples:
        target["boxes"] = target["boxes"].numpy()
        target["labels"] = target["labels"].numpy()
    images = [image for image, _ in samples]
    if get_worker_info() is not None:
        _share(images)
    return images, [target for _, target in samples]


def _share(images: list[Tensor]) -> None:
    """Move images to shared memory, as the loader's queue would in a thread of its own.

    There a failure loses the batch, and the main process waits for it for ever.
    """
    try:
        for image in images:
            image.share_memory_()
    except RuntimeError as error:
        raise DataError(
            f"the loader's workers have too little shared memory for a batch ({error}): give "
            "/dev/shm more (docker run --shm-size=8g), or set DATALOADER.NUM_WORKERS 0"
        ) from error


class BatchLoader:
    """Batches `(images, targets)`: a list of uint8 [3, H, W] and a list of target dicts."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        try:
            with signals_deferred():  # it starts the workers
                batches = iter(self._loader)
            for images, targets in batches:
                for target in targets:
                    target["boxes"] = torch.from_numpy(target["boxes"])
                    target["labels"] = torch.from_numpy(target["labels"])
                if images:
                    yield images, targets
        finally:
            # An exception's traceback keeps the iterator alive; collected as cyclic garbage, it
            # waits seconds for each worker or for ever. So its workers are ended here and now.
            if self._loader.num_workers and batches is not None:
                batches._shutdown_workers()

    def __len__(self) -> int:
        """Batches to come, for a test loader; a training loader has no end (TypeError)."""
        return len(self._loader)


def start_worker(_: int) -> None:
    """Set up a worker process: one thread, and no signal that was not meant for it."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # not 1: that would wait for threads that only the main process has
    # Ctrl-C, and often SIGTERM, reach the whole process group at once. The main process still needs
    # batches to finish its step and ends its workers itself, so only its own SIGTERM counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Wait for a SIGTERM that the process `parent` sent (or one that came after its end)."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == parent:
        pass
    os._exit(0)  # to the loader any other code means that a worker failed


def _loader(cfg: CfgNode, view: Dataset, sampler) -> BatchLoader:
    return BatchLoader(
        DataLoader(
            view,
            batch_sampler=sampler,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=collate,
            worker_init_fn=start_worker,
        )
    )


def _groups(cfg: CfgNode, records: Sequence) -> np.ndarray:
    """1 for images at least as high as wide, 0 for the others; all 0 without grouping."""
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return np.zeros(len(records), dtype=np.int64)
    return np.array([record.height >= record.width for record in records], dtype=np.int64)


def build_dataset(
    cfg: CfgNode, name: str, classes: Sequence[str] | None = None
) -> DetectionDataset:
    """Read the data set `name`; its labels are numbered as in the training data.

    Args:
        cfg: the config tree.
        name: of the data set.
        classes: names by label, where they are known better than from the training data (a
            trained model has them on record).

    Raises:
        ConfigError: an unknown name or a faulty entry of DATASETS.CUSTOM.
        DataError: missing or malformed files.
    """
    spec = with_training_classes(cfg, find_dataset(cfg, name), classes)
    return load_dataset(spec, cfg.DATASETS.MAX_BAD_IMAGES)


def build_train_loader(
    cfg: CfgNode, rank: int = 0, world_size: int = 1, start_iteration: int = 0
) -> BatchLoader:
    """An endless loader over all of DATASETS.TRAIN; one item per optimizer step.

    An item is this process's share of the global batch: SOLVER.IMS_PER_BATCH / `world_size`
    images, to be cut into SOLVER.ACCUMULATE parts by the caller. Items depend only on the config
    and on the step, not on workers or on where the loader started.

    Args:
        cfg: the config tree; SEED must not be negative any more.
        rank, world_size: of this process.
        start_iteration: steps already done; the first item is that of the next one.

    Raises:
        ConfigError: a batch that does not divide, or MODEL.NUM_CLASSES that does not fit the data.
        DataError: no usable data; while iterating, too many images that cannot be read.
    """
    if cfg.SEED < 0:
        raise ValueError("SEED must be replaced by an actual seed before the loader is built")
    classes = class_names(cfg)
    if cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but the data of DATASETS.TRAIN = "
            f"{tuple(cfg.DATASETS.TRAIN)} have {len(classes)} classes; set it to 0 to follow them"
        )
    datasets = [build_dataset(cfg, name) for name in cfg.DATASETS.TRAIN]
    for dataset in datasets:
        if not dataset.has_annotations:
            raise DataError(f"data set {dataset.name} cannot be trained on: it has no annotations")
    records = [record for dataset in datasets for record in dataset.records]
    indices = np.arange(len(records))
    if cfg.DATALOADER.SKIP_EMPTY:
        indices = indices[[not record.ignored.all() for record in records]]
        logger.info(
            "%d of %d training images have boxes; the others are left out",
            len(indices), len(records),
        )  # fmt: skip
        if not len(indices):
            raise DataError(
                f"no image of {', '.join(cfg.DATASETS.TRAIN)} has a box to train on "
                "(DATALOADER.SKIP_EMPTY leaves out those without)"
            )
    transform = TrainTransform(
        min_sizes=tuple(cfg.INPUT.MIN_SIZE_TRAIN),
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        size_range=tuple(cfg.INPUT.MIN_SIZE_RANGE_TRAIN) or None,
        flip_prob=cfg.INPUT.FLIP_PROB,
        brightness=cfg.INPUT.BRIGHTNESS,
        contrast=cfg.INPUT.CONTRAST,
        saturation=cfg.INPUT.SATURATION,
        hue=cfg.INPUT.HUE,
    )
    pixels = [_Pixels(dataset, transform.largest_short_side) for dataset in datasets]
    view = _TrainingView(ConcatDataset(pixels), indices, transform, cfg.SEED)
    sampler = TrainBatchSampler(
        groups=_groups(cfg, [records[i] for i in indices]),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        rank=rank,
        world_size=world_size,
        accumulate=cfg.SOLVER.ACCUMULATE,
        start_iteration=start_iteration,
    )
    return _loader(cfg, view, sampler)


def build_test_loader(
    cfg: CfgNode, dataset: DetectionDataset, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Each image of `dataset` once over all processes, resized for testing.

    Batches hold TEST.IMS_PER_BATCH / `world_size` images (at least one). Boxes of the targets are
    in the resized image; `original_size` (height, width) leads back. Images that cannot be read
    are logged and left out.
    """
    sampler = EvalBatchSampler(
        groups=_groups(cfg, dataset.records),
        batch_size=max(1, cfg.TEST.IMS_PER_BATCH // world_size),
        rank=rank,
        world_size=world_size,
    )
    transform = EvalTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return _loader(cfg, _EvalView(dataset, transform), sampler)
