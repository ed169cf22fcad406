"""Which trials are trained in full to check the proxy."""

import pytest

pytest.importorskip("optuna")

from nasfcos.config import ConfigError  # noqa: E402
from nasfcos.search.agreement import spread  # noqa: E402
from nasfcos.search.records import COMPLETE, FAILED, TrialRecord, TrialResult  # noqa: E402


def record(index, reward, status=COMPLETE, reused=None):
    result = TrialResult(status, reward)
    return TrialRecord(index, 0, (), str(index), [], result, reward, reused)


def test_the_chosen_are_spread_over_the_rewards_not_over_the_ranks():
    # Nine good ones close together, and two far below.
    rewards = [-5.0, -3.0, *(-1.0 - 0.01 * i for i in range(9))]
    records = [record(i, reward) for i, reward in enumerate(rewards)]
    chosen = [r.result.reward for r in spread(records, 3)]
    assert chosen == [-5.0, -3.0, -1.0]


def test_each_is_chosen_once_and_only_trials_of_their_own_that_ended():
    records = [record(i, -1.0) for i in range(4)]
    records += [record(4, -9.0, reused=0), record(5, float("nan"), FAILED)]
    assert sorted(r.index for r in spread(records, 4)) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="only 4 architectures"):
        spread(records, 5)
