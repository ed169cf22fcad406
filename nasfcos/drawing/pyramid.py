"""Draws the cells of a pyramid as a wiring plan."""

from __future__ import annotations

from ..genotype import AGGREGATIONS, FPN_OPS, NUM_INPUTS
from .canvas import EXTRA, GREY, INK, MARGIN, OP_SIZE, WIRE, Canvas
from .layout import (
    BACKBONE_STRIDES,
    C_SIZE,
    CELL_SIZE,
    LEVEL_STRIDES,
    P_SIZE,
    Net,
    PyramidLayout,
)


def draw_pyramid(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    """Draw a laid-out pyramid, whose lower edge is at the height `bottom` of the canvas."""
    _draw_bands(canvas, layout, bottom)
    _draw_backbone_maps(canvas, layout, bottom)
    _draw_cells(canvas, layout, bottom)
    _draw_wires(canvas, layout, bottom)
    _draw_levels(canvas, layout, bottom)


def _draw_bands(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    for i, (stride, (low, high)) in enumerate(sorted(layout.bands.items())):
        canvas.box(
            layout.width / 2, bottom + (low + high) / 2,
            (layout.width - 2 * MARGIN, high - low), color=("#f3f6f9", "#f8fafb")[i % 2],
            edge="none", radius=0.08, kind="band", zorder=0,
        )  # fmt: skip
        y = bottom + (low + high) / 2
        canvas.text(MARGIN + 0.1, y, f"1/{stride}", 9, color=GREY, ha="left")


def _draw_backbone_maps(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    for node in range(NUM_INPUTS):
        y = bottom + layout.rows[node]
        used = node in layout.genotype.consumed
        style = {} if used else {"edge": GREY, "linestyle": (0, (3, 2))}
        canvas.box(layout.c_x, y, C_SIZE, kind="node", **style)
        color = INK if used else GREY
        under = f"1/{BACKBONE_STRIDES[node]}" if used else "not used"
        canvas.text(layout.c_x, y + 0.085, layout.names[node], 10, weight="bold", color=color)
        canvas.text(layout.c_x, y - 0.1, under, 7.5, color=GREY)


def _draw_cells(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    for k, cell in enumerate(layout.genotype.cells):
        node = NUM_INPUTS + k
        x, y = layout.column_x[layout.depth[node] - 1], bottom + layout.rows[node]
        canvas.box(x, y, CELL_SIZE, kind="node")
        for _, op, height in layout.cell_ports(k):
            canvas.operation(
                x - CELL_SIZE[0] / 2 + 0.08 + OP_SIZE[0] / 2, bottom + height, FPN_OPS[op]
            )
        side = x + CELL_SIZE[0] / 2 - 0.3
        canvas.text(side, y + 0.2, layout.names[node], 10, weight="bold")
        canvas.text(side, y, AGGREGATIONS[cell.aggregation], 8.5)
        canvas.text(side, y - 0.19, f"1/{layout.strides[node]}", 7.5, color=GREY)


def _draw_wires(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    for node, end in layout.wire_ends().items():
        start = layout.c_x + C_SIZE[0] / 2
        if node >= NUM_INPUTS:
            start = layout.column_x[layout.depth[node] - 1] + CELL_SIZE[0] / 2
        color = EXTRA if node in layout.genotype.extra_nodes else WIRE
        canvas.line([start, end], [bottom + layout.rows[node]] * 2, color)
    boxes_left = [x - CELL_SIZE[0] / 2 for x in layout.column_x]
    boxes_left.append(layout.level_x - P_SIZE[0] / 2)
    for box_left, nets in zip(boxes_left, layout.channels, strict=True):
        for net in nets:
            _draw_net(canvas, net, bottom, box_left)


def _draw_levels(canvas: Canvas, layout: PyramidLayout, bottom: float) -> None:
    for i, (y, stride) in enumerate(zip(layout.level_y, LEVEL_STRIDES, strict=True)):
        canvas.box(layout.level_x, bottom + y, P_SIZE, color="#fdf3dc", kind="node")
        canvas.text(layout.level_x, bottom + y + 0.11, f"P{i + 3}", 10.5, weight="bold")
        canvas.text(layout.level_x, bottom + y - 0.12, f"1/{stride}", 8, color=GREY)
    for low, high in zip(layout.level_y[2:], layout.level_y[3:], strict=False):
        start, end = bottom + low + P_SIZE[1] / 2, bottom + high - P_SIZE[1] / 2
        canvas.line([layout.level_x] * 2, [start, end - 0.03])
        canvas.arrow_tip(layout.level_x, end, WIRE, "^")


def _draw_net(canvas: Canvas, net: Net, bottom: float, box_left: float) -> None:
    wire = EXTRA if net.extra else WIRE
    heights = [bottom + height for height in net.heights]
    if not net.straight:
        canvas.line([net.x] * 2, [min(heights), max(heights)], wire, over=True)
        for height in net.source_heights:
            canvas.dot(net.x, bottom + height, wire)
    for height, color in net.ports:
        y = [bottom + height] * 2
        canvas.line([net.x, box_left - 0.03], y, color, linewidth=1.8)
        if not net.straight:  # cover the rim of the vertical line
            canvas.line([net.x, net.x + 0.05], y, color, linewidth=1.8, zorder=3)
        canvas.arrow_tip(box_left, bottom + height, color)
