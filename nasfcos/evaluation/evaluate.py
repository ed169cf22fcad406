"""Evaluation of detections: check them, write them to files, compute their metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..boxes import legacy_to_xywh
from ..data import DetectionDataset
from ..data.coco import load_coco
from ..files import write_json
from .coco import METRICS, coco_metrics
from .voc import Boxes, voc_average_precision

logger = logging.getLogger(__name__)

Metrics = dict[str, float | dict[str, dict[str, float]]]


class EvaluationError(ValueError):
    """The detections cannot belong to the data set."""


def evaluate(
    dataset: DetectionDataset,
    detections: Mapping[int, dict[str, Tensor]],
    output_dir: str | Path | None = None,
) -> Metrics:
    """Evaluate detections against the ground truth of a data set.

    Args:
        dataset: the data set; without annotations, only the submission file is written.
        detections: by image id: `boxes` [N, 4] (xyxy in pixels of the original image, both corners
            inclusive), `scores` [N] and `labels` [N] in 1..number of classes. Missing images count
            as images without detections; their number is logged.
        output_dir: folder for `bbox.json` (the detections as COCO results) and `metrics.json`; None
            writes nothing.

    Returns:
        The twelve COCO metrics by name (`AP`, `AP50`, ... `ARl`) in 0..1, and under `per_class` the
        AP, AP50 and AP75 of each class. A VOC data set also has `AP50_voc2007` (11 points) and
        `AP50_voc` (area under the curve), overall and per class; in COCO's metrics its difficult
        objects count like crowds: found or not, they change nothing. A metric without ground truth
        is nan (null in `metrics.json`). Empty for a data set without annotations.

    Raises:
        EvaluationError: an image is not in the data set, a score or coordinate is not finite, a
            label is unknown, or lengths disagree.
    """
    image_ids = {record.image_id for record in dataset.records}
    _check(detections, image_ids, len(dataset.classes), dataset.name)
    results = coco_results(detections, dataset.category_ids)
    if output_dir is not None:
        write_json(Path(output_dir) / "bbox.json", results)
    if not dataset.has_annotations:
        logger.info("%s has no annotations: only its detections are written.", dataset.name)
        return {}

    missing = len(image_ids - detections.keys())
    if missing:
        logger.warning(
            "%s: %d of %d images have no entry among the detections; they count as images without "
            "detections.",
            dataset.name, missing, len(image_ids),
        )  # fmt: skip

    if dataset.spec.format == "voc":
        metrics = _voc_metrics(dataset, detections, results)
    else:
        metrics = coco_metrics(
            [record.image_id for record in dataset.records],
            load_coco(dataset.spec.annotations)["annotations"],
            results,
            dataset.category_ids,
            dataset.classes,
        )
    if math.isnan(metrics["AP"]):
        logger.warning("%s has no objects to find: its metrics are undefined.", dataset.name)
    if output_dir is not None:
        write_json(Path(output_dir) / "metrics.json", metrics, indent=2)
    return metrics


def coco_results(
    detections: Mapping[int, dict[str, Tensor]], category_ids: Sequence[int]
) -> list[dict]:
    """Convert detections (as for `evaluate`) to COCO's results format, sorted by image id.

    A box becomes [x0, y0, x1 - x0 + 1, y1 - y0 + 1], and label n the n-th category id.
    """
    results = []
    for image_id in sorted(detections):
        found = detections[image_id]
        boxes = legacy_to_xywh(found["boxes"].detach().to("cpu", torch.float64))
        results += [
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(
                boxes.tolist(),
                found["scores"].tolist(),
                found["labels"].tolist(),
                strict=True,
            )
        ]
    return results


def format_metrics(metrics: Metrics) -> str:
    """Text tables of the overall metrics and of those of each class."""
    if not metrics:
        return "no figures: the data set has no annotations"
    further = [name for name in metrics if name not in METRICS and name != "per_class"]
    names = list(METRICS)
    groups = [names[:6], names[6:], *([further] if further else [])]
    blocks = [_table([group, [_number(metrics[name]) for name in group]]) for group in groups]

    per_class = metrics["per_class"]
    columns = list(next(iter(per_class.values()), {}))
    rows = [
        [name, *(_number(figures[column]) for column in columns)]
        for name, figures in per_class.items()
    ]
    blocks.append(_table([["class", *columns], *rows]))
    return "\n\n".join(blocks)


def _check(
    detections: Mapping[int, dict[str, Tensor]],
    image_ids: set[int],
    num_classes: int,
    dataset_name: str,
) -> None:
    """Raise an `EvaluationError` for detections that cannot belong to the data set."""
    unknown = sorted(detections.keys() - image_ids)
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise EvaluationError(
            f"{len(unknown)} images with detections are not in {dataset_name}: image id {shown}. "
            "Were they made on another data set?"
        )
    for image_id, found in detections.items():
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        fault = None
        if boxes.shape != (len(scores), 4) or len(labels) != len(scores):
            fault = (
                f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels "
                f"{list(labels.shape)} do not agree"
            )
        elif not torch.isfinite(scores).all():
            fault = "a score is not finite"
        elif not torch.isfinite(boxes).all():
            fault = "a box coordinate is not finite"
        elif len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= num_classes:
            fault = f"a label is not in 1..{num_classes}"
        if fault:
            raise EvaluationError(f"Detections of image {image_id} of {dataset_name}: {fault}.")


def _voc_metrics(
    dataset: DetectionDataset, detections: Mapping[int, dict[str, Tensor]], results: list[dict]
) -> Metrics:
    """COCO's metrics of a VOC data set, and VOC's own two metrics."""
    records = dataset.records
    truth = Boxes(
        image=np.repeat([r.image_id for r in records], [len(r.labels) for r in records]),
        label=np.concatenate([r.labels for r in records]),
        box=np.concatenate([r.boxes for r in records]).astype(np.float64),
        difficult=np.concatenate([r.ignored for r in records]),
    )
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": dataset.category_ids[label - 1],
            "bbox": box,
            "iscrowd": difficult,
        }
        for number, (image_id, label, box, difficult) in enumerate(
            zip(
                truth.image.tolist(),
                truth.label.tolist(),
                legacy_to_xywh(torch.from_numpy(truth.box)).tolist(),
                truth.difficult.tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    metrics = coco_metrics(
        [record.image_id for record in records],
        annotations,
        results,
        dataset.category_ids,
        dataset.classes,
    )

    eleven_point, area = voc_average_precision(truth, _flatten(detections), len(dataset.classes))
    for name, values in {"AP50_voc2007": eleven_point, "AP50_voc": area}.items():
        defined = values[~np.isnan(values)]
        metrics[name] = float(defined.mean()) if len(defined) else float("nan")
        for class_name, value in zip(dataset.classes, values.tolist(), strict=True):
            metrics["per_class"][class_name][name] = value
    return metrics


def _flatten(detections: Mapping[int, dict[str, Tensor]]) -> Boxes:
    """The detections of all images in flat arrays."""

    def join(key: str, dtype: torch.dtype, *shape: int) -> np.ndarray:
        parts = [found[key].detach().to("cpu", dtype) for found in detections.values()]
        return torch.cat([torch.zeros(0, *shape, dtype=dtype), *parts]).numpy()

    counts = [len(found["labels"]) for found in detections.values()]
    return Boxes(
        image=np.repeat(np.array(list(detections), dtype=np.int64), counts),
        label=join("labels", torch.int64),
        box=join("boxes", torch.float64, 4),
        score=join("scores", torch.float64),
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _table(rows: list[list[str]]) -> str:
    """Align rows of text: class names flush left, all other columns flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = rows[0][0] == "class"
    lines = [
        "  ".join(
            cell.ljust(width) if names and column == 0 else cell.rjust(max(width, 6))
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)
