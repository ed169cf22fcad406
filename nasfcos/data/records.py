"""What readers return: one record per image, whatever the annotation format.

Boxes are float32 [N, 4], (x0, y0, x1, y1) in pixels of the image, both corners inclusive (the
convention of the original release, used throughout this project).
"""

from dataclasses import dataclass, field

import numpy as np

from .remarks import Oddity, Remarks

_ROUNDING = 0.1
"""Pixels by which a box may exceed its image without a remark, since files round coordinates."""


class DataError(ValueError):
    """Unusable data or description of data; the message names the file, the key and a remedy."""


class UnreadableImage(DataError):
    """One image is missing or does not decode; the caller may continue with another one."""


@dataclass(slots=True)
class Record:
    """One image and its objects."""

    file_name: str  # relative to the data set's images folder
    image_id: int
    height: int  # as annotated, or of the image file (see `beyond`); 0 if neither is known
    width: int
    boxes: np.ndarray  # [N, 4] float32
    labels: np.ndarray  # [N] int64 in 1..number of classes
    ignored: np.ndarray  # [N] bool: crowd (COCO) or difficult (VOC); not trained on


@dataclass(slots=True)
class Annotations:
    """What a reader found in the annotations of a data set."""

    records: list[Record]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # id in the file of the class with label i + 1
    has_annotations: bool
    remarks: Remarks = field(default_factory=Remarks)


def side(value: object) -> int:
    """An annotated height or width in pixels; 0 if it is not a number."""
    try:
        return max(0, int(float(value)))
    except (OverflowError, TypeError, ValueError):
        return 0


def beyond(boxes: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int) -> np.ndarray:
    """Which boxes extend beyond the annotated size of their images, [N] bool.

    Either the box or the size is wrong, so the image file should be consulted. For the arguments
    see `clip_and_filter`.
    """
    return (boxes > _last_pixels(boxes, heights, widths) + _ROUNDING).any(1)


def _last_pixels(
    boxes: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int
) -> np.ndarray:
    """The largest valid value of each coordinate [N, 4]; infinite for images of unknown size."""
    last = np.empty(boxes.shape)
    last[:, 0::2] = np.reshape(widths, (-1, 1))
    last[:, 1::2] = np.reshape(heights, (-1, 1))
    return np.where(last > 0, last - 1, np.inf)


def clip_and_filter(
    boxes: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Clip boxes to their images and find those that still have an area.

    Args:
        boxes: [N, 4] of any float type; may contain NaN.
        heights, widths: size of the image of each box, [N] or one number for all; 0 if unknown
            (then nothing is clipped).

    Returns:
        The clipped boxes [N, 4] float32; a mask [N] of those to keep (finite, and x1 > x0 and
        y1 > y0 after clipping, as in the release); the number of kept boxes that were clipped.
    """
    clipped = np.clip(boxes, 0, _last_pixels(boxes, heights, widths))
    keep = np.isfinite(boxes).all(1)
    keep &= (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    moved = np.abs(clipped - boxes).max(1, initial=0) > _ROUNDING
    return clipped.astype(np.float32), keep, int((moved & keep).sum())


def clip_and_count(
    boxes: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int, remarks: Remarks
) -> tuple[np.ndarray, np.ndarray]:
    """`clip_and_filter` that counts its changes in `remarks`; returns the boxes and the mask."""
    clipped, keep, moved = clip_and_filter(boxes, heights, widths)
    remarks.add(Oddity.BAD_BOX, int((~keep).sum()))
    remarks.add(Oddity.CLIPPED_BOX, moved)
    return clipped, keep
