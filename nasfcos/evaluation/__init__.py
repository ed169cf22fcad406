"""COCO and PASCAL VOC figures of detections."""

from .evaluate import EvaluationError, evaluate, format_metrics

__all__ = ["EvaluationError", "evaluate", "format_metrics"]
