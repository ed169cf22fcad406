"""The report: its arithmetic, its content, and that its plots are legible."""

import base64
import math
import random
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import matplotlib
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nasfcos.genotype import AGGREGATIONS, FPN_OPS, HEAD_OPS
from nasfcos.search import plots, report
from nasfcos.search.plots import kendall_tau, moving_average, pareto_front
from nasfcos.search.ranking import Selected
from nasfcos.search.records import (
    COMPLETE,
    FAILED,
    PRUNED,
    TrialRecord,
    TrialResult,
    ended_as,
    own_trials,
    ranked,
)
from nasfcos.search.report import StageReport, write_report
from nasfcos.search.space import FPNSpace, HeadSpace
from nasfcos.search.status import trials_per_hour
from tests.known import PUBLISHED

FPN = FPNSpace(4, FPN_OPS, AGGREGATIONS)
HEAD = HeadSpace(PUBLISHED.cells, 6, HEAD_OPS)


def trials(space, count, *, seed=0, batch=10, cost=0.0, latency=math.nan):
    """A search as it may go: most trials end well, some fail, some are pruned, some repeated."""
    rng = random.Random(seed)
    records = []
    for index in range(count):
        kind = rng.choices(("complete", "pruned", "failed", "reused"), (80, 8, 4, 8))[0]
        finished = 1000.0 + 12 * index
        if kind == "reused" and index and records[0].result.status == COMPLETE:
            first = records[0]
            choices, result, objective = first.choices, first.result, first.objective
        else:
            kind = "complete" if kind == "reused" else kind
            choices = space.sample(rng)
            reward = -2.0 + index / count / 2 + rng.gauss(0, 0.1) - (kind == "pruned")
            flops = rng.uniform(1, 2)
            result = TrialResult(
                {"complete": COMPLETE, "pruned": PRUNED, "failed": FAILED}[kind],
                math.nan if kind == "failed" else reward,
                {"loss_cls": -reward * 0.6, "loss_box": -reward * 0.4},
                params=rng.randrange(300_000, 900_000), flops=flops, latency=latency * flops,
                seconds=10.0, reason="out of memory" if kind == "failed" else "",
            )  # fmt: skip
            objective = -9.0 if kind == "failed" else reward - cost * flops
        records.append(
            TrialRecord(
                index, index // batch, choices, space.key(choices),
                space.genotype(choices).to_list(), result, objective,
                0 if kind == "reused" else None, finished,
            )  # fmt: skip
        )
    return records


def stage(space, count, planned=None, **options):
    stats = [
        {"entropy": 1.5 - 0.1 * batch, "kl": 0.01 * batch, "policy_loss": -0.1}
        for batch in range(count // 10)
    ]
    records = trials(space, count, **options)
    return StageReport(space.stage, records, space.decisions, stats, "ppo", planned or count)


def ranking(stages, count=5):
    rows = [
        Selected(
            s.stage, rank, record.genotype, record.objective, record.result.reward,
            record.result.params, record.result.flops, AP=0.4 - 0.01 * rank, AP50=0.6,
            folder=f"select/{s.stage}/{rank}",
        )
        for s in stages
        for rank, record in enumerate(ranked(s.records)[:count], 1)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row.AP)


# ------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "x, y, tau",
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),  # five pairs agree, one does not
        # Two ties in each: (2 - 6) / sqrt(8 * 9), by hand.
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -4 / math.sqrt(72)),
    ],
)
def test_kendalls_tau_of_known_values(x, y, tau):
    assert kendall_tau(x, y) == pytest.approx(tau)


def test_kendalls_tau_is_not_defined_for_a_constant():
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    assert math.isnan(kendall_tau([1], [2])) and math.isnan(kendall_tau([], []))


def test_the_moving_average_looks_back_only():
    assert moving_average([4, 2, 6, 8], 2) == pytest.approx([4, 3, 4, 7])
    assert moving_average([4, 2, 6], 10) == pytest.approx([4, 3, 4])


def test_nothing_beats_the_pareto_front():
    rng = np.random.default_rng(0)
    costs, rewards = rng.integers(0, 20, 200), rng.integers(0, 20, 200)
    front = pareto_front(costs, rewards)
    for i in range(200):
        beaten = any(
            costs[j] <= costs[i] and rewards[j] >= rewards[i]
            and (costs[j] < costs[i] or rewards[j] > rewards[i])
            for j in range(200)
        )  # fmt: skip
        same = any(costs[j] == costs[i] and rewards[j] == rewards[i] for j in front)
        assert same != beaten
    assert list(costs[front]) == sorted(set(costs[front]))
    assert pareto_front([], []) == []


def test_shares_follow_the_trials():
    records = trials(FPN, 40)
    shares = plots._Shares(records[::-1], FPN.decisions)
    assert list(shares.edges) == [0, 10, 20, 30, 40]
    ops = [d for d in FPN.decisions if d.kind == "op"]
    values = shares.of(ops, FPN_OPS)
    assert values.sum(0) == pytest.approx(1.0)
    positions = [i for i, d in enumerate(FPN.decisions) if d.kind == "op"]
    chosen = [records[t].choices[i] for t in range(10, 20) for i in positions]
    for op in range(len(FPN_OPS)):
        assert values[op, 1] == pytest.approx(chosen.count(op) / len(chosen))
    assert len(plots._Shares(trials(FPN, 200, batch=1), ()).edges) == 61


# ------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """The text, the pictures and the references of an HTML file; tags must be balanced."""

    def __init__(self, path):
        super().__init__()
        self.words, self.images, self.references, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            kind, data = attributes["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            assert attributes["alt"]
            self.images.append(base64.b64decode(data))
        elif tag != "meta":
            self.open.append(tag)
        self.references += [attributes[name] for name in ("href", "src") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def test_the_report_has_it_all_and_needs_no_network(tmp_path):
    stages = [stage(FPN, 60), stage(HEAD, 40, planned=80)]
    path = write_report(tmp_path, stages, ranking(stages))
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert all(reference.startswith("data:") for reference in page.references)
    assert "url(" not in path.read_text() and "@import" not in path.read_text()

    files = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert sorted(files.values()) == sorted(page.images)
    names = ("rewards", "strategy", "choices", "places", "costs", "best1", "best4")
    assert {f"{s}_{name}.png" for s in ("fpn", "head") for name in names} <= set(files)
    assert {"ranking.png", "found1.png", "found4.png"} <= set(files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, "report.html"])
    for content in files.values():
        assert content.startswith(b"\x89PNG")

    assert "60 of 60" in page.text and "40 of 80" in page.text
    for s in stages:
        best = ranked(s.records)[0]
        assert f"{best.result.reward:.4f} reward of the best, trial {best.index}" in page.text
        assert PUBLISHED.describe().splitlines()[0] in page.text  # the head stage's FPN
        assert str(best.genotype) in page.text
        assert f"{ended_as(s.records, FAILED)} failed" in page.text
        assert f"{ended_as(s.records, PRUNED)} pruned" in page.text
        assert f"{len(s.records) - len(own_trials(s.records))} reused" in page.text
        assert f"{trials_per_hour(own_trials(s.records)):,.0f} trials per hour" in page.text
    assert "out of memory" in page.text
    assert "select/head/2" in page.text
    # The rewards fall with the rank, as the AP does.
    assert page.text.count("over 5 architectures: 1.000") == 2


@pytest.mark.parametrize(
    "records",
    [
        [],
        trials(FPN, 1, seed=1),
        [r for r in trials(FPN, 200) if r.result.status == FAILED],
        [r for r in trials(FPN, 200) if r.result.status == PRUNED],
        [TrialRecord(0, 0, c := FPN.sample(random.Random(0)), FPN.key(c),
                     FPN.genotype(c).to_list(), TrialResult(COMPLETE), math.nan)],
        [r for r in trials(FPN, 30) if r.index not in (0, 3, 28)],
    ],
    ids=["empty", "one", "failed", "pruned", "nan", "gaps"],
)  # fmt: skip
def test_any_state_of_a_search_has_a_report(tmp_path, records):
    s = StageReport("fpn", records, FPN.decisions, [], "random", 100)
    page = Page(write_report(tmp_path, [s]))
    assert f"{len(records)} of 100 trials" in page.text
    assert ("No trial has finished yet" in page.text) == (not records)
    assert ("The best architectures" in page.text) == bool(ranked(s.records))


def test_no_stage_yet(tmp_path):
    assert "has not begun" in Page(write_report(tmp_path, [])).text


def test_a_ranking_without_full_trainings(tmp_path):
    stages = [stage(FPN, 20)]
    rows = ranking(stages, 4)
    rows[1:] = [replace(row, AP=None, AP50=None) for row in rows[1:]]
    page = Page(write_report(tmp_path, stages, rows))
    assert "0.3900 0.6000" in page.text and "– –" in page.text
    assert "tau" not in page.text  # of one AP there is none


def test_what_was_found_is_drawn_whatever_its_rank(tmp_path):
    stages = [stage(FPN, 60)]
    rows = ranking(stages, 9)
    assert str(rows[-1].genotype) not in Page(write_report(tmp_path, stages, rows)).text
    found = replace(rows[-1], AP=0.9)
    page = Page(write_report(tmp_path, stages, [found, *rows[:-1]]))
    assert "1: FPN stage, rank 9 , AP 0.9000" in page.text and str(found.genotype) in page.text


def test_where_costs_count_the_ranking_has_the_objective(tmp_path):
    for cost, shown in ((0.0, False), (0.5, True)):
        stages = [stage(FPN, 40, cost=cost)]
        rows = ranking(stages, 3)
        text = Page(write_report(tmp_path, stages, rows)).text
        final = text[text.index("trained in full") :]
        assert ("objective" in final) == shown
        assert f"{rows[0].objective:.4f} 0.3900" in final  # where they do not, the reward
        assert ("reward of the best by the objective, trial" in text) == shown


def test_the_range_of_several_seeds(tmp_path):
    stages = [stage(FPN, 20)]
    rows = ranking(stages, 2)
    rows[0] = replace(rows[0], APs=[0.41, 0.37])
    page = Page(write_report(tmp_path, stages, rows))
    assert "0.3900 (0.3700 to 0.4100)" in page.text and page.text.count(" to 0.") == 1


def test_reasons_are_text_not_markup(tmp_path):
    (record,) = trials(FPN, 1)
    results = ["<script>alert(1)</script>", "x" * 5000, ""]
    records = [
        TrialRecord(i, 0, record.choices, "", record.genotype, TrialResult(FAILED, reason=r), -9.0)
        for i, r in enumerate([*results, *(f"reason {n}" for n in range(30))])
    ]
    page = Page(write_report(tmp_path, [StageReport("fpn", records, FPN.decisions)]))
    assert "<script>alert(1)</script>" in page.text
    assert "x" * 300 + " …" in page.text and "x" * 301 not in page.text
    assert "unknown" in page.text and "13 more" in page.text


def test_only_what_has_changed_is_drawn_again(tmp_path):
    stages = [stage(FPN, 20), stage(HEAD, 20)]

    def drawn():
        write_report(tmp_path, stages)
        return {p.name: p.stat().st_ino for p in tmp_path.iterdir()}

    first, second = drawn(), drawn()
    assert {name for name in first if first[name] != second[name]} == {"report.html"}
    stages[1].records = trials(HEAD, 30)
    third = drawn()
    changed = {name for name in second if second[name] != third[name]}
    assert "head_rewards.png" in changed and not any(n.startswith("fpn") for n in changed)
    assert "30 of 20" in Page(tmp_path / "report.html").text


def test_three_thousand_trials(tmp_path):
    s = stage(FPNSpace(7, FPN_OPS, AGGREGATIONS), 300, batch=2)
    s.records = [replace(r, index=10 * r.index + i) for r in s.records for i in range(10)]
    page = Page(write_report(tmp_path, [s]))
    assert "3,000 of 300 trials" in page.text


# --------------------------------------------------------------------------------------- pictures


def texts(figure):
    """(text, extent) of all that is written on a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text().strip():
            extent = text.get_window_extent(canvas.get_renderer())
            shown = all(
                axis.get_visible() and (text not in labels or _in_view(axis, text, labels))
                for axis in figure.axes
                if (labels := [*axis.get_xticklabels(), *axis.get_yticklabels()]) is not None
                and (text in labels or text in axis.findobj(matplotlib.text.Text))
            )
            if shown:
                found.append((text.get_text(), extent))
    return found


def _in_view(axis, text, labels):
    """Whether a tick is inside the limits: matplotlib keeps labels of others, and hides them."""
    x = text in axis.get_xticklabels()
    low, high = sorted(axis.get_xlim() if x else axis.get_ylim())
    at = text.get_position()[0 if x else 1]
    return low <= at <= high


def with_a_slow_trial(s):
    """The best by the reward is it."""
    best = max(ranked(s.records), key=lambda record: record.result.reward)
    slow = replace(best, result=replace(best.result, latency=500.0))
    records = [slow if record is best else record for record in s.records]
    return replace(s, records=records)


FIGURES = {
    "rewards": lambda s: plots.draw_rewards.__wrapped__(s.records),
    "strategy": lambda s: plots.draw_strategy.__wrapped__(s.batch_stats),
    "choices": lambda s: plots.draw_choices.__wrapped__(s.records, s.decisions),
    "places": lambda s: plots.draw_places.__wrapped__(s.records, s.decisions),
    "costs": lambda s: plots.draw_costs.__wrapped__(ranked(s.records)),
    "agreement": lambda s: plots.draw_agreement.__wrapped__(
        {report._stage_name(s.stage): [(row.reward, row.AP) for row in ranking([s], 9)]},
        "proxy reward",
        "AP after full training",
    ),
    "again": lambda s: plots.draw_agreement.__wrapped__(
        {"head stage, a_data_set": [(row.reward, row.reward + row.AP) for row in ranking([s], 9)]},
        "reward of the trial",
        "reward when re-evaluated",
        same_scale=True,
    ),
    "first hits": lambda s: plots.draw_first_hits.__wrapped__(
        {name: [1 + (7 * r.index) % 301 for r in s.records] for name in ("ppo", "evolution")},
        300,
        "the best 3 of 313 architectures",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    "search",
    [
        stage(FPN, 1, seed=1),
        stage(FPN, 10),
        stage(FPNSpace(7, FPN_OPS, AGGREGATIONS), 800),
        stage(HEAD, 200, cost=0.3, latency=4.0),
        with_a_slow_trial(stage(HEAD, 200, cost=0.3, latency=4.0)),
    ],
    ids=["one", "short", "fpn", "head", "slow"],
)
def test_no_text_overlaps_or_leaves_the_picture(name, search):
    if name == "strategy" and not search.batch_stats:
        pytest.skip("the strategy has told nothing yet")
    with matplotlib.rc_context(plots.STYLE):
        figure = FIGURES[name](search)
        written = texts(figure)
    assert len(written) > 4
    frame = figure.bbox
    for text, extent in written:
        assert frame.xmin <= extent.xmin and extent.xmax <= frame.xmax, text
        assert frame.ymin <= extent.ymin and extent.ymax <= frame.ymax, text
    for (one, a), (other, b) in combinations(written, 2):
        width = min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
        height = min(a.ymax, b.ymax) - max(a.ymin, b.ymin)
        assert width < 1 or height < 1, f"{one!r} and {other!r}"


def test_one_outlier_does_not_flatten_the_curve():
    values = np.append(np.linspace(-2, -1, 99), -500.0)
    low, high = plots._limits(values)
    assert -3 < low < -1.9 and high == -1


def test_one_slow_trial_does_not_flatten_the_costs():
    s = with_a_slow_trial(stage(HEAD, 200, cost=0.3, latency=4.0))
    with matplotlib.rc_context(plots.STYLE):
        latency = plots.draw_costs.__wrapped__(ranked(s.records)).axes[-1]
    assert latency.get_xlim()[1] < 20 and "1 dearer" in latency.get_xlabel()
    # It is on the front all the same, as the best of all.
    front = latency.collections[-1].get_offsets()
    assert front[:, 1].max() == max(r.result.reward for r in ranked(s.records))


def test_the_best_so_far_is_of_what_the_panel_shows():
    s = stage(HEAD, 100, cost=0.5)
    with matplotlib.rc_context(plots.STYLE):
        axes = plots.draw_rewards.__wrapped__(s.records).axes
    labels = [t.get_text() for axis in axes for t in axis.get_legend().get_texts()]
    done = [r for r in own_trials(s.records) if r.result.status == COMPLETE]
    assert f"best reward so far ({max(r.result.reward for r in done):.4f})" in labels
    assert f"best objective so far ({max(r.objective for r in done):.4f})" in labels
