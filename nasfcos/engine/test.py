"""Testing: every image of the test sets once, over any number of processes, then the figures."""

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
from ..models.inference import InferenceDetector
from ..models.weights import Weights, read_weights
from ..transfer import to_cpu
from . import distributed
from .checkpoint import check_classes, find_weights
from .logging import progress
from .metrics import format_duration

logger = logging.getLogger(__name__)

Detections = dict[int, dict[str, Tensor]]


def test_sets(
    cfg: CfgNode, classes: Sequence[str] | None = None
) -> dict[str, DetectionDataset]:
    """The data sets of DATASETS.TEST by name, for `test`.

    Args:
        cfg: the config tree.
        classes: what a model's labels 1..N mean; None: as in the training data of the config.

    Raises:
        ConfigError, DataError: one of them cannot be read.
    """
    return {name: build_dataset(cfg, name, classes) for name in cfg.DATASETS.TEST}


def test(
    cfg: CfgNode, model: Detector, datasets: Mapping[str, DetectionDataset]
) -> dict[str, dict]:
    """Detect in data sets and measure.

    What detects is a copy of the model for inference in TEST.DTYPE; the model itself stays as it
    is.

    Writes ``inference/<data set>/bbox.json`` and ``metrics.json`` in OUTPUT_DIR.

    Args:
        cfg: the config tree.
        model: the detector, on this process's device.
        datasets: by name, see `test_sets`.

    Returns:
        On process 0 the metrics (see `nasfcos.evaluation.evaluate`) of each data set by name; on
        the others an empty dict.
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


test.__test__ = test_sets.__test__ = False  # no test cases, whatever pytest makes of the names


def inference_form(cfg: CfgNode, model: Detector) -> InferenceDetector:
    """The model for inference in TEST.DTYPE.

    Raises:
        ConfigError: a dtype that its device does not take.
    """
    try:
        return optimize_for_inference(model, getattr(torch, cfg.TEST.DTYPE))
    except ValueError as error:
        raise ConfigError(f"TEST.DTYPE: {error}") from error


def load_test_model(
    cfg: CfgNode, device: torch.device
) -> tuple[Detector, list[str] | None]:
    """The detector to be tested, with the weights that `find_weights` finds.

    Where MODEL.NUM_CLASSES is 0 and the annotations of the training data are not at hand, the
    weights say how many classes there are.

    Args:
        cfg: the config tree.
        device: this process's.

    Returns:
        The model, on `device`, and the names of its classes as far as the weights record them.

    Raises:
        ConfigError: there are no weights of a detector.
        CheckpointError: they were trained for other classes than those of the training data.
        WeightsError: they are not those of a whole detector of this config.
    """
    weights = _read_test_weights(cfg)
    _check_classes(cfg, weights)
    return build_trained(cfg, weights, device), weights.classes


def build_trained(cfg: CfgNode, weights: Weights, device: torch.device) -> Detector:
    """The config's detector with a whole detector's weights, on `device`.

    Where MODEL.NUM_CLASSES is 0, there are as many classes as the weights record, or else as the
    training data has.

    Raises:
        WeightsError: they are not those of a whole detector of this config.
    """
    classes = cfg.MODEL.NUM_CLASSES or len(weights.classes or ()) or num_classes(cfg)
    model = build_detector(cfg, classes)
    load_weights(model, weights)
    return model.to(device)


def _read_test_weights(cfg: CfgNode) -> Weights:
    """The same weights on every process: which ones, process 0 says."""
    found = find_weights(cfg) if distributed.rank() == 0 else None
    source = distributed.broadcast(found and found.name)
    path = local_path(source)
    if found is None and path is not None and not path.is_file():
        raise ConfigError(
            f"process {distributed.rank()} has no file {source}, which process 0 is to test: "
            "OUTPUT_DIR must be a folder that all machines share, or MODEL.WEIGHT of the command "
            "line a file that each of them has"
        )
    with distributed.first_on_machine():  # one download for all of a machine's processes
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
def detect(model: nn.Module, loader: BatchLoader, total: int, title: str) -> Detections:
    """Detections of every image of `loader`, by image id, on the CPU; `total` is the number of
    images of all processes, for the log.

    Boxes are in the pixels of the images as they were before the loader resized them, clipped to
    [0, w-1] x [0, h-1].
    """
    found: Detections = {}
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
    """Boxes [N, 4] in an image resized to `size` (h, w), scaled to the `original` and clipped."""
    return clip_boxes(scale_boxes(boxes, size, original), *original)


def merge(shares: list[Detections]) -> Detections:
    """One dict of all processes' detections.

    Raises:
        RuntimeError: two processes worked on the same image.
    """
    merged: Detections = {}
    for share in shares:
        if twice := merged.keys() & share.keys():
            raise RuntimeError(f"images {sorted(twice)[:5]} were tested by two processes")
        merged |= share
    return merged
