"""A picture of the training curves: losses, learning rate and AP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import replacing
from .metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[int], list[float]]  # iterations and values


def plot_training(metrics_jsonl: str | Path, output_png: str | Path) -> None:
    """Draw the losses, the learning rate and the AP of a run over its iterations.

    Args:
        metrics_jsonl: file written by training, with a JSON object per line. Drawn are `loss`,
            `loss_...`, `lr`, `eval/<data set>/AP` and `eval/<data set>/AP50` over `iteration`.
        output_png: picture to write, whole or not at all.

    Raises:
        ValueError: the file has none of these.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    history = read_metrics(metrics_jsonl)
    series = _series(history)
    losses = sorted(
        (name for name in series if name.startswith("loss")), key=lambda n: (n != "loss", n)
    )
    figures = [name for name in series if name.startswith("eval/")]
    figures = [name for name in figures if name.rsplit("/", 1)[1] in ("AP", "AP50")]
    panels = [
        kind
        for kind, present in (("loss", losses), ("lr", "lr" in series), ("AP", figures))
        if present
    ]
    if not panels:
        raise ValueError(f"{metrics_jsonl} has no line with a loss, a learning rate or an AP")

    # Small, with many dots per inch: the text can be read where a page shrinks the picture.
    figure = Figure(figsize=(3.9 * len(panels), 3.3), dpi=170, layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    if losses:
        _plot_losses(axes["loss"], {name: series[name] for name in losses})
    if "lr" in series:
        _plot_learning_rate(axes["lr"], series["lr"])
    if figures:
        _plot_average_precision(axes["AP"], {name: series[name] for name in figures})
    last = max(history)
    for axis in axes.values():
        axis.set_xlabel("iteration")
        axis.set_xlim(0, last)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(output_png) as temporary:
        figure.savefig(temporary, format="png")


def _series(history: Mapping[int, Mapping[str, float]]) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for iteration in sorted(history):
        for name, value in history[iteration].items():
            iterations, values = series.setdefault(name, ([], []))
            iterations.append(iteration)
            values.append(value)
    return series


def _plot_losses(axis: Axes, losses: Mapping[str, Series]) -> None:
    top = 0.0
    for name, (iterations, values) in losses.items():
        smoothed = _smooth(np.array(values))
        (line,) = axis.plot(
            iterations, smoothed, linewidth=2.2 if name == "loss" else 1.6,
            color="#222222" if name == "loss" else None, label=name, zorder=3,
        )  # fmt: skip
        axis.plot(iterations, values, linewidth=0.7, alpha=0.3, color=line.get_color())
        # The first losses can be a hundred times the later ones; they may leave the picture.
        top = max(top, np.percentile(values, 98))
    limit = top * 1.15 or 1
    highest = max(max(values) for _, values in losses.values())
    if highest > limit:
        axis.text(0.04, 0.98, f"↑ {highest:.3g}", transform=axis.transAxes, va="top", fontsize=9)
    axis.set_ylim(0, limit)
    axis.set_title("training losses")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)


def _plot_learning_rate(axis: Axes, series: Series) -> None:
    # With few log lines, dots show that the rates in between (such as a peak) are not recorded.
    marker = "." if len(series[0]) <= 60 else None
    axis.plot(*series, color="#444444", linewidth=1.8, marker=marker)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.set_title("learning rate")
    axis.set_ylabel("learning rate of the weights")


def _plot_average_precision(axis: Axes, figures: Mapping[str, Series]) -> None:
    datasets = sorted({name.split("/", 1)[1].rsplit("/", 1)[0] for name in figures})
    for name, (iterations, values) in sorted(figures.items()):
        dataset, figure = name.split("/", 1)[1].rsplit("/", 1)
        axis.plot(
            iterations, values, color=f"C{datasets.index(dataset)}", linewidth=1.8,
            linestyle="-" if figure == "AP" else "--", marker="o", markersize=4, clip_on=False,
            label=f"{figure} {dataset}" if len(datasets) > 1 else figure,
        )  # fmt: skip
        axis.annotate(
            f"{values[-1]:.3f}", (iterations[-1], values[-1]), xytext=(-4, 5),
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    axis.set_ylim(0, 1)
    axis.set_title(f"AP on {datasets[0]}" if len(datasets) == 1 else "AP")
    axis.set_ylabel("average precision")
    axis.legend(frameon=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a twentieth of the run, over less at its ends."""
    half = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
    low, high = index - reach, index + reach + 1
    return (sums[high] - sums[low]) / (high - low)
