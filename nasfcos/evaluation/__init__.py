"""COCO and PASCAL VOC metrics of detections."""

from .evaluate import EvaluationError, evaluate, format_metrics

__all__ = ["EvaluationError", "evaluate", "format_metrics"]
