"""Searches on a table of known rewards: how many trials does a strategy need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from .space import Space
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
    goal = set(best[: max(1, math.floor(top * len(best)))])
    return [_first_hit(space, table, build(seed), goal, batch, max_trials) for seed in seeds]


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
