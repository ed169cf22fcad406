"""How a search stands, in words: for its log, and for another terminal.

What the trials say is in the journal; what else the search does (its phase, its process) it writes
to `progress.json` in its folder.
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
"""Held by the process of a search as long as it runs."""

RECENT = 20
"""Trials at least that the rate is taken from."""

FINISHED = "finished"
"""The phase of a search that has come to its end."""

SILENT = 15 * 60
"""Seconds without a word after which the status says where to look for more."""


# --------------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """What a search was doing when it last said so.

    Attributes:
        phase: in words; `FINISHED` at the end.
        pid, host: of its main process.
        updated: seconds since the epoch.
        done, total: steps of the phase; None where it has none.
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
    """Say what this process does, and how many steps of it are done if it has any."""
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
    """What `write_progress` wrote last; None where there is none that can be read."""
    content = read_json(Path(folder) / PROGRESS_FILE)
    try:
        return Progress(
            str(content["phase"]), int(content["pid"]), str(content["host"]),
            float(content["updated"]), content.get("done"), content.get("total"),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError):
        return None


def is_running(folder: str | Path, progress: Progress) -> bool | None:
    """Whether the search in a folder runs; None where that cannot be seen from here."""
    if progress.host != socket.gethostname():
        return None
    path = Path(folder) / LOCK_FILE
    if not path.exists():
        return False
    # A lock ends with its process, whose number may soon be that of another one.
    with unless_held(path) as free:
        return None if free is None else not free


# ----------------------------------------------------------------------------------------- trials


def trials_per_hour(records: Sequence[TrialRecord]) -> float:
    """Pace of the last whole batches with `RECENT` trials or more in them, of the first batch that
    of its trials until now; nan where no time has passed.

    Parallel workers begin a batch together, and their trials may end together: only over whole
    batches is the time that they took the time between some of their ends. Time in which no trial
    ran counts unless it is longer than the longest of these trials: then the search had stopped.
    """
    newest = max((record.batch for record in records), default=0)
    ended = Counter(record.batch for record in records if record.batch != newest)
    chosen: list[int] = [] if ended else [newest]
    for batch in sorted(ended, reverse=True):
        if sum(ended[other] for other in chosen) < RECENT:
            chosen.append(batch)
    recent = [record for record in records if record.batch in chosen]
    # A reused result took no time.
    seconds = [record.result.seconds if record.reused is None else 0.0 for record in recent]
    spans = sorted((r.finished - took, r.finished) for r, took in zip(recent, seconds, strict=True))
    elapsed, until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle = max(0.0, start - until)
        elapsed += (idle if idle <= max(seconds) else 0.0) + max(0.0, end - max(start, until))
        until = max(until, end)
    return 3600 * len(recent) / elapsed if elapsed > 0 else math.nan


def best_in_words(record: TrialRecord) -> str:
    """The trial that is best by the search's objective, with its reward where that is another."""
    reward = record.result.reward
    other = f", reward {reward:.4f}" if not math.isclose(reward, record.objective) else ""
    return f"{record.objective:.4f} (trial {record.index}{other})"


def format_stage(
    stage: str, records: Sequence[TrialRecord], planned: int, ended: bool = False
) -> str:
    """A stage in a line: trials, best so far, pace (unless `ended`) and how the trials ended."""
    done, own = len(records), own_trials(records)
    parts = [f"{stage}: {done:,} of {planned:,} trials"]
    if best := ranked(records):
        parts.append(f"best {best_in_words(best[0])}")
    if done < planned and not ended:
        # Reused ones take no time, but they are a part of the way.
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
    """The whole search: a line for its process, its phase and each stage.

    Args:
        folder: of the search.
        stages: name, finished and planned trials of each, in the order of the search.
        now: seconds since the epoch; None is the present.
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
    # Clocks of machines differ.
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
