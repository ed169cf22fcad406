"""Build data sets and loaders from the config."""

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
    """A data set whose images are uint8 arrays [H, W, 3], possibly decoded at reduced size."""

    def __init__(self, dataset: DetectionDataset, enough: int):
        """
        Args:
            dataset: the data set.
            enough: see `load_pixels`.
        """
        self.dataset = dataset
        self.load = partial(load_pixels, enough=enough)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict]:
        return self.dataset.read(index, self.load)


class _TrainingView(Dataset):
    """Some images of a joined data set, augmented; an item's key is (index, stream position)."""

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

    def _load(self, index: int) -> tuple[np.ndarray, dict]:
        """The image with this index, or the next readable one, so that runs repeat exactly."""
        for step in range(len(self.indices)):
            try:
                return self.dataset[self.indices[(index + step) % len(self.indices)]]
            except UnreadableImage:
                continue
        raise DataError("none of the training images can be read")


class _EvalView(Dataset):
    """Images resized for evaluation; None for one that cannot be read."""

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
    """Apply a transform; an exception becomes a `DataError` that names the image."""
    try:
        return transform(image, target, *args)
    except Exception as error:
        raise DataError(f"{target['file_name']}: {type(error).__name__}: {error}") from error


def collate(samples: list[tuple[Tensor, dict] | None]) -> tuple[list[Tensor], list[dict]]:
    """Batch samples in the form in which workers send them; `BatchLoader` restores tensors."""
    samples = [sample for sample in samples if sample is not None]
    # Workers send small arrays by value, whereas each tensor would cost an open file.
    for _, target in samples:
        target["boxes"] = target["boxes"].numpy()
        target["labels"] = target["labels"].numpy()
    images = [image for image, _ in samples]
    if get_worker_info() is not None:
        _share(images)
    return images, [target for _, target in samples]


def _share(images: list[Tensor]) -> None:
    """Move images to shared memory before the loader's queue does so in its own thread.

    A failure in that thread would lose the batch, and the main process would wait forever.
    """
    try:
        for image in images:
            image.share_memory_()
    except RuntimeError as error:
        raise DataError(
            f"the loader's workers have too little shared memory for a batch ({error}): enlarge "
            "/dev/shm (docker run --shm-size=8g), or set DATALOADER.NUM_WORKERS 0"
        ) from error


class BatchLoader:
    """Batches `(images, targets)`: a list of uint8 [3, H, W] and a list of target dicts."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        try:
            with signals_deferred():  # this starts the workers
                batches = iter(self._loader)
            for images, targets in batches:
                for target in targets:
                    target["boxes"] = torch.from_numpy(target["boxes"])
                    target["labels"] = torch.from_numpy(target["labels"])
                if images:
                    yield images, targets
        finally:
            # An exception's traceback keeps the iterator alive, and when it is collected as cyclic
            # garbage, it waits seconds for each worker, or forever. So end its workers here.
            if self._loader.num_workers and batches is not None:
                batches._shutdown_workers()

    def __len__(self) -> int:
        """Number of batches of a test loader; TypeError for a training loader, which is endless."""
        return len(self._loader)


def start_worker(_: int) -> None:
    """Set up a worker process: one thread, and deaf to signals not meant for it."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # 1 would wait for threads that exist in the main process only
    # Ctrl-C, and often SIGTERM, reach the whole process group at once. The main process still needs
    # batches to finish its step and ends its workers itself, so only its own SIGTERM counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Exit on a SIGTERM that was sent by process `parent`, or that arrives after its end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == parent:
        pass
    os._exit(0)  # the loader takes any other code for a failed worker


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
    """Aspect-ratio group of each image: 1 if height >= width, else 0; all 0 without grouping."""
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return np.zeros(len(records), dtype=np.int64)
    return np.array([record.height >= record.width for record in records], dtype=np.int64)


def build_dataset(
    cfg: CfgNode, name: str, classes: Sequence[str] | None = None
) -> DetectionDataset:
    """Read a data set. Its labels are numbered as in the training data.

    Args:
        cfg: the config tree.
        name: name of the data set.
        classes: class names by label, if known from elsewhere (a trained model records them);
            None: those of the training data.

    Raises:
        ConfigError: unknown name, or faulty entry of DATASETS.CUSTOM.
        DataError: missing or malformed files.
    """
    spec = with_training_classes(cfg, find_dataset(cfg, name), classes)
    return load_dataset(spec, cfg.DATASETS.MAX_BAD_IMAGES)


def build_train_loader(
    cfg: CfgNode, rank: int = 0, world_size: int = 1, start_iteration: int = 0
) -> BatchLoader:
    """Build an endless loader over all of DATASETS.TRAIN, with one item per optimizer step.

    An item is this process's share of the global batch: SOLVER.IMS_PER_BATCH / `world_size`
    images, which the caller splits into SOLVER.ACCUMULATE parts. It depends only on the config and
    the step, not on the number of workers or the step at which the loader started.

    Args:
        cfg: the config tree; SEED must be an actual seed (not negative).
        rank: rank of this process.
        world_size: number of processes.
        start_iteration: number of steps already done; the first item belongs to the next one.

    Raises:
        ConfigError: the batch does not divide evenly, or MODEL.NUM_CLASSES does not fit the data.
        DataError: no usable data, or, while iterating, too many unreadable images.
    """
    if cfg.SEED < 0:
        raise ValueError("SEED must be replaced by an actual seed before the loader is built")
    classes = class_names(cfg)
    if cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but the data of DATASETS.TRAIN = "
            f"{tuple(cfg.DATASETS.TRAIN)} have {len(classes)} classes; set it to 0 to use that "
            "number"
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
    """Build a loader that yields each image of `dataset` once over all processes, resized.

    Batches hold TEST.IMS_PER_BATCH / `world_size` images (at least one). Boxes of the targets are
    in pixels of the resized image; `original_size` (height, width) allows to scale them back.
    Unreadable images are logged and left out.

    Args:
        cfg: the config tree.
        dataset: the data set.
        rank: rank of this process.
        world_size: number of processes.
    """
    sampler = EvalBatchSampler(
        groups=_groups(cfg, dataset.records),
        batch_size=max(1, cfg.TEST.IMS_PER_BATCH // world_size),
        rank=rank,
        world_size=world_size,
    )
    transform = EvalTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return _loader(cfg, _EvalView(dataset, transform), sampler)
