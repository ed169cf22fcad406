"""The report of a search: one HTML file that holds its pictures and needs no network."""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.metrics import format_duration
from ..files import replacing
from ..genotype import Genotype
from .plots import (
    differ,
    draw_agreement,
    draw_best,
    draw_choices,
    draw_costs,
    draw_places,
    draw_rewards,
    draw_strategy,
    number_text,
)
from .ranking import Selected
from .records import FAILED, PRUNED, TrialRecord, ended_as, kendall_tau, own_trials, ranked
from .space import Decision
from .status import trials_per_hour

BEST = 4
"""Number of architectures that are drawn for each stage and for the final ranking."""


@dataclass
class StageReport:
    """What the report shows of a stage.

    Attributes:
        stage: "fpn" or "head".
        records: finished trials.
        decisions: decisions of the search space, in the order of the trials' choices.
        batch_stats: the strategy's statistics of each batch by name, such as the entropy.
        strategy: name of the strategy.
        planned: number of trials of the whole stage.
    """

    stage: str
    records: Sequence[TrialRecord]
    decisions: Sequence[Decision]
    batch_stats: Sequence[dict[str, float]] = field(default_factory=list)
    strategy: str = ""
    planned: int = 0
    # (state, HTML) written last, so that only a stage that has changed is drawn again.
    _section: tuple[tuple, str] = field(default=((), ""), init=False, repr=False, compare=False)

    def section(self, folder: Path) -> str:
        """The stage as HTML; its pictures are written to the folder."""
        state = (folder, len(self.records), len(self.batch_stats))
        if self._section[0] != state:
            self._section = (state, _stage_section(folder, self))
        return self._section[1]


def write_report(
    folder: str | Path, stages: Sequence[StageReport], ranking: Sequence[Selected] = ()
) -> Path:
    """Write `report.html` and its pictures as PNGs, each whole or not at all.

    Args:
        folder: directory of the report.
        stages: stages in the order in which they are searched.
        ranking: the ranking, best first; empty until architectures are trained in full.

    Returns:
        The HTML file.
    """
    folder = Path(folder)
    sections = [stage.section(folder) for stage in stages]
    if ranking:
        sections.append(_ranking_section(folder, ranking))
    if not sections:
        sections.append("<p>The search has not begun with its trials.</p>")
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(_page(sections), encoding="utf-8")
    return path


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

    picture("rewards", draw_rewards(stage.records), "Reward of each trial")
    if any(stage.batch_stats):
        parts.append(f"<h3>The strategy: {html.escape(stage.strategy)}</h3>")
        picture("strategy", draw_strategy(stage.batch_stats), "Statistics of the batches")
    if stage.decisions:
        parts.append("<h3>What is chosen over time</h3>")
        shares = draw_choices(stage.records, stage.decisions)
        picture("choices", shares, "Share of each operation over time")
        inputs = any(decision.kind == "in" for decision in stage.decisions)
        what = "The connections: the nodes that each cell takes" if inputs else "Layer by layer"
        parts.append(f"<h3>{what}</h3>")
        picture("places", draw_places(stage.records, stage.decisions), what)
    best = ranked(stage.records)
    if best:
        parts.append("<h3>Reward and cost</h3>")
        picture("costs", draw_costs(best), "Reward against the costs")
        parts.append(
            "<h3>The best architectures so far</h3>"
            '<p class="note">Ranked by a single trial each. At the end of the stage the best are '
            "re-evaluated with other seeds, which decides (SEARCH.SELECT.RETRIALS).</p>"
        )
        parts.append(_best_table(best[:BEST]))
        for place, record in enumerate(best[:BEST], 1):
            reward = f"reward {number_text(record.result.reward, '.4f')}"
            title = f"<b>{place}: trial {record.index}</b>, {reward}"
            name = f"{stage.stage}_best{place}"
            parts.append(_architecture(folder, name, title, record.genotype, place == 1))
    parts.append(_failures(stage.records))
    return "\n".join(parts)


def _cards(stage: StageReport) -> str:
    done, own = len(stage.records), own_trials(stage.records)
    by = " by the objective" if _is_costly(stage.records) else ""
    best = [
        (f"{record.result.reward:.4f}", f"reward of the best{by}, trial {record.index}")
        for record in ranked(stage.records)[:1]
    ]
    values = [
        (f"{done:,} of {stage.planned:,}", "trials"),
        *(best or [("–", "reward of the best")]),
        (number_text(trials_per_hour(own), ",.0f"), "trials per hour"),
        (format_duration(sum(r.result.seconds for r in own)), "spent in trials"),
        (f"{ended_as(own, PRUNED):,}", "pruned"),
        (f"{ended_as(own, FAILED):,}", "failed"),
        (f"{done - len(own):,}", "reused"),
    ]
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for value, name in values
    )
    share = 100 * min(1.0, done / stage.planned) if stage.planned else 0.0
    return (
        f'<div class="bar"><div style="width: {share:.1f}%"></div></div>'
        f'<div class="cards">{cards}</div>'
    )


def _is_costly(records: Sequence[TrialRecord]) -> bool:
    """Whether the objective includes a cost, so that it differs from the reward."""
    return any(differ(record.objective, record.result.reward) for record in records)


def _best_table(records: Sequence[TrialRecord]) -> str:
    losses = list(dict.fromkeys(name for record in records for name in record.result.losses))
    costly = _is_costly(records)
    timed = any(math.isfinite(record.result.latency) for record in records)
    head = ["", "trial", "reward", *(["objective"] if costly else []), *losses]
    head += ["parameters", "multiply-adds", *(["latency"] if timed else []), "seconds"]
    rows = []
    for place, record in enumerate(records, 1):
        result = record.result
        row = [str(place), str(record.index), number_text(result.reward, ".4f")]
        row += [number_text(record.objective, ".4f")] if costly else []
        row += [number_text(result.losses.get(name, math.nan), ".4f") for name in losses]
        row += _costs_in_words(result.params, result.flops)
        row += [number_text(result.latency, ".2f", " ms")] if timed else []
        rows.append([*row, number_text(result.seconds, ".1f")])
    return _table(head, rows, numbers=range(len(head)))


def _architecture(folder: Path, name: str, title: str, genotype: list, is_open: bool) -> str:
    """HTML of an architecture: its drawing and description below a title, which is HTML.

    The drawing is also written to ``<name>.png`` in the folder.
    """
    parsed = Genotype.parse(genotype)
    picture = _picture(folder / f"{name}.png", draw_best(parsed), "The architecture")
    return (
        f"<details{' open' if is_open else ''}><summary>{title}</summary>{picture}"
        f"<pre>{html.escape(parsed.describe())}</pre>"
        f"<p>MODEL.GENOTYPE: <code>{html.escape(str(genotype))}</code></p></details>"
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
    trained: dict[str, list[tuple[float, float]]] = {}
    for row in ranking:
        if row.AP is not None and math.isfinite(row.AP) and math.isfinite(row.reward):
            trained.setdefault(_stage_name(row.stage), []).append((row.reward, row.AP))
    several = {title: pairs for title, pairs in trained.items() if len(pairs) >= 3}
    costly = any(differ(row.objective, row.reward) for row in ranking)
    rows = [
        [
            str(place), _stage_name(row.stage) + (", given" if row.given else ""),
            number_text(row.rank or None, "d"), number_text(row.reward, ".4f"),
            *([number_text(row.objective, ".4f")] if costly else []),
            number_text(row.AP, ".4f") + _range(row.APs), number_text(row.AP50, ".4f"),
            *_costs_in_words(row.params, row.flops), row.folder,
        ]
        for place, row in enumerate(ranking, 1)
    ]  # fmt: skip
    head = ["", "stage", "rank in the stage", "proxy reward",
            *(["objective"] if costly else []), "AP", "AP50", "parameters", "multiply-adds",
            "full training"]  # fmt: skip
    parts = [
        "<h2>The best, trained in full</h2>",
        '<p class="note">The reward is the mean over the re-evaluations, where there were any. '
        "Parameters and multiply-adds are those of the trial. Drawn below are the first ones: "
        "number 1 is best.yaml. Rewards of different stages cannot "
        "be compared: their trials differ in width.</p>",
        _table(head, rows, numbers=(0, *range(2, len(head) - 1))),
    ]
    for place, row in enumerate(ranking[:BEST], 1):
        found = "AP " + number_text(row.AP, ".4f") if row.AP is not None else "not trained in full"
        title = f"<b>{place}: {_stage_name(row.stage)}, rank {row.rank or '–'}</b>, {found}"
        parts.append(_architecture(folder, f"found{place}", title, row.genotype, place == 1))
    if several:
        parts.append("<h3>Is the proxy worth something?</h3>")
        for title, pairs in several.items():
            tau = kendall_tau(*zip(*pairs, strict=True))
            parts.append(
                f"<p>{html.escape(title)}: Kendall's tau (b) between proxy reward and "
                f"AP over {len(pairs)} architectures: <b>{number_text(tau, '.3f')}</b></p>"
            )
        picture = draw_agreement(several, "proxy reward", "AP after full training")
        parts.append(_picture(folder / "ranking.png", picture, "AP against proxy reward"))
    return "\n".join(parts)


def _stage_name(stage: str) -> str:
    return {"fpn": "FPN stage", "head": "Head stage"}[stage]


def _costs_in_words(params: int, flops: float) -> list[str]:
    return [f"{params / 1e6:.3g} M", number_text(flops, ".3g", " G")]


def _range(values: Sequence[float]) -> str:
    return f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int]) -> str:
    """A table as HTML; `numbers` are the indices of right-aligned columns."""
    right = set(numbers)

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in right else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows)
    return f"<table><tr>{row(head, 'th')}</tr>\n{body}</table>"


def _picture(path: Path, png: bytes, what: str) -> str:
    """Write the picture to a file, and return HTML that holds a copy of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(png)
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'
