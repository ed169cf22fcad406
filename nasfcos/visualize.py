"""Drawing of boxes on images, and of sheets of images."""

import colorsys
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.images import to_rgb
from .data.transforms import scale_boxes

AnyImage = np.ndarray | Tensor | Image.Image


def draw_detections(
    image: AnyImage,
    detections: Mapping[str, Tensor],
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Draw boxes and class names on a copy of an image.

    Lines and text grow with the image. The best-scored boxes lie on top. Tags stay within the image
    and do not cover each other if there is room.

    Args:
        image: uint8 RGB array [H, W, 3], PIL image, or RGB tensor [3, H, W], uint8 or float 0..1.
        detections: `boxes` [N, 4], xyxy in pixels of the image, both corners inclusive; `labels`
            [N] from 1; `scores` [N]. Without scores, as in a training target, all are drawn.
        class_names: name of label n at index n - 1; None shows the numbers.
        score_threshold: smallest score that is drawn.

    Returns:
        uint8 RGB array [H, W, 3].

    Raises:
        ValueError: not such an image.
    """
    canvas = to_picture(image)
    draw = ImageDraw.Draw(canvas)
    # Small compared with the image, but legible.
    font_size = max(9, round(math.sqrt(canvas.width * canvas.height) / 42))
    line_width = max(1, round(font_size / 6))
    font = _font(font_size)

    tags, placed = [], []
    for box, label, score in _best_first(detections, score_threshold):
        text = class_names[label - 1] if class_names else str(label)
        if score is not None:
            text = f"{text} {score:.2f}"
        text = _shorten(text, font, canvas.width - 2 * (font_size // 4))
        width = math.ceil(font.getlength(text)) + 2 * (font_size // 4)
        height = round(font_size * 1.3)
        tag = _place_tag(box, width, height, canvas.size, placed)
        placed.append(tag)
        tags.append((box, class_color(label), text, tag))

    for box, color, text, tag in reversed(tags):
        x0, y0, x1, y1 = (round(side) for side in box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=line_width)
        draw.rectangle((tag[0], tag[1], tag[2] - 1, tag[3] - 1), fill=color)
        luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
        draw.text(
            ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2),
            text,
            fill=(0, 0, 0) if luminance > 140 else (255, 255, 255),
            font=font,
            anchor="mm",
        )
    return np.array(canvas)


def image_grid(
    images: Sequence[AnyImage],
    detections: Sequence[Mapping[str, Tensor]] | None = None,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.3,
    columns: int | None = None,
    cell_size: int = 400,
) -> np.ndarray:
    """Draw a sheet of images, each with its detections.

    Images are scaled to their cells before boxes are drawn, so that text is equally legible on all
    of them. A row is as high as its highest image.

    Args:
        images, class_names, score_threshold: see `draw_detections`.
        detections: detections of each image; None draws images only.
        columns: number of columns; None makes the sheet about as many cells high as wide.
        cell_size: longer side of each image on the sheet, in pixels.

    Returns:
        uint8 RGB array [H, W, 3].

    Raises:
        ValueError: no images, or something that is not an image.
    """
    if not images:
        raise ValueError("image_grid needs at least one image")
    pictures = []
    for index, image in enumerate(images):
        picture = to_picture(image)
        width, height = picture.size
        scale = cell_size / max(picture.size)
        new_width, new_height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
        if detections is not None:
            scaled = dict(detections[index])
            scaled["boxes"] = scale_boxes(
                scaled["boxes"].detach().cpu(), (height, width), (new_height, new_width)
            )
            picture = draw_detections(picture, scaled, class_names, score_threshold)
        pictures.append(np.asarray(picture))

    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    gap = max(2, cell_size // 50)
    step = cell_size + gap
    sheet = np.full(
        (sum(heights) + gap * (len(rows) + 1), step * len(rows[0]) + gap, 3), 255, np.uint8
    )
    row_top = gap
    for row, row_height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            height, width = picture.shape[:2]
            top = row_top + (row_height - height) // 2
            left = gap + column * step + (cell_size - width) // 2
            sheet[top : top + height, left : left + width] = picture
        row_top += row_height + gap
    return sheet


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB color of a label, in 0..255: fixed, and unlike those of neighbouring labels."""
    hue = (0.58 + label * (math.sqrt(5) - 1) / 2) % 1  # golden ratio: far from the last few hues
    saturation, value = [(0.85, 0.95), (0.6, 1.0), (1.0, 0.7)][label // 8 % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


def _best_first(detections: Mapping[str, Tensor], score_threshold: float):
    """(box, label, score or None) of the detections to draw, sorted by falling score."""
    boxes, labels = detections["boxes"].tolist(), detections["labels"].tolist()
    if "scores" not in detections:
        return zip(boxes, labels, [None] * len(boxes), strict=True)
    triples = zip(boxes, labels, detections["scores"].tolist(), strict=True)
    return sorted(
        (triple for triple in triples if triple[2] >= score_threshold),
        key=lambda triple: -triple[2],
    )


def to_picture(image: AnyImage) -> Image.Image:
    """Copy an image (see `draw_detections`) to an 8-bit RGB PIL image of the same size.

    Raises:
        ValueError: wrong type, shape or range of values, or an image without pixels.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"an image of {image.width} x {image.height} pixels has none")
        return to_rgb(image).copy()
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(
            "an image must be a path, a PIL image, an array or a tensor, not "
            f"{type(image).__name__}"
        )
    given = f"{image.dtype} {list(image.shape)}"
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.is_floating_point():
            if image.numel() and not -1 <= image.min() <= image.max() <= 2:  # or NaN
                raise ValueError(
                    f"an image of floats must lie in 0..1, not in {image.min():g}.."
                    f"{image.max():g}; divide by 255, or give it as uint8"
                )
            image = (image * 255).round().clamp(0, 255).to(torch.uint8)
        image = image.movedim(0, -1).numpy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            "an image must be an RGB array [H, W, 3] of uint8 or a tensor [3, H, W] of uint8 or of "
            f"floats in 0..1, not {given}"
        )
    return Image.fromarray(np.ascontiguousarray(image))


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its fonts cover more alphabets than PIL's

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """Shorten a text with an ellipsis so that it fits into `room` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…" if text else ""


def _place_tag(
    box: Sequence[float],
    width: int,
    height: int,
    image_size: tuple[int, int],
    placed: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Where to put the tag of a box: (x0, y0, x1, y1), with x1 and y1 exclusive.

    The candidates are above the box, below it, inside at its top, and inside at its bottom. The
    first one that covers no other tag is taken, or else the one that covers others least.

    Args:
        box: xyxy in pixels.
        width, height: size of the tag.
        image_size: (width, height).
        placed: the tags that are already placed.
    """
    image_width, image_height = image_size
    width, height = min(width, image_width), min(height, image_height)
    left = min(max(0, round(box[0])), image_width - width)
    top, bottom = round(box[1]), round(box[3]) + 1

    def covered(y: int) -> int:
        return sum(
            max(0, min(left + width, x1) - max(left, x0)) * max(0, min(y + height, y1) - max(y, y0))
            for x0, y0, x1, y1 in placed
        )

    candidates = [top - height, bottom, top, bottom - height]
    inside = [y for y in candidates if 0 <= y <= image_height - height]
    y = min(inside or [min(max(0, top), image_height - height)], key=covered)
    return left, y, left + width, y + height
