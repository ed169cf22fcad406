"""The report of a search: pictures, and one HTML file that holds them all and needs no network."""

from __future__ import annotations

import base64
import functools
import html
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..drawing import draw_architecture, operation_color, short_name
from ..engine.metrics import format_duration
from ..files import replacing
from ..genotype import FPN_OPS, HEAD_OPS, Genotype, node_names
from .records import COMPLETE, FAILED, PRUNED, TrialRecord, ended_as, own_trials, ranked
from .select import Selected
from .space import Decision
from .status import trials_per_hour

BINS = 60
"""Most steps in which what is chosen is followed over time."""

BEST = 4
"""Architectures of a stage that are drawn."""

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


@dataclass
class StageReport:
    """What the report knows of a stage.

    Attributes:
        stage: "fpn" or "head".
        records: the finished trials.
        decisions: of its space, in the order of the trials' choices.
        batch_figures: what the strategy told of each batch, such as its entropy.
        strategy: its name.
        planned: trials of the whole stage.
    """

    stage: str
    records: Sequence[TrialRecord]
    decisions: Sequence[Decision]
    batch_figures: Sequence[dict[str, float]] = field(default_factory=list)
    strategy: str = ""
    planned: int = 0
    # What was written last, and for what; a stage that has ended is not drawn again and again.
    _section: tuple[tuple, str] = field(default=((), ""), init=False, repr=False, compare=False)


def write_report(
    folder: str | Path, stages: Sequence[StageReport], ranking: Sequence[Selected] = ()
) -> Path:
    """Write `report.html` and its pictures as PNGs, each whole or not at all.

    Args:
        folder: of the report.
        stages: in the order in which they are searched.
        ranking: best first; empty before any architecture was trained in full.

    Returns:
        The HTML file.
    """
    folder = Path(folder)
    sections = []
    for stage in stages:
        known = (folder, len(stage.records), len(stage.batch_figures))
        if stage._section[0] != known:
            stage._section = (known, _stage_section(folder, stage))
        sections.append(stage._section[1])
    if ranking:
        sections.append(_ranking_section(folder, ranking))
    if not sections:
        sections.append("<p>The search has not begun with its trials.</p>")
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(_page(sections), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------- figures


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and those before it, `window` of them in all (fewer at the start)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def pareto_front(costs: Sequence[float], rewards: Sequence[float]) -> list[int]:
    """Indices of what is not both dearer and no better than another, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -rewards[i])):
        if not front or rewards[i] > rewards[front[-1]]:
            front.append(i)
    return front


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of two rankings from -1 to 1, ties accounted for.

    nan where one of the two is constant, or for fewer than two pairs.
    """
    dx, dy = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x), np.asarray(y)))
    untied = math.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / untied) if untied else math.nan


def _with_style(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """The PNG of the figure that `draw` returns, in the report's style."""

    @functools.wraps(draw)
    def png(*args, **kwargs) -> bytes:
        with matplotlib.rc_context(STYLE):
            return _to_png(draw(*args, **kwargs))

    return png


def _to_png(figure: Figure, colors: int | None = None) -> bytes:
    """The figure as a PNG, with a palette of so many colours, or all that it has."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if colors is not None:  # of the methods this one keeps pale shades apart
        picture = picture.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)
    return figure


@_with_style
def _draw_rewards(records: Sequence[TrialRecord]) -> Figure:
    """Rewards of the trials, and, where costs count, the objective below."""
    measures = [("reward", lambda record: record.result.reward)]
    if any(_differ(r.objective, r.result.reward) for r in records if r.result.status == COMPLETE):
        measures.append(("objective (reward less cost)", lambda record: record.objective))
    figure = _figure(0.4 + 3.6 * len(measures))
    axes = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axis, (name, value) in zip(axes, measures, strict=True):
        _plot_rewards(axis, records, value)
        axis.set_ylabel(name)
    axes[-1].set_xlabel("trial")
    axes[0].set_title("Rewards of the trials", loc="left")
    return figure


def _differ(a: float, b: float) -> bool:
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) > 1e-9


def _plot_rewards(
    axis: Axes, records: Sequence[TrialRecord], value: Callable[[TrialRecord], float]
) -> None:
    def series(chosen: Iterable[TrialRecord]) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(r.index, value(r)) for r in chosen if math.isfinite(value(r))]
        index, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(index), np.array(values)

    complete = [r for r in records if r.result.status == COMPLETE]
    own = [r for r in records if r.reused is None]
    kinds = [
        ("trained", [r for r in own if r.result.status == COMPLETE], "o", BLUE, 0.45),
        ("pruned", [r for r in own if r.result.status == PRUNED], "v", ORANGE, 0.7),
        ("reused", [r for r in records if r.reused is not None], "D", GREY, 0.8),
    ]
    _, shown = series(r for _, chosen, *_ in kinds for r in chosen)
    low, high = _limits(shown)
    below = int((shown < low).sum())
    for name, chosen, marker, color, alpha in kinds:
        index, values = series(chosen)
        if len(index):
            axis.scatter(
                index, np.maximum(values, low), s=13, marker=marker, color=color, alpha=alpha,
                linewidths=0, label=f"{name} ({len(chosen):,})",
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
            label=f"best reward so far ({best[-1]:.4f})",
        )  # fmt: skip
    if below:
        axis.plot([], [], " ", label=f"{below:,} lower: at the edge,\nnot in the mean")
    axis.set_ylim(low - 0.06 * (high - low), high + 0.05 * (high - low))
    _count_along_x(axis, 1 + max(r.index for r in records))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0)


def _count_along_x(axis: Axes, count: int) -> None:
    """The x axis shows 0 to count - 1, whole numbers only."""
    margin = 0.5 + 0.01 * (count - 1)
    axis.set_xlim(-margin, count - 1 + margin)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _limits(values: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) shown: the worst twentieth may lie far below the others."""
    if not len(values):
        return -1.0, 0.0
    top, bottom, middle = values.max(), values.min(), np.percentile(values, 5)
    low = max(bottom, middle - 0.5 * (top - middle))
    return (low, top) if top > low else (top - 0.5, top + 0.5)


@_with_style
def _draw_strategy(figures: Sequence[dict[str, float]]) -> Figure:
    """What the strategy told of each batch, entropy first."""
    names = sorted({name for batch in figures for name in batch}, key=lambda n: (n != "entropy", n))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(0.3 + 2.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        batches, values = zip(
            *((i, batch[name]) for i, batch in enumerate(figures) if name in batch), strict=True
        )
        few = {"marker": "o", "markersize": 3} if len(batches) < 30 else {}
        axis.plot(batches, values, color=BLUE, linewidth=1.8, **few)
        axis.set_title(name.replace("_", " "), loc="left")
        axis.set_xlabel("batch")
        _count_along_x(axis, len(figures))
    return figure


class _Shares:
    """How often each choice is made, over the trials in order.

    Attributes:
        edges: of the steps, in trials, [steps + 1].
    """

    def __init__(self, stage: StageReport) -> None:
        records = sorted(stage.records, key=lambda r: r.index)
        self.decisions = stage.decisions
        self.choices = np.array([r.choices for r in records])
        batches = len({r.batch for r in records})
        self.edges = np.linspace(0, len(records), min(BINS, batches) + 1).round().astype(int)

    def of(self, decisions: Sequence[Decision], choices: Sequence[str]) -> np.ndarray:
        """[choices, steps]: the share of each of the choices in all of the decisions."""
        shares = np.zeros((len(choices), len(self.edges) - 1))
        for decision in decisions:
            column = self.choices[:, self.decisions.index(decision)]
            for i, choice in enumerate(decision.choices):
                counts = np.add.reduceat(column == i, self.edges[:-1], dtype=float)
                shares[choices.index(choice)] += counts / np.diff(self.edges)
        return shares / len(decisions)


_WHAT = {
    "op": "Operations",
    "agg": "Aggregations",
    "split": "Head layers with weights of their own at each level",
    "in": "Inputs",
}


@_with_style
def _draw_choices(stage: StageReport) -> Figure:
    """Shares of the operations and of the other choices that all cells or layers have in common."""
    shares = _Shares(stage)
    kinds = dict.fromkeys(d.kind for d in stage.decisions)
    panels = [kind for kind in kinds if kind != "in"]
    figure = _figure(0.3 + 2.6 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, kind in zip(axes, panels, strict=True):
        decisions = [d for d in stage.decisions if d.kind == kind]
        choices = list(dict.fromkeys(choice for d in decisions for choice in d.choices))
        values = shares.of(decisions, choices)
        if kind == "op":
            colors = [_operation_color(choice, i) for i, choice in enumerate(choices)]
        else:
            colors = matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 0.7, len(choices)))
        # Steps, not slopes: each is a mean over its trials.
        axis.stackplot(
            np.repeat(shares.edges, 2)[1:-1], np.repeat(values, 2, axis=1), colors=colors,
            labels=choices, edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        axis.set_title(f"{_WHAT.get(kind, kind)}: share of the choices", loc="left")
        axis.set_ylim(0, 1)
        axis.set_xlim(0, shares.edges[-1])
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(  # in the order of the stack
            handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.005, 1.0),
            borderaxespad=0,
        )  # fmt: skip
    axes[-1].set_xlabel("trial")
    return figure


def _operation_color(name: str, position: int) -> str:
    return operation_color(name) if name in (*FPN_OPS, *HEAD_OPS) else f"C{position}"


@_with_style
def _draw_places(stage: StageReport) -> Figure:
    """For each cell the shares of the nodes it takes, for each head layer those of operations."""
    shares = _Shares(stage)
    kind = "in" if any(d.kind == "in" for d in stage.decisions) else "op"
    places: dict[str, list[Decision]] = {}
    for decision in stage.decisions:
        if decision.kind == kind:
            cell, _, own = decision.name.partition(".")
            places.setdefault(cell if kind == "in" else own, []).append(decision)
    columns = min(4, len(places))
    rows = math.ceil(len(places) / columns)
    most = max(len(decisions[0].choices) for decisions in places.values())
    values = {
        place: shares.of(decisions, decisions[0].choices) for place, decisions in places.items()
    }
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
def _draw_costs(records: Sequence[TrialRecord]) -> Figure:
    """Reward against each cost that was measured, with the Pareto front."""
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
        axis.scatter(
            costs, np.maximum(rewards, low), s=14, color=BLUE, alpha=0.4, linewidths=0,
            label="trial",
        )  # fmt: skip
        front = pareto_front(costs, rewards)
        front = [i for i in front if rewards[i] >= low]
        axis.step(costs[front], rewards[front], where="post", color=RED, linewidth=1.3, alpha=0.8)
        axis.scatter(
            costs[front], rewards[front], s=30, color=RED, zorder=3, linewidths=0,
            label="Pareto front",
        )  # fmt: skip
        axis.set_xlabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_title(f"Reward against {name.rpartition(' ')[0]}", loc="left")
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes[0].set_ylabel("reward")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0)
    return figure


@functools.lru_cache(maxsize=32)  # the same ones stand in every refreshed report
def _draw_architecture(genotype: Genotype) -> bytes:
    figure = draw_architecture(genotype)
    figure.set_dpi(105)
    # They are most of the report's bytes, and a palette, enough for even areas, takes a third.
    return _to_png(figure, colors=256)


@_with_style
def _draw_agreement(rows: dict[str, list[Selected]]) -> Figure:
    """AP of the full training against the proxy reward, for each stage."""
    figure = _figure(4.0, min(WIDTH, 5.8 * len(rows)))
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for axis, (stage, trained) in zip(axes, rows.items(), strict=True):
        rewards, precisions = [row.reward for row in trained], [row.AP for row in trained]
        axis.scatter(rewards, precisions, s=34, color=BLUE, linewidths=0)
        axis.margins(0.08)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("proxy reward")
        axis.set_ylabel("AP after full training")
        tau = kendall_tau(rewards, precisions)
        title = f"{_stage_name(stage)}: Kendall's tau {_number(tau, '.2f')}"
        axis.set_title(title, loc="left")
    return figure


# ------------------------------------------------------------------------------------------ HTML


_STYLE_SHEET = """
body { margin: 0; background: #fff; color: #1f2933; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 22px; margin: 44px 0 12px; }
h2 { border-bottom: 2px solid #e4e7eb; padding-bottom: 6px; } h3 { margin: 30px 0 8px; }
p.note { color: #52606d; margin: 4px 0 12px; }
img { max-width: 100%; height: auto; display: block; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.card { background: #f5f7fa; border-radius: 8px; padding: 10px 16px; flex: 1 0 auto; }
.card b { display: block; font-size: 21px; } .card span { color: #52606d; font-size: 13px; }
.bar { height: 8px; background: #e4e7eb; border-radius: 4px; overflow: hidden; }
.bar div { height: 100%; background: #2f6fb5; }
table { border-collapse: collapse; margin: 8px 0; font-size: 14px; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid #e4e7eb;
  vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: 10px 0; } summary { cursor: pointer; padding: 6px 0; }
pre { background: #f5f7fa; border-radius: 8px; padding: 12px 16px; overflow-x: auto;
  font-size: 13px; line-height: 1.45; }
code { overflow-wrap: anywhere; }
"""


def _page(sections: Sequence[str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Architecture search</title><style>{_STYLE_SHEET}</style></head><body><main>\n"
        f'<h1>Architecture search</h1><p class="note">As of {html.escape(written)}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _stage_section(folder: Path, stage: StageReport) -> str:
    parts = [f"<h2>{html.escape(_stage_name(stage.stage))}</h2>", _cards(stage)]
    if not stage.records:
        return "\n".join([*parts, "<p>No trial has finished yet.</p>"])

    def picture(name: str, png: bytes, what: str) -> None:
        parts.append(_picture(folder / f"{stage.stage}_{name}.png", png, what))

    picture("rewards", _draw_rewards(stage.records), "Reward of each trial")
    if any(stage.batch_figures):
        parts.append(f"<h3>The strategy: {html.escape(stage.strategy)}</h3>")
        picture("strategy", _draw_strategy(stage.batch_figures), "Its figures over the batches")
    if stage.decisions:
        parts.append("<h3>What is chosen over time</h3>")
        picture("choices", _draw_choices(stage), "Share of each operation over time")
        inputs = any(decision.kind == "in" for decision in stage.decisions)
        what = "The connections: the nodes that each cell takes" if inputs else "Layer by layer"
        parts.append(f"<h3>{what}</h3>")
        picture("places", _draw_places(stage), what)
    best = ranked(stage.records)
    if best:
        parts.append("<h3>Reward and cost</h3>")
        picture("costs", _draw_costs(best), "Reward against the costs")
        parts.append(
            "<h3>The best architectures so far</h3>"
            '<p class="note">By the trial itself. At the end of a stage the best are tried again, '
            "and what comes then decides (SEARCH.SELECT.RETRIALS).</p>"
        )
        parts.append(_best_table(best[:BEST]))
        for place, record in enumerate(best[:BEST], 1):
            parts.append(_best_architecture(folder, stage.stage, place, record))
    parts.append(_failures(stage.records))
    return "\n".join(parts)


def _cards(stage: StageReport) -> str:
    done, own = len(stage.records), own_trials(stage.records)
    best = [
        (f"{record.result.reward:.4f}", f"reward of the best, trial {record.index}")
        for record in ranked(stage.records)[:1]
    ]
    figures = [
        (f"{done:,} of {stage.planned:,}", "trials"),
        *(best or [("–", "reward of the best")]),
        (_number(trials_per_hour(own), ",.0f"), "trials per hour"),
        (format_duration(sum(r.result.seconds for r in own)), "spent in trials"),
        (f"{ended_as(own, PRUNED):,}", "pruned"),
        (f"{ended_as(own, FAILED):,}", "failed"),
        (f"{done - len(own):,}", "reused"),
    ]
    cards = "".join(
        f'<div class="card"><b>{html.escape(figure)}</b><span>{html.escape(name)}</span></div>'
        for figure, name in figures
    )
    share = 100 * min(1.0, done / stage.planned) if stage.planned else 0.0
    return (
        f'<div class="bar"><div style="width: {share:.1f}%"></div></div>'
        f'<div class="cards">{cards}</div>'
    )


def _best_table(records: Sequence[TrialRecord]) -> str:
    losses = list(dict.fromkeys(name for record in records for name in record.result.losses))
    costly = any(_differ(record.objective, record.result.reward) for record in records)
    timed = any(math.isfinite(record.result.latency) for record in records)
    head = ["", "trial", "reward", *(["objective"] if costly else []), *losses]
    head += ["parameters", "multiply-adds", *(["latency"] if timed else []), "seconds"]
    rows = []
    for place, record in enumerate(records, 1):
        result = record.result
        row = [str(place), str(record.index), _number(result.reward, ".4f")]
        row += [_number(record.objective, ".4f")] if costly else []
        row += [_number(result.losses.get(name, math.nan), ".4f") for name in losses]
        row += _costs_in_words(result.params, result.flops)
        row += [_number(result.latency, ".2f", " ms")] if timed else []
        rows.append([*row, _number(result.seconds, ".1f")])
    return _table(head, rows, numbers=range(len(head)))


def _best_architecture(folder: Path, stage: str, place: int, record: TrialRecord) -> str:
    genotype = Genotype.parse(record.genotype)
    picture = _picture(
        folder / f"{stage}_best{place}.png", _draw_architecture(genotype), f"Architecture {place}"
    )
    return (
        f"<details{' open' if place == 1 else ''}><summary><b>{place}: trial {record.index}</b>, "
        f"reward {_number(record.result.reward, '.4f')}</summary>{picture}"
        f"<pre>{html.escape(genotype.describe())}</pre>"
        f"<p>MODEL.GENOTYPE: <code>{html.escape(str(record.genotype))}</code></p></details>"
    )


def _failures(records: Sequence[TrialRecord]) -> str:
    reasons: dict[str, list[int]] = {}
    for record in own_trials(records):
        if record.result.status == FAILED:
            reasons.setdefault(record.result.reason or "unknown", []).append(record.index)
    if not reasons:
        return ""
    rows = [
        [
            str(len(trials)),
            ", ".join(map(str, trials[:5])) + (", …" if len(trials) > 5 else ""),
            reason if len(reason) <= 300 else reason[:300] + " …",
        ]
        for reason, trials in sorted(reasons.items(), key=lambda item: -len(item[1]))[:20]
    ]
    more = f'<p class="note">And {len(reasons) - 20:,} more.</p>' if len(reasons) > 20 else ""
    return "<h3>Failed trials</h3>" + _table(["number", "trials", "reason"], rows, (0,)) + more


def _ranking_section(folder: Path, ranking: Sequence[Selected]) -> str:
    trained: dict[str, list[Selected]] = {}
    for row in ranking:
        if row.AP is not None and math.isfinite(row.AP) and math.isfinite(row.reward):
            trained.setdefault(row.stage, []).append(row)
    several = {stage: rows for stage, rows in trained.items() if len(rows) >= 3}
    rows = [
        [
            str(place), _stage_name(row.stage) + (", given" if row.given else ""),
            _number(row.rank or None, "d"), _number(row.reward, ".4f"),
            _number(row.AP, ".4f") + _range(row.APs), _number(row.AP50, ".4f"),
            *_costs_in_words(row.params, row.flops), row.folder,
        ]
        for place, row in enumerate(ranking, 1)
    ]  # fmt: skip
    head = ["", "stage", "rank in the stage", "proxy reward", "AP", "AP50", "parameters",
            "multiply-adds", "full training"]  # fmt: skip
    parts = [
        "<h2>The best, trained in full</h2>",
        '<p class="note">The reward is the mean of the trials again, where there were any. '
        "Parameters and multiply-adds are those of the trial. Rewards of different stages cannot "
        "be compared: their trials differ in width.</p>",
        _table(head, rows, numbers=(0, 2, 3, 4, 5, 6, 7)),
    ]
    if several:
        parts.append("<h3>Is the proxy worth something?</h3>")
        for stage, rows in several.items():
            tau = kendall_tau([r.reward for r in rows], [r.AP for r in rows])
            parts.append(
                f"<p>{html.escape(_stage_name(stage))}: Kendall's tau (b) between proxy reward and "
                f"AP over {len(rows)} architectures: <b>{_number(tau, '.3f')}</b></p>"
            )
        picture = _draw_agreement(several)
        parts.append(_picture(folder / "ranking.png", picture, "AP against proxy reward"))
    return "\n".join(parts)


def _stage_name(stage: str) -> str:
    return {"fpn": "FPN stage", "head": "Head stage"}.get(stage, stage)


def _costs_in_words(params: int, flops: float) -> list[str]:
    return [f"{params / 1e6:.3g} M", _number(flops, ".3g", " G")]


def _number(value: float | None, form: str, unit: str = "") -> str:
    """The number in this form; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form) + unit


def _range(values: Sequence[float]) -> str:
    return f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int]) -> str:
    """`numbers` are the columns of numbers."""
    right = set(numbers)

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in right else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows)
    return f"<table><tr>{row(head, 'th')}</tr>\n{body}</table>"


def _picture(path: Path, png: bytes, what: str) -> str:
    """The picture as a file, and as HTML that does not need the file."""
    with replacing(path) as temporary:
        temporary.write_bytes(png)
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'
