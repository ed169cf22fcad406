"""Executors with real processes, which really die."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nasfcos.config import ConfigError, get_defaults
from nasfcos.engine.distributed import available_cores
from nasfcos.search.executors import (
    ExecutorError,
    InlineExecutor,
    LocalExecutor,
    RayExecutor,
    WorkerLost,
    build_executor,
    cluster,
    local,
    pool,
    share_out,
    visible_gpus,
)
from nasfcos.search.records import COMPLETE, TrialJob, TrialResult


@dataclass
class Play:
    """A task that does what the job's "genotype" says: [action, argument]."""

    folder: Path | None = None
    opening: float = 0.0

    def open(self):
        time.sleep(self.opening)

    def run(self, job):
        what, argument = job.genotype
        if what == "sleep":
            time.sleep(argument)
        elif what == "exit":
            os._exit(argument)
        elif what == "kill":
            os.kill(os.getpid(), argument)
        elif what == "raise":
            raise LookupError(argument)
        elif what == "note":  # (file for the worker's process id, seconds)
            name, seconds = argument
            (self.folder / name).write_text(str(os.getpid()))
            time.sleep(seconds)
        elif what == "meet":  # wait until both workers are here
            (self.folder / f"{argument}.{os.getpid()}").touch()
            wait_for(lambda: len(list(self.folder.glob(f"{argument}.*"))) == 2)
        elif what == "place":
            time.sleep(0.2)  # so that another worker gets a job
            return TrialResult(
                COMPLETE, reward=torch.get_num_threads(), reason=str(os.environ.get(argument))
            )
        return TrialResult(COMPLETE, reward=-float(job.index))


class Unloadable:
    """A task that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (7,)


def job(index, what="sleep", argument=0.0):
    return TrialJob(index, [what, argument])


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def read_when_there(note):
    wait_for(lambda: note.exists() and note.read_text())
    return int(note.read_text())


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    task = Play(tmp_path_factory.mktemp("notes"))
    with LocalExecutor(task, gpus=("3", "GPU-5")) as executor:
        yield executor


def test_inline_runs_in_order_and_lazily():
    taken = []

    def jobs():
        for index in range(3):
            taken.append(index)
            yield job(index)

    with InlineExecutor(Play()) as executor:
        for i, (done, result) in enumerate(executor.run(jobs())):
            assert (done.index, result.reward) == (i, -i)
            assert taken == list(range(i + 1))
        with pytest.raises(LookupError):
            list(executor.run([job(0, "raise", "no cache")]))


def test_workers_give_results_as_they_finish_and_take_jobs_when_free(pair):
    list(pair.run([job(i, "meet", "ready") for i in range(2)]))
    taken = []

    def jobs():
        for index, seconds in enumerate((1.5, 0.0, 0.0, 0.0)):
            taken.append(index)
            yield job(index, "sleep", seconds)

    done = []
    for finished, result in pair.run(jobs()):
        assert (result.status, result.reward) == (COMPLETE, -finished.index)
        done.append(finished.index)
        assert len(taken) <= len(done) + 2
    assert done == [1, 2, 3, 0]
    assert list(pair.run([])) == []


def test_cores_and_gpus_are_shared_out(pair):
    cores = max(1, available_cores() // 2)
    for _, result in pair.run([job(i, "place", "OMP_NUM_THREADS") for i in range(2)]):
        assert (result.reward, result.reason) == (cores, str(cores))
    list(pair.run([job(i, "meet", "places") for i in range(2)]))
    places = [job(i, "place", "CUDA_VISIBLE_DEVICES") for i in range(4)]
    gpus = {result.reason for _, result in pair.run(places)}
    assert gpus == {"3", "GPU-5"}


def test_a_worker_that_dies_takes_only_its_trial_with_it(pair):
    jobs = [job(0), job(1, "exit", 3), job(2), job(3, "kill", signal.SIGKILL), job(4), job(5)]
    outcomes = {}
    for finished, outcome in pair.run(jobs):
        assert finished.index not in outcomes
        outcomes[finished.index] = outcome
    assert sorted(outcomes) == list(range(6))
    assert outcomes.pop(1) == WorkerLost("exit code 3")
    lost = outcomes.pop(3)
    assert isinstance(lost, WorkerLost) and lost.reason.startswith("killed by SIGKILL")
    assert all(outcome.reward == -index for index, outcome in outcomes.items())
    assert len(list(pair.run([job(i) for i in range(4)]))) == 4


def test_leaving_a_run_ends_its_trials(pair):
    jobs = [job(0, "note", ("left", 60.0)), job(1)]
    for finished, _ in pair.run(jobs):
        assert finished.index == 1
        process_id = read_when_there(pickle.loads(pair._task).folder / "left")
        break
    wait_for(lambda: not is_alive(process_id))
    # The job that was left does not come back.
    assert [finished.index for finished, _ in pair.run([job(7)])] == [7]


def test_what_a_task_raises_ends_the_run(pair):
    with pytest.raises(ExecutorError, match="in trial 4(.|\n)*LookupError: the cache is gone"):
        list(pair.run([job(4, "raise", "the cache is gone")]))


def test_workers_that_never_start_are_an_error(monkeypatch):
    monkeypatch.setattr(pool, "MAX_START_FAILURES", 2)
    with LocalExecutor(Unloadable(), workers=1) as executor:
        with pytest.raises(ExecutorError, match="2 workers in a row died while .*: exit code 7"):
            list(executor.run([job(0)]))


def test_a_worker_that_hangs_is_told_of(pair, monkeypatch, caplog):
    monkeypatch.setattr(local, "SILENT", 0.2)
    list(pair.run([job(6, "sleep", 1.0)]))
    assert "trial 6 in process " in caplog.text and "kill its process" in caplog.text


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    cfg = get_defaults()
    cfg.MODEL.DEVICE, cfg.SEARCH.EXECUTOR, cfg.SEARCH.WORKERS = "cpu", "local", 2
    cfg.SEARCH.TRIAL_TIMEOUT = 2
    # The time limit does not include the opening of the task.
    with build_executor(cfg, Play(tmp_path, opening=2.5)) as executor:
        list(executor.run([job(i, "meet", "ready") for i in range(2)]))
        jobs = [job(0, "note", ("slow", 60.0)), *(job(i, "sleep", 0.2) for i in range(1, 4))]
        outcomes = {finished.index: outcome for finished, outcome in executor.run(jobs)}
        assert outcomes.pop(0) == WorkerLost("it took longer than 00:00:02")
        assert not is_alive(read_when_there(tmp_path / "slow"))
        assert {i: outcome.reward for i, outcome in outcomes.items()} == {1: -1, 2: -2, 3: -3}
        assert len(list(executor.run(jobs[1:]))) == 3


def test_workers_that_only_die_are_an_error(monkeypatch):
    monkeypatch.setattr(pool, "MAX_DEATHS", 2)
    with LocalExecutor(Play(), workers=1) as executor:
        # Deaths by one and the same trial are no error.
        for _ in range(2):
            [(_, outcome)] = executor.run([job(1, "exit", 9)])
            assert isinstance(outcome, WorkerLost)
        list(executor.run([job(0)]))
        lost = []
        with pytest.raises(ExecutorError, match="2 workers in a row died before they finished"):
            for finished, outcome in executor.run(job(i, "exit", 9) for i in range(2, 9)):
                assert isinstance(outcome, WorkerLost)
                lost.append(finished.index)
    assert lost == [2]


MAIN = """
import signal
import sys
from pathlib import Path
from nasfcos.search.executors import LocalExecutor
from tests.search.test_executors import Play, job

if __name__ == "__main__":
    # Tests started by a shell in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1])
    with LocalExecutor(Play(folder), workers=1) as executor:
        list(executor.run([job(0, "note", ("worker", 120.0))]))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("how", ["the main process is killed", "Ctrl-C"])
def test_no_worker_outlives_the_main_process(tmp_path, how):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    root = Path(__file__).parents[2]
    main = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        worker = read_when_there(tmp_path / "worker")
        assert is_alive(worker)
        if how == "Ctrl-C":
            os.killpg(main.pid, signal.SIGINT)
        else:
            main.kill()
        wait_for(lambda: not is_alive(worker))
        errors = main.communicate(timeout=60)[1]
    finally:
        main.kill()
    if how == "Ctrl-C":
        assert errors.count("KeyboardInterrupt") == 1, "the workers have nothing to say"


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "expected"),
    [
        ([2], [0], 1, (1, 2.0, 0.0)),
        ([2], [0], 0, (2, 1.0, 0.0)),
        ([2], [0], 4, (4, 0.5, 0.0)),
        ([16, 16, 16, 16], [0] * 4, 6, (6, 8.0, 0.0)),
        ([64, 8], [0, 0], 3, (3, 21.0, 0.0)),
        ([32, 32], [4, 4], 0, (8, 8.0, 1.0)),
        ([32, 32], [4, 4], 2, (2, 32.0, 1.0)),
        ([32, 32], [4, 4], 16, (16, 4.0, 0.5)),
        ([64, 16], [0, 2], 2, (2, 8.0, 1.0)),
        ([16, 1], [0, 4], 4, (4, 0.25, 1.0)),
    ],
)
def test_a_cluster_is_shared_out_so_that_all_workers_fit(cpus, gpus, workers, expected):
    assert share_out(cpus, gpus, workers) == expected


def test_ray_survives_the_loss_of_a_worker(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "available_cores", lambda: 3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    with RayExecutor(Play(tmp_path), workers=2, use_gpus=False, folders=[tmp_path]) as executor:
        assert signal.getsignal(signal.SIGTERM) is handler
        jobs = [job(0, "note", ("victim", 120.0)), *(job(i) for i in range(1, 5))]
        outcomes = {}
        for finished, outcome in executor.run(jobs):
            outcomes[finished.index] = outcome
            if len(outcomes) == 1:
                os.kill(read_when_there(tmp_path / "victim"), signal.SIGKILL)
        assert isinstance(outcomes.pop(0), WorkerLost)
        assert {i: outcome.reward for i, outcome in outcomes.items()} == {
            i: -i for i in range(1, 5)
        }
        executor._timeout = 3.0
        jobs = [job(5, "note", ("slow", 60.0)), job(6)]
        outcomes = {finished.index: outcome for finished, outcome in executor.run(jobs)}
        assert outcomes[5] == WorkerLost("it took longer than 00:00:03")
        assert outcomes[6].reward == -6
        wait_for(lambda: not is_alive(read_when_there(tmp_path / "slow")))
        with pytest.raises(ExecutorError, match="LookupError"):
            list(executor.run([job(4, "raise", "the cache is gone")]))
        elsewhere = RayExecutor(Play(), 3, False, folders=[tmp_path / "not shared"])
        with pytest.raises(ExecutorError, match="does not have .*not shared.*SEARCH.CACHE.FOLDER"):
            list(elsewhere.run([job(0)]))
        elsewhere.close()
        assert ray.is_initialized(), "it belongs to the first executor"
    assert not ray.is_initialized()


@pytest.mark.slow
def test_ray_goes_on_without_a_machine_that_is_lost(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Two Ray nodes, each with its own store, scheduler and workers, as on two machines.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with RayExecutor(Play(tmp_path), use_gpus=False, folders=[tmp_path]) as executor:
            list(executor.run([job(0, "meet", "both"), job(1, "meet", "both")]))
            jobs = [job(i, "note", (f"job {i}", 2.0)) for i in range(6)]
            outcomes = {}
            for finished, outcome in executor.run(jobs):
                if not outcomes:
                    wait_for(lambda: len(list(tmp_path.glob("job *"))) >= 2)
                    cluster.remove_node(lost, allow_graceful=False)
                outcomes[finished.index] = outcome
            again = [jobs[i] for i, outcome in outcomes.items() if isinstance(outcome, WorkerLost)]
            assert len(outcomes) == 6 and len(again) == 1
            ((_, outcome),) = executor.run(again)
            assert outcome.reward == -again[0].index
    finally:
        cluster.shutdown()


def test_one_gpu_by_name_cannot_be_shared_out():
    cfg = get_defaults()
    assert isinstance(build_executor(cfg, Play()), InlineExecutor)
    cfg.SEARCH.EXECUTOR, cfg.MODEL.DEVICE = "local", "cuda:1"
    with pytest.raises(ConfigError, match="MODEL.DEVICE cuda:1 is one GPU"):
        build_executor(cfg, Play())


def test_gpus_are_named_as_the_environment_names_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7")
    assert visible_gpus() == ("2", "GPU-7")
