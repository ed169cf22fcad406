"""Exit codes and messages of jobs."""

import logging

import pytest
import torch

from nasfcos.engine import launch


@pytest.fixture
def said(monkeypatch, caplog):
    """Exit code, message and traceback that `run` gives for a job that raises an error."""
    monkeypatch.setattr(launch, "log_to_console", lambda: None)  # pytest's own log is enough

    def say(error):
        def job():
            raise error

        return launch.run(job), caplog.records[-1].getMessage(), caplog.records[-1].exc_info

    return say


def test_too_little_memory_names_what_helps_in_training_and_in_testing(said):
    code, message, traceback = said(torch.OutOfMemoryError("tried to allocate 2 GiB"))
    assert code == 1 and traceback is None
    assert message.endswith("tried to allocate 2 GiB")
    for key in ("SOLVER.ACCUMULATE", "TEST.IMS_PER_BATCH", "INPUT.MIN_SIZE_TEST", "TEST.DTYPE"):
        assert key in message


def test_a_file_that_cannot_be_read_is_said_without_a_traceback(said):
    code, message, traceback = said(OSError(5, "Input/output error", "model_0000009.pth"))
    assert code == 2 and traceback is None
    assert "Input/output error" in message and "model_0000009.pth" in message


def test_the_traceback_of_such_an_error_goes_to_the_log_file(said, caplog):
    """It may be a mistake in the program."""
    with caplog.at_level(logging.DEBUG, logger="nasfcos"):
        said(OSError(5, "Input/output error"))
    traceback, error = caplog.records
    assert traceback.levelno == logging.DEBUG and traceback.exc_info
    assert error.levelno == logging.ERROR
