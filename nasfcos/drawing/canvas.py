"""A canvas measured in inches, and how operations look on it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import Normal, withStroke
from matplotlib.textpath import TextPath

from ..genotype import FPN_OPS, HEAD_OPS

_PALETTE = (
    "#8ecae6", "#4f9fd8", "#2f6fb5", "#a9b4c0", "#f4a259", "#a8d8a0", "#5fae6e", "#e8c547",
    "#d98cb3", "#9f86c0", "#e07a5f", "#7fc8c2",
)  # fmt: skip
OPERATIONS = tuple(dict.fromkeys((*FPN_OPS, *HEAD_OPS)))
"""Names of all operations."""

INK, GREY, WIRE, EXTRA = "#1f2933", "#4b5763", "#52606d", "#8e3fa8"
"""Colours of text and outlines, of secondary text, of wires, and of unused cell outputs' wires."""

# All lengths are in inches.
MARGIN = 0.25
OP_SIZE = (0.98, 0.26)


def operation_color(name: str) -> str:
    """Hexadecimal colour of an operation; the same in every picture."""
    return _PALETTE[OPERATIONS.index(name) % len(_PALETTE)]


def short_name(name: str) -> str:
    """Name of an operation, short enough for a box: ``sep_conv_3x3_dil3`` is ``sep 3×3 d3``."""
    text = name.replace("_connect", "").replace("_conv_", " ").replace("_dil", " d")
    text = re.sub(r"(\d)x(\d)", r"\1×\2", text.replace("_", " "))
    return re.sub(r"^conv(?=\d)", "conv ", text)


class Canvas:
    """A figure to draw on, with coordinates in inches from the lower left corner.

    Parts are added as artists, because methods such as `Axes.plot`, which update the limits of the
    data, take twice as long.
    """

    def __init__(self, figure: Figure) -> None:
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        width, height = figure.get_size_inches()
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)

    def box(
        self, x: float, y: float, size: tuple[float, float], *, color: str = "white",
        edge: str = INK, radius: float = 0.06, kind: str = "box", zorder: float = 4, **style,
    ) -> None:  # fmt: skip
        """A rounded rectangle with its middle at (x, y).

        `kind` tells the parts of a drawing apart: it is their id in an SVG file.
        """
        corner = (x - size[0] / 2, y - size[1] / 2)
        self.axes.add_artist(
            FancyBboxPatch(
                corner, *size, boxstyle=f"round,pad=0,rounding_size={radius}", facecolor=color,
                edgecolor=edge, zorder=zorder, gid=kind, **{"linewidth": 1.0, **style},
            )  # fmt: skip
        )

    def text(self, x: float, y: float, text: str, size: float, **style) -> None:
        """A text of `size` points with its middle at (x, y)."""
        style = {"color": INK, "ha": "center", "va": "center", "zorder": 6, **style}
        self.axes.text(x, y, text, fontsize=size, **style)

    def operation(
        self, x: float, y: float, name: str, size: tuple[float, float] = OP_SIZE
    ) -> None:
        """A box with the colour and short name of an operation, with its middle at (x, y)."""
        color = operation_color(name)
        self.box(x, y, size, color=color, edge=INK, linewidth=0.6, zorder=5, kind="operation")
        dark = sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) < 380
        self.text(x, y - 0.008, short_name(name), 8.5, color="white" if dark else INK)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], color: str = WIRE, *, over: bool = False,
        **style,
    ) -> None:  # fmt: skip
        """A line through the points (xs, ys); one that runs `over` others has a pale rim."""
        if over:
            rim = [withStroke(linewidth=4.5, foreground="white"), Normal()]
            style = {"path_effects": rim, "zorder": 3, **style}
        style = {"linewidth": 1.5, "zorder": 2, "solid_capstyle": "projecting", **style}
        self.axes.add_artist(Line2D(xs, ys, color=color, gid="line", **style))

    def arrow_tip(self, x: float, y: float, color: str, marker: str = ">") -> None:
        """The tip of an arrow, whose point is at (x, y)."""
        dx, dy = {">": (-0.035, 0), "^": (0, -0.035)}[marker]
        self._mark(x + dx, y + dy, color, marker=marker, markersize=5.5, zorder=5)

    def dot(self, x: float, y: float, color: str = WIRE) -> None:
        """A dot, which marks that two lines are connected."""
        self._mark(x, y, color, marker="o", markersize=4.5, zorder=4)

    def _mark(self, x: float, y: float, color: str, **style) -> None:
        self.axes.add_artist(Line2D([x], [y], color=color, markeredgewidth=0, **style))


@functools.cache
def text_width(text: str, size: float) -> float:
    """Width of a text of `size` points, in inches."""
    return TextPath((0, 0), text, size=size).get_extents().width / 72
