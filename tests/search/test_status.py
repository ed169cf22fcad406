"""The state of a search in words, from its progress file and its finished trials."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest

from nasfcos.search.records import COMPLETE, FAILED, PRUNED, TrialRecord, TrialResult, ranked
from nasfcos.search.status import (
    FINISHED,
    LOCK_FILE,
    PROGRESS_FILE,
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


@pytest.fixture
def said(tmp_path):
    """Write what a search said at second 1000; gives its folder."""

    def write(phase="search fpn", pid=None, host=None, updated=1000.0, done=None, total=None):
        content = {"phase": phase, "pid": pid or os.getpid(), "updated": updated}
        content |= {"host": host or socket.gethostname(), "done": done, "total": total}
        (tmp_path / PROGRESS_FILE).write_text(json.dumps(content))
        return tmp_path

    return write


# --------------------------------------------------------------------------------------- progress


def test_progress_comes_back_as_written(tmp_path):
    write_progress(tmp_path / "new", "select", done=3, total=20)
    read = read_progress(tmp_path / "new")
    assert (read.phase, read.pid, read.host) == ("select", os.getpid(), socket.gethostname())
    assert (read.done, read.total) == (3, 20)
    write_progress(tmp_path / "new", "neck")
    assert read_progress(tmp_path / "new").phase == "neck"
    assert [p.name for p in (tmp_path / "new").iterdir()] == [PROGRESS_FILE]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"phase": "x"}', b"\xff\xfe"])
def test_progress_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / PROGRESS_FILE).write_bytes(content)
    assert read_progress(tmp_path) is None


@pytest.fixture
def running(tmp_path):
    """A process that holds the lock of the folder, as a search does."""
    code = f"""
import time
from filelock import FileLock
with FileLock({str(tmp_path / LOCK_FILE)!r}):
    print("locked", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_whether_the_search_runs(said, running, tmp_path):
    assert is_running(tmp_path, read_progress(said(pid=running.pid))) is True
    assert is_running(tmp_path, read_progress(said(host="elsewhere"))) is None
    running.kill()
    running.wait()
    # Another process may have its number by now: here it is that of the test itself.
    assert is_running(tmp_path, read_progress(said(pid=os.getpid()))) is False
    (tmp_path / LOCK_FILE).unlink(missing_ok=True)
    assert is_running(tmp_path, read_progress(said())) is False
    assert not (tmp_path / LOCK_FILE).exists()


# ----------------------------------------------------------------------------------------- trials


def test_the_rate_is_that_of_the_last_twenty_trials():
    slow_then_fast = steady(30, every=600, seconds=600.0) + [
        trial(30 + i, finished=18_400 + 30 * (i + 1), seconds=30.0, batch=1 + i // 20)
        for i in range(23)
    ]
    assert trials_per_hour(slow_then_fast) == pytest.approx(120)
    assert trials_per_hour(list(reversed(slow_then_fast))) == pytest.approx(120)
    assert trials_per_hour(slow_then_fast[:31]) == pytest.approx(6)
    assert math.isnan(trials_per_hour([])) and math.isnan(trials_per_hour([trial(0, seconds=0.0)]))
    assert trials_per_hour(steady(1)) == pytest.approx(60)


def test_a_stop_over_night_does_not_count_for_the_rate():
    before = steady(5, every=60, seconds=60.0)
    after = [trial(5 + i, finished=90_000 + 60 * i, seconds=60.0) for i in range(5)]
    assert trials_per_hour(before + after) == pytest.approx(60)


def test_parallel_workers_add_up():
    # Four workers, each trial takes a minute, and four end at the same moment.
    records = [trial(i, finished=1000 + 60 * (i // 4)) for i in range(20)]
    for some in (records[:4], records):
        assert trials_per_hour(some) == pytest.approx(240)
    # Of many that end at nearly the same moment, in batches of two waves, half of the third done.
    records = [
        trial(i, finished=1000 + 60 * (i // 32) + 0.05 * (i % 32), batch=i // 64)
        for i in range(144)
    ]
    assert trials_per_hour(records) == pytest.approx(32 * 60, rel=0.03)


def test_a_stage_in_a_line():
    records = steady(10)
    records[3] = trial(3, -1.5, finished=1180)
    records[4] = trial(4, -1.0, status=PRUNED, finished=1240)
    records[5] = trial(5, -9.0, status=FAILED, finished=1300)
    records[6] = trial(6, -1.5, finished=1360, duplicate_of=3)
    line = format_stage("fpn", records, 40)
    assert line == (
        "fpn: 10 of 40 trials, best -1.5000 (trial 3), 54 trials/h, 00:30:00 left, "
        "1 failed, 1 pruned, 1 reused"
    )


def test_the_best_is_that_of_the_objective():
    records = [trial(0, -1.0, objective=-3.0), trial(1, -2.0, objective=-2.0)]
    assert [record.index for record in ranked(records)] == [1, 0]
    assert format_stage("head", records, 2) == "head: 2 of 2 trials, best -2.0000 (trial 1)"
    assert "best -3.0000 (trial 0, reward -1.0000)" in format_stage("head", records[:1], 2)


@pytest.mark.parametrize(
    "records",
    [[], [trial(0, status=FAILED)], [trial(0, math.nan, objective=math.nan)],
     [trial(i, -math.inf, status=FAILED) for i in range(5)]],
    ids=["none", "failed", "nan", "all failed"],
)  # fmt: skip
def test_a_stage_without_a_reward(records):
    assert ranked(records) == []
    assert format_stage("fpn", records, 5).startswith(f"fpn: {len(records)} of 5 trials")


# --------------------------------------------------------------------------------------- together


def test_a_running_search(said, running):
    text = format_status(
        said("search head", pid=running.pid, done=0, total=20),
        [("fpn", steady(40), 40), ("head", [], 20)],
        now=1030.0,
    )
    process, phase, fpn, head = text.splitlines()
    here = f"process {running.pid} on {socket.gethostname()}"
    assert process == f"running: {here}, last word 00:00:30 ago"
    assert phase == "phase: search head 0 of 20"
    assert fpn == "fpn: 40 of 40 trials, best -2.0000 (trial 0)"
    assert head == "head: 0 of 20 trials"


def test_a_stopped_silent_finished_or_distant_search(said, gone, running, tmp_path):
    def first(folder, now):
        return format_status(folder, [], now).splitlines()[0]

    assert "log.txt" in first(said(), 8200.0)
    running.kill()
    running.wait()
    assert first(said(pid=gone), 4600.0) == (
        f"stopped: process {gone} on {socket.gethostname()} is gone, last word 01:00:00 ago; "
        "--resume goes on"
    )
    assert first(said(FINISHED, pid=gone), 1060.0) == "finished 00:01:00 ago"
    assert "cannot be seen from here whether it runs" in first(said(host="elsewhere"), 1060.0)
    assert "no search has run" in first(tmp_path / "none", 1000.0)


def test_a_process_that_says_so_itself_runs(tmp_path, running):
    write_progress(tmp_path, "neck")
    assert format_status(tmp_path, []).startswith("running")


def test_nothing_is_left_of_a_search_that_has_ended(said):
    assert "00:30:00 left" in format_status(said(), [("fpn", steady(10), 40)])
    assert "left" not in format_status(said(FINISHED), [("fpn", steady(10), 40)])


def test_steps_of_a_phase(said):
    assert format_status(said("prepare"), []).splitlines()[1] == "phase: prepare"
    text = format_status(said("prepare", done=0, total=4), [])
    assert text.splitlines()[1] == "phase: prepare 0 of 4"
