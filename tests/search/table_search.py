"""A search without training, as a script: rewards are a fixed function of the graph.

    python table_search.py FOLDER [local]

Loop, journal and executors are the real ones; it is fast enough to be killed many times.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from nasfcos.search.cost import Objective
from nasfcos.search.executors import InlineExecutor, LocalExecutor
from nasfcos.search.journal import Journal
from nasfcos.search.records import COMPLETE, FAILED, TrialJob, TrialResult
from nasfcos.search.space import HeadSpace
from nasfcos.search.stage import Pruning, StageRunner
from tests.known import PUBLISHED
from tests.strategies import ppo

TRIALS, BATCH, SEED = 60, 5, 3


class TableTask:
    """Rewards from a hash; about every twelfth graph fails. Each trial appends its index and its
    process id to a file."""

    def __init__(self, log):
        self.log = Path(log)

    def open(self):
        pass

    def run(self, job: TrialJob) -> TrialResult:
        with self.log.open("a") as file:
            file.write(f"{job.index} {os.getpid()}\n")
        time.sleep(0.01)
        digest = int(hashlib.sha256(json.dumps(job.genotype).encode()).hexdigest(), 16)
        if digest % 12 == 0:
            return TrialResult(FAILED, reason="unlucky")
        reward = -(digest % 997) / 997
        return TrialResult(COMPLETE, reward, {"loss_cls": -reward}, params=digest % 100)


def space():
    return HeadSpace(PUBLISHED.cells, 3, ("conv3x3", "skip_connect", "def_conv_3x3"))


def main(folder, executor="inline"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = TableTask(folder / "runs.txt")
    journal = Journal(folder / "search.db", space(), retries=99, settings={"seed": SEED})
    make = InlineExecutor(task) if executor == "inline" else LocalExecutor(task, 2)
    with make as runner:
        strategy = ppo(space(), SEED)
        StageRunner(journal, strategy, runner, Objective(), Pruning()).run(TRIALS, BATCH)
    journal.export_csv(folder / "trials.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
