"""NAS-FCOS: object detection with searched feature pyramids and heads.

>>> cfg = nasfcos.load_config("configs/search/R_50_NAS_head.yaml", ["MODEL.DEVICE", "cpu"])
>>> model = nasfcos.build_detector(cfg)
>>> nasfcos.load_weights(model, "R-50-NAS-head.pth")
>>> detections = model.eval()([image])
"""

from yacs.config import CfgNode

from . import models
from .config import ConfigError, load_config
from .engine.distributed import resolve_device
from .models import (
    Detector,
    export_detector,
    export_onnx,
    load_weights,
    optimize_for_inference,
)
from .predictor import Predictor

__all__ = [
    "ConfigError",
    "Predictor",
    "build_detector",
    "export_detector",
    "export_onnx",
    "load_config",
    "load_weights",
    "optimize_for_inference",
]


def build_detector(cfg: CfgNode) -> Detector:
    """The detector that a config describes, freshly initialised, on MODEL.DEVICE, in training mode.

    Where MODEL.NUM_CLASSES is 0, the number of classes follows from DATASETS.TRAIN. Weights are not
    loaded: see `load_weights`.

    Raises:
        ConfigError: a part, a data set or the device does not exist.
        DataError: the classes of the training data cannot be read.
    """
    device = resolve_device(cfg.MODEL.DEVICE)
    return models.build_detector(cfg).to(device)
