"""Transforms from a decoded image to the model's input: resizing, flipping, colour jitter.

Boxes are xyxy with both corners inclusive. All randomness comes from the generator passed in.
Evaluation resizes with PIL, as the released models were tested; training uses a faster method.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """The size (height, width) to which an image is resized, keeping its aspect ratio.

    The short side becomes `min_size` unless the long side would exceed `max_size`; then the short
    side becomes round(max_size * short / long). The long side is truncated to an integer. If the
    short side is 1, which cannot shrink further, the long side is cut to `max_size`.
    """
    short, long = min(height, width), max(height, width)
    if long * min_size > max_size * short:
        min_size = max(1, round(max_size * short / long))
    long = min_size * long // short
    if min_size == 1:
        long = min(long, max_size)
    return (min_size, long) if height <= width else (long, min_size)


def resize(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resize to (height, width): bilinear with antialiasing."""
    height, width = shape
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale boxes [N, 4] from an image of size `old` (height, width) to one of size `new`.

    Coordinates are multiplied by the ratio of the sizes, as in the release.
    """
    y, x = new[0] / old[0], new[1] / old[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)  # boxes may be integers
    return boxes * boxes.new_tensor([x, y, x, y], dtype=dtype)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes [N, 4] left-right: x becomes width - 1 - x."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack((width - 1 - x1, y0, width - 1 - x0, y1), dim=1)


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a uint8 tensor [3, H, W]."""
    import cv2

    planes = np.empty((3, image.height, image.width), np.uint8)
    cv2.split(np.asarray(image), list(planes))  # twice as fast as numpy
    return torch.from_numpy(planes)


def resize_fast(pixels: np.ndarray, shape: tuple[int, int], flip: bool) -> Tensor:
    """Resize an array [H, W, 3] to (height, width), and mirror it if `flip`.

    The result, uint8 [3, height, width], differs from that of `resize` by at most one brightness
    level: in a fifth of the values when enlarging, in a thousandth when shrinking.
    """
    import cv2

    height, width = shape
    if pixels.shape[0] > height or pixels.shape[1] > width:  # OpenCV would alias
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        x = interpolate(x, shape, mode="bilinear", antialias=True)
        pixels = x[0].permute(1, 2, 0).numpy()
    if flip:
        pixels = cv2.flip(pixels, 1)
    result = np.empty((3, height, width), np.uint8)
    for plane, larger in zip(cv2.split(pixels), result, strict=True):
        cv2.resize(plane, (width, height), dst=larger, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(result)


@dataclass(frozen=True)
class EvalTransform:
    """Resize to a short side of `min_size` and a long side of at most `max_size` pixels."""

    min_size: int
    max_size: int

    def __call__(self, image: Image.Image, target: dict) -> tuple[Tensor, dict]:
        old = (image.height, image.width)
        new = resized_shape(*old, self.min_size, self.max_size)
        target = {**target, "boxes": scale_boxes(target["boxes"], old, new)}
        return to_uint8_tensor(resize(image, new)), target


@dataclass(frozen=True)
class TrainTransform:
    """Colour jitter, resize to a random short side, random flip.

    Attributes:
        min_sizes: short sides to choose from, in pixels.
        max_size: limit of the long side, in pixels.
        size_range: (low, high), inclusive: short sides to draw from instead of `min_sizes`.
        flip_prob: probability of a left-right flip.
        brightness, contrast, saturation: x draws a factor from [1 - x, 1 + x].
        hue: x draws a shift from [-x, x], in turns of the colour circle.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    size_range: tuple[int, int] | None = None
    flip_prob: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(
        self, pixels: np.ndarray, target: dict, rng: np.random.Generator
    ) -> tuple[Tensor, dict]:
        """
        Args:
            pixels: uint8 [H, W, 3]: the image, at full or reduced size.
            target: its target; `boxes` refer to the `original_size` (height, width).
            rng: source of randomness.

        Returns:
            The image as a uint8 tensor [3, H', W'], and the target with boxes in its pixels.
        """
        old = target["original_size"]
        new = resized_shape(*old, self._draw_size(rng), self.max_size)
        flip = rng.random() < self.flip_prob
        boxes = scale_boxes(target["boxes"], old, new)
        if flip:
            boxes = flip_boxes(boxes, new[1])
        return resize_fast(self._jitter(pixels, rng), new, flip), {**target, "boxes": boxes}

    @property
    def largest_short_side(self) -> int:
        """The largest short side that can be drawn, in pixels."""
        return max(self.size_range or self.min_sizes)

    def _draw_size(self, rng: np.random.Generator) -> int:
        if self.size_range is not None:
            low, high = self.size_range
            return int(rng.integers(low, high + 1))
        return self.min_sizes[int(rng.integers(len(self.min_sizes)))]

    def _jitter(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        order = rng.permutation(len(strengths))
        if not any(strength > 0 for strength in strengths):
            return pixels
        # Not at the top: it takes a second to import, and prediction does not need it.
        from torchvision.transforms.v2 import functional as F

        changes = [
            (F.adjust_brightness, self.brightness, 1.0),
            (F.adjust_contrast, self.contrast, 1.0),
            (F.adjust_saturation, self.saturation, 1.0),
            (F.adjust_hue, self.hue, 0.0),
        ]
        image = Image.fromarray(pixels)
        for i in order:
            change, strength, centre = changes[i]
            if strength > 0:
                amount = rng.uniform(centre - strength, centre + strength)
                image = change(image, amount if centre == 0 else max(0.0, amount))
        return np.array(image)
