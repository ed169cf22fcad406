"""Image files to RGB pictures, whatever mode, depth or orientation they are stored in."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB.

    16-bit grey is divided by 257 (65535 becomes 255), where PIL would cut it off at 255; floating
    point grey is taken as 0..1 if nothing in it is larger, else as 0..255. Alpha is dropped.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image).astype(np.float64))
        if grey.max(initial=0) <= 1:
            grey *= 255
    else:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file as it is displayed, without decoding it."""
    with Image.open(path) as image:
        width, height = image.size
        if _orientation(image) in _QUARTER_TURNS:
            height, width = width, height
        return height, width


def load_image(path: str | Path, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file as 8-bit RGB, turned as its EXIF orientation says.

    Some annotations were made on the displayed picture, others (COCO's) on the stored pixels. So
    that boxes fit, a quarter turn is not applied where `annotated_size` (height, width) is that of
    the stored pixels and not that of the displayed picture. Where the sizes cannot tell (half
    turns, mirrored or square pictures) the orientation is applied, as today's annotation tools do.

    Raises:
        Whatever PIL raises for a file that is missing or does not decode.
    """
    with Image.open(path) as image:
        orientation = _orientation(image)
        width, height = image.size
        as_stored = (
            orientation in _QUARTER_TURNS
            and height != width
            and annotated_size is not None
            and tuple(annotated_size) == (height, width)
        )
        image.load()
        if 2 <= orientation <= 8 and not as_stored:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
