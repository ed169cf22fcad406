"""Pictures of growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..files import replacing
from .memory import RESOLUTION


def plot_growth(axis: dict[str, Any], path: str | Path) -> None:
    """Write a picture of one axis of `growth.measure_growth`: time left, memory right, both axes
    logarithmic, with the exponent of the upper half of each curve in the legend. Memory that is too
    small to be measured is left out."""
    figure = Figure(figsize=(12, 5.2 + 0.22 * len(axis["curves"])), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for curve in axis["curves"]:
        x = [point["x"] for point in curve["points"]]
        seconds = [point["seconds"] for point in curve["points"]]
        (line,) = times.plot(
            x,
            [1000 * s["median"] for s in seconds],
            marker="o",
            label=_label(curve["name"], curve["time_exponent"]),
        )
        times.fill_between(
            x,
            [1000 * s["q1"] for s in seconds],
            [1000 * s["q3"] for s in seconds],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
        known = [p for p in curve["points"] if (p["memory_bytes"] or 0) >= RESOLUTION]
        if known:
            memory.plot(
                [p["x"] for p in known],
                [p["memory_bytes"] / 2**20 for p in known],
                marker="o",
                color=line.get_color(),
                label=_label(curve["name"], curve["memory_exponent"]),
            )
    values = sorted({point["x"] for curve in axis["curves"] for point in curve["points"]})
    _dress(times, "time of a call (ms), quartiles shaded", axis["label"], values)
    _dress(memory, "peak memory of a call (MiB)", axis["label"], values)
    figure.suptitle(axis["what"])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _label(name: str, exponent: float | None) -> str:
    return name if exponent is None else f"{name}: $\\sim x^{{{exponent:.2f}}}$"


def _dress(axes: Axes, title: str, label: str, values: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label)
    axes.set_xticks(values, [f"{x:,}" for x in values], rotation=30 if values[-1] > 1000 else 0)
    low, high = axes.get_ylim()
    if high < 10 * low:  # a decade at least, so that flat curves look flat
        axes.set_ylim(high / 10, 1.1 * high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
