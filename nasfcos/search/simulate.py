"""Searches on known rewards: how many trials does a strategy need?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .records import COMPLETE, PRUNED, TrialRecord, TrialResult, kendall_tau
from .space import Choices, Space
from .stage import Pruning, lessons
from .strategies import Strategy

STALLED = 50
"""Batches in a row without a new graph after which a simulated search is given up."""

SAMPLES = 10_000
"""Draws from which it is estimated what the best of a large space are worth."""


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
    best = sorted(table.values(), reverse=True)[: goal_size(len(table), top)]

    def reward(choices: Choices) -> float:
        return table[space.key(choices)]

    return [first_hit(space, reward, build(seed), best[-1], batch, max_trials) for seed in seeds]


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


def first_hit(
    space: Space,
    reward: Callable[[Choices], float],
    strategy: Strategy,
    goal: float,
    batch: int,
    max_trials: int,
) -> int:
    """Distinct graphs that one search tries until it finds one of at least the reward `goal`.

    The rest is as in `first_hits`.
    """
    tried: set[str] = set()
    stalled = 0
    while len(tried) < max_trials and stalled < STALLED:
        before = len(tried)
        proposals = strategy.propose(batch)
        rewards = [reward(choices) for choices in proposals]
        for choices, found in zip(proposals, rewards, strict=True):
            tried.add(space.key(choices))
            if found >= goal and len(tried) <= max_trials:
                return len(tried)
        strategy.learn(proposals, rewards)
        stalled = stalled + 1 if len(tried) == before else 0
    return max_trials + 1


class SyntheticRewards:
    """Made-up rewards for spaces that no table could hold.

    Every choice is worth something where it stands, something for its kind wherever that stands,
    and something beside the choice before it; all are drawn from normal distributions, of deviation
    1, 1/2 and 1/2.

    Args:
        space: of the architectures.
        seed: of the draws; another one makes other architectures the best.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed
        self._worths: dict[tuple, float] = {}

    def __call__(self, choices: Choices) -> float:
        total = 0.0
        for place, choice in enumerate(choices):
            decision = self.space.decisions[place]
            total += self._worth("place", place, choice)
            total += self._worth("kind", decision.kind, decision.choices[choice]) / 2
            total += self._worth("pair", place, choices[place - 1], choice) / 2 if place else 0.0
        return total

    def best(self, top: float) -> float:
        """The reward above which a share `top` of the space lies, from `SAMPLES` draws of it."""
        rng = random.Random(f"{self.seed}: samples")
        rewards = sorted(self(self.space.sample(rng)) for _ in range(SAMPLES))
        return rewards[-goal_size(SAMPLES, top)]

    def _worth(self, *what: object) -> float:
        if what not in self._worths:
            self._worths[what] = random.Random(f"{self.seed}: {what}").gauss(0, 1)
        return self._worths[what]


def stopped_hit(
    space: Space,
    trials: Mapping[str, TrialResult],
    strategy: Strategy,
    goal: float,
    pruning: Pruning,
    iterations: int,
    batch: int,
) -> float:
    """What a search with early stopping spends until it has trained an architecture of at least the
    reward `goal` to the end: training iterations, in whole trials.

    Args:
        trials: of every graph of the space by its key, all trained to the end, with their rewards
            at the rungs.
        pruning: the rule.
        iterations: of a whole trial.
        batch: proposals between two lessons.

    Returns:
        What all trials would take and one more, where the search does not get there.
    """
    records: list[TrialRecord] = []
    known: dict[str, TrialResult] = {}
    spent = stalled = 0
    while stalled < STALLED:
        thresholds = dict(pruning.thresholds([dict(result.curve) for result in known.values()]))
        proposals = strategy.propose(batch)
        before = len(known)
        for choices in proposals:
            key = space.key(choices)
            reused = key in known
            if not reused:
                known[key] = _stopped(trials[key], thresholds)
                complete = known[key].status == COMPLETE
                spent += iterations if complete else known[key].curve[-1][0]
                if complete and known[key].reward >= goal:
                    return spent / iterations
            result, number = known[key], len(records)
            records.append(
                TrialRecord(number, number // batch, choices, key, [], result, result.reward,
                            reused=0 if reused else None)
            )  # fmt: skip
        strategy.learn(proposals, lessons(records, len(proposals)))
        stalled = stalled + 1 if len(known) == before else 0
    return len(trials) + 1


def _stopped(trial: TrialResult, thresholds: Mapping[int, float]) -> TrialResult:
    """A trial that ran to its end, as it would have been with these thresholds."""
    for place, (iteration, reward) in enumerate(trial.curve, 1):
        if reward < thresholds.get(iteration, -math.inf):
            return replace(trial, status=PRUNED, reward=reward, curve=trial.curve[:place])
    return trial


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
        taus: Kendall's tau (b) between the rewards at each rung and at the end, of all trials.
    """

    saved: float
    stopped: int
    best_kept: float
    best_found: float
    taus: dict[int, float]


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
        taus={
            rung: kendall_tau([curve[rung] for curve in curves], rewards) for rung in pruning.rungs
        },
    )
