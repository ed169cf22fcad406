"""The best trials of a stage once more: the best of many rewards is, for a good part, the luckiest.

A trial is short, and with other first weights and other batches its reward is another one, by as
much as good architectures differ. So the few that look best are tried again, and compared by the
mean of what they come to then.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from .executors import Executor, WorkerLost
from .journal import Journal
from .records import FAILED, TrialJob, TrialRecord

logger = logging.getLogger(__name__)


def try_again(
    journal: Journal,
    executor: Executor,
    candidates: Sequence[TrialRecord],
    times: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TrialRecord]:
    """Try architectures again, each so many times; what the journal has already is not repeated.

    Args:
        journal: of the stage.
        executor: runs the trials.
        candidates: finished trials.
        times: other seeds for each, at least one.
        on_progress: called with the trials that are done, and all of them.

    Returns:
        The candidates by their new rewards, best first: each has the mean of these for its reward
        (the first one, which it was chosen for, does not count), less its cost for its objective.
        Both are nan of those, at the end, that failed once.
    """
    known = journal.retrials()
    repeats = range(1, times + 1)
    jobs = [
        TrialJob(record.index, record.genotype, repeat=repeat)
        for repeat in repeats
        for record in candidates
        if (record.index, repeat) not in known
    ]
    total = len(candidates) * times
    done = total - len(jobs)
    deaths: Counter[tuple[int, int]] = Counter()
    if jobs:
        on_progress(done, total)
    while jobs:
        lost = []
        for job, result in executor.run(jobs):
            name = f"{journal.space.stage} trial {job.index} again"
            if isinstance(result, WorkerLost):
                logger.warning("%s: %s", name, result.reason)
                deaths[job.index, job.repeat] += 1
                if deaths[job.index, job.repeat] <= journal.retries:
                    lost.append(job)
                    continue
            elif result.status == FAILED:
                logger.warning("%s failed: %s", name, result.reason)
            reward = math.nan if isinstance(result, WorkerLost) else result.reward
            journal.note_retrial(job.index, job.repeat, reward)
            done += 1
            logger.info("%s: reward %.4f (%d/%d done)", name, reward, done, total)
            on_progress(done, total)
        jobs = lost
    known = journal.retrials()
    found = [
        _with_reward(record, fmean(known[record.index, repeat] for repeat in repeats))
        for record in candidates
    ]
    return sorted(found, key=lambda r: math.inf if math.isnan(r.objective) else -r.objective)


def _with_reward(record: TrialRecord, reward: float) -> TrialRecord:
    penalty = record.result.reward - record.objective
    return replace(
        record, result=replace(record.result, reward=reward), objective=reward - penalty
    )
