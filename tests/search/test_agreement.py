"""Checks of the proxy: the choice of trials, and full trainings that diverge."""

import json

import pytest
import torch

pytest.importorskip("optuna")

from nasfcos.config import ConfigError  # noqa: E402
from nasfcos.config.defaults import get_defaults  # noqa: E402
from nasfcos.engine.monitor import NonFiniteLossError  # noqa: E402
from nasfcos.search import agreement  # noqa: E402
from nasfcos.search.agreement import check_agreement, spread  # noqa: E402
from nasfcos.search.journal import Journal  # noqa: E402
from nasfcos.search.records import COMPLETE, FAILED, TrialRecord, TrialResult  # noqa: E402
from tests.search import table_search  # noqa: E402


def record(index, reward, status=COMPLETE, duplicate_of=None):
    result = TrialResult(status, reward)
    return TrialRecord(index, 0, (), str(index), [], result, reward, duplicate_of)


def test_the_chosen_are_spread_over_the_rewards_not_over_the_ranks():
    # Nine good rewards close together, and two far below.
    rewards = [-5.0, -3.0, *(-1.0 - 0.01 * i for i in range(9))]
    records = [record(i, reward) for i, reward in enumerate(rewards)]
    chosen = [r.result.reward for r in spread(records, 3)]
    assert chosen == [-5.0, -3.0, -1.0]


def test_each_is_chosen_once_and_only_trials_of_their_own_that_ended():
    records = [record(i, -1.0) for i in range(4)]
    records += [record(4, -9.0, duplicate_of=0), record(5, float("nan"), FAILED)]
    assert sorted(r.index for r in spread(records, 4)) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="only 4 architectures"):
        spread(records, 5)


def test_a_full_training_that_diverges_is_left_out(tmp_path, monkeypatch):
    space = table_search.space()
    journal = Journal(tmp_path / "search.db", space, retries=0, settings={})
    journal.propose(0, [(0, 0, 0, 0), (0, 0, 0, 2), (0, 2, 0, 0), (0, 2, 2, 0)])
    for index in range(4):
        journal.start(index)
        journal.finish(index, TrialResult(COMPLETE, -float(index)), -float(index))
    precisions = {"0": 0.3, "1": 0.2, "3": 0.1}

    def train_in_full(cfg, device):
        trial = cfg.OUTPUT_DIR.rpartition("/")[2]
        if trial not in precisions:
            raise NonFiniteLossError("the loss is nan")
        return {"AP": precisions[trial], "AP50": 0.5}

    monkeypatch.setattr(agreement, "train_in_full", train_in_full)
    cfg = get_defaults()
    arguments = (cfg, torch.device("cpu"), tmp_path, "head", 4)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty"):
        check_agreement(*arguments)
    cfg.DATASETS.TEST = ("val",)
    monkeypatch.setattr(agreement, "check_full_training", lambda *_, **__: None)
    assert check_agreement(*arguments) == 1.0
    found = json.loads((tmp_path / "agreement/head.json").read_text())
    assert [row["trial"] for row in found["rows"]] == [3, 1, 0]
    precisions = {"0": 0.3}
    with pytest.raises(ConfigError, match=r"1 of 4 .* SEARCH\.SELECT\.OVERRIDES"):
        check_agreement(*arguments)
