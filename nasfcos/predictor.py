"""Detection on any image, in a file or in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from yacs.config import CfgNode

from .config import ConfigError
from .data import DataError, class_names, resized_shape
from .data.images import load_image
from .data.records import UnreadableImage
from .data.transforms import resize, to_uint8_tensor
from .engine.distributed import resolve_device
from .engine.test import build_trained, inference_form, to_original_size
from .engine.weights import NEEDS_DETECTOR, find_weights
from .models.heads.post_process import Detections
from .models.weights import Weights, WeightsError, read_weights
from .transfer import to_cpu
from .visualize import AnyImage, draw_detections, to_picture

logger = logging.getLogger(__name__)


class Predictor:
    """A trained detector for images of any kind and size.

    Example:
        >>> predictor = Predictor(load_config("configs/search/R_50_NAS_head.yaml"), "model.pth")
        >>> found = predictor("street.jpg")
        >>> [predictor.class_names[label - 1] for label in found["labels"]]
        >>> predictor.draw("street.jpg", found).save("found.jpg")

    Attributes:
        model: the detector, in its inference form and in TEST.DTYPE.
        class_names: the name of label n at index n - 1, as recorded in the weights, otherwise as in
            the config's training data, otherwise "1", "2", ...
        device: the device that the model is on.
        min_size, max_size: size in pixels to which images are resized (INPUT.MIN_SIZE_TEST and
            INPUT.MAX_SIZE_TEST).
    """

    def __init__(
        self,
        cfg: CfgNode,
        weights: str | os.PathLike[str] | Mapping[str, Any] | Weights | None = None,
    ) -> None:
        """
        Args:
            cfg: the config tree. Its data sets need not exist: where MODEL.NUM_CLASSES is 0, the
                number of classes can follow from the weights.
            weights: any source that `load_weights` takes. None, as in the tools: MODEL.WEIGHT if
                the overrides of `load_config` (or the caller) set it, otherwise the newest
                checkpoint in OUTPUT_DIR, otherwise MODEL.WEIGHT of the config file.

        Raises:
            ConfigError: no weights of a detector are found, or the device does not support
                TEST.DTYPE.
            WeightsError: the weights cannot be read or belong to another model.
        """
        recorded = find_weights(cfg) if weights is None else weights
        if not isinstance(recorded, Weights):
            recorded = read_weights(recorded)
        if recorded.kind != "detector":
            raise WeightsError(f"{recorded.name} is a {recorded.description}: {NEEDS_DETECTOR}")
        self.device = resolve_device(cfg.MODEL.DEVICE)
        model = build_trained(cfg, recorded, self.device)
        self.class_names = _choose_names(cfg, recorded.classes, model.head.num_classes)
        self.model = inference_form(cfg, model)
        self.min_size = cfg.INPUT.MIN_SIZE_TEST
        self.max_size = cfg.INPUT.MAX_SIZE_TEST

    def __call__(
        self, image: str | os.PathLike[str] | AnyImage | Sequence[str | os.PathLike[str] | AnyImage]
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            image: the path of a file, a PIL image, an RGB array [H, W, 3] of uint8, an RGB tensor
                [3, H, W] of uint8 or of floats in 0..1; or a list of these, processed one by one.
                Files are rotated by their EXIF orientation.

        Returns:
            a dict of ``boxes`` [N, 4] (legacy xyxy in the image's own pixels, within
            [0, w - 1] x [0, h - 1]), ``scores`` [N] in descending order and ``labels`` [N] int64
            from 1, on the CPU. For a list, a list of dicts.

        Raises:
            UnreadableImage: a file is missing or cannot be decoded.
            ValueError: an array or tensor is not an image.
        """
        if isinstance(image, (list, tuple)):
            return [self(one) for one in image]
        return self._detect(_to_picture(image))

    def draw(
        self,
        image: str | os.PathLike[str] | AnyImage,
        found: Detections,
        score_threshold: float = 0.3,
    ) -> Image.Image:
        """A copy of an image with boxes, class names and scores drawn into it.

        Args:
            image: an image as for detection.
            found: its detections.
            score_threshold: detections with lower scores are not drawn.

        Raises:
            UnreadableImage, ValueError: as for detection.
        """
        drawn = draw_detections(_to_picture(image), found, self.class_names, score_threshold)
        return Image.fromarray(drawn)

    @torch.no_grad()
    def _detect(self, picture: Image.Image) -> Detections:
        original = (picture.height, picture.width)
        size = resized_shape(*original, self.min_size, self.max_size)
        pixels = to_uint8_tensor(resize(picture, size))
        (found,) = to_cpu(self.model([pixels]))
        return found | {"boxes": to_original_size(found["boxes"], size, original)}


def _choose_names(cfg: CfgNode, recorded: list[str] | None, count: int) -> list[str]:
    if recorded and len(recorded) == count:
        return recorded
    try:
        names = class_names(cfg)
    except (ConfigError, DataError) as error:
        logger.warning("the names of the classes are not known, numbers stand for them: %s", error)
    else:
        if len(names) == count:
            return names
    return [str(label) for label in range(1, count + 1)]


def _to_picture(image: str | os.PathLike[str] | AnyImage) -> Image.Image:
    return open_picture(image) if isinstance(image, (str, os.PathLike)) else to_picture(image)


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The RGB image in a file, rotated by its EXIF orientation.

    Raises:
        UnreadableImage: the file is missing or cannot be decoded.
    """
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UnreadableImage(f"the image {os.fspath(path)} {state}")
    try:
        return load_image(path)
    except Exception as error:
        raise UnreadableImage(f"{os.fspath(path)} cannot be read as an image: {error}") from error
