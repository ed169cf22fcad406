"""The data set class for all annotation formats."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .catalog import DatasetSpec
from .coco import read_coco
from .images import load_image
from .records import Annotations, DataError, UnreadableImage, clip_and_filter
from .voc import read_voc

logger = logging.getLogger(__name__)

Loader = Callable[[Path, tuple[int, int]], tuple[Any, tuple[int, int]]]
"""Maps a file and its annotated (height, width) to an image in any form, and the (height, width) of
the full-size image."""


class DetectionDataset(Dataset):
    """Images with boxes.

    `dataset[i]` is `(image, target)`: a PIL image, 8-bit RGB, and a dict with `boxes` [N, 4]
    float32 (xyxy in pixels, both corners inclusive), `labels` [N] int64 in 1..len(classes),
    `image_id`, `original_size` (height, width) and `file_name`. Crowd and difficult boxes are left
    out.

    Attributes:
        name: name in the config.
        classes: class names; label i is `classes[i - 1]`.
        category_ids: id of each class in the annotation file, in the same order.
        records: one `Record` per image, with all boxes (crowd and difficult ones flagged).
        spec: description of the data set, with the paths of its files.
        has_annotations: False for a test split.
    """

    def __init__(self, spec: DatasetSpec, annotations: Annotations, max_bad_images: int = 10):
        """
        Args:
            spec: description of the data set.
            annotations: what a reader found for this description.
            max_bad_images: number of unreadable images that are skipped before it is an error.

        Raises:
            DataError: the annotations list no image.
        """
        self.spec = spec
        self.name = spec.name
        self.records = annotations.records
        self.classes = annotations.classes
        self.category_ids = annotations.category_ids
        self.has_annotations = annotations.has_annotations and spec.has_annotations
        self.max_bad_images = max_bad_images
        # In shared memory, so that worker processes count together.
        self._bad = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()
        self._warned_of_size = False
        if not self.records:
            raise DataError(f"data set {self.name}: {spec.annotations} lists no image")
        boxes = sum(len(record.boxes) for record in self.records)
        logger.info(
            "data set %s: %d images, %d boxes, %d classes", self.name, len(self), boxes,
            len(self.classes),
        )  # fmt: skip
        if annotations.remarks:
            logger.warning("data set %s: %s", self.name, annotations.remarks)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict]:
        """
        Raises:
            UnreadableImage: the image is missing or does not decode (logged once).
            DataError: more than `max_bad_images` images are unreadable.
        """
        return self.read(index, _load_image)

    def read(self, index: int, load: Loader) -> tuple[Any, dict]:
        """`dataset[index]` with the image that `load` returns."""
        record = self.records[index]
        path = self.spec.images / record.file_name
        try:
            image, size = load(path, (record.height, record.width))
        except Exception as error:
            self._report_bad(index, error)
            raise UnreadableImage(f"{path} cannot be read: {error}") from error
        keep = ~record.ignored
        boxes, labels = record.boxes[keep], record.labels[keep]
        if size != (record.height, record.width):
            boxes, labels = self._fit(boxes, labels, size, record.height, record.width, path)
        return image, {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "image_id": record.image_id,
            "original_size": size,
            "file_name": record.file_name,
        }

    def _fit(self, boxes, labels, size, height, width, path) -> tuple[np.ndarray, np.ndarray]:
        """Clip boxes to a file whose size differs from the annotated one; warn once."""
        if not self._warned_of_size:
            self._warned_of_size = True
            logger.warning(
                "data set %s: %s is %d x %d pixels (height x width) but annotated as %d x %d; its "
                "boxes are taken as pixels of the file (further images like this are not reported)",
                *(self.name, path, *size, height, width),
            )
        boxes, usable, _ = clip_and_filter(boxes, *size)
        return boxes[usable], labels[usable]

    def _report_bad(self, index: int, error: Exception) -> None:
        record = self.records[index]
        path = self.spec.images / record.file_name
        if not self._bad[index]:
            self._bad[index] = True
            logger.warning("data set %s: %s is skipped: %s", self.name, path, error)
        bad = self._bad.nonzero().flatten().tolist()
        if len(bad) > self.max_bad_images:
            names = ", ".join(self.records[i].file_name for i in bad[:5])
            raise DataError(
                f"data set {self.name}: {len(bad)} images of {self.spec.images} are missing or "
                f"do not decode ({names}{', ...' if len(bad) > 5 else ''}), more than "
                f"DATASETS.MAX_BAD_IMAGES = {self.max_bad_images}; the last one: {error}"
            ) from error


def _load_image(path: Path, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    image = load_image(path, size)
    return image, (image.height, image.width)


def load_dataset(spec: DatasetSpec, max_bad_images: int = 10) -> DetectionDataset:
    """Read the annotations of a data set.

    Args:
        spec: description of the data set; a VOC set needs `classes`.
        max_bad_images: see `DetectionDataset`; also the number of VOC annotation files that may
            be missing.

    Raises:
        DataError: missing or malformed files, or a VOC set without `classes`.
    """
    if spec.format == "coco":
        annotations = read_coco(spec.annotations, spec.images, spec.classes, spec.adopted)
    else:
        if spec.classes is None:
            raise DataError(f"data set {spec.name}: a VOC set cannot be read without its classes")
        annotations = read_voc(
            spec.annotations,
            spec.images,
            spec.split,
            spec.classes,
            spec.has_annotations,
            max_bad_images,
        )
    return DetectionDataset(spec, annotations, max_bad_images)
