"""Simulated searches on known rewards, which show how many trials a strategy needs."""

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
"""Number of consecutive batches without a new graph after which a search is given up."""

SAMPLES = 10_000
"""Number of samples from which the best rewards of a large space are estimated."""


def first_hits(
    space: Space,
    table: Mapping[str, float],
    build: Callable[[int], Strategy],
    seeds: Iterable[int],
    top: float,
    batch: int,
    max_trials: int,
) -> list[int]:
    """Number of distinct graphs that searches try until they find one of the best.

    Proposing a graph again costs nothing, as in a real search, which reuses the first trial.

    Args:
        space: search space.
        table: reward of every graph of the space, by key (`Space.key`).
        build: makes the strategy for a seed.
        seeds: seeds of the searches.
        top: fraction of the graphs that count as the best; at least one graph does.
        batch: number of proposals between two updates of the strategy.
        max_trials: trials of a search. One that has not found any of the best by then, or that
            stops proposing new graphs, counts as `max_trials + 1`.

    Returns:
        The number of each search.

    Raises:
        KeyError: a proposed graph is not in the table.
    """
    best = sorted(table.values(), reverse=True)[: goal_size(len(table), top)]

    def reward(choices: Choices) -> float:
        return table[space.key(choices)]

    return [first_hit(space, reward, build(seed), best[-1], batch, max_trials) for seed in seeds]


def goal_size(size: int, top: float) -> int:
    """Number of graphs in the best fraction `top` of `size` graphs; at least one."""
    return max(1, math.floor(top * size))


def uniform_hits(size: int, goal: int, count: int) -> list[int]:
    """The result of `first_hits` for uniform draws from the graphs, without repetition.

    These are not random: they are `count` evenly spaced quantiles of the exact distribution.
    `RandomSearch` differs, because it is uniform over sequences, and many may describe one graph.

    Args:
        size: number of graphs.
        goal: number of graphs that count as the best.
        count: number of quantiles.
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
    """Number of distinct graphs that a search tries until one has at least the reward `goal`.

    The other arguments are those of `first_hits`.
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
    """Synthetic rewards, for spaces that are too large for a table.

    A reward is a sum over the decisions. Each choice adds a value for its position, one for its
    kind at any position, and one for the pair that it forms with the choice before it. The values
    are normally distributed, with standard deviations of 1, 1/2 and 1/2.

    Args:
        space: search space.
        seed: seed of the values; with another one, other architectures are the best.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed
        self._values: dict[tuple, float] = {}

    def __call__(self, choices: Choices) -> float:
        total = 0.0
        for position, choice in enumerate(choices):
            decision = self.space.decisions[position]
            # The texts take part in the seeds, so they stay as they are.
            total += self._value("place", position, choice)
            total += self._value("kind", decision.kind, decision.choices[choice]) / 2
            if position:
                total += self._value("pair", position, choices[position - 1], choice) / 2
        return total

    def best(self, top: float) -> float:
        """The reward that a share `top` of the space reaches, estimated from `SAMPLES` samples."""
        rng = random.Random(f"{self.seed}: samples")
        rewards = sorted(self(self.space.sample(rng)) for _ in range(SAMPLES))
        return rewards[-goal_size(SAMPLES, top)]

    def _value(self, *what: object) -> float:
        if what not in self._values:
            self._values[what] = random.Random(f"{self.seed}: {what}").gauss(0, 1)
        return self._values[what]


def stopped_hit(
    space: Space,
    trials: Mapping[str, TrialResult],
    strategy: Strategy,
    goal: float,
    pruning: Pruning,
    iterations: int,
    batch: int,
) -> float:
    """Cost of a search with early stopping until it completes a trial with the reward `goal`.

    Args:
        space: search space.
        trials: the complete trial of every graph of the space, by key, with its rewards at the
            rungs.
        strategy: strategy of the search.
        goal: least reward of the architecture to find.
        pruning: rule of early stopping.
        iterations: training iterations of a complete trial.
        batch: number of proposals between two updates of the strategy.

    Returns:
        Training iterations, as a number of complete trials. If the search does not find such an
        architecture, the cost of all trials and one more.
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
                            duplicate_of=0 if reused else None)
            )  # fmt: skip
        strategy.learn(proposals, lessons(records, len(proposals)))
        stalled = stalled + 1 if len(known) == before else 0
    return len(trials) + 1


def _stopped(trial: TrialResult, thresholds: Mapping[int, float]) -> TrialResult:
    """A complete trial as it would have ended with some thresholds."""
    for count, (iteration, reward) in enumerate(trial.curve, 1):
        if reward < thresholds.get(iteration, -math.inf):
            return replace(trial, status=PRUNED, reward=reward, curve=trial.curve[:count])
    return trial


@dataclass(frozen=True)
class EarlyStopping:
    """The effect that early stopping would have had on a search whose trials all ran to the end.

    Attributes:
        saved: share of the training iterations that would have been saved.
        stopped: number of trials that would have been stopped.
        best_kept: share of the best tenth of the trials, by final reward, that would not have been
            stopped.
        best_found: final reward of the best trial that would not have been stopped, minus that of
            the best of all trials; 0 if the best would have survived.
        taus: Kendall's tau-b between the rewards of all trials at each rung and at the end.
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
    """Stop the trials of a finished search as `pruning` would have stopped them.

    Args:
        rewards: final rewards of the trials, in the order of the search.
        curves: rewards of each trial at all rungs, by iteration.
        pruning: rule of early stopping.
        iterations: training iterations of a complete trial.
        batch: number of trials that share their thresholds.
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
