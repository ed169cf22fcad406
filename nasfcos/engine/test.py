"""Testing: every image of the test sets once, over any number of processes, then the figures."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from ..boxes import clip_boxes
from ..config import ConfigError
from ..data import build_dataset, build_test_loader
from ..evaluation import evaluate, format_metrics
from ..models import load_weights
from . import distributed
from .checkpoint import newest_checkpoint
from .logging import PERIODIC, on_terminal
from .metrics import format_duration

logger = logging.getLogger(__name__)

# Seconds between two lines about the progress.
LOG_EVERY = 30.0

Detections = dict[int, dict[str, Tensor]]


def test(cfg: CfgNode, model: nn.Module, device: torch.device) -> dict[str, dict]:
    """Detect in every data set of DATASETS.TEST and measure; the model comes back as it was.

    Writes ``inference/<data set>/bbox.json`` and ``metrics.json`` in OUTPUT_DIR.

    Returns:
        On process 0 the metrics (see `nasfcos.evaluation.evaluate`) of each data set by name; on
        the others an empty dict.
    """
    training = model.training
    model.eval()
    results = {}
    for name in cfg.DATASETS.TEST:
        dataset = build_dataset(cfg, name)
        loader = build_test_loader(
            cfg, dataset, rank=distributed.rank(), world_size=distributed.world_size()
        )
        logger.info("%s: testing on %d images", name, len(dataset))
        start = time.perf_counter()
        shares = distributed.gather(detect(model, loader, device, title=name))
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
    model.train(training)
    return results


test.__test__ = False  # not a test case, whatever pytest makes of the name


def load_test_weights(cfg: CfgNode, model: nn.Module, prefer_config: bool = False) -> None:
    """Load what is to be tested: OUTPUT_DIR's newest checkpoint, else MODEL.WEIGHT.

    Args:
        cfg: the config tree.
        model: what the config describes.
        prefer_config: MODEL.WEIGHT comes first (it was given on purpose).

    Raises:
        ConfigError: there is neither.
        WeightsError: the weights are not those of a whole detector of this config.
    """
    source = cfg.MODEL.WEIGHT if prefer_config else ""
    with distributed.first_on_machine():
        if not source:
            found = newest_checkpoint(cfg.OUTPUT_DIR)
            source = cfg.MODEL.WEIGHT if found is None else str(found[0])
        if not source:
            raise ConfigError(
                f"there is nothing to test: {cfg.OUTPUT_DIR} (OUTPUT_DIR) has no checkpoint and "
                "MODEL.WEIGHT is empty; set it to a weight file"
            )
        report = load_weights(model, source)
    if report.kind == "backbone":
        raise ConfigError(
            f"MODEL.WEIGHT {source} is a backbone, not a whole detector: train it first, or name "
            "a trained model"
        )


@torch.inference_mode()
def detect(model: nn.Module, loader, device: torch.device, title: str = "") -> Detections:
    """Detections of every image of `loader`, by image id, on the CPU.

    Boxes are in the pixels of the images as they were before the loader resized them, clipped to
    [0, w-1] x [0, h-1].
    """
    found: Detections = {}
    done, start, last_line = 0, time.perf_counter(), time.perf_counter()
    for batch, (images, targets) in enumerate(
        tqdm(loader, desc=title, unit="batch", leave=False, disable=not on_terminal()), start=1
    ):
        detections = model([image.to(device, non_blocking=True) for image in images])
        for image, target, detection in zip(images, targets, detections, strict=True):
            detection = {key: value.cpu() for key, value in detection.items()}
            detection["boxes"] = to_original_size(
                detection["boxes"], tuple(image.shape[-2:]), tuple(target["original_size"])
            )
            found[int(target["image_id"])] = detection
        done += len(images)
        now = time.perf_counter()
        if now - last_line > LOG_EVERY:
            last_line = now
            rest = (len(loader) - batch) * (now - start) / batch
            logger.info(
                "%s: %d of %d batches, %.1f images/s, %s to go",
                title, batch, len(loader), done * distributed.world_size() / (now - start),
                format_duration(rest), extra=PERIODIC,
            )  # fmt: skip
    return found


def to_original_size(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] in an image resized to `size` (h, w), scaled to the `original` and clipped."""
    ratio_y, ratio_x = original[0] / size[0], original[1] / size[1]
    scaled = boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    return clip_boxes(scaled, *original)


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
