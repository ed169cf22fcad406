"""The whole picture: title, legend, pyramid and head."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from ..files import replacing
from ..genotype import AGGREGATIONS, FPN_OPS, HEAD_OPS, Genotype
from .canvas import EXTRA, MARGIN, OP_SIZE, OPERATIONS, Canvas, text_width
from .head import HEIGHT as HEAD_HEIGHT
from .head import draw_head, head_width
from .layout import PyramidLayout
from .pyramid import draw_pyramid

FORMATS = (".png", ".svg", ".pdf")

_MEANING = {
    "psum": "psum: sum with a weight per channel",
    "cat": "cat: concatenation, norm, ReLU, grouped 1×1 conv",
}
_FONT_SIZE = 8.5  # of the legend, in points
_SYMBOL_WIDTHS = {"operation": OP_SIZE[0] + 0.08, "wire": 0.48, "none": 0.0}  # inches


def draw_architecture(genotype: Genotype, title: str | None = None) -> Figure:
    """Draw an architecture; the size of the figure follows from the genotype.

    The pyramid runs from C2..C5 on the left to P3..P7 on the right. The head is below it, if it is
    searched.
    """
    pyramid = PyramidLayout(genotype)
    width = max(pyramid.min_width, head_width(genotype), 8.0)
    pyramid.place_columns(width)
    legend = _legend_rows(genotype, width - 2 * MARGIN)
    titles = textwrap.wrap(title, int(width * 8.5)) if title else []

    head_height = HEAD_HEIGHT if genotype.head_ops else 0.0
    top = 0.15 + 0.26 * len(titles) + 0.34 * len(legend) + 0.12
    height = top + pyramid.height + head_height + 0.2

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    canvas = Canvas(figure)
    y = height - 0.15
    for line in titles:
        y -= 0.26
        canvas.text(MARGIN, y + 0.1, line, 12.5, weight="bold", ha="left")
    for row in legend:
        y -= 0.34
        for x, entry in row:
            _draw_entry(canvas, MARGIN + x, y + 0.15, *entry)
    draw_pyramid(canvas, pyramid, bottom=0.2 + head_height)
    if genotype.head_ops:
        left = (width - head_width(genotype)) / 2
        draw_head(canvas, genotype, left, top=0.2 + head_height)
    return figure


def save_architecture(genotype: Genotype, path: str | Path, title: str | None = None) -> None:
    """Write the drawing to a file, whole or not at all, in the format of the file's suffix.

    Raises:
        ValueError: the suffix is not one of `FORMATS`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}")
    figure = draw_architecture(genotype, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:])


def _legend_rows(genotype: Genotype, width: float) -> list[list[tuple[float, tuple[str, str]]]]:
    """The legend in rows of at most `width`: (left edge, (symbol, text)) of each entry."""
    used = {FPN_OPS[op] for cell in genotype.cells for op in cell.ops}
    used |= {HEAD_OPS[op] for op in genotype.head_ops}
    entries = [("operation", name) for name in OPERATIONS if name in used]
    aggregations = {AGGREGATIONS[cell.aggregation] for cell in genotype.cells}
    entries += [("none", _MEANING[name]) for name in sorted(aggregations)]
    if genotype.extra_nodes:
        entries.append(("wire", "unused cell outputs, added to P3, P4 and P5"))
    entries.append(("none", "1/s: size relative to the image"))
    rows, x = [[]], 0.0
    for symbol, text in entries:
        needed = _SYMBOL_WIDTHS[symbol] + text_width(text, _FONT_SIZE)
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, (symbol, text)))
        x += needed + 0.28
    return rows


def _draw_entry(canvas: Canvas, x: float, y: float, symbol: str, text: str) -> None:
    if symbol == "operation":
        canvas.operation(x + OP_SIZE[0] / 2, y, text)
    elif symbol == "wire":
        canvas.line([x, x + 0.4], [y, y], EXTRA)
    canvas.text(x + _SYMBOL_WIDTHS[symbol], y - 0.008, text, _FONT_SIZE, ha="left")
