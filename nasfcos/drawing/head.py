"""Draws the two towers of a searched head."""

from __future__ import annotations

import textwrap

from ..genotype import HEAD_OPS, Genotype
from .canvas import GREY, MARGIN, WIRE, Canvas, operation_color, text_width

HEIGHT = 2.55
"""Height of the drawing, in inches."""

_OP_SIZE = (1.02, 0.36)
_STEP = _OP_SIZE[0] + 0.26  # from layer to layer
_SIDE = 1.35  # width of the boxes before and behind the layers
_SHEET = 0.035  # offset of the sheets of a stack


def head_width(genotype: Genotype) -> float:
    """Width of the drawing, in inches; 0 without a searched head."""
    if not genotype.head_ops:
        return 0.0
    return 2 * (MARGIN + _SIDE) + _STEP * len(genotype.head_ops)


def draw_head(canvas: Canvas, genotype: Genotype, left: float, top: float) -> None:
    """Draw both towers, layer by layer.

    A layer with separate weights per level is drawn as a stack of five sheets. `left` and `top` are
    in inches from the lower left corner of the canvas.
    """
    first = left + MARGIN + _SIDE + _STEP / 2
    count, split = len(genotype.head_ops), genotype.head_split
    for start, end, sheets, color, caption in (
        (0, split, 5, "#e4ebf3", "separate weights per level"),
        (split, count, 1, "#f3f6f9", "weights shared across levels"),
    ):
        if start < end:
            low = first + start * _STEP - _OP_SIZE[0] / 2 - 0.05
            high = first + (end - 1) * _STEP + _OP_SIZE[0] / 2 + 0.05 + (sheets - 1) * _SHEET
            middle, size = (low + high) / 2, (high - low, HEIGHT - 0.2)
            canvas.box(middle, top - 0.1 - size[1] / 2, size, color=color, edge="none", radius=0.08,
                       kind="band", zorder=0)  # fmt: skip
            if text_width(caption, 9) > size[0]:
                caption = textwrap.fill(caption, 16)
            canvas.text(middle, top - 0.46, caption, 9, linespacing=1.1)
    for name, output, y in (
        ("classification", "class scores", top - 1.12),
        ("regression", "boxes", top - 1.97),
    ):
        x = left + MARGIN + 0.6
        canvas.box(x, y, (1.2, 0.5), color="#fdf3dc", kind="node")
        canvas.text(x, y + 0.09, "P3 – P7", 9, weight="bold")
        canvas.text(x, y - 0.11, name, 7.5, color=GREY)
        before, end = x + 0.6, first + (count - 0.5) * _STEP + 0.1
        for i, op in enumerate(genotype.head_ops):
            center = first + i * _STEP
            for sheet in range(4 if i < split else 0, 0, -1):
                canvas.box(
                    center + _SHEET * sheet, y + _SHEET * sheet, _OP_SIZE, linewidth=0.6,
                    color=operation_color(HEAD_OPS[op]), kind="sheet", zorder=4.5,
                )  # fmt: skip
            canvas.operation(center, y, HEAD_OPS[op], _OP_SIZE)
            _draw_arrow(canvas, before, center - _OP_SIZE[0] / 2, y)
            before = center + _OP_SIZE[0] / 2
        _draw_arrow(canvas, before, end, y)
        canvas.box(end + 0.55, y, (1.1, 0.4), kind="node")
        canvas.text(end + 0.55, y - 0.005, output, 9)


def _draw_arrow(canvas: Canvas, start: float, end: float, y: float) -> None:
    canvas.line([start, end - 0.03], [y, y])
    canvas.arrow_tip(end, y, WIRE)
