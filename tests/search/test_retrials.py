"""The best trials again: which order they come to, what is kept of it, and what is not repeated."""

import math

import pytest

pytest.importorskip("optuna")

from nasfcos.search.executors import WorkerLost  # noqa: E402
from nasfcos.search.journal import Journal  # noqa: E402
from nasfcos.search.records import COMPLETE, FAILED, TrialResult, ranked  # noqa: E402
from nasfcos.search.retrials import try_again  # noqa: E402
from tests.search import table_search  # noqa: E402

FIRST = {0: -1.0, 1: -2.0, 2: -3.0, 3: -4.0}
AGAIN = {(0, 1): -3.5, (0, 2): -2.5, (1, 1): -2.75, (1, 2): -2.25, (2, 1): -2.0, (2, 2): -2.0}
PENALTY = {0: 0.0, 1: 0.75, 2: 0.0, 3: 0.0}


class Table:
    """An executor whose rewards are in a table; what is not there is lost with its worker."""

    def __init__(self, rewards):
        self.rewards = rewards
        self.ran = []

    def run(self, jobs):
        for job in jobs:
            self.ran.append((job.index, job.repeat))
            reward = self.rewards.get((job.index, job.repeat))
            if reward is None:
                yield job, WorkerLost("the worker died")
            else:
                status = FAILED if math.isnan(reward) else COMPLETE
                yield job, TrialResult(status, reward)


@pytest.fixture
def journal(tmp_path):
    return open_journal(tmp_path)


def open_journal(folder):
    space = table_search.space()
    journal = Journal(folder / "search.db", space, retries=0, settings={})
    if not journal.records():
        journal.propose(0, [(0, 0, 0, 0), (0, 0, 0, 2), (0, 2, 0, 0), (0, 2, 2, 0)])
        for index, reward in FIRST.items():
            journal.start(index)
            result = TrialResult(COMPLETE, reward, params=index)
            journal.finish(index, result, reward - PENALTY[index])
    return journal


def test_the_mean_of_the_trials_again_ranks(journal):
    candidates = ranked(journal.records())[:3]
    told = []
    found = try_again(journal, Table(AGAIN), candidates, 2, lambda *done: told.append(done))
    # The first rewards do not count, what an architecture costs does.
    assert [(r.index, r.result.reward, r.objective) for r in found] == [
        (2, -2.0, -2.0), (0, -3.0, -3.0), (1, -2.5, -3.25),
    ]  # fmt: skip
    assert [r.result.params for r in found] == [2, 0, 1]
    assert told == [(done, 6) for done in range(7)]
    # The trials themselves stay what they were.
    assert {r.index: r.result.reward for r in journal.records()} == FIRST


def test_what_was_tried_again_is_not_tried_once_more(journal, tmp_path):
    candidates = ranked(journal.records())[:3]
    lost = {key: reward for key, reward in AGAIN.items() if key != (1, 2)}
    try_again(journal, Table(lost), candidates[:2], 2)

    resumed, executor = open_journal(tmp_path), Table(AGAIN)
    found = try_again(resumed, executor, ranked(resumed.records())[:3], 2)
    assert executor.ran == [(2, 1), (1, 2), (2, 2)]
    assert [r.index for r in found] == [2, 0, 1]
    executor = Table({})
    assert try_again(resumed, executor, ranked(resumed.records())[:3], 2) == found
    assert executor.ran == []


def test_failures(journal):
    candidates = ranked(journal.records())[:3]
    nothing = {(2, 1): math.nan, (2, 2): math.nan}
    found = try_again(journal, Table({**AGAIN, **nothing, (0, 1): math.nan}), candidates, 2)
    assert [r.index for r in found] == [0, 1, 2]
    assert found[0].result.reward == -2.5  # of the time that it did not fail
    assert math.isnan(found[2].objective)


def test_none_are_tried_again_where_none_shall_be(journal):
    candidates = ranked(journal.records())
    executor = Table(AGAIN)
    assert try_again(journal, executor, candidates, 0) == candidates
    assert executor.ran == []
