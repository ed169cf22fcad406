"""Plots of a search: those of its report, and the comparisons of rewards and of strategies."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..drawing import draw_architecture, operation_color, short_name
from ..genotype import Genotype, node_names
from .records import COMPLETE, FAILED, PRUNED, TrialRecord, kendall_tau
from .space import Decision

MAX_STEPS = 60
"""Largest number of steps in a plot of the choices over time."""

STYLE = {
    "font.size": 10,
    "text.color": "#1f2933",
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": "#1f2933",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "figure.dpi": 100,
}
BLUE, ORANGE, RED, GREEN, GREY = "#2f6fb5", "#e8872e", "#c0392b", "#2e8b57", "#9aa5b1"
WIDTH = 11.5  # inches


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """The number formatted by `form`; a dash if it is None or not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form) + unit


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over each value and the `window - 1` before it (fewer at the start)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def pareto_front(costs: Sequence[float], rewards: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in cost and reward, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -rewards[i])):
        if not front or rewards[i] > rewards[front[-1]]:
            front.append(i)
    return front


def _with_style(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Make `draw`, which returns a figure, return its PNG in the style of the report."""

    @functools.wraps(draw)
    def png(*args, **kwargs) -> bytes:
        with matplotlib.rc_context(STYLE):
            return _to_png(draw(*args, **kwargs))

    return png


def _to_png(figure: Figure, colors: int | None = None) -> bytes:
    """The figure as a PNG; `colors` is the size of the palette, None for true colour."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if colors is not None:  # the other methods merge pale shades
        picture = picture.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure


@_with_style
def draw_rewards(records: Sequence[TrialRecord]) -> Figure:
    """Rewards of the trials and, if the objective includes a cost, the objective below."""
    measures = [("reward", lambda record: record.result.reward)]
    if any(differ(r.objective, r.result.reward) for r in records if r.result.status == COMPLETE):
        measures.append(("objective (reward less cost)", lambda record: record.objective))
    figure = _figure(0.4 + 3.6 * len(measures))
    axes = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axis, (name, value) in zip(axes, measures, strict=True):
        _plot_rewards(axis, records, value, name.partition(" ")[0])
        axis.set_ylabel(name)
    axes[-1].set_xlabel("trial")
    axes[0].set_title("Rewards of the trials", loc="left")
    return figure


def differ(a: float, b: float) -> bool:
    """Whether two numbers are finite and not equal (beyond rounding)."""
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) > 1e-9


def _plot_rewards(
    axis: Axes, records: Sequence[TrialRecord], value: Callable[[TrialRecord], float], name: str
) -> None:
    def series(chosen: Iterable[TrialRecord]) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(r.index, value(r)) for r in chosen if math.isfinite(value(r))]
        index, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(index), np.array(values)

    complete = [r for r in records if r.result.status == COMPLETE]
    own = [r for r in records if r.duplicate_of is None]
    kinds = [
        ("trained", [r for r in own if r.result.status == COMPLETE], "o", BLUE, 0.45),
        ("pruned", [r for r in own if r.result.status == PRUNED], "v", ORANGE, 0.7),
        ("reused", [r for r in records if r.duplicate_of is not None], "D", GREY, 0.8),
    ]
    _, shown = series(r for _, chosen, *_ in kinds for r in chosen)
    low, high = _limits(shown)
    below = int((shown < low).sum())
    for kind, chosen, marker, color, alpha in kinds:
        index, values = series(chosen)
        if len(index):
            axis.scatter(
                index, np.maximum(values, low), s=13, marker=marker, color=color, alpha=alpha,
                linewidths=0, label=f"{kind} ({len(chosen):,})",
            )  # fmt: skip
    failed = [r.index for r in own if r.result.status == FAILED]
    if failed:
        axis.scatter(
            failed, [0.02] * len(failed), s=22, marker="x", color=RED, linewidths=1.2,
            transform=axis.get_xaxis_transform(), label=f"failed ({len(failed):,})",
        )  # fmt: skip
    index, values = series(complete)
    index, values = index[values >= low], values[values >= low]
    if len(index):
        window = max(5, min(100, len(index) // 12))
        axis.plot(
            index, moving_average(values, window), color="#123a63", linewidth=2.2,
            label=f"mean of the last {window}",
        )  # fmt: skip
    index, values = series(r for r in own if r.result.status == COMPLETE)
    if len(index):
        best = np.maximum.accumulate(values)
        last = max(r.index for r in records)
        axis.step(
            [*index, last], [*best, best[-1]], where="post", color=GREEN, linewidth=1.8,
            label=f"best {name} so far ({best[-1]:.4f})",
        )  # fmt: skip
    if below:
        axis.plot([], [], " ", label=f"{below:,} lower: at the edge,\nnot in the mean")
    axis.set_ylim(low - 0.06 * (high - low), high + 0.05 * (high - low))
    _count_along_x(axis, 1 + max(r.index for r in records))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0)


def _count_along_x(axis: Axes, count: int) -> None:
    """Let the x axis run from 0 to count - 1, with ticks at whole numbers only."""
    margin = 0.5 + 0.01 * (count - 1)
    axis.set_xlim(-margin, count - 1 + margin)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _limits(values: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) value shown: the worst 5 % may lie far below the others."""
    if not len(values):
        return -1.0, 0.0
    top, bottom, middle = values.max(), values.min(), np.percentile(values, 5)
    low = max(bottom, middle - 0.5 * (top - middle))
    return (low, top) if top > low else (top - 0.5, top + 0.5)


@_with_style
def draw_strategy(stats: Sequence[dict[str, float]]) -> Figure:
    """The strategy's statistics by batch, a panel each, entropy first."""
    names = sorted({name for batch in stats for name in batch}, key=lambda n: (n != "entropy", n))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(0.3 + 2.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        batches, values = zip(
            *((i, batch[name]) for i, batch in enumerate(stats) if name in batch), strict=True
        )
        few = {"marker": "o", "markersize": 3} if len(batches) < 30 else {}
        axis.plot(batches, values, color=BLUE, linewidth=1.8, **few)
        axis.set_title(name.replace("_", " "), loc="left")
        axis.set_xlabel("batch")
        _count_along_x(axis, len(stats))
    return figure


class _Shares:
    """How often each choice is made, over the trials in their order.

    Attributes:
        edges: [steps + 1] edges of the time steps, in trials.
    """

    def __init__(self, records: Sequence[TrialRecord], decisions: Sequence[Decision]) -> None:
        records = sorted(records, key=lambda r: r.index)
        self.decisions = decisions
        self.choices = np.array([r.choices for r in records])
        batches = len({r.batch for r in records})
        self.edges = np.linspace(0, len(records), min(MAX_STEPS, batches) + 1).round().astype(int)

    def of(self, decisions: Sequence[Decision], choices: Sequence[str]) -> np.ndarray:
        """Share of each choice among `decisions` in each step, [choices, steps]."""
        shares = np.zeros((len(choices), len(self.edges) - 1))
        for decision in decisions:
            column = self.choices[:, self.decisions.index(decision)]
            for i, choice in enumerate(decision.choices):
                counts = np.add.reduceat(column == i, self.edges[:-1], dtype=float)
                shares[choices.index(choice)] += counts / np.diff(self.edges)
        return shares / len(decisions)


_PANEL_TITLES = {
    "op": "Operations",
    "agg": "Aggregations",
    "split": "Head layers with separate weights per level",
}


@_with_style
def draw_choices(records: Sequence[TrialRecord], decisions: Sequence[Decision]) -> Figure:
    """Shares of the operations and aggregations, or of the head's operations and its split."""
    shares = _Shares(records, decisions)
    kinds = dict.fromkeys(d.kind for d in decisions)
    panels = [kind for kind in kinds if kind != "in"]
    figure = _figure(0.3 + 2.6 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, kind in zip(axes, panels, strict=True):
        own = [d for d in decisions if d.kind == kind]
        choices = list(dict.fromkeys(choice for d in own for choice in d.choices))
        values = shares.of(own, choices)
        if kind == "op":
            colors = [operation_color(choice) for choice in choices]
        else:
            colors = matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 0.7, len(choices)))
        # Steps rather than slopes: each value is the mean over the trials of its step.
        axis.stackplot(
            np.repeat(shares.edges, 2)[1:-1], np.repeat(values, 2, axis=1), colors=colors,
            labels=choices, edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        axis.set_title(f"{_PANEL_TITLES[kind]}: share of the choices", loc="left")
        axis.set_ylim(0, 1)
        axis.set_xlim(0, shares.edges[-1])
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(  # in the order of the stack, top first
            handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.005, 1.0),
            borderaxespad=0,
        )  # fmt: skip
    axes[-1].set_xlabel("trial")
    return figure


@_with_style
def draw_places(records: Sequence[TrialRecord], decisions: Sequence[Decision]) -> Figure:
    """Shares of the input nodes of each cell, or of the operations of each head layer."""
    shares = _Shares(records, decisions)
    kind = "in" if any(d.kind == "in" for d in decisions) else "op"
    places: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.kind == kind:
            cell, _, own = decision.name.partition(".")
            places.setdefault(cell if kind == "in" else own, []).append(decision)
    columns = min(4, len(places))
    rows = math.ceil(len(places) / columns)
    most = max(len(own[0].choices) for own in places.values())
    values = {place: shares.of(own, own[0].choices) for place, own in places.items()}
    highest = math.ceil(10 * max(map(np.max, values.values()))) / 10
    figure = _figure(0.5 + (0.7 + 0.19 * most) * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(places) :]:
        axis.set_visible(False)
    for number, (axis, place) in enumerate(zip(axes.flat, places, strict=False)):
        choices = places[place][0].choices
        mesh = axis.pcolormesh(
            shares.edges, np.arange(len(choices) + 1), values[place],
            cmap="Blues", vmin=0, vmax=highest,
        )  # fmt: skip
        axis.invert_yaxis()
        axis.grid(False)
        axis.set_yticks(np.arange(len(choices)) + 0.5)
        axis.set_yticklabels([short_name(choice) for choice in choices], fontsize=8.5)
        axis.tick_params(length=0)
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        if kind == "in":
            title = f"cell {number} (makes {node_names(number + 1)[-1]})"
        else:
            title = f"layer {number}"
        axis.set_title(title, loc="left", fontsize=10)
        if number + columns >= len(places):
            axis.set_xlabel("trial")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.7, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    bar.set_label("share of the inputs" if kind == "in" else "share of the trials")
    return figure


_COSTS = (
    ("parameters (M)", lambda result: result.params / 1e6),
    ("multiply-adds (G)", lambda result: result.flops),
    ("latency (ms)", lambda result: result.latency),
)


@_with_style
def draw_costs(records: Sequence[TrialRecord]) -> Figure:
    """Reward against each measured cost, with the Pareto front."""
    panels = []
    for name, cost in _COSTS:
        pairs = [(cost(r.result), r.result.reward) for r in records]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            panels.append((name, *map(np.array, zip(*pairs, strict=True))))
    figure = _figure(3.9)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    low, high = _limits(panels[0][2])
    for axis, (name, costs, rewards) in zip(axes, panels, strict=True):
        highest = -_limits(-costs)[0]
        dearer = int((costs > highest).sum())
        axis.scatter(
            np.minimum(costs, highest), np.maximum(rewards, low), s=14, color=BLUE, alpha=0.4,
            linewidths=0, label="trial",
        )  # fmt: skip
        front = pareto_front(costs, rewards)
        front = [i for i in front if rewards[i] >= low]
        shown = np.minimum(costs[front], highest)
        axis.step(shown, rewards[front], where="post", color=RED, linewidth=1.3, alpha=0.8)
        axis.scatter(
            shown, rewards[front], s=30, color=RED, zorder=3, linewidths=0,
            label="Pareto front",
        )  # fmt: skip
        axis.set_xlabel(f"{name}; {dearer:,} dearer: at the edge" if dearer else name)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_title(f"Reward against {name.rpartition(' ')[0]}", loc="left")
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes[0].set_ylabel("reward")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0)
    return figure


@functools.lru_cache(maxsize=32)  # each refreshed report shows mostly the same architectures
def draw_best(genotype: Genotype) -> bytes:
    """One of the best architectures, as in :mod:`nasfcos.drawing`."""
    figure = draw_architecture(genotype)
    figure.set_dpi(105)
    # These pictures make up most of the report. Their areas are even, so a palette is enough; it
    # takes a third of the bytes.
    return _to_png(figure, colors=256)


@_with_style
def draw_agreement(
    panels: Mapping[str, Sequence[tuple[float, float]]],
    reward: str,
    other: str,
    same_scale: bool = False,
) -> Figure:
    """A second measure of some architectures against their rewards.

    Args:
        panels: (reward, other measure) of each architecture, by panel title.
        reward, other: axis labels.
        same_scale: the other measure is a reward too: equal axes, with the line y = x.
    """
    height, width = (4.8, 4.8) if same_scale else (4.0, 5.8)
    figure = _figure(height, min(WIDTH, width * len(panels)))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, pairs) in zip(axes, panels.items(), strict=True):
        rewards, others = zip(*pairs, strict=True)
        axis.scatter(rewards, others, s=34, color=BLUE, linewidths=0, zorder=2)
        axis.margins(0.08)
        if same_scale:
            values = (*rewards, *others)
            margin = 0.06 * (max(values) - min(values)) or 0.5
            limits = (min(values) - margin, max(values) + margin)
            axis.plot(
                limits, limits, color=GREY, linewidth=1.2, linestyle="--", zorder=1,
                label="equal rewards",
            )  # fmt: skip
            axis.legend(loc="lower right")
            axis.set(xlim=limits, ylim=limits, aspect="equal")
            axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel(reward)
        axis.set_ylabel(other)
        tau = number_text(kendall_tau(rewards, others), ".2f")
        axis.set_title(
            f"{title}\nKendall's tau {tau} over {len(pairs)} architectures", loc="left"
        )
    return figure


@_with_style
def draw_first_hits(hits: Mapping[str, Sequence[int]], max_trials: int, goal: str) -> Figure:
    """Share of the searches of each strategy that have reached the goal, against their trials.

    Args:
        hits: trials that each search took, by strategy; more than `max_trials`: it never got there.
        max_trials: trials of a search.
        goal: the architectures to find, in words.
    """
    figure = _figure(4.4, 8.0)
    axis = figure.subplots()
    # The axis ends soon after the last search, because no curve changes from there on.
    end = 1.02 * min(max_trials, max(map(max, hits.values())))
    styles = ((BLUE, "-"), (ORANGE, "-"), (GREY, "-"), ("#1f2933", "--"))
    for (name, trials), (color, line) in zip(hits.items(), styles, strict=False):
        found = sorted(count for count in trials if count <= max_trials)
        shares = [i / len(trials) for i in range(len(found) + 1)]
        label = "PPO" if name == "ppo" else name
        axis.step(
            [0, *found, end], [*shares, shares[-1]], where="post", linewidth=2, color=color,
            linestyle=line, label=f"{label}: median {median(trials):g}",
        )  # fmt: skip
    axis.set_xlim(0, end)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("distinct architectures tried")
    count = max(map(len, hits.values()))
    axis.set_ylabel(f"share of {count} searches that found\none of {goal}")
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.legend(loc="best")
    return figure
