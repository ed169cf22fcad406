"""The state of a search in words, from its progress file and its finished trials."""

import math
import os
import socket
import subprocess
import sys

import pytest

from nasfcos.search.records import COMPLETE, FAILED, PRUNED, TrialRecord, TrialResult
from nasfcos.search.status import (
    PROGRESS_FILE,
    Progress,
    StageStatus,
    format_seconds,
    format_stage,
    format_status,
    is_running,
    read_progress,
    trials_per_hour,
    write_progress,
)


def trial(index, reward=-2.0, *, status=COMPLETE, finished=0.0, seconds=60.0, **rest):
    result = TrialResult(status, reward if status != FAILED else math.nan, seconds=seconds)
    values = {"batch": 0, "choices": (), "key": str(index), "genotype": [], "objective": reward}
    return TrialRecord(index, result=result, finished=finished, **{**values, **rest})


def steady(count, every=60.0, **rest):
    return [trial(i, finished=1000 + every * i, **rest) for i in range(count)]


@pytest.fixture
def gone():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def progress(phase="search fpn", pid=None, host=None, updated=1000.0, **figures):
    return Progress(phase, pid or os.getpid(), host or socket.gethostname(), updated, figures)


# --------------------------------------------------------------------------------------- progress


def test_progress_comes_back_as_written(tmp_path):
    write_progress(tmp_path / "new", "select", done=3, total=20, config="a.yaml")
    read = read_progress(tmp_path / "new")
    assert (read.phase, read.pid, read.host) == ("select", os.getpid(), socket.gethostname())
    assert read.figures == {"done": 3, "total": 20, "config": "a.yaml"}
    write_progress(tmp_path / "new", "neck")
    assert read_progress(tmp_path / "new").phase == "neck"
    assert [p.name for p in (tmp_path / "new").iterdir()] == [PROGRESS_FILE]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"phase": "x"}', b"\xff\xfe"])
def test_progress_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / PROGRESS_FILE).write_bytes(content)
    assert read_progress(tmp_path) is None


def test_whether_the_process_is_alive(gone):
    assert is_running(progress()) is True
    assert is_running(progress(pid=gone)) is False
    assert is_running(progress(host="elsewhere")) is None
    assert is_running(progress(pid=1)) is True  # also where it belongs to another user


# ----------------------------------------------------------------------------------------- trials


def test_the_rate_is_that_of_the_last_twenty_trials():
    slow_then_fast = steady(30, every=600) + [
        trial(30 + i, finished=1000 + 600 * 29 + 30 * (i + 1)) for i in range(20)
    ]
    assert trials_per_hour(slow_then_fast) == pytest.approx(120)
    assert trials_per_hour(list(reversed(slow_then_fast))) == pytest.approx(120)
    assert math.isnan(trials_per_hour([])) and math.isnan(trials_per_hour(steady(1)))


def test_a_stop_over_night_does_not_count_for_the_rate():
    before = steady(5, every=60, seconds=60.0)
    after = [trial(5 + i, finished=90_000 + 60 * i, seconds=60.0) for i in range(5)]
    assert trials_per_hour(before + after) == pytest.approx(60)


def test_parallel_workers_add_up():
    # Four workers, each trial takes a minute, and four end at the same moment.
    records = [trial(i, finished=1000 + 60 * (i // 4)) for i in range(20)]
    assert 220 < trials_per_hour(records) < 300
    assert math.isnan(trials_per_hour(records[:4]))  # no time has passed between them


def test_a_stage_in_a_line():
    records = steady(10)
    records[3] = trial(3, -1.5, finished=1180)
    records[4] = trial(4, -1.0, status=PRUNED, finished=1240)
    records[5] = trial(5, -9.0, status=FAILED, finished=1300)
    records[6] = trial(6, -1.5, finished=1360, reused=3)
    line = format_stage(StageStatus("fpn", records, 40))
    assert line == (
        "fpn: 10 of 40 trials, best -1.5000 (trial 3), 53.3 trials/h, 30 min left, "
        "1 failed, 1 pruned, 1 reused"
    )


def test_the_best_is_that_of_the_objective():
    records = [trial(0, -1.0, objective=-3.0), trial(1, -2.0, objective=-2.0)]
    stage = StageStatus("head", records, 2)
    assert stage.best.index == 1
    assert format_stage(stage) == "head: 2 of 2 trials, best -2.0000 (trial 1)"


@pytest.mark.parametrize(
    "records",
    [[], [trial(0, status=FAILED)], [trial(0, math.nan, objective=math.nan)],
     [trial(i, -math.inf, status=FAILED) for i in range(5)]],
    ids=["none", "failed", "nan", "all failed"],
)  # fmt: skip
def test_a_stage_without_a_reward(records):
    stage = StageStatus("fpn", records, 5)
    assert stage.best is None
    assert format_stage(stage).startswith(f"fpn: {len(records)} of 5 trials")


# --------------------------------------------------------------------------------------- together


def test_a_running_search():
    text = format_status(
        [StageStatus("fpn", steady(40), 40), StageStatus("head", [], 20)],
        progress("search head", done=0, total=20),
        now=1030.0,
    )
    process, phase, fpn, head = text.splitlines()
    here = f"process {os.getpid()} on {socket.gethostname()}"
    assert process == f"running: {here}, last word 30 s ago"
    assert phase == "phase: search head 0 of 20"
    assert fpn == "fpn: 40 of 40 trials, best -2.0000 (trial 0)"
    assert head == "head: 0 of 20 trials"


def test_a_stopped_silent_finished_or_distant_search(gone):
    def first(*args, **kwargs):
        return format_status([], *args, **kwargs).splitlines()[0]

    assert first(progress(pid=gone), now=4600.0) == (
        f"stopped: process {gone} on {socket.gethostname()} is gone, last word 1 h ago; "
        "--resume goes on"
    )
    assert "it may hang" in first(progress(), now=8200.0)
    assert first(progress("", pid=gone), now=1060.0) == "finished 1 min ago"
    assert "cannot be seen whether it runs" in first(progress(host="elsewhere"), now=1060.0)
    assert first(None) == "no search has written its progress here"


def test_figures_of_a_phase():
    text = format_status([], progress("prepare", iteration=200, loss=1.23456), now=1000.0)
    assert text.splitlines()[1] == "phase: prepare, iteration 200, loss 1.235"


@pytest.mark.parametrize(
    "seconds, text",
    [(-3, "0 s"), (0.4, "0 s"), (59.6, "1 min"), (310, "5 min 10 s"), (3599.7, "1 h"),
     (12_000, "3 h 20 min"), (86_390, "1 d"), (187_200, "2 d 4 h"), (86_400 * 30, "30 d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_seconds(seconds) == text
