"""Pictures of growth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from ..files import replacing
from .memory import RESOLUTION

MIB = 2**20
BOUND = {"marker": "v", "fillstyle": "none", "linestyle": ""}
Style = dict[str, str]


def plot_growth(axis: dict[str, Any], path: str | Path) -> None:
    """Write a picture of one axis of `growth.measure_growth`: time left, memory right.

    Both scales are logarithmic, and the legend has the exponent of the upper half of each curve.
    Memory that is too small to be measured is drawn as an open triangle at the upper bound. One or
    two values are drawn as bars, on linear scales.

    Args:
        axis: entry of the report's "axes", with at least one curve.
        path: file to write; its suffix decides the format.
    """
    curves = axis["curves"]
    values = sorted({point["x"] for curve in curves for point in curve["points"]})
    few = len(values) < 3
    figure = Figure(figsize=(12, 5 + 0.22 * len(curves)), layout="constrained")
    times, memory = figure.subplots(1, 2)
    styles = _styles([curve["name"] for curve in curves])
    if few:
        _draw_bars(times, memory, curves, styles, values)
    else:
        _draw_curves(times, memory, curves, styles)
    for panel, title, unit in (
        (times, "time of a call", "milliseconds"),
        (memory, "peak memory of a call", "MiB"),
    ):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(axis["label"])
        panel.set_ylabel(unit)
        panel.grid(alpha=0.3, axis="y" if few else "both")
        panel.set_axisbelow(True)
        if not few:
            _set_log_scales(panel, values)
        places = range(len(values)) if few else values
        panel.set_xticks(places, [_value_text(axis["name"], x) for x in values])
    note = "" if few else " (logarithmic scales; quartiles of the times shaded)"
    figure.suptitle(axis["what"] + note)
    handles = [
        Line2D([], [], marker="o", label=_label(curve), **style)
        for curve, style in zip(curves, styles, strict=True)
    ]
    if not few and any(_is_too_small(point) for curve in curves for point in curve["points"]):
        text = f"less memory than can be measured ({RESOLUTION / MIB:g} MiB)"
        handles.append(Line2D([], [], color="grey", label=text, **BOUND))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _styles(names: Sequence[str]) -> list[Style]:
    """A color for each kind of work and a line style for each model, for names "model: work"."""
    models, works = ([name.rpartition(": ")[part] for name in names] for part in (0, 2))
    colors = {work: f"C{i}" for i, work in enumerate(dict.fromkeys(works))}
    lines = dict(zip(dict.fromkeys(models), itertools.cycle(("-", "--", ":")), strict=False))
    return [
        {"color": colors[work], "linestyle": lines[model]}
        for model, work in zip(models, works, strict=True)
    ]


def _draw_curves(
    times: Axes, memory: Axes, curves: list[dict[str, Any]], styles: list[Style]
) -> None:
    for curve, style in zip(curves, styles, strict=True):
        points = curve["points"]
        x = [point["x"] for point in points]
        median, q1, q3 = (
            [1000 * point["seconds"][key] for point in points] for key in ("median", "q1", "q3")
        )
        times.plot(x, median, marker="o", **style)
        times.fill_between(x, q1, q3, color=style["color"], alpha=0.2, linewidth=0)
        if measured := [point for point in points if _is_measured(point)]:
            sizes = [point["memory_bytes"] / MIB for point in measured]
            memory.plot([point["x"] for point in measured], sizes, marker="o", **style)
        if bounded := [point["x"] for point in points if _is_too_small(point)]:
            bounds = [RESOLUTION / MIB] * len(bounded)
            memory.plot(bounded, bounds, color=style["color"], **BOUND)


def _draw_bars(
    times: Axes,
    memory: Axes,
    curves: list[dict[str, Any]],
    styles: list[Style],
    values: Sequence[int],
) -> None:
    """Draw a group of bars for each value, at 0, 1, ... on the x axes."""
    width = 0.6 / len(curves)
    for number, (curve, style) in enumerate(zip(curves, styles, strict=True)):
        for point in curve["points"]:
            place = values.index(point["x"]) + (number - (len(curves) - 1) / 2) * width
            heights = 1000 * point["seconds"]["median"], (point["memory_bytes"] or 0) / MIB
            for panel, height in zip((times, memory), heights, strict=True):
                panel.bar(place, height, 0.9 * width, color=style["color"])
    for panel in (times, memory):
        panel.set_xlim(-0.6, len(values) - 0.4)


def _is_measured(point: dict[str, Any]) -> bool:
    return point["memory_bytes"] is not None and point["memory_bytes"] >= RESOLUTION


def _is_too_small(point: dict[str, Any]) -> bool:
    return point["memory_bytes"] is not None and point["memory_bytes"] < RESOLUTION


def _label(curve: dict[str, Any]) -> str:
    exponents = [
        f"{what} $\\sim x^{{{curve[key]:.2f}}}$"
        for what, key in (("time", "time_exponent"), ("memory", "memory_exponent"))
        if curve[key] is not None
    ]
    return f"{curve['name']}: {', '.join(exponents)}" if exponents else curve["name"]


def _value_text(axis_name: str, x: int) -> str:
    """Label of a value; numbers of pixels are shown as squares of the side."""
    return f"{math.isqrt(x)}$^2$" if axis_name == "image" else f"{x:,}"


def _set_log_scales(panel: Axes, values: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    margin = (values[-1] / values[0]) ** 0.05
    panel.set_xlim(values[0] / margin, values[-1] * margin)
    low, high = panel.get_ylim()
    if high < 10 * low:  # a decade at least, so that flat curves look flat
        panel.set_ylim(high / 10, 1.1 * high)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    panel.minorticks_off()
