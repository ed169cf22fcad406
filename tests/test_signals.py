"""Signals at moments when Python ignores exceptions."""

import os
import signal
import subprocess
import sys

import pytest

from nasfcos.signals import Interrupted, StopRequest, signals_deferred

FORKING = """
import multiprocessing, os, signal
from torch.utils.data import DataLoader
from nasfcos.data.build import BatchLoader
from nasfcos.signals import Interrupted, StopRequest

os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
loader = DataLoader(
    [0], num_workers=1, collate_fn=lambda x: (x, []), multiprocessing_context="fork"
)
batches = iter(BatchLoader(loader))
try:
    with StopRequest() as stop, stop.heeded_at_once():
        next(batches)
        print("went on")
except Interrupted as error:
    print(error.signum == signal.SIGTERM, multiprocessing.active_children())
"""


def test_a_signal_while_the_loaders_workers_start_is_heeded():
    result = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "True []\n", result.stderr
    assert "Exception ignored" not in result.stderr


def test_deferred_signals_reach_the_handler_after_the_block():
    reached = []
    with StopRequest() as stop, pytest.raises(Interrupted), stop.heeded_at_once():
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end")
        reached.append("beyond")
    assert reached == ["the end"]
    assert stop.signum == signal.SIGINT


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_was_dropped_ends_the_block():
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(100))  # the handler runs here

    with StopRequest() as stop, pytest.raises(Interrupted), stop.heeded_at_once():
        Dropping()
