"""The state of a search in words, for its log and for another terminal.

The trials are in the journal. What else the search does (its phase, its process) it writes to
`progress.json` in its directory.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.metrics import format_duration
from ..files import read_json, write_json
from ..locks import unless_held
from .records import FAILED, PRUNED, TrialRecord, ended_as, own_trials, ranked

PROGRESS_FILE = "progress.json"

LOCK_FILE = "lock"
"""Lock file that the process of a search holds as long as it runs."""

RECENT = 20
"""Least number of trials that the throughput is computed from."""

FINISHED = "finished"
"""The phase of a search that has ended."""

SILENT = 15 * 60
"""Seconds without an update after which the status says where to find more."""


# --------------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """What a search did at its last update.

    Attributes:
        phase: phase in words; `FINISHED` at the end.
        pid, host: id and host of the main process.
        updated: time of the update, in seconds since the epoch.
        done, total: steps of the phase; None if it has no steps.
    """

    phase: str
    pid: int
    host: str
    updated: float
    done: int | None = None
    total: int | None = None


def write_progress(
    folder: str | Path, phase: str, done: int | None = None, total: int | None = None
) -> None:
    """Write `progress.json`: the phase of this process and, if it has steps, their numbers."""
    write_json(
        Path(folder) / PROGRESS_FILE,
        {
            "phase": phase,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": time.time(),
            "done": done,
            "total": total,
        },
    )


def read_progress(folder: str | Path) -> Progress | None:
    """What `write_progress` wrote last; None if there is no readable file."""
    content = read_json(Path(folder) / PROGRESS_FILE)
    try:
        return Progress(
            str(content["phase"]), int(content["pid"]), str(content["host"]),
            float(content["updated"]), content.get("done"), content.get("total"),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError):
        return None


def is_running(folder: str | Path, progress: Progress) -> bool | None:
    """Whether the search in a folder runs; None if that cannot be seen from this machine."""
    if progress.host != socket.gethostname():
        return None
    path = Path(folder) / LOCK_FILE
    if not path.exists():
        return False
    # The lock ends with its process. The pid proves nothing: another process may have it by now.
    with unless_held(path) as free:
        return None if free is None else not free


# ----------------------------------------------------------------------------------------- trials


def trials_per_hour(records: Sequence[TrialRecord]) -> float:
    """Throughput over the latest complete batches that together hold at least `RECENT` trials.

    In the first batch, it is computed over its trials so far. It is nan if no time has passed.

    Only complete batches give a meaningful time, because parallel workers begin a batch together
    and their trials may end together. Time in which no trial runs counts, unless it is longer than
    the longest of these trials: then the search was stopped meanwhile.
    """
    newest = max((record.batch for record in records), default=0)
    ended = Counter(record.batch for record in records if record.batch != newest)
    chosen: list[int] = [] if ended else [newest]
    for batch in sorted(ended, reverse=True):
        if sum(ended[other] for other in chosen) < RECENT:
            chosen.append(batch)
    recent = [record for record in records if record.batch in chosen]
    # Reusing a result takes no time.
    seconds = [record.result.seconds if record.duplicate_of is None else 0.0 for record in recent]
    spans = sorted((r.finished - took, r.finished) for r, took in zip(recent, seconds, strict=True))
    elapsed, until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle = max(0.0, start - until)
        elapsed += (idle if idle <= max(seconds) else 0.0) + max(0.0, end - max(start, until))
        until = max(until, end)
    return 3600 * len(recent) / elapsed if elapsed > 0 else math.nan


def best_in_words(record: TrialRecord) -> str:
    """Objective and index of the best trial, and its reward if that differs."""
    reward = record.result.reward
    other = f", reward {reward:.4f}" if not math.isclose(reward, record.objective) else ""
    return f"{record.objective:.4f} (trial {record.index}{other})"


def format_stage(
    stage: str, records: Sequence[TrialRecord], planned: int, ended: bool = False
) -> str:
    """A stage in one line: trials, best so far, throughput (unless `ended`) and outcomes."""
    done, own = len(records), own_trials(records)
    parts = [f"{stage}: {done:,} of {planned:,} trials"]
    if best := ranked(records):
        parts.append(f"best {best_in_words(best[0])}")
    if done < planned and not ended:
        # Reused trials take no time, but they count as progress.
        rate, pace = trials_per_hour(own), trials_per_hour(records)
        if math.isfinite(rate):
            parts.append(f"{rate:{',.0f' if rate >= 100 else '.3g'}} trials/h")
        if math.isfinite(pace):
            parts.append(f"{format_duration(3600 * (planned - done) / pace)} left")
    counts = (
        ("failed", ended_as(records, FAILED)),
        ("pruned", ended_as(records, PRUNED)),
        ("reused", done - len(own)),
    )
    parts += [f"{count:,} {name}" for name, count in counts if count]
    return ", ".join(parts)


def format_status(
    folder: str | Path,
    stages: Sequence[tuple[str, Sequence[TrialRecord], int]],
    now: float | None = None,
) -> str:
    """The whole search: a line each for its process, its phase and its stages.

    Args:
        folder: directory of the search.
        stages: name, finished trials and number of planned trials of each stage, in order.
        now: time in seconds since the epoch; None: the present.
    """
    progress = read_progress(folder)
    ended = progress is not None and progress.phase == FINISHED
    if progress is None:
        lines = [f"no search has run in {folder}, or it has not got as far as saying so"]
    else:
        lines = [_format_process(folder, progress, time.time() if now is None else now)]
        if not ended:
            steps = "" if progress.total is None else f" {progress.done} of {progress.total}"
            lines.append(f"phase: {progress.phase}{steps}")
    return "\n".join(lines + [format_stage(*stage, ended) for stage in stages])


def _format_process(folder: str | Path, progress: Progress, now: float) -> str:
    # The clocks of two machines may differ.
    age = max(0.0, now - progress.updated)
    said = f"last word {format_duration(age)} ago"
    if progress.phase == FINISHED:
        return f"finished {format_duration(age)} ago"
    process = f"process {progress.pid} on {progress.host}"
    running = is_running(folder, progress)
    if running is None:
        return f"{process}: it cannot be seen from here whether it runs; {said}"
    if not running:
        return f"stopped: {process} is gone, {said}; --resume goes on"
    if age > SILENT:
        return f"running: {process}, {said} (a long phase says more in log.txt)"
    return f"running: {process}, {said}"
