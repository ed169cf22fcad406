"""The best trials of a stage once more: the best of many rewards is, for a good part, the luckiest.

A trial is short, and with other first weights and other batches its reward is another one, by as
much as good architectures differ. So the few that look best are tried again, and compared by the
mean of what they come to then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from .executors import Executor, WorkerLost
from .journal import Journal
from .records import TrialJob, TrialRecord

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
        candidates: finished trials, best first.
        times: other seeds for each; with none the candidates stay as they are.
        on_progress: called with the trials that are done, and all of them.

    Returns:
        The candidates by their new rewards, best first: each has the mean of these for its reward
        (the first one, which it was chosen for, does not count), less its cost for its objective.
        One that never came to its end again has nan, and is last.
    """
    if not times:
        return list(candidates)
    known = journal.retrials()
    jobs = [
        TrialJob(record.index, record.genotype, repeat=repeat)
        for repeat in range(1, times + 1)
        for record in candidates
        if (record.index, repeat) not in known
    ]
    total = len(candidates) * times
    on_progress(total - len(jobs), total)
    for number, (job, result) in enumerate(executor.run(jobs), total - len(jobs) + 1):
        if isinstance(result, WorkerLost):  # a resumed search tries it again
            logger.warning("trial %d, again: %s", job.index, result.reason)
        else:
            journal.note_retrial(job.index, job.repeat, result.reward)
            logger.info(
                "%s trial %d again: reward %.4f (%d/%d done)",
                journal.space.stage, job.index, result.reward, number, total,
            )  # fmt: skip
        on_progress(number, total)
    known = journal.retrials()
    found = [
        _with_rewards(record, [known.get((record.index, n), math.nan) for n in range(1, times + 1)])
        for record in candidates
    ]
    return sorted(found, key=lambda r: math.inf if math.isnan(r.objective) else -r.objective)


def _with_rewards(record: TrialRecord, rewards: Sequence[float]) -> TrialRecord:
    finite = [reward for reward in rewards if math.isfinite(reward)]
    reward = fmean(finite) if finite else math.nan
    penalty = record.result.reward - record.objective
    return replace(
        record, result=replace(record.result, reward=reward), objective=reward - penalty
    )
