"""Searches on a table of known rewards: how many trials does a strategy need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.figure import Figure

from .space import Space
from .stage import Pruning
from .strategies import Strategy

STALLED = 50
"""Batches in a row without a new graph after which a simulated search is given up."""


def first_hits(
    space: Space,
    table: Mapping[str, float],
    build: Callable[[int], Strategy],
    seeds: Iterable[int],
    top: float,
    batch: int,
    max_trials: int,
) -> list[int]:
    """Distinct graphs that searches try until they find one of the best.

    A graph proposed again costs nothing, as in a real search, where its trial is reused.

    Args:
        table: reward of every graph of the space by its key (`Space.key`).
        build: makes the strategy for a seed.
        seeds: one search each.
        top: the goal, as a fraction of the graphs: at least one, the best.
        batch: proposals between two lessons.
        max_trials: a search that has not hit by then counts as `max_trials + 1`; likewise one
            that has stopped proposing new graphs.

    Raises:
        KeyError: a proposed graph is not in the table.
    """
    best = sorted(table, key=table.get, reverse=True)
    goal = set(best[: goal_size(len(best), top)])
    return [_first_hit(space, table, build(seed), goal, batch, max_trials) for seed in seeds]


def goal_size(size: int, top: float) -> int:
    """How many of `size` graphs are the best fraction `top`: at least one."""
    return max(1, math.floor(top * size))


def uniform_hits(size: int, goal: int, count: int) -> list[int]:
    """What `first_hits` gives for draws that are uniform over the graphs, none twice.

    Not drawn, but `count` quantiles of the exact distribution, at even distances.

    `RandomSearch` is uniform over sequences, of which some graphs have many.
    """
    hits, missed, trials = [], 1.0, 0
    for quantile in range(count):
        while 1 - missed < (quantile + 0.5) / count:
            missed *= 1 - goal / (size - trials)
            trials += 1
        hits.append(trials)
    return hits


def _first_hit(
    space: Space,
    table: Mapping[str, float],
    strategy: Strategy,
    goal: set[str],
    batch: int,
    max_trials: int,
) -> int:
    tried: set[str] = set()
    stalled = 0
    while len(tried) < max_trials and stalled < STALLED:
        before = len(tried)
        proposals = strategy.propose(batch)
        keys = [space.key(choices) for choices in proposals]
        for key in keys:
            tried.add(key)
            if key in goal and len(tried) <= max_trials:
                return len(tried)
        strategy.learn(proposals, [table[key] for key in keys])
        stalled = stalled + 1 if len(tried) == before else 0
    return max_trials + 1


@dataclass(frozen=True)
class EarlyStopping:
    """What early stopping would have done to a search whose trials all ran to the end.

    Attributes:
        saved: share of the training iterations.
        stopped: trials.
        best_kept: of the trials with the best final rewards (a tenth of all), the share that would
            have been trained to the end.
        best_found: final reward of the best trial trained to the end, less that of the best of all;
            0 where the best survives.
    """

    saved: float
    stopped: int
    best_kept: float
    best_found: float


def replay_pruning(
    rewards: Sequence[float],
    curves: Sequence[Mapping[int, float]],
    pruning: Pruning,
    iterations: int,
    batch: int,
) -> EarlyStopping:
    """Stop the trials of a finished search as `pruning` would have.

    Args:
        rewards: of the trials at their ends, in the order of the search.
        curves: of each, its reward at all of the rungs.
        pruning: the rule.
        iterations: of a whole trial.
        batch: trials that share their thresholds.
    """
    past: list[Mapping[int, float]] = []
    spent, survivors = 0, []
    for first in range(0, len(rewards), batch):
        thresholds = pruning.thresholds(past)
        trials = range(first, min(first + batch, len(rewards)))
        for trial in trials:
            reached = iterations
            for rung, threshold in thresholds:
                if curves[trial][rung] < threshold:
                    reached = rung
                    break
            spent += reached
            past.append({r: v for r, v in curves[trial].items() if r <= reached})
            if reached == iterations:
                survivors.append(trial)
    ranked = sorted(range(len(rewards)), key=lambda trial: -rewards[trial])
    tenth = ranked[: max(1, len(ranked) // 10)]
    return EarlyStopping(
        saved=1 - spent / (iterations * len(rewards)),
        stopped=len(rewards) - len(survivors),
        best_kept=len(set(tenth) & set(survivors)) / len(tenth),
        best_found=max(rewards[trial] for trial in survivors) - rewards[ranked[0]],
    )


def plot_first_hits(hits: Mapping[str, Sequence[int]], size: int, goal: int) -> Figure:
    """How many of the searches of each strategy have found one of the best, against their trials.

    Args:
        hits: trials of each search until then, by strategy.
        size: graphs in the space.
        goal: how many of them are the best.
    """
    figure = Figure(figsize=(6.2, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    for name, trials in hits.items():
        trials = sorted(trials)
        shares = [(i + 1) / len(trials) for i in range(len(trials))]
        axis.step([0, *trials], [0, *shares], where="post", linewidth=2,
                  label=f"{name}: median {median(trials):g}")  # fmt: skip
    axis.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, size)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel(f"different architectures tried, of {size}")
    axis.set_ylabel(f"searches that found one of the best {goal}")
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
