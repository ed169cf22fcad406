"""Progress in the log."""

import itertools
import logging
import os
import sys
from types import SimpleNamespace

import pytest

from nasfcos.engine import logging as module
from nasfcos.engine.logging import progress


def test_progress_is_told_now_and_then(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = SimpleNamespace(perf_counter=itertools.count(step=10.0).__next__)
    monkeypatch.setattr(module, "time", clock)
    parts = [[1, 2], [3], [4, 5, 6], [7]]
    assert list(progress(parts, 7, "letters", "words", len)) == parts
    assert [record.getMessage() for record in caplog.records] == [
        "letters: 3 of 7 words, 0.1 words/s, 00:00:27 to go",
        "letters: 7 of 7 words, 0.2 words/s, 00:00:00 to go",
    ]
    assert all(record.periodic for record in caplog.records)


def test_more_than_was_expected_is_all(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "LOG_EVERY", -1.0)
    assert len(list(progress("abc", 2, "letters", "words"))) == 3
    assert "letters: 2 of 2 words" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("00:00:00 to go")


@pytest.mark.parametrize("width, watched", [(0, False), (80, True)])
def test_a_terminal_without_width_shows_no_bars(monkeypatch, width, watched):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
    assert module.on_terminal() == watched
