"""The loop of a stage: kill and resume, duplicates, failures, objectives, thresholds."""

import csv
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from nasfcos.search.cost import Objective  # noqa: E402
from nasfcos.search.executors import InlineExecutor, WorkerLost  # noqa: E402
from nasfcos.search.journal import Journal  # noqa: E402
from nasfcos.search.records import COMPLETE, FAILED, PRUNED, TrialResult  # noqa: E402
from nasfcos.search.simulate import EarlyStopping, replay_pruning  # noqa: E402
from nasfcos.search.stage import Pruning, StageRunner  # noqa: E402
from nasfcos.search.strategies import RandomSearch  # noqa: E402
from tests.search import table_search  # noqa: E402
from tests.strategies import ppo  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "search" / "table_search.py"


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def succeed(process, timeout=120):
    _, error = process.communicate(timeout=timeout)
    assert process.returncode == 0, error


def rows(folder):
    """The exported trials, without durations and times."""
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for row in found:
        del row["finished"], row["seconds"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    succeed(start(folder))
    return rows(folder)


def test_a_stage_killed_at_random_moments_ends_as_one_undisturbed(undisturbed, tmp_path):
    rng = random.Random(0)
    kills = 0
    wanted = int(os.environ.get("NASFCOS_KILLS", 2))
    while kills < wanted:
        process = start(tmp_path)
        log = tmp_path / "runs.txt"
        before = log.read_text().count("\n") if log.exists() else 0
        deadline = time.monotonic() + 60
        # Within the next few trials, not during the start of Python.
        target = before + rng.randint(1, 5)
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= target:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    print(f"killed {kills} times")
    assert kills >= 2
    succeed(start(tmp_path))
    assert rows(tmp_path) == undisturbed
    own = sum(row["reused"] == "" for row in undisturbed)
    runs = Counter(line.split()[0] for line in (tmp_path / "runs.txt").read_text().splitlines())
    # Only trials that a kill interrupted are run again.
    assert len(runs) == own and sum(runs.values()) <= own + kills


def test_killed_workers_change_nothing(undisturbed, tmp_path):
    process = start(tmp_path, "local")
    rng = random.Random(1)
    killed, wanted = 0, int(os.environ.get("NASFCOS_KILLS", 2))
    apart = table_search.TRIALS // (2 * wanted)
    while process.poll() is None and killed < wanted:
        runs = tmp_path / "runs.txt"
        if runs.exists() and runs.read_text().count("\n") > apart * killed:
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid), "-f", "spawn_main"],
                capture_output=True, text=True, check=False,
            ).stdout.split()  # fmt: skip
            # Only workers that have run a trial; repeated deaths at the start are an error.
            at_work = sorted(set(found) & set(runs.read_text().split()[1::2]))
            if at_work:
                os.kill(int(rng.choice(at_work)), signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    succeed(process, timeout=300)
    print(f"killed {killed} workers")
    assert killed >= 1
    assert rows(tmp_path) == undisturbed


def test_equal_seeds_propose_equal_architectures_and_others_do_not(undisturbed, tmp_path):
    succeed(start(tmp_path))
    assert rows(tmp_path) == undisturbed
    space = table_search.space()
    first = [tuple(ppo(space, seed).propose(5)) for seed in (3, 3, 4)]
    assert first[0] == first[1] != first[2]


class Recorded(RandomSearch):
    """Makes given proposals, and records what it learns."""

    def __init__(self, proposals):
        self.proposals = list(proposals)
        self.lessons = []

    def propose(self, count):
        place = sum(len(rewards) for _, rewards in self.lessons)
        return self.proposals[place : place + count]

    def learn(self, batch, rewards):
        self.lessons.append((list(batch), list(rewards)))
        return {}


class Scripted:
    """A task with given results by trial index."""

    def __init__(self, results):
        self.results = results
        self.jobs = []

    @property
    def ran(self):
        return [job.index for job in self.jobs]

    def open(self):
        pass

    def run(self, job):
        self.jobs.append(job)
        return self.results[job.index]


def run(tmp_path, proposals, task, batch=2, objective=None, pruning=None, executor=InlineExecutor,
        start=None):  # fmt: skip
    strategy = Recorded(proposals)
    journal = Journal(tmp_path / "s.db", table_search.space(), retries=1, settings={})
    with executor(task) as runner:
        stage = StageRunner(
            journal, strategy, runner, objective or Objective(), pruning or Pruning()
        )
        stage.run(len(proposals), batch, start)
    return journal, strategy


def done(reward, **kwargs):
    return TrialResult(COMPLETE, reward, {"loss": -reward}, **kwargs)


def test_a_graph_written_twice_is_tried_once(tmp_path):
    # The same graph with the skip in another layer, in the same batch and in a later one.
    same = [(1, 0, 1, 2), (1, 0, 2, 1), (1, 0, 1, 2), (0, 0, 0, 0)]
    task = Scripted({0: done(-2.0), 3: done(-1.0)})
    journal, strategy = run(tmp_path, same, task)
    assert task.ran == [0, 3]
    records = journal.records()
    assert [r.duplicate_of for r in records] == [None, 0, 0, None]
    assert [r.objective for r in records] == [-2.0, -2.0, -2.0, -1.0]
    assert [rewards for _, rewards in strategy.lessons] == [[-2.0, -2.0], [-2.0, -1.0]]


@pytest.mark.parametrize("first", [(0, 2, 0, 0), (0, 0, 0, 2)])
def test_what_a_stage_starts_from_is_tried_first_and_learnt_from(tmp_path, first):
    proposals = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 0, 2, 0), (0, 2, 2, 0)]
    task = Scripted({i: done(-float(i)) for i in range(4)})
    journal, strategy = run(tmp_path, proposals, task, batch=2, start=first)
    tried = [first, *proposals[:1], *proposals[2:]]
    assert [r.choices for r in journal.records()] == tried
    lessons = [(tried[:2], [-0.0, -1.0]), (tried[2:], [-2.0, -3.0])]
    assert strategy.lessons == lessons

    resumed = Recorded(proposals)
    with InlineExecutor(Scripted({})) as runner:
        StageRunner(journal, resumed, runner, Objective(), Pruning()).run(4, 2, first)
    assert resumed.lessons == lessons


def test_a_failed_trial_has_no_reward_and_a_reason(tmp_path):
    proposals = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 0, 2, 0), (0, 2, 0, 0)]
    failed = TrialResult(FAILED, reason="out of memory")
    results = {0: failed, 1: done(-3.0), 2: done(-5.0), 3: failed}
    journal, strategy = run(tmp_path, proposals, Scripted(results))
    lessons = [reward for _, rewards in strategy.lessons for reward in rewards]
    assert lessons == pytest.approx([math.nan, -3.0, -5.0, math.nan], nan_ok=True)
    assert journal.records()[0].result.reason == "out of memory"
    assert math.isnan(journal.records()[3].objective)


class Fragile(InlineExecutor):
    """Loses the worker of trial 1 as often as the task says."""

    def run(self, jobs):
        for job, outcome in super().run(jobs):
            lost = job.index == 1 and self.task.losses > 0
            self.task.losses -= lost
            yield job, WorkerLost("killed by SIGKILL") if lost else outcome


@pytest.mark.parametrize("losses, status", [(1, COMPLETE), (2, FAILED)])
def test_a_lost_worker_costs_its_own_trial_an_attempt(tmp_path, losses, status):
    task = Scripted({0: done(-3.0), 1: done(-5.0)})
    task.losses = losses
    journal, _ = run(tmp_path, [(0, 0, 0, 0), (0, 0, 0, 2)], task, executor=Fragile)
    assert [r.result.status for r in journal.records()] == [COMPLETE, status]
    assert task.ran == [0, 1, 1]
    if status == FAILED:
        assert "killed by SIGKILL" in journal.records()[1].result.reason


def test_the_second_objective_takes_off_what_is_above_the_target():
    objective = Objective("flops", target=2.0, weight=0.5)
    assert objective(done(-1.0, flops=1.5)) == -1.0
    assert objective(done(-1.0, flops=3.0)) == -1.25
    assert Objective("latency", 10.0, 1.0)(done(-1.0, latency=15.0)) == -1.5
    assert Objective()(done(-1.0, flops=99.0)) == -1.0
    assert math.isnan(objective(TrialResult(FAILED)))


def test_thresholds_are_the_quantiles_of_those_that_reached_a_rung():
    pruning = Pruning((10, 20), keep=0.5, startup=3)
    curves = [{10: -float(i), 20: -0.5 * i} if i % 2 == 0 else {10: -float(i)} for i in range(5)]
    assert pruning.thresholds(curves) == ((10, -2.0), (20, -1.0))
    assert pruning.thresholds(curves[:2]) == ((10, -math.inf), (20, -math.inf))
    assert Pruning().thresholds(curves) == ()


def test_pruning_learns_from_trials_of_their_own_in_finished_batches(tmp_path):
    # The third batch is judged by the two before it, of which one trial is a duplicate.
    proposals = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 0, 0, 0), (0, 2, 0, 0), (0, 2, 2, 0), (0, 0, 2, 2)]
    results = {i: done(-float(i), curve=((10, -10.0 * i),)) for i in range(6)}
    task = Scripted(results)
    run(tmp_path, proposals, task, pruning=Pruning((10,), keep=0.5, startup=2))
    thresholds = [job.thresholds[0][1] for job in task.jobs]
    assert thresholds == [-math.inf, -math.inf, -5.0, -10.0, -10.0]


def test_pruning_judges_by_the_objective(tmp_path):
    # The second trial has better rewards, but costs too much.
    proposals = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 2, 0, 0)]
    results = {0: done(-1.0, flops=2.0, curve=((10, -3.0),)),
               1: done(-0.5, flops=6.0, curve=((10, -2.0),)), 2: done(-1.0, flops=2.0)}  # fmt: skip
    task = Scripted(results)
    objective = Objective("flops", target=2.0, weight=3.0)
    pruning = Pruning((10,), keep=0.5, startup=2)
    run(tmp_path, proposals, task, objective=objective, pruning=pruning)
    assert task.jobs[2].thresholds == ((10, -5.5),)  # half way between -3 and -2 - 6


def test_a_stopped_trial_teaches_what_it_would_have_reached(tmp_path):
    # From the rung on, the others gained 2, 4 and, in a later batch, 100.
    proposals = [(0, 0, 0, 0), (0, 0, 0, 2), (0, 2, 0, 0), (0, 2, 2, 0), (0, 0, 2, 2), (0, 0, 2, 0)]
    stopped = TrialResult(PRUNED, -9.0, {"loss": 9.0}, ((10, -9.0),), flops=4.0)
    results = {0: done(-1.0, flops=2.0, curve=((10, -3.0),)),
               1: done(-2.0, flops=2.0, curve=((10, -6.0),)),
               2: stopped, 3: TrialResult(FAILED),
               4: done(-1.0, flops=2.0, curve=((10, -101.0),)), 5: stopped}  # fmt: skip
    objective = Objective("flops", target=2.0, weight=0.5)
    journal, strategy = run(tmp_path, proposals, Scripted(results), objective=objective)
    lessons = [reward for _, rewards in strategy.lessons for reward in rewards]
    assert lessons[:3] == [-1.0, -2.0, -9.0 - 0.5 + 3.0]
    assert math.isnan(lessons[3])
    assert lessons[4:] == [-1.0, -9.0 - 0.5 + 4.0]
    assert journal.records()[2].objective == -9.5

    resumed = Recorded(proposals)
    with InlineExecutor(Scripted({})) as runner:  # the journal holds all results
        StageRunner(journal, resumed, runner, objective, Pruning()).run(6, 2)
    assert str(resumed.lessons) == str(strategy.lessons)  # one of them is nan


def test_what_early_stopping_would_have_done():
    rewards = [-1.0, -2.0, -3.0, -4.0]
    curves = [{10: -1.0}, {10: -3.0}, {10: -2.0}, {10: -4.0}]
    outcome = replay_pruning(rewards, curves, Pruning((10,), 0.5, startup=2), 40, batch=2)
    # The threshold of the second batch is -2, which its first trial just reaches.
    # One of the six pairs is in the opposite order.
    assert outcome == EarlyStopping(30 / 160, 1, 1.0, 0.0, {10: pytest.approx(4 / 6)})
