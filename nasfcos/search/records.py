"""Jobs, results and records of trials, which the parts of a search hand to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
"""How a trial ends: trained to the end, stopped early by pruning, or without a reward."""


class DeviceLost(RuntimeError):
    """A GPU has failed in a way that makes it unusable for this process."""


@dataclass(frozen=True)
class TrialJob:
    """One architecture to be tried.

    Attributes:
        index: index of the proposal within its stage, from 0.
        genotype: the whole decoder, as a nested list (`nasfcos.genotype`).
        thresholds: (iteration, objective) pairs, ordered by iteration. The trial stops at an
            iteration if its objective there is below the threshold; with (iteration, -inf) the
            reward is only recorded.
        seed_offset: 0 for the trial itself; n > 0 for its n-th re-evaluation, with other initial
            weights and other batches.
    """

    index: int
    genotype: list
    thresholds: tuple[tuple[int, float], ...] = ()
    seed_offset: int = 0


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        status: `COMPLETE`, `PRUNED` or `FAILED`.
        reward: negative sum of the losses on meta-val (of a pruned trial, at its last rung); nan
            for a failed trial.
        losses: loss terms on meta-val by name.
        curve: (iteration, reward) at the rungs that were reached.
        params: number of parameters of the trained decoder.
        flops: multiply-adds of the decoder for one image, in G; nan if not measured.
        latency: milliseconds of its forward pass for one image; nan if not measured.
        seconds: duration of the trial.
        reason: reason of a failure, in words.
    """

    status: str
    reward: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    params: int = 0
    flops: float = math.nan
    latency: float = math.nan
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial, as recorded in the journal.

    Attributes:
        index: index of the proposal within its stage, from 0.
        batch: batch of the proposal; the strategy proposes a batch at a time.
        choices: the decisions (`nasfcos.search.space`).
        key: identifies the graph, however it is written.
        genotype: the whole decoder, as a nested list.
        result: result of the trial; of a duplicate, the result of the original trial.
        objective: what the strategy learns from: the reward minus the cost penalty; nan for a
            failed trial.
        duplicate_of: index of an earlier trial of the same graph, whose result this is; None for
            a trial that was run.
        finished: time of its end, in seconds since the epoch.
    """

    index: int
    batch: int
    choices: tuple[int, ...]
    key: str
    genotype: list
    result: TrialResult
    objective: float
    duplicate_of: int | None = None
    finished: float = 0.0


def own_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that were run, without duplicates."""
    return [record for record in records if record.duplicate_of is None]


def ended_as(records: Sequence[TrialRecord], status: str) -> int:
    """The number of trials that were run and ended with this status."""
    return sum(record.result.status == status for record in own_trials(records))


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that were run to the end, without duplicates, best objective first."""
    complete = [
        record
        for record in own_trials(records)
        if record.result.status == COMPLETE
        and math.isfinite(record.result.reward)
        and math.isfinite(record.objective)
    ]
    return sorted(complete, key=lambda record: (-record.objective, record.index))


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of two rankings, from -1 to 1, with ties accounted for.

    nan if one of them is constant, or with fewer than two pairs.
    """
    dx, dy = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x), np.asarray(y)))
    untied = math.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / untied) if untied else math.nan
