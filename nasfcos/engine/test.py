"""Testing a detector on data sets, shared among any number of processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..boxes import clip_boxes
from ..config import ConfigError
from ..data import DataError, build_dataset, build_test_loader, class_names, num_classes
from ..data.build import BatchLoader
from ..data.dataset import DetectionDataset
from ..data.transforms import scale_boxes
from ..download import local_path
from ..evaluation import evaluate, format_metrics
from ..models import Detector, build_detector, load_weights, optimize_for_inference
from ..models.heads.post_process import Detections
from ..models.inference import InferenceDetector
from ..models.weights import Weights, read_weights
from ..transfer import to_cpu
from . import distributed
from .checkpoint import check_classes
from .logging import progress
from .metrics import format_duration
from .weights import find_weights

logger = logging.getLogger(__name__)

DetectionsByImage = dict[int, Detections]


def test_sets(cfg: CfgNode, classes: Sequence[str] | None = None) -> dict[str, DetectionDataset]:
    """Build the data sets of DATASETS.TEST, by name.

    Args:
        cfg: the config tree.
        classes: names of the model's classes 1..N; None: those of the config's training data.

    Raises:
        ConfigError, DataError: a data set cannot be read.
    """
    return {name: build_dataset(cfg, name, classes) for name in cfg.DATASETS.TEST}


def test(
    cfg: CfgNode, model: Detector, datasets: Mapping[str, DetectionDataset]
) -> dict[str, dict]:
    """Detect objects in data sets and evaluate the detections; every process calls this.

    The detections come from a copy of the model, optimized for inference in TEST.DTYPE; the model
    itself is unchanged. Writes ``inference/<data set>/bbox.json`` and ``metrics.json`` in
    OUTPUT_DIR.

    Args:
        cfg: the config tree.
        model: the detector, on this process's device.
        datasets: data sets by name, as from `test_sets`.

    Returns:
        On process 0, the metrics of each data set by name (see `nasfcos.evaluation.evaluate`); on
        the other processes an empty dict.

    Raises:
        ConfigError: the device does not support TEST.DTYPE.
    """
    if not datasets:
        logger.warning("DATASETS.TEST is empty: there is nothing to test on")
    fast = inference_form(cfg, model)
    results = {}
    for name, dataset in datasets.items():
        loader = build_test_loader(
            cfg, dataset, rank=distributed.rank(), world_size=distributed.world_size()
        )
        logger.info("%s: testing on %d images", name, len(dataset))
        start = time.perf_counter()
        shares = distributed.gather(detect(fast, loader, len(dataset), name))
        if shares is not None:
            detections, seconds = merge(shares), time.perf_counter() - start
            logger.info(
                "%s: %d images in %s, %.1f images/s",
                name, len(detections), format_duration(seconds), len(detections) / seconds,
            )  # fmt: skip
            folder = Path(cfg.OUTPUT_DIR) / "inference" / name
            results[name] = evaluate(dataset, detections, folder)
            logger.info("%s: results in %s\n%s", name, folder, format_metrics(results[name]))
        distributed.barrier()
    return results


def inference_form(cfg: CfgNode, model: Detector) -> InferenceDetector:
    """A copy of the model, optimized for inference in TEST.DTYPE.

    Raises:
        ConfigError: the model's device does not support TEST.DTYPE.
    """
    try:
        return optimize_for_inference(model, getattr(torch, cfg.TEST.DTYPE))
    except ValueError as error:
        raise ConfigError(f"TEST.DTYPE: {error}") from error


def load_test_model(cfg: CfgNode, device: torch.device) -> tuple[Detector, list[str] | None]:
    """Build the config's detector with the weights that `find_weights` finds.

    If MODEL.NUM_CLASSES is 0, the weights say how many classes there are, so that the training data
    need not be available.

    Args:
        cfg: the config tree.
        device: device of this process.

    Returns:
        The model on `device`, and the names of its classes; None if the weights do not record them.

    Raises:
        ConfigError: there are no weights of a detector.
        CheckpointError: the weights were trained for other classes than the training data has.
        WeightsError: the weights are not those of a complete detector of this config.
    """
    weights = _read_test_weights(cfg)
    _check_classes(cfg, weights)
    return build_trained(cfg, weights, device), weights.classes


def build_trained(cfg: CfgNode, weights: Weights, device: torch.device) -> Detector:
    """Build the config's detector with the given weights, on `device`.

    If MODEL.NUM_CLASSES is 0, the number of classes is that recorded with the weights, or else that
    of the training data.

    Raises:
        WeightsError: the weights are not those of a complete detector of this config.
    """
    classes = cfg.MODEL.NUM_CLASSES or len(weights.classes or ()) or num_classes(cfg)
    model = build_detector(cfg, classes)
    load_weights(model, weights)
    return model.to(device)


def _read_test_weights(cfg: CfgNode) -> Weights:
    """Read the weights that process 0 finds, on every process."""
    found = find_weights(cfg) if distributed.rank() == 0 else None
    source = distributed.broadcast(found and found.name)
    path = local_path(source)
    if found is None and path is not None and not path.is_file():
        raise ConfigError(
            f"process {distributed.rank()} has no file {source}, which process 0 tests: "
            "OUTPUT_DIR must be a folder that all machines share, or MODEL.WEIGHT on the command "
            "line a file that each of them has"
        )
    with distributed.first_on_machine():  # download once per machine
        return found or read_weights(source)


def _check_classes(cfg: CfgNode, weights: Weights) -> None:
    if weights.classes is None or not cfg.DATASETS.TRAIN:
        return
    try:
        names = class_names(cfg)
    except DataError as error:
        logger.info("the classes are those of %s: %s", weights.name, error)
    else:
        check_classes(weights.classes, names, weights.name)


@torch.inference_mode()
def detect(model: nn.Module, loader: BatchLoader, total: int, title: str) -> DetectionsByImage:
    """Detect objects in all images of `loader`.

    Args:
        model: the detector in its form for inference.
        loader: yields this process's share of the images.
        total: number of images of all processes, for the log.
        title: name of the data set, for the log.

    Returns:
        The detections by image id, on the CPU. Boxes are in pixels of the images before the loader
        resized them, clipped to [0, w-1] x [0, h-1].
    """
    found: DetectionsByImage = {}
    processes = distributed.world_size()
    for images, targets in progress(
        loader, total, title, "images", lambda batch: len(batch[0]) * processes
    ):
        detections = to_cpu(model(images))
        for image, target, detection in zip(images, targets, detections, strict=True):
            detection["boxes"] = to_original_size(
                detection["boxes"], tuple(image.shape[-2:]), tuple(target["original_size"])
            )
            found[int(target["image_id"])] = detection
    return found


def to_original_size(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Scale boxes [N, 4] from an image of `size` (h, w) to the `original` (h, w), and clip them."""
    return clip_boxes(scale_boxes(boxes, size, original), *original)


def merge(shares: list[DetectionsByImage]) -> DetectionsByImage:
    """Join the detections of all processes.

    Raises:
        RuntimeError: two processes tested the same image.
    """
    merged: DetectionsByImage = {}
    for share in shares:
        if twice := merged.keys() & share.keys():
            raise RuntimeError(f"images {sorted(twice)[:5]} were tested by two processes")
        merged |= share
    return merged
