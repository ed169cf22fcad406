"""What the parts of a search hand to each other: jobs, results and finished trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
"""How a trial ends: trained to its end, stopped early as hopeless, or without a reward."""


class DeviceLost(RuntimeError):
    """A GPU has failed such that only another process can use it again."""


@dataclass(frozen=True)
class TrialJob:
    """One architecture to be tried.

    Attributes:
        index: of the proposal within its stage, from 0.
        genotype: the whole decoder, as a nested list (`nasfcos.genotype`).
        thresholds: (iteration, objective) pairs, in the order of the iterations: the trial stops
            where its objective at that iteration lies below. (iteration, -inf) only reports.
        repeat: 0 for the trial itself, n for its n-th repetition, with first weights and batches of
            its own.
    """

    index: int
    genotype: list
    thresholds: tuple[tuple[int, float], ...] = ()
    repeat: int = 0


@dataclass(frozen=True)
class TrialResult:
    """What a trial found out.

    Attributes:
        status: `COMPLETE`, `PRUNED` or `FAILED`.
        reward: the negative sum of the losses on meta-val, of a pruned trial at its last rung;
            nan for a failed one.
        losses: the loss terms on meta-val by name.
        curve: (iteration, reward) at the rungs that were reached.
        params: parameters of what the trial trained.
        flops: multiply-adds of it for one image, in G.
        latency: milliseconds of its forward pass for one image; nan where not asked for.
        seconds: the trial took.
        reason: of a failure, in words.
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
    """A finished trial as the journal has it.

    Attributes:
        index: of the proposal within its stage, from 0.
        batch: of the proposals; all of a batch are proposed by the same state of the strategy.
        choices: the decisions (`nasfcos.search.space`).
        key: the same for every way of writing the same graph.
        genotype: the whole decoder, as a nested list.
        result: as the trial returned it, or, where the graph had been tried, that trial's.
        objective: what the strategy learns from: the reward less the cost term; nan of a failed
            trial.
        reused: index of the trial whose result this is; None for a trial of its own.
        finished: time of the end, seconds since the epoch.
    """

    index: int
    batch: int
    choices: tuple[int, ...]
    key: str
    genotype: list
    result: TrialResult
    objective: float
    reused: int | None = None
    finished: float = 0.0


def own_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that were run, not reused."""
    return [record for record in records if record.reused is None]


def ended_as(records: Sequence[TrialRecord], status: str) -> int:
    """How many of the trials of their own ended so."""
    return sum(record.result.status == status for record in own_trials(records))


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials of their own that were trained to the end, by objective, best first."""
    complete = [
        record
        for record in own_trials(records)
        if record.result.status == COMPLETE
        and math.isfinite(record.result.reward)
        and math.isfinite(record.objective)
    ]
    return sorted(complete, key=lambda record: (-record.objective, record.index))


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of two rankings from -1 to 1, ties accounted for.

    nan where one of the two is constant, or for fewer than two pairs.
    """
    dx, dy = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x), np.asarray(y)))
    untied = math.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / untied) if untied else math.nan
