"""Re-evaluation of the best trials: the maximum of many noisy rewards is, in good part, luck.

A trial is short. With other initial weights and other batches its reward changes by as much as good
architectures differ. So the few that look best are evaluated again with other seeds, and compared
by the mean of the new rewards.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from .cost import Objective
from .executors import Executor, WorkerLost
from .journal import Journal
from .records import FAILED, TrialJob, TrialRecord

logger = logging.getLogger(__name__)


def reevaluate(
    journal: Journal,
    executor: Executor,
    objective: Objective,
    candidates: Sequence[TrialRecord],
    times: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TrialRecord]:
    """Evaluate architectures again, with seed offsets 1 to `times`.

    Rewards that the journal holds already are not computed again.

    Args:
        journal: journal of the stage.
        executor: runs the trials.
        objective: ranks the candidates.
        candidates: finished trials.
        times: number of new rewards of each candidate, at least one.
        on_progress: called with the number of evaluations that are done, and of all of them.

    Returns:
        The candidates, best objective first. The reward of each is the mean of its new rewards; the
        original one, for which it was chosen, does not count. If one of its evaluations failed,
        reward and objective are nan; such candidates come last.
    """
    known = journal.reevaluations()
    seed_offsets = range(1, times + 1)
    jobs = [
        TrialJob(record.index, record.genotype, seed_offset=seed_offset)
        for seed_offset in seed_offsets
        for record in candidates
        if (record.index, seed_offset) not in known
    ]
    total = len(candidates) * times
    done = total - len(jobs)
    deaths: Counter[tuple[int, int]] = Counter()
    if jobs:
        on_progress(done, total)
    while jobs:
        requeued = []
        for job, result in executor.run(jobs):
            name = f"{journal.space.stage} trial {job.index} again"
            if isinstance(result, WorkerLost):
                logger.warning("%s: %s", name, result.reason)
                deaths[job.index, job.seed_offset] += 1
                if deaths[job.index, job.seed_offset] <= journal.retries:
                    requeued.append(job)
                    continue
            elif result.status == FAILED:
                logger.warning("%s failed: %s", name, result.reason)
            reward = math.nan if isinstance(result, WorkerLost) else result.reward
            journal.note_reevaluation(job.index, job.seed_offset, reward)
            done += 1
            logger.info("%s: reward %.4f (%d/%d done)", name, reward, done, total)
            on_progress(done, total)
        jobs = requeued
    known = journal.reevaluations()
    found = [
        _with_reward(record, fmean(known[record.index, n] for n in seed_offsets), objective)
        for record in candidates
    ]
    return sorted(found, key=lambda r: math.inf if math.isnan(r.objective) else -r.objective)


def _with_reward(record: TrialRecord, reward: float, objective: Objective) -> TrialRecord:
    result = replace(record.result, reward=reward)
    return replace(record, result=result, objective=objective(result))
