"""File locks, on file systems with and without support for them."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from filelock import Timeout

from nasfcos.config import ConfigError
from nasfcos.locks import locked, only_one, unless_held

HOLDER = """
import sys, time
from pathlib import Path
from nasfcos.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_keeps_others_out_and_ends_with_a_killed_process(tmp_path, holder):
    with pytest.raises(Timeout), locked(tmp_path / "lock", timeout=0.1):
        pass
    with pytest.raises(ConfigError, match="busy"), only_one(tmp_path / "lock", "busy", 0.1):
        pass
    with unless_held(tmp_path / "lock") as free:
        assert free is False
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "lock", timeout=0.1):
        pass
    with unless_held(tmp_path / "lock") as free:
        assert free is True
        with pytest.raises(Timeout), locked(tmp_path / "lock", timeout=0.1):
            pass


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, caplog, error):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", timeout=0.1):  # stands for a killed holder
        with only_one(tmp_path / "lock", "busy", 0.1):
            pass
    assert "this file system has no locks" in caplog.text
    with unless_held(tmp_path / "lock") as free:
        assert free is None


def test_other_errors_are_not_taken_for_want_of_locks(tmp_path):
    with pytest.raises(IsADirectoryError), locked(tmp_path, timeout=0.1):
        pass
