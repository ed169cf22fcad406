"""The loop of one stage: propose a batch, try it, learn from it; resumable at any moment.

The journal is the only state. A resumed stage runs the same loop from its start: the strategy
is asked only for what the journal does not have, finished trials are not run again, and what the
strategy learns from them brings it to the state it was in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from .cost import Objective
from .executors import Executor, WorkerLost
from .journal import Journal
from .records import COMPLETE, FAILED, PRUNED, TrialJob, TrialRecord, TrialResult
from .space import Choices, Space
from .strategies import Strategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruning:
    """Successive halving: at each rung the worse part of the trials stops.

    A trial is compared with all that reached the rung in finished batches, by thresholds that go
    with its job. So what is stopped does not depend on which worker was faster, workers need not
    ask, and a repeated search repeats itself; Optuna's pruners, asked in the middle of a trial,
    could not promise that.

    Attributes:
        rungs: iterations at which a trial is judged.
        keep: share that goes on.
        startup: trials that must have reached a rung before any is stopped there.
    """

    rungs: tuple[int, ...] = ()
    keep: float = 0.5
    startup: int = 20

    def thresholds(self, curves: Sequence[Mapping[int, float]]) -> tuple[tuple[int, float], ...]:
        """For a batch's jobs, from the trials of the batches before.

        Args:
            curves: of each of these, its objective at the rungs it reached.
        """
        found = []
        for rung in self.rungs:
            reached = [curve[rung] for curve in curves if rung in curve]
            enough = len(reached) >= self.startup
            found.append((rung, np.quantile(reached, 1 - self.keep) if enough else -math.inf))
        return tuple((rung, float(threshold)) for rung, threshold in found)


def run_stage(
    journal: Journal,
    space: Space,
    strategy: Strategy,
    executor: Executor,
    trials: int,
    batch_size: int,
    objective: Objective,
    pruning: Pruning,
    on_progress: Callable[[Journal], None] = lambda journal: None,
    start: Choices | None = None,
) -> None:
    """Run a stage to its end, from wherever the journal says it is.

    Args:
        journal: of the stage.
        space, strategy: what is proposed, and by whom (fresh: it has learnt nothing yet).
        executor: runs the trials.
        trials: of the whole stage, repeated proposals of a known graph included.
        batch_size: proposals between two lessons of the strategy.
        objective: what the strategy learns from.
        pruning: when trials stop early.
        on_progress: called after each finished trial and each lesson.
        start: what the first trial tries, instead of the strategy's first proposal.
    """
    done = batch = 0
    while done < trials:
        size = journal.batch_size(batch) or min(batch_size, trials - done)
        # What was proposed stands, whatever another machine's arithmetic would propose.
        proposals = journal.proposed(batch)
        if len(proposals) < size:
            proposed = strategy.propose(size)
            if batch == 0 and start is not None:
                proposed = [start, *(p for p in proposed if p != start)][:size]
            proposals += proposed[len(proposals) :]
            journal.propose(batch, proposals)
        before = [
            _objectives(r.result, objective)
            for r in journal.records()
            if r.batch < batch and r.reused is None
        ]
        _run_batch(
            journal,
            space,
            executor,
            range(done, done + size),
            proposals,
            objective,
            pruning.thresholds(before),
            on_progress,
        )
        done += size
        # Not of later batches, which a resumed stage may know as well: it must learn the same.
        records = [record for record in journal.records() if record.batch <= batch]
        journal.note_batch(batch, strategy.learn(proposals, lessons(records, size)))
        on_progress(journal)
        batch += 1


def lessons(records: Sequence[TrialRecord], count: int) -> list[float]:
    """What a strategy learns from the last `count` trials: their objectives.

    The reward of a stopped trial is that of a shorter training. It counts as what it would be at
    the end, had it gained as much as the others did from the same rung on (in the median).
    """
    gains: dict[int, list[float]] = {}
    for record in records:
        if record.result.status == COMPLETE and record.reused is None:
            for rung, reward in record.result.curve:
                gains.setdefault(rung, []).append(record.result.reward - reward)

    def lesson(record: TrialRecord) -> float:
        if record.result.status != PRUNED:
            return record.objective
        rung, _ = record.result.curve[-1]
        return record.objective + (median(gains[rung]) if rung in gains else 0.0)

    return [lesson(record) for record in records[len(records) - count :]]


def _run_batch(
    journal: Journal,
    space: Space,
    executor: Executor,
    indices: range,
    proposals: Sequence[tuple[int, ...]],
    objective: Objective,
    thresholds: tuple[tuple[int, float], ...],
    on_progress: Callable[[Journal], None],
) -> None:
    """Finish the trials of a batch that are not finished yet."""
    finished = {record.index for record in journal.records()}
    known = _by_key(journal.records())
    failed = {r.key for r in journal.records() if r.index in indices} - known.keys()
    jobs: dict[str, TrialJob] = {}
    repeats: list[tuple[int, str]] = []
    for index, choices in zip(indices, proposals, strict=True):
        if index in finished:
            continue
        key = space.key(choices)
        if key in known or key in jobs or key in failed:
            repeats.append((index, key))
        else:
            jobs[key] = TrialJob(index, space.genotype(choices).to_list(), thresholds)
    _try_all(journal, executor, list(jobs.values()), objective, on_progress)
    known = _by_key(journal.records())
    for index, key in repeats:
        if key not in known:  # its first trial failed, and so would this one
            reason = "the same architecture failed in another trial of this batch"
            journal.start(index)
            journal.finish(index, TrialResult(FAILED, reason=reason), math.nan)
            continue
        original = known[key]
        journal.start(index)
        journal.finish(index, original.result, original.objective, reused=original.index)
    if repeats:
        on_progress(journal)


def _objectives(result: TrialResult, objective: Objective) -> dict[int, float]:
    """The curve of a trial, less what its architecture costs."""
    penalty = objective.penalty(result.flops, result.latency)
    return {iteration: reward - penalty for iteration, reward in result.curve}


def _by_key(records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """The trials whose result holds for every other trial of the same graph."""
    usable = (COMPLETE, PRUNED)
    return {r.key: r for r in records if r.reused is None and r.result.status in usable}


def _try_all(
    journal: Journal,
    executor: Executor,
    jobs: list[TrialJob],
    objective: Objective,
    on_progress: Callable[[Journal], None],
) -> None:
    """Run jobs; those whose worker died are run again, as often as the journal allows."""

    def started(jobs: Sequence[TrialJob]) -> Iterator[TrialJob]:
        """Each job as soon as a worker is free for it."""
        for job in jobs:
            journal.start(job.index)
            yield job

    while jobs:
        again = []
        for job, outcome in executor.run(started(jobs)):
            if isinstance(outcome, WorkerLost):
                if journal.retry(job.index, outcome.reason):
                    logger.warning("trial %d is tried again: %s", job.index, outcome.reason)
                    again.append(job)
                else:
                    logger.warning("trial %d failed: %s", job.index, outcome.reason)
            else:
                if outcome.status == FAILED:
                    logger.warning("trial %d failed: %s", job.index, outcome.reason)
                journal.finish(job.index, outcome, objective(outcome))
            on_progress(journal)
        jobs = again
