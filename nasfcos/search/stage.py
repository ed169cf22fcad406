"""The loop of one stage: propose a batch, run its trials, learn from them; resumable at any time.

The journal holds the only state. A resumed stage runs the same loop from the beginning: the
strategy is asked only for proposals that the journal does not hold, finished trials are not run
again, and learning from them brings the strategy back to its former state.
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
from .records import (
    COMPLETE,
    FAILED,
    PRUNED,
    TrialJob,
    TrialRecord,
    TrialResult,
    own_trials,
)
from .space import Choices
from .strategies import Strategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruning:
    """Successive halving: at each rung, the worse part of the trials is stopped.

    A trial is compared with all trials of earlier batches that reached the rung, by thresholds that
    are part of its job. So what is stopped does not depend on which worker was faster, workers need
    no communication, and a search is reproducible. Optuna's pruners, which are asked in the middle
    of a trial, could not guarantee that.

    Attributes:
        rungs: iterations at which a trial is judged.
        keep: share of the trials that continues beyond a rung.
        startup: number of trials that must have reached a rung before any is stopped there.
    """

    rungs: tuple[int, ...] = ()
    keep: float = 0.5
    startup: int = 20

    def thresholds(self, curves: Sequence[Mapping[int, float]]) -> tuple[tuple[int, float], ...]:
        """(iteration, objective) thresholds for the jobs of a batch.

        Args:
            curves: for each trial of the earlier batches, its objective at the rungs it reached.
        """
        found = []
        for rung in self.rungs:
            reached = [curve[rung] for curve in curves if rung in curve]
            enough = len(reached) >= self.startup
            found.append((rung, np.quantile(reached, 1 - self.keep) if enough else -math.inf))
        return tuple((rung, float(threshold)) for rung, threshold in found)


class StageRunner:
    """Runs the trials of a stage, and teaches the strategy.

    Args:
        journal: journal of the stage.
        strategy: proposes the architectures; must not have learnt anything yet.
        executor: runs the trials.
        objective: what the strategy learns from.
        pruning: when trials stop early.
        on_progress: called after each finished trial and each batch learnt.
    """

    def __init__(
        self,
        journal: Journal,
        strategy: Strategy,
        executor: Executor,
        objective: Objective,
        pruning: Pruning,
        on_progress: Callable[[Journal], None] = lambda journal: None,
    ) -> None:
        self.journal = journal
        self.strategy = strategy
        self.executor = executor
        self.objective = objective
        self.pruning = pruning
        self.on_progress = on_progress

    def run(self, trials: int, batch_size: int, start: Choices | None = None) -> None:
        """Run the stage to its end, from wherever the journal says it is.

        Args:
            trials: number of trials of the whole stage, duplicates included.
            batch_size: number of proposals from which the strategy learns at once.
            start: architecture of the first trial, in place of the strategy's first proposal.
        """
        done = batch = 0
        while done < trials:
            size = self.journal.batch_size(batch) or min(batch_size, trials - done)
            proposals = self._propose(batch, size, start if batch == 0 else None)
            self._run_batch(batch, range(done, done + size), proposals)
            done += size
            # The journal of a resumed stage may hold later batches, which must not count here.
            records = [record for record in self.journal.records() if record.batch <= batch]
            stats = self.strategy.learn(proposals, lessons(records, size))
            self.journal.note_batch(batch, stats)
            self.on_progress(self.journal)
            batch += 1

    def _propose(self, batch: int, size: int, start: Choices | None) -> list[Choices]:
        """The proposals of a batch. Those in the journal are kept, even if the arithmetic of this
        machine would lead to others."""
        proposals = self.journal.proposed(batch)
        if len(proposals) < size:
            proposed = self.strategy.propose(size)
            if start is not None:
                proposed = [start, *(p for p in proposed if p != start)][:size]
            proposals += proposed[len(proposals) :]
            self.journal.propose(batch, proposals)
        return proposals

    def _run_batch(self, batch: int, indices: range, proposals: Sequence[Choices]) -> None:
        """Finish the trials of a batch that are not finished yet."""
        records = self.journal.records()
        finished = {record.index for record in records}
        known = _by_key(records)
        failed = {r.key for r in records if r.index in indices} - known.keys()
        thresholds = self._thresholds(batch)
        jobs: dict[str, TrialJob] = {}
        duplicates: list[tuple[int, str]] = []
        for index, choices in zip(indices, proposals, strict=True):
            if index in finished:
                continue
            key = self.journal.space.key(choices)
            if key in known or key in jobs or key in failed:
                duplicates.append((index, key))
            else:
                genotype = self.journal.space.genotype(choices).to_list()
                jobs[key] = TrialJob(index, genotype, thresholds)
        self._run_jobs(list(jobs.values()))
        if duplicates:
            self._finish_duplicates(duplicates)
            self.on_progress(self.journal)

    def _thresholds(self, batch: int) -> tuple[tuple[int, float], ...]:
        """The thresholds of a batch's jobs, from the trials that were run in earlier batches."""
        earlier = [record for record in own_trials(self.journal.records()) if record.batch < batch]
        return self.pruning.thresholds([self._curve(record.result) for record in earlier])

    def _curve(self, result: TrialResult) -> dict[int, float]:
        """The objective of a trial at each rung that it reached."""
        penalty = self.objective.penalty(result.flops, result.latency)
        return {iteration: reward - penalty for iteration, reward in result.curve}

    def _run_jobs(self, jobs: list[TrialJob]) -> None:
        """Run jobs; those whose worker died are requeued as often as the journal allows."""
        while jobs:
            requeued = []
            for job, outcome in self.executor.run(self._started(jobs)):
                if isinstance(outcome, WorkerLost):
                    if self.journal.requeue(job.index, outcome.reason):
                        logger.warning("trial %d is tried again: %s", job.index, outcome.reason)
                        requeued.append(job)
                    else:
                        logger.warning("trial %d failed: %s", job.index, outcome.reason)
                else:
                    if outcome.status == FAILED:
                        logger.warning("trial %d failed: %s", job.index, outcome.reason)
                    self.journal.finish(job.index, outcome, self.objective(outcome))
                self.on_progress(self.journal)
            jobs = requeued

    def _started(self, jobs: Sequence[TrialJob]) -> Iterator[TrialJob]:
        """Yields each job when a worker takes it, and records that it is running."""
        for job in jobs:
            self.journal.start(job.index)
            yield job

    def _finish_duplicates(self, duplicates: Sequence[tuple[int, str]]) -> None:
        """Finish trials, given by index and key, with the results of the same graphs."""
        known = _by_key(self.journal.records())
        for index, key in duplicates:
            self.journal.start(index)
            if key in known:
                original = known[key]
                self.journal.finish(index, original.result, original.objective, original.index)
            else:  # the original failed, and so would this one
                reason = "the same architecture failed in another trial of this batch"
                self.journal.finish(index, TrialResult(FAILED, reason=reason), math.nan)


def lessons(records: Sequence[TrialRecord], count: int) -> list[float]:
    """The objectives that a strategy learns from the last `count` trials.

    The reward of a pruned trial is that of a shorter training. It is extrapolated to the end of the
    training by the median gain of the complete trials from the same rung on.

    Args:
        records: finished trials, ordered by index.
        count: number of trials to learn from; the earlier ones only count towards the gains.
    """
    gains: dict[int, list[float]] = {}
    for record in records:
        if record.result.status == COMPLETE and record.duplicate_of is None:
            for rung, reward in record.result.curve:
                gains.setdefault(rung, []).append(record.result.reward - reward)

    def lesson(record: TrialRecord) -> float:
        if record.result.status != PRUNED:
            return record.objective
        rung, _ = record.result.curve[-1]
        return record.objective + (median(gains[rung]) if rung in gains else 0.0)

    return [lesson(record) for record in records[len(records) - count :]]


def _by_key(records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """The trials whose results hold for all trials of the same graph, by its key."""
    usable = (COMPLETE, PRUNED)
    return {r.key: r for r in own_trials(records) if r.result.status in usable}
