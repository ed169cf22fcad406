"""NAS-FCOS: object detection with searched feature pyramids and heads.

>>> cfg = nasfcos.load_config("configs/search/R_50_NAS_head.yaml", ["MODEL.DEVICE", "cpu"])
>>> model = nasfcos.build_detector(cfg)
>>> nasfcos.load_weights(model, "R-50-NAS-head.pth")
>>> detections = model.eval()([image])
"""

from yacs.config import CfgNode

from .config import ConfigError, load_config
from .engine import build_model
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
    """The detector that a config describes, freshly initialised, on its MODEL.DEVICE.

    Where MODEL.NUM_CLASSES is 0, the number of classes follows from DATASETS.TRAIN. Weights are not
    read: see `load_weights`.

    Raises:
        ConfigError: a part or a data set that does not exist, a device that is not there.
    """
    return build_model(cfg, resolve_device(cfg.MODEL.DEVICE))
