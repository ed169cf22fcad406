"""What the readers hand on: one record per image, the same for every annotation format.

Boxes are float32 [N, 4], (x0, y0, x1, y1) in pixels of the image, both corners inclusive (the
release's convention, as everywhere in this project).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


class DataError(ValueError):
    """Data or their description are unusable; the message names the file, the key and a remedy."""


class UnreadableImage(DataError):
    """One image is missing or does not decode; the caller may go on with another one."""


@dataclass(slots=True)
class Record:
    """One image and its objects."""

    file_name: str  # relative to the data set's images folder
    image_id: int
    height: int  # as annotated, or of the image file; 0 where neither could be read
    width: int
    boxes: np.ndarray  # [N, 4] float32
    labels: np.ndarray  # [N] int64 in 1..number of classes
    ignored: np.ndarray  # [N] bool: crowd (COCO) or difficult (VOC); not trained on


@dataclass(slots=True)
class Annotations:
    """Everything a reader found."""

    records: list[Record]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # the file's own id of the class with label i + 1
    has_annotations: bool
    remarks: Counter = field(default_factory=Counter)  # oddity -> how often

    def describe_remarks(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.remarks.items()))


def clip_and_filter(
    boxes: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Clip boxes to their images and find those that are left with an area.

    Args:
        boxes: [N, 4] of any float type, perhaps with NaN.
        heights, widths: of each box's image, [N] or one number; 0 where unknown (not clipped).

    Returns:
        The clipped boxes [N, 4] float32; a mask [N] of those to keep (finite, and x1 > x0 and
        y1 > y0 once clipped, as in the release); how many of the kept ones were clipped.
    """
    highest = np.empty(boxes.shape)
    highest[:, 0::2] = np.reshape(widths, (-1, 1))
    highest[:, 1::2] = np.reshape(heights, (-1, 1))
    highest = np.where(highest > 0, highest - 1, np.inf)
    clipped = np.clip(boxes, 0, highest)
    keep = np.isfinite(boxes).all(1)
    keep &= (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    # Rounding in a file's decimals is no remark worth making.
    moved = np.abs(clipped - boxes).max(1, initial=0) > 0.1
    return clipped.astype(np.float32), keep, int((moved & keep).sum())
