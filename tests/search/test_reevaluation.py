"""Re-evaluation of the best trials: their new order, what is recorded, what is not repeated."""

import math

import pytest

pytest.importorskip("optuna")

from nasfcos.search.cost import Objective  # noqa: E402
from nasfcos.search.executors import WorkerLost  # noqa: E402
from nasfcos.search.journal import Journal  # noqa: E402
from nasfcos.search.records import COMPLETE, FAILED, TrialResult, ranked  # noqa: E402
from nasfcos.search.reevaluation import reevaluate  # noqa: E402
from tests.search import table_search  # noqa: E402

FIRST = {0: -1.0, 1: -2.0, 2: -3.0, 3: -4.0}
AGAIN = {(0, 1): -3.5, (0, 2): -2.5, (1, 1): -2.75, (1, 2): -2.25, (2, 1): -2.0, (2, 2): -2.0}
FLOPS = {0: 1.0, 1: 4.0, 2: 2.0, 3: 2.0}
OBJECTIVE = Objective("flops", target=2.0, weight=0.75)  # takes 0.75 off trial 1


class Table:
    """An executor that looks rewards up in a table. A list holds those of successive attempts, None
    is a lost worker, and a missing entry kills the search."""

    def __init__(self, rewards):
        self.rewards = {key: list(x) if isinstance(x, list) else [x] for key, x in rewards.items()}
        self.ran = []

    def run(self, jobs):
        assert jobs  # an executor waits for a worker even if there are no jobs
        for job in jobs:
            self.ran.append((job.index, job.seed_offset))
            if (job.index, job.seed_offset) not in self.rewards:
                raise KeyboardInterrupt
            reward = self.rewards[job.index, job.seed_offset].pop(0)
            if reward is None:
                yield job, WorkerLost("the worker died")
            else:
                status = FAILED if math.isnan(reward) else COMPLETE
                yield job, TrialResult(status, reward, reason="it failed")


@pytest.fixture
def journal(tmp_path):
    return open_journal(tmp_path)


def open_journal(folder):
    space = table_search.space()
    journal = Journal(folder / "search.db", space, retries=1, settings={})
    if not journal.records():
        journal.propose(0, [(0, 0, 0, 0), (0, 0, 0, 2), (0, 2, 0, 0), (0, 2, 2, 0)])
        for index, reward in FIRST.items():
            journal.start(index)
            result = TrialResult(COMPLETE, reward, params=index, flops=FLOPS[index])
            journal.finish(index, result, OBJECTIVE(result))
    return journal


def test_the_mean_of_the_trials_again_ranks(journal):
    candidates = ranked(journal.records())[:3]
    told = []
    found = reevaluate(
        journal, Table(AGAIN), OBJECTIVE, candidates, 2, lambda *done: told.append(done)
    )
    # The first rewards do not count, but the penalty does.
    assert [(r.index, r.result.reward, r.objective) for r in found] == [
        (2, -2.0, -2.0), (0, -3.0, -3.0), (1, -2.5, -3.25),
    ]  # fmt: skip
    assert [r.result.params for r in found] == [2, 0, 1]
    assert told == [(done, 6) for done in range(7)]
    # The records of the trials are unchanged.
    assert {r.index: r.result.reward for r in journal.records()} == FIRST


def test_what_was_tried_again_is_not_tried_once_more(journal, tmp_path):
    candidates = ranked(journal.records())[:3]
    killed = {key: reward for key, reward in AGAIN.items() if key[1] == 1 and key[0] < 2}
    with pytest.raises(KeyboardInterrupt):
        reevaluate(journal, Table(killed), OBJECTIVE, candidates, 2)

    resumed = open_journal(tmp_path)
    for table, ran in ((AGAIN, [(2, 1), (0, 2), (1, 2), (2, 2)]), ({}, [])):
        executor = Table(table)
        found = reevaluate(resumed, executor, OBJECTIVE, ranked(resumed.records())[:3], 2)
        assert executor.ran == ran
        assert [(r.index, r.objective) for r in found] == [(2, -2.0), (0, -3.0), (1, -3.25)]


def test_failures(journal, caplog):
    """A failure excludes an architecture, as in full trainings; a lost worker is retried."""
    nan = math.nan
    rewards = {**AGAIN, (0, 1): [None, -3.5], (1, 2): [None, None], (2, 1): nan}
    executor = Table(rewards)
    found = reevaluate(journal, executor, OBJECTIVE, ranked(journal.records())[:3], 2)
    assert [(r.index, r.result.reward) for r in found[:1]] == [(0, -3.0)]
    assert [r.index for r in found[1:]] == [1, 2]
    assert all(math.isnan(x) for r in found[1:] for x in (r.result.reward, r.objective))
    assert executor.ran[6:] == [(0, 1), (1, 2)]
    assert "head trial 2 again failed: it failed" in caplog.text
