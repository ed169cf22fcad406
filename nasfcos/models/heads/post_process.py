"""Settings of post-processing, and the form of its results.

There are two equivalent implementations. On the CPU (`sparse`) candidates are filtered early. On a
GPU, and for export, all shapes are fixed (`static`): the host would have to wait for the number of
candidates.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Detections = dict[str, Tensor]
"""One image's ``boxes`` [N, 4] legacy xyxy in pixels, ``scores`` [N] and ``labels`` [N] int64 from
1, by descending score."""


@dataclass(frozen=True)
class PostProcess:
    """How predictions become detections.

    Attributes:
        score_threshold: class probabilities at or below it are dropped.
        pre_nms_top_n: number of candidates that each level passes on.
        nms_iou: legacy IoU from which NMS suppresses within a class.
        detections_per_image: number of detections that are kept; ties with the last one stay too.
    """

    score_threshold: float
    pre_nms_top_n: int
    nms_iou: float
    detections_per_image: int

    @property
    def max_dropped_logit(self) -> float:
        """The largest class logit that is dropped."""
        return threshold_logit(self.score_threshold)


@functools.cache
def threshold_logit(probability: float) -> float:
    """The largest float32 logit whose float32 probability does not exceed `probability`."""

    def logit(index: int) -> float:  # all float32 numbers in ascending order, 0 at 0
        return math.copysign(np.int32(abs(index)).view(np.float32), index)

    def is_above(index: int) -> bool:
        power = math.exp(-abs(logit(index)))
        return np.float32((power if index < 0 else 1) / (1 + power)) > np.float32(probability)

    infinity = int(np.float32(np.inf).view(np.int32))
    first = bisect.bisect_left(range(-infinity, infinity + 1), True, key=is_above) - infinity
    return logit(first - 1) if first > -infinity else -math.inf
