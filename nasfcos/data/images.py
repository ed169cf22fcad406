"""Decode image files to 8-bit RGB from any mode, bit depth and orientation."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation: the transpose that displays the picture upright
_QUARTER_TURNS = (5, 6, 7, 8)  # those that swap width and height
_END_OF_JPEG = b"\xff\xd9"


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow rotates these itself
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to skip the image
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to 8-bit RGB.

    16-bit grey is divided by 257 (65535 becomes 255), whereas PIL would clip it at 255. Floating
    point grey is taken as 0..1 if no value exceeds 1, else as 0..255. Alpha is dropped.
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


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the file types that PIL can open, such as ".jpg"."""
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if kind in Image.OPEN)


def read_size(path: Path, annotated_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of the image that `load_image` returns for a file.

    Only TIFF files are decoded for it.

    Raises:
        OSError: the file is missing or not an image.
    """
    with Image.open(path) as image:
        if image.format == "TIFF":  # some versions of Pillow rotate these on loading only
            image.load()
        width, height = image.size
        if _orientation_to_apply(image, annotated_size) in _QUARTER_TURNS:
            height, width = width, height
        return height, width


def find_size(path: Path, annotated_size: tuple[int, int]) -> tuple[int, int]:
    """`read_size`, or the annotated size for a file that cannot be read."""
    try:
        return read_size(path, annotated_size)
    except Exception:  # reported by name when the image is loaded
        return annotated_size


def load_image(path: str | Path, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, rotated according to its EXIF orientation.

    Some annotations refer to the displayed picture, others (COCO's) to the stored pixels. So that
    boxes fit, a rotation by 90 or 270 degrees is not applied if `annotated_size` (height, width) is
    the size of the stored pixels but not of the displayed picture. Where sizes cannot tell (half
    turns, mirrored or square pictures) the orientation is applied, as annotation tools do today.
    To TIFF files it is always applied.

    Raises:
        Exception: whatever PIL raises for a file that is missing or does not decode.
    """
    with Image.open(path) as image:
        orientation = _orientation_to_apply(image, annotated_size)
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)


def load_pixels(
    path: str | Path,
    annotated_size: tuple[int, int] | None = None,
    enough: int | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """`load_image` as a uint8 array [H, W, 3], and the (height, width) of the full-size image.

    Ordinary JPEG files are decoded by OpenCV, which is faster and gives the same pixels.

    Args:
        path: image file.
        annotated_size: see `load_image`.
        enough: sufficient length of the short side in pixels; a JPEG file may be decoded at 1/2,
            1/4 or 1/8 of its size if the short side keeps this length. None: full size.
    """
    found = _decode_jpeg(Path(path), annotated_size, enough)
    if found is None:
        image = load_image(path, annotated_size)
        found = np.array(image), (image.height, image.width)
    return found


def _decode_jpeg(
    path: Path, annotated_size: tuple[int, int] | None, enough: int | None
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """See `load_pixels`; None for a file to leave to PIL: another format or mode, or damaged."""
    import cv2  # takes time, and most importers of this module never decode an image

    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    with Image.open(path) as image:
        if image.format != "JPEG" or image.mode != "RGB":
            return None
        orientation = _orientation_to_apply(image, annotated_size)
        width, height = image.size
    data = path.read_bytes()
    if not data.rstrip(b"\0").endswith(_END_OF_JPEG):  # some versions of OpenCV accept it
        return None
    # With sides that do not divide evenly, boxes would not fit the pixels.
    fitting = [
        by
        for by in flags
        if enough and min(height, width) >= by * enough and height % by == width % by == 0
    ]
    reduction = max(fitting, default=1)
    pixels = cv2.imdecode(
        np.frombuffer(data, np.uint8), flags[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if pixels is None or pixels.shape != (height // reduction, width // reduction, 3):
        return None
    pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    if orientation != 1:
        pixels = np.array(Image.fromarray(pixels).transpose(_TURNS[orientation]))
    if orientation in _QUARTER_TURNS:
        height, width = width, height
    return pixels, (height, width)


def _orientation_to_apply(image: Image.Image, annotated_size: tuple[int, int] | None) -> int:
    """The EXIF orientation to apply to an image, 1 for none; see `load_image`."""
    orientation = _orientation(image)
    width, height = image.size
    as_stored = (
        orientation in _QUARTER_TURNS
        and height != width
        and annotated_size is not None
        and tuple(annotated_size) == (height, width)
    )
    return orientation if orientation in _TURNS and not as_stored else 1
