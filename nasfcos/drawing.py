"""Pictures of searched architectures: the cells of the pyramid as a wiring plan, and the head.

Height stands for resolution: a band per stride, coarse at the top. A node's output is a wire that
runs to the right in its row until the last cell that takes it; a cell takes its inputs from the
wires through lanes in front of its column. So no line ever passes through a box, whatever the
genotype.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import Normal, withStroke
from matplotlib.textpath import TextPath

from .files import replacing
from .genotype import AGGREGATIONS, FPN_OPS, HEAD_OPS, NUM_INPUTS, Genotype, node_names
from .models.heads.cells import STRIDES as LEVEL_STRIDES

FORMATS = (".png", ".svg", ".pdf")

STRIDES = (4, 8, 16, 32)
"""Of C2..C5: pixels of the image a step on the map stands for."""

_PALETTE = (
    "#8ecae6", "#4f9fd8", "#2f6fb5", "#a9b4c0", "#f4a259", "#a8d8a0", "#5fae6e", "#e8c547",
    "#d98cb3", "#9f86c0", "#e07a5f", "#7fc8c2",
)  # fmt: skip
_MEANING = {
    "psum": "psum: sum with a weight per channel",
    "cat": "cat: concatenation, 1×1 conv",
}
_NAMES = tuple(dict.fromkeys((*FPN_OPS, *HEAD_OPS)))

_INK, _FAINT, _WIRE, _EXTRA = "#1f2933", "#7b8794", "#52606d", "#8e3fa8"

# All lengths are in inches.
_MARGIN = 0.25
_C_SIZE = (0.95, 0.42)
_CELL_SIZE = (1.66, 0.72)
_P_SIZE = (0.95, 0.56)
_OP_SIZE = (0.98, 0.26)
_HEAD_OP_SIZE = (1.02, 0.36)
_LABEL = 0.68  # room for a band's resolution
_ROW_GAP = 0.2
_BAND_GAP = 0.1
_LANE = 0.17
_PORT = 0.16  # of a box's two inputs from its middle


def operation_color(name: str) -> str:
    """The colour of an operation, the same in every picture (hexadecimal)."""
    return _PALETTE[_NAMES.index(name) % len(_PALETTE)]


def short_name(name: str) -> str:
    """An operation's name as it fits into a box: ``sep_conv_3x3_dil3`` is ``sep 3×3 d3``."""
    text = name.replace("_connect", "").replace("_conv_", " ").replace("_dil", " d")
    text = re.sub(r"(\d)x(\d)", r"\1×\2", text.replace("_", " "))
    return re.sub(r"^conv(?=\d)", "conv ", text)


def node_strides(genotype: Genotype) -> list[int]:
    """Stride of every node, C2 first: a cell's output is as large as its larger input."""
    strides = list(STRIDES)
    for cell in genotype.cells:
        strides.append(min(strides[node] for node in cell.inputs))
    return strides


def draw_architecture(genotype: Genotype, title: str | None = None) -> Figure:
    """The architecture as a picture.

    The pyramid from C2..C5 on the left to P3..P7 on the right, and below it, where it is searched,
    the head. The figure's size follows from the genotype.
    """
    pyramid = _PyramidLayout(genotype)
    head_width = _head_width(genotype)
    width = max(pyramid.min_width, head_width, 8.0)
    pyramid.place_columns(width)
    legend = _legend_rows(genotype, width - 2 * _MARGIN)
    titles = textwrap.wrap(title, int(width * 8.5)) if title else []

    head_height = 2.55 if genotype.head_ops else 0.0
    top = 0.15 + 0.26 * len(titles) + 0.34 * len(legend) + 0.12
    height = top + pyramid.height + head_height + 0.2

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    canvas = _Canvas(figure)
    y = height - 0.15
    for line in titles:
        y -= 0.26
        canvas.text(_MARGIN, y + 0.1, line, 12.5, weight="bold", ha="left")
    for row in legend:
        y -= 0.34
        for x, draw in row:
            draw(canvas, _MARGIN + x, y + 0.15)
    _draw_pyramid(canvas, pyramid, bottom=0.2 + head_height)
    if genotype.head_ops:
        _draw_head(canvas, genotype, left=(width - head_width) / 2, top=0.2 + head_height)
    return figure


def save_architecture(genotype: Genotype, path: str | Path, title: str | None = None) -> None:
    """Write the picture, whole or not at all, in the format of the name's suffix.

    Raises:
        ValueError: a suffix other than those of `FORMATS`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}")
    figure = draw_architecture(genotype, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:])


# ---------------------------------------------------------------------------------------- canvas


class _Canvas:
    """A figure to draw on in inches, from its lower left corner.

    Parts are added as artists: the faces that follow the limits of the data take twice as long.
    """

    def __init__(self, figure: Figure) -> None:
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        width, height = figure.get_size_inches()
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)

    def box(
        self, x: float, y: float, size: tuple[float, float], *, color: str = "white",
        edge: str = _INK, radius: float = 0.06, kind: str = "box", zorder: float = 4, **style,
    ) -> None:  # fmt: skip
        """A rounded rectangle with its middle at (x, y); `kind` tells the drawing's parts apart."""
        corner = (x - size[0] / 2, y - size[1] / 2)
        self.axes.add_artist(
            FancyBboxPatch(
                corner, *size, boxstyle=f"round,pad=0,rounding_size={radius}", facecolor=color,
                edgecolor=edge, zorder=zorder, gid=kind, **{"linewidth": 1.0, **style},
            )  # fmt: skip
        )

    def text(self, x: float, y: float, text: str, size: float, **style) -> None:
        style = {"color": _INK, "ha": "center", "va": "center", "zorder": 6, **style}
        self.axes.text(x, y, text, fontsize=size, **style)

    def operation(
        self, x: float, y: float, name: str, size: tuple[float, float] = _OP_SIZE
    ) -> None:
        color = operation_color(name)
        self.box(x, y, size, color=color, edge=_INK, linewidth=0.6, zorder=5, kind="operation")
        dark = sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) < 380
        self.text(x, y - 0.008, short_name(name), 8.5, color="white" if dark else _INK)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], color: str = _WIRE, *, over: bool = False,
        **style,
    ) -> None:  # fmt: skip
        """A line; one that runs `over` others has a pale rim where it crosses them."""
        if over:
            rim = [withStroke(linewidth=4.5, foreground="white"), Normal()]
            style = {"path_effects": rim, "zorder": 3, **style}
        style = {"linewidth": 1.5, "zorder": 2, "solid_capstyle": "projecting", **style}
        self.axes.add_artist(Line2D(xs, ys, color=color, gid="line", **style))

    def arrow_tip(self, x: float, y: float, color: str, marker: str = ">") -> None:
        """An arrow's tip that ends at (x, y)."""
        dx, dy = {">": (-0.035, 0), "^": (0, -0.035)}[marker]
        self._mark(x + dx, y + dy, color, marker=marker, markersize=5.5, zorder=5)

    def dot(self, x: float, y: float, color: str = _WIRE) -> None:
        self._mark(x, y, color, marker="o", markersize=4.5, zorder=4)

    def _mark(self, x: float, y: float, color: str, **style) -> None:
        self.axes.add_artist(Line2D([x], [y], color=color, markeredgewidth=0, **style))


@functools.cache
def _text_width(text: str, size: float) -> float:
    return TextPath((0, 0), text, size=size).get_extents().width / 72


# ---------------------------------------------------------------------------------------- layout


@dataclass
class _Net:
    """One vertical lane: the heights of what comes to it from the left and leaves to the right."""

    sources: list[int]  # nodes
    ports: list[tuple[float, str]]  # height, colour
    extra: bool = False
    source_heights: list[float] = field(default_factory=list)
    x: float = 0.0

    @property
    def heights(self) -> list[float]:
        return self.source_heights + [height for height, _ in self.ports]

    @property
    def straight(self) -> bool:
        return max(self.heights) - min(self.heights) < 1e-6


class _PyramidLayout:
    """Where everything of a pyramid goes; heights are from the lower edge of its lowest band."""

    def __init__(self, genotype: Genotype) -> None:
        self.genotype = genotype
        self.names = node_names(len(genotype.cells))
        self.strides = node_strides(genotype)
        self.depth = [0] * NUM_INPUTS
        for cell in genotype.cells:
            self.depth.append(1 + max(self.depth[node] for node in cell.inputs))
        self.columns = max(self.depth)
        self._place_rows()
        self._place_levels()
        self.channels = [self._input_nets(d) for d in range(1, self.columns + 1)]
        self.channels.append(self._output_nets())
        self.channels = [_improve(nets, _crossings) for nets in self.channels]

    # ----- heights

    def _place_rows(self) -> None:
        """A row for each node, in the band of its stride, near what it is connected with."""
        order = {stride: self._share_rows(stride) for stride in STRIDES}
        edges = [
            (NUM_INPUTS + k, node)
            for k, cell in enumerate(self.genotype.cells)
            for node in cell.inputs
        ]

        def length(order: dict[int, list[list[int]]]) -> float:
            rows, bands = self._stack(order)
            vertical = sum(abs(rows[a] - rows[b]) for a, b in edges)
            for node, stride in zip(self.genotype.pyramid_nodes, LEVEL_STRIDES, strict=False):
                vertical += abs(rows[node] - sum(bands[stride]) / 2)
            return vertical

        for stride in STRIDES:
            order[stride] = _improve(
                order[stride], lambda band, stride=stride: length({**order, stride: band})
            )
        self.rows, self.bands = self._stack(order)
        self.height = max(high for _, high in self.bands.values())

    def _share_rows(self, stride: int) -> list[list[int]]:
        """The nodes of a stride in rows; one whose wire has ended makes room for another."""
        taken_by: dict[int, list[int]] = {}
        for k, cell in enumerate(self.genotype.cells):
            for node in cell.inputs:
                taken_by.setdefault(node, []).append(NUM_INPUTS + k)
        nodes = [n for n, other in enumerate(self.strides) if other == stride]
        rows: list[list[int]] = []
        for node in sorted(nodes, key=lambda n: self.depth[n]):
            free = [
                row
                for row in rows
                if row[-1] in taken_by
                and max(self.depth[taker] for taker in taken_by[row[-1]]) <= self.depth[node]
            ]
            if free:
                max(free, key=lambda row: node in taken_by[row[-1]]).append(node)
            else:
                rows.append([node])
        return rows

    def _stack(
        self, order: dict[int, list[list[int]]]
    ) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
        """Heights of the nodes and (low, high) of the bands, their rows stacked in this order."""
        heights, bands, y = {}, {}, 0.0
        for stride in STRIDES:
            rows = [
                (_C_SIZE if max(row) < NUM_INPUTS else _CELL_SIZE)[1] + _ROW_GAP
                for row in order[stride]
            ]
            band = sum(rows)
            if stride in LEVEL_STRIDES:
                band = max(band, _P_SIZE[1] + 0.3)
            bottom = y + (band - sum(rows)) / 2
            for nodes, height in zip(order[stride], rows, strict=True):
                heights.update((node, bottom + height / 2) for node in nodes)
                bottom += height
            bands[stride] = (y, y + band)
            y += band + _BAND_GAP
        for stride in LEVEL_STRIDES[3:]:
            bands[stride] = (y, y + _P_SIZE[1] + 0.2)
            y = bands[stride][1] + _BAND_GAP
        return heights, bands

    def _place_levels(self) -> None:
        """P3..P5 inside their bands, where their inputs lie on no other output's wire."""
        wires = {node: self.rows[node] for node in self.genotype.unconsumed}
        self.level_y, self.level_ports = [], []
        for node, stride in zip(self.genotype.pyramid_nodes, STRIDES[1:], strict=True):
            low, high = (
                edge + sign * (_P_SIZE[1] / 2 + 0.05)
                for edge, sign in zip(self.bands[stride], (1, -1), strict=True)
            )
            offsets = (_PORT, -_PORT) if self.genotype.extra_nodes else (0.0,)
            wanted = min(max(wires[node] - offsets[0], low), high)

            def cost(y: float, node=node, offsets=offsets, wanted=wanted) -> float:
                own = abs(y + offsets[0] - wires[node])
                clashes = 0 < own < 0.1
                for other, height in wires.items():
                    clashes += sum(
                        abs(y + offset - height) < 0.1
                        for offset in offsets
                        if (other, offset) != (node, offsets[0])
                    )
                return 100 * clashes + abs(y - wanted)

            steps = [low + (high - low) * i / 40 for i in range(41)]
            self.level_y.append(min([wanted, *steps], key=cost))
            self.level_ports.append([self.level_y[-1] + offset for offset in offsets])
        for stride in LEVEL_STRIDES[3:]:
            self.level_y.append(sum(self.bands[stride]) / 2)

    # ----- lanes

    def cell_ports(self, k: int) -> list[tuple[int, int, float]]:
        """(input node, operation, height) of a cell's two inputs; the higher wire goes on top."""
        cell, middle = self.genotype.cells[k], self.rows[NUM_INPUTS + k]
        inputs = sorted(zip(cell.inputs, cell.ops, strict=True), key=lambda i: -self.rows[i[0]])
        return [(*i, middle + port) for i, port in zip(inputs, (_PORT, -_PORT), strict=True)]

    def _input_nets(self, depth: int) -> list[_Net]:
        ports: dict[int, list[tuple[float, str]]] = {}
        for k in range(len(self.genotype.cells)):
            if self.depth[NUM_INPUTS + k] == depth:
                for node, op, height in self.cell_ports(k):
                    ports.setdefault(node, []).append((height, operation_color(FPN_OPS[op])))
        return [
            _Net([node], p, source_heights=[self.rows[node]]) for node, p in sorted(ports.items())
        ]

    def _output_nets(self) -> list[_Net]:
        nets = [
            _Net([node], [(ports[0], _WIRE)], source_heights=[self.rows[node]])
            for node, ports in zip(self.genotype.pyramid_nodes, self.level_ports, strict=True)
        ]
        extra = list(self.genotype.extra_nodes)
        if extra:
            ports = [(ports[1], _EXTRA) for ports in self.level_ports]
            heights = [self.rows[node] for node in extra]
            nets.append(_Net(extra, ports, extra=True, source_heights=heights))
        return nets

    # ----- columns

    def _channel_width(self, nets: Sequence[_Net]) -> float:
        return 0.34 + _LANE * max(0, len(nets) - 1) + 0.12

    @property
    def min_width(self) -> float:
        return (
            2 * _MARGIN + _LABEL + _C_SIZE[0] + self.columns * _CELL_SIZE[0] + _P_SIZE[0]
            + sum(map(self._channel_width, self.channels)) + 0.15
        )  # fmt: skip

    def place_columns(self, width: float) -> None:
        """Middles of the columns and lanes; spare width goes to the channels between them."""
        self.width = width
        spare = (width - self.min_width) / len(self.channels)
        self.c_x = _MARGIN + _LABEL + _C_SIZE[0] / 2
        x = _MARGIN + _LABEL + _C_SIZE[0]
        self.column_x = []
        for nets in self.channels:
            channel = self._channel_width(nets) + spare
            # In the right part: the short end of a line is the coloured one, which tells its
            # operation.
            lane = x + channel - 0.29 - _LANE * max(0, len(nets) - 1)
            for i, net in enumerate(nets):
                net.x = lane + i * _LANE
            x += channel
            if len(self.column_x) < self.columns:
                self.column_x.append(x + _CELL_SIZE[0] / 2)
                x += _CELL_SIZE[0]
        self.level_x = x + _P_SIZE[0] / 2

    def wire_ends(self) -> dict[int, float]:
        """The lane at which each node's wire ends."""
        ends: dict[int, float] = {}
        for nets in self.channels:
            for net in nets:
                for node in net.sources:
                    ends[node] = max(ends.get(node, 0.0), net.x)
        return ends


def _improve(order: Sequence, cost: Callable[[list], float]) -> list:
    """The order after every swap of two that lowers the cost."""
    order = list(order)
    best = cost(order)
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i):
                order[i], order[j] = order[j], order[i]
                value = cost(order)
                if value < best - 1e-6:
                    best, improved = value, True
                else:
                    order[i], order[j] = order[j], order[i]
    return order


def _crossings(nets: Sequence[_Net]) -> int:
    """Between the horizontal and the vertical parts of nets in neighbouring lanes."""

    def inside(height: float, net: _Net) -> bool:
        return min(net.heights) < height < max(net.heights)

    return sum(
        sum(inside(height, right) for height, _ in left.ports)
        + sum(inside(height, left) for height in right.source_heights)
        for j, right in enumerate(nets)
        for left in nets[:j]
    )


# --------------------------------------------------------------------------------------- drawing


def _draw_pyramid(canvas: _Canvas, layout: _PyramidLayout, bottom: float) -> None:
    genotype = layout.genotype
    rows = {node: bottom + y for node, y in layout.rows.items()}
    for i, (stride, (low, high)) in enumerate(sorted(layout.bands.items())):
        canvas.box(
            layout.width / 2, bottom + (low + high) / 2,
            (layout.width - 2 * _MARGIN, high - low), color=("#f3f6f9", "#f8fafb")[i % 2],
            edge="none", radius=0.08, kind="band", zorder=0,
        )  # fmt: skip
        y = bottom + (low + high) / 2
        canvas.text(_MARGIN + 0.1, y, f"1/{stride}", 9, color=_FAINT, ha="left")

    for node in range(NUM_INPUTS):
        used = node in genotype.consumed
        style = {} if used else {"edge": _FAINT, "linestyle": (0, (3, 2))}
        canvas.box(layout.c_x, rows[node], _C_SIZE, kind="node", **style)
        color = _INK if used else _FAINT
        under = f"stride {STRIDES[node]}" if used else "not used"
        canvas.text(
            layout.c_x, rows[node] + 0.085, layout.names[node], 10, weight="bold", color=color
        )
        canvas.text(layout.c_x, rows[node] - 0.1, under, 7.5, color=_FAINT)

    for k, cell in enumerate(genotype.cells):
        node = NUM_INPUTS + k
        x, y = layout.column_x[layout.depth[node] - 1], rows[node]
        canvas.box(x, y, _CELL_SIZE, kind="node")
        for _, op, height in layout.cell_ports(k):
            canvas.operation(
                x - _CELL_SIZE[0] / 2 + 0.08 + _OP_SIZE[0] / 2, bottom + height, FPN_OPS[op]
            )
        side = x + _CELL_SIZE[0] / 2 - 0.3
        canvas.text(side, y + 0.2, layout.names[node], 10, weight="bold")
        canvas.text(side, y, AGGREGATIONS[cell.aggregation], 8.5)
        canvas.text(side, y - 0.19, f"1/{layout.strides[node]}", 7.5, color=_FAINT)

    for node, end in layout.wire_ends().items():
        start = layout.c_x + _C_SIZE[0] / 2
        if node >= NUM_INPUTS:
            start = layout.column_x[layout.depth[node] - 1] + _CELL_SIZE[0] / 2
        color = _EXTRA if node in genotype.extra_nodes else _WIRE
        canvas.line([start, end], [rows[node]] * 2, color)
    boxes_left = [x - _CELL_SIZE[0] / 2 for x in layout.column_x]
    boxes_left.append(layout.level_x - _P_SIZE[0] / 2)
    for box_left, nets in zip(boxes_left, layout.channels, strict=True):
        for net in nets:
            _draw_net(canvas, net, bottom, box_left)

    for i, (y, stride) in enumerate(zip(layout.level_y, LEVEL_STRIDES, strict=True)):
        canvas.box(layout.level_x, bottom + y, _P_SIZE, color="#fdf3dc", kind="node")
        canvas.text(layout.level_x, bottom + y + 0.11, f"P{i + 3}", 10.5, weight="bold")
        canvas.text(layout.level_x, bottom + y - 0.12, f"1/{stride}", 8, color=_FAINT)
    for low, high in zip(layout.level_y[2:], layout.level_y[3:], strict=False):
        start, end = bottom + low + _P_SIZE[1] / 2, bottom + high - _P_SIZE[1] / 2
        canvas.line([layout.level_x] * 2, [start, end - 0.03])
        canvas.arrow_tip(layout.level_x, end, _WIRE, "^")


def _draw_net(canvas: _Canvas, net: _Net, bottom: float, box_left: float) -> None:
    wire = _EXTRA if net.extra else _WIRE
    heights = [bottom + height for height in net.heights]
    if not net.straight:
        canvas.line([net.x] * 2, [min(heights), max(heights)], wire, over=True)
        for height in net.source_heights:
            canvas.dot(net.x, bottom + height, wire)
    for height, color in net.ports:
        y = [bottom + height] * 2
        canvas.line([net.x, box_left - 0.03], y, color, linewidth=1.8)
        if not net.straight:  # over the lane's own rim
            canvas.line([net.x, net.x + 0.05], y, color, linewidth=1.8, zorder=3)
        canvas.arrow_tip(box_left, bottom + height, color)


def _head_width(genotype: Genotype) -> float:
    if not genotype.head_ops:
        return 0.0
    return 2 * _MARGIN + 1.35 + (_HEAD_OP_SIZE[0] + 0.26) * len(genotype.head_ops) + 1.35


def _draw_head(canvas: _Canvas, genotype: Genotype, left: float, top: float) -> None:
    """Both towers, layer by layer; a layer with weights for each level is a stack of five."""
    step = _HEAD_OP_SIZE[0] + 0.26
    first = left + _MARGIN + 1.35 + step / 2
    count, split = len(genotype.head_ops), genotype.head_split
    for start, end, text in (
        (0, split, "weights of their own at each level"),
        (split, count, "shared by all levels"),
    ):
        if start < end:
            low, high = first + (start - 0.42) * step, first + (end - 1 + 0.42) * step
            narrow = _text_width(text, 9) > high - low
            canvas.text(
                (low + high) / 2, top - 0.42, textwrap.fill(text, 17) if narrow else text, 9,
                linespacing=1.1,
            )  # fmt: skip
            canvas.line([low, low, high, high], [top - 0.74, top - 0.66, top - 0.66, top - 0.74],
                        _FAINT, linewidth=1)  # fmt: skip
    for name, output, y in (
        ("classification", "class scores", top - 1.12),
        ("regression", "boxes", top - 1.97),
    ):
        x = left + _MARGIN + 0.6
        canvas.box(x, y, (1.2, 0.5), color="#fdf3dc", kind="node")
        canvas.text(x, y + 0.09, "P3 – P7", 9, weight="bold")
        canvas.text(x, y - 0.11, name, 7.5, color=_FAINT)
        before, end = x + 0.6, first + count * step - step / 2 + 0.1
        for i, op in enumerate(genotype.head_ops):
            center = first + i * step
            for sheet in range(4 if i < split else 0, 0, -1):
                canvas.box(
                    center + 0.035 * sheet, y + 0.035 * sheet, _HEAD_OP_SIZE, linewidth=0.6,
                    color=operation_color(HEAD_OPS[op]), kind="sheet", zorder=4.5,
                )  # fmt: skip
            canvas.operation(center, y, HEAD_OPS[op], _HEAD_OP_SIZE)
            _draw_arrow(canvas, before, center - _HEAD_OP_SIZE[0] / 2, y)
            before = center + _HEAD_OP_SIZE[0] / 2
        _draw_arrow(canvas, before, end, y)
        canvas.box(end + 0.55, y, (1.1, 0.4), kind="node")
        canvas.text(end + 0.55, y - 0.005, output, 9)


def _draw_arrow(canvas: _Canvas, start: float, end: float, y: float) -> None:
    canvas.line([start, end - 0.03], [y, y])
    canvas.arrow_tip(end, y, _WIRE)


def _legend_rows(
    genotype: Genotype, width: float
) -> list[list[tuple[float, Callable[[_Canvas, float, float], None]]]]:
    """What the colours mean, in rows: (left edge, draws itself at a place) of each entry."""
    used = {FPN_OPS[op] for cell in genotype.cells for op in cell.ops}
    used |= {HEAD_OPS[op] for op in genotype.head_ops}

    def operation(canvas: _Canvas, x: float, y: float, name: str) -> None:
        canvas.operation(x + _OP_SIZE[0] / 2, y, name)
        canvas.text(x + _OP_SIZE[0] + 0.08, y - 0.008, name, 8.5, ha="left")

    def aggregation(canvas: _Canvas, x: float, y: float, text: str) -> None:
        canvas.text(x, y - 0.008, text, 8.5, ha="left")

    def extra(canvas: _Canvas, x: float, y: float, text: str) -> None:
        canvas.line([x, x + 0.4], [y, y], _EXTRA)
        canvas.text(x + 0.48, y - 0.008, text, 8.5, ha="left")

    entries = [(operation, _OP_SIZE[0] + 0.08, name) for name in _NAMES if name in used]
    aggregations = {AGGREGATIONS[cell.aggregation] for cell in genotype.cells}
    entries += [(aggregation, 0.0, _MEANING[name]) for name in sorted(aggregations)]
    if genotype.extra_nodes:
        entries.append((extra, 0.48, "added to P3, P4 and P5"))
    rows, x = [[]], 0.0
    for draw, offset, text in entries:
        needed = offset + _text_width(text, 8.5)
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, lambda c, x, y, draw=draw, text=text: draw(c, x, y, text)))
        x += needed + 0.28
    return rows
