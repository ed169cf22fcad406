"""Complete jobs on the command line: killed, stopped, and with several processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nasfcos.config import load_config
from nasfcos.engine.checkpoint import CONTENT, load_checkpoint, save_checkpoint
from nasfcos.models import build_detector

ROOT = Path(__file__).parents[2]
PLAIN = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class Job:
    """A running tool; its output is read at the end."""

    def __init__(self, tool, config_file, *arguments, launcher=PLAIN, cwd, env=()):
        self.process = subprocess.Popen(
            [*launcher, ROOT / "tools" / tool, "--config-file", config_file, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)},
            start_new_session=True,  # a process group of its own
        )

    def wait_for(self, path, seconds=60):
        """Wait until `path` exists; fails if the job ends before."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert self.process.poll() is None, self.end()[1]
            assert time.monotonic() < deadline, f"{path} does not come"
            time.sleep(0.01)

    def end(self, timeout=120):
        """Wait for the end; returns (exit code, output)."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output


@pytest.fixture
def job(config_file, tmp_path):
    """Starts tools with the tiny config; those still running after the test are killed."""
    jobs = []

    def start(tool, *arguments, output="out", **kwargs):
        arguments = [*arguments, "OUTPUT_DIR", tmp_path / output]
        jobs.append(Job(tool, config_file, *arguments, cwd=tmp_path, **kwargs))
        return jobs[-1]

    yield start
    for started in jobs:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


def succeed(job):
    code, output = job.end()
    assert code == 0, output
    return output


def weights(folder, name="model_final.pth"):
    return load_checkpoint(folder / name)["model"]


def save_untrained(config_file, path):
    """Save a checkpoint of the tiny config's detector before any training."""
    model = build_detector(load_config(config_file))
    state = dict.fromkeys(CONTENT) | {"model": model.state_dict(), "iteration": 1}
    save_checkpoint(state, path)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_a_killed_and_resumed_run_ends_bit_identical(job, tmp_path):
    overrides = ("SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 5, "DATALOADER.NUM_WORKERS", 1)
    cut = job("train_net.py", "--skip-test", *overrides, output="cut")
    cut.wait_for(tmp_path / "cut" / "model_0000010.pth")
    cut.process.kill()
    cut.end()
    assert not (tmp_path / "cut" / "model_final.pth").exists()
    output = succeed(job("train_net.py", "--resume", "--skip-test", *overrides, output="cut"))
    assert re.search(r"resuming from .*model_00000(10|15|20)\.pth", output)

    succeed(job("train_net.py", "--skip-test", *overrides, output="whole"))
    one, other = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == sorted(set(iterations)) and set(range(2, 25, 2)) < set(iterations)


def test_two_machines(job, tmp_path):
    """The README's launch on two machines, here two launchers on one."""
    endpoint = f"localhost:{free_port()}"
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}")  # fmt: skip
    machines = [
        job(
            "train_net.py", "--skip-test", output="machines",
            launcher=(sys.executable, *launcher, f"--node-rank={rank}"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [succeed(machine) for machine in machines]
    assert sum(output.count("saved ") for output in outputs) == 3  # by one process only
    succeed(job("train_net.py", "--skip-test", "SOLVER.ACCUMULATE", 2, output="one"))
    assert_same_training(weights(tmp_path / "machines"), weights(tmp_path / "one"))


def assert_same_training(one, other):
    """Two processes against one process with two gradient-accumulation steps: both normalise losses
    and batch norms over half of the batch."""
    for name in one:
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)


def test_two_processes_are_one_with_its_batch_in_two_parts(job, tmp_path):
    launch = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port", free_port())
    two = job(
        "train_net.py", launcher=(sys.executable, *map(str, launch)), output="two",
    )  # fmt: skip
    output = succeed(two)
    assert "2 process(es)" in output
    assert output.count("saved ") == 3  # only one process writes and logs
    assert (tmp_path / "two" / "log_rank1.txt").exists()
    succeed(job("train_net.py", "--skip-test", "SOLVER.ACCUMULATE", 2, output="one"))
    assert_same_training(weights(tmp_path / "one"), weights(tmp_path / "two"))
    states = load_checkpoint(tmp_path / "two" / "model_final.pth")["random"]
    assert len(states) == 2

    # One process testing the same weights finds the same detections: none twice, none missing.
    weight = tmp_path / "two" / "model_final.pth"
    single = ("MODEL.WEIGHT", weight, "TEST.IMS_PER_BATCH", 1)
    output = succeed(job("test_net.py", *single, output="single"))
    results = [
        json.loads((tmp_path / folder / "inference" / "val" / "bbox.json").read_text())
        for folder in ("two", "single")
    ]
    keys = [[(r["image_id"], r["category_id"]) for r in found] for found in results]
    assert keys[0] == keys[1] and len({image for image, _ in keys[0]}) == 7
    for a, b in zip(*results, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)
    assert "AP50" in output and "red" in output


def test_sigterm_to_the_launcher_saves_on_the_way_out(job, tmp_path):
    running = job("train_net.py", "SOLVER.MAX_ITER", 100_000, launcher=TORCHRUN)
    running.wait_for(tmp_path / "out" / "model_0000006.pth")
    running.process.send_signal(signal.SIGTERM)
    code, output = running.end()
    assert code != 0
    saved = re.search(r"stopped after iteration (\d+); --resume goes on from (\S+)", output)
    assert saved, output
    assert load_checkpoint(saved[2])["iteration"] == int(saved[1])


def test_sigterm_to_the_whole_group_loses_nothing(job, tmp_path):
    running = job(
        "train_net.py", "SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 100_000,
        "DATALOADER.NUM_WORKERS", 1, "INPUT.MIN_SIZE_TRAIN", "(640,)",
    )  # fmt: skip
    running.wait_for(tmp_path / "out" / "metrics.jsonl")
    time.sleep(1)
    os.killpg(running.process.pid, signal.SIGTERM)
    code, output = running.end()
    assert code == 128 + signal.SIGTERM
    saved = re.search(r"stopped after iteration (\d+); --resume goes on from (\S+)", output)
    assert saved, output
    assert load_checkpoint(saved[2])["iteration"] == int(saved[1])


def test_the_job_ends_when_one_process_is_gone(job, tmp_path):
    running = job("train_net.py", "SOLVER.MAX_ITER", 100_000, launcher=TORCHRUN)
    running.wait_for(tmp_path / "out" / "model_0000003.pth")
    children = subprocess.run(
        ["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    code, _ = running.end(timeout=60)
    assert code != 0


def test_divergence_ends_every_process_with_a_message(job, tmp_path):
    code, output = job(
        "train_net.py", "SOLVER.BASE_LR", 1e6, "SOLVER.MAX_ITER", 50, launcher=TORCHRUN
    ).end()
    assert code != 0
    said = []
    for name in ("log.txt", "log_rank1.txt"):
        log = (tmp_path / "out" / name).read_text()
        said += re.findall(r"ERROR .*(iteration \d+: the loss is not finite .*\.png)", log)
        assert "Traceback" not in log
    assert len(said) == 2 and said[0] == said[1]
    assert said[0] in output
    assert not (tmp_path / "out" / "model_final.pth").exists()


def test_interrupted_from_the_keyboard(job, tmp_path):
    running = job(
        "train_net.py", "SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 50_000
    )  # fmt: skip
    running.wait_for(tmp_path / "out" / "metrics.jsonl")
    running.process.send_signal(signal.SIGINT)
    code, output = running.end()
    assert code == 130, output
    assert "--resume goes on from" in output and "Traceback" not in output
    assert list((tmp_path / "out").glob("model_*.pth"))


def test_a_console_that_goes_away_ends_no_training(job, tmp_path):
    running = job("train_net.py")
    running.process.stdout.readline()
    running.process.stdout.close()  # as when a `tee` at the end of a pipe exits
    assert running.process.wait(timeout=120) == 0
    assert (tmp_path / "out" / "inference" / "val" / "metrics.json").exists()
    assert "iteration 8/8" in (tmp_path / "out" / "log.txt").read_text()


def test_machines_that_do_not_share_the_output_folder_are_told_so(config_file, tmp_path):
    save_untrained(config_file, tmp_path / "0" / "out" / "model_final.pth")
    (tmp_path / "1").mkdir()
    port = str(free_port())
    machines = [
        Job(
            "test_net.py", config_file, "OUTPUT_DIR", "out", cwd=tmp_path / str(rank),
            env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, output), (second, message) = [machine.end(60) for machine in machines]
    assert second == 2 and "Traceback" not in message
    assert "out/model_final.pth" in message and "OUTPUT_DIR must be a folder" in message
    assert first != 0, output


def test_prediction_takes_options_and_config_keys_in_any_order(job, data_root, tmp_path):
    arguments = ("MODEL.DEVICE", "cpu", "--input", data_root / "val" / "images" / "001.png")
    code, output = job("predict.py", *arguments, "--output", "found").end()
    assert code == 2 and "has no checkpoint" in output  # all arguments were accepted


def test_an_interrupted_prediction_says_where_its_pictures_are(
    job, config_file, data_root, tmp_path
):
    save_untrained(config_file, tmp_path / "out" / "model_final.pth")
    (tmp_path / "many").mkdir()
    for number in range(2000):
        link = tmp_path / "many" / f"{number:04d}.png"
        link.symlink_to(data_root / "val" / "images" / "001.png")
    running = job("predict.py", "--input", "many", "--output", "found")
    running.wait_for(tmp_path / "found" / "0000.png")
    running.process.send_signal(signal.SIGINT)
    code, output = running.end()
    assert code == 130 and "Traceback" not in output
    assert "finished are in found" in output and "--resume" not in output
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert 0 < len(found) < 2000


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("train_net.py", ("SEED", -1, "--resume", "SOLVER.BASE_LRR", 1), "SOLVER.BASE_LR"),
        ("train_net.py", ("MODEL.WEIGHT", "nowhere.pth"), "nowhere.pth"),
        ("test_net.py", (), "MODEL.WEIGHT"),
    ],
)
def test_what_the_user_has_to_mend_is_said_shortly(job, tool, arguments, words):
    code, output = job(tool, *arguments).end()
    assert code == 2
    assert words in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "32", "64"), "at least 64 pixels"),
        (("--output", "."), "no demo data set; name another folder"),
    ],
)
def test_what_the_user_has_to_mend_in_the_demo_data_is_said_shortly(tmp_path, arguments, words):
    (tmp_path / "thesis.txt").write_text("x")
    command = [sys.executable, ROOT / "tools" / "make_demo_data.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_one_is_named_by_its_key(job):
    code, output = job("test_net.py", output="tiny.yaml").end()  # an existing file
    assert code == 2 and re.search(r"OUTPUT_DIR .*tiny.yaml cannot be written to", output), output
