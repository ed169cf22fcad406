"""Detectors and their parts, built from registries."""

from .build import build_detector
from .detector import Detector, Preprocess
from .export import export_detector
from .inference import optimize_for_inference
from .onnx import export_onnx
from .registry import BACKBONES, HEADS, NECKS
from .weights import load_weights

__all__ = [
    "BACKBONES",
    "HEADS",
    "NECKS",
    "Detector",
    "Preprocess",
    "build_detector",
    "export_detector",
    "export_onnx",
    "load_weights",
    "optimize_for_inference",
]
