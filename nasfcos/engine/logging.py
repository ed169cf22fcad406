"""The log on the console and in ``log.txt``, progress bars, and a report on the environment."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from . import distributed
from .metrics import format_duration

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

PACKAGE = logging.getLogger("nasfcos")
# `extra` for log lines that repeat what the progress bar on a terminal shows.
PERIODIC = {"periodic": True}
# Seconds between two log lines of `progress`.
LOG_EVERY = 15.0


class _Console(logging.Handler):
    """Errors go to stderr, other records to stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        try:
            with tqdm.external_write_mode(file=stream):
                # One write, so that lines of several processes do not mix.
                stream.write(self.format(record) + "\n")
                stream.flush()
        except BrokenPipeError:
            # The reader (a `tee` perhaps) is gone; that is no reason to stop. Replace the stream:
            # prints of other code, and flushing the buffer at exit, would raise as well.
            name = "stdout" if stream is sys.stdout else "stderr"
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        except Exception:
            self.handleError(record)


class _File(logging.FileHandler):
    """``log.txt``. If it cannot be written to, as on a full disk, only the console is used."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to_console() -> None:
    """Show the package's log on the console: everything of process 0, errors of the others."""
    console = _Console()
    if distributed.rank() == 0:
        console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        console.setLevel(logging.INFO)
    else:
        console.setFormatter(
            logging.Formatter(f"process {distributed.rank()}: %(levelname)s %(message)s")
        )
        console.setLevel(logging.ERROR)
    if on_terminal():
        console.addFilter(lambda record: not getattr(record, "periodic", False))
    PACKAGE.setLevel(logging.DEBUG)  # for the files
    PACKAGE.propagate = False
    PACKAGE.addHandler(console)


def log_to_file(output_dir: str | os.PathLike[str]) -> None:
    """Append the package's log to ``log.txt``, or ``log_rankN.txt`` for process N > 0."""
    rank = distributed.rank()
    path = Path(output_dir) / ("log.txt" if rank == 0 else f"log_rank{rank}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    PACKAGE.addHandler(file)


def on_terminal() -> bool:
    """Whether this is process 0 on an interactive terminal, where a progress bar is useful."""
    if distributed.rank() != 0 or not sys.stdout.isatty() or not sys.stderr.isatty():
        return False
    # Some programs emulate a terminal of width 0, where a bar would not be seen.
    return shutil.get_terminal_size(fallback=(0, 0)).columns > 0


def progress(
    items: Iterable[_Item],
    total: int,
    title: str,
    unit: str,
    size: Callable[[_Item], int] = lambda item: 1,
) -> Iterator[_Item]:
    """Iterate with a progress bar on a terminal, and a log line every `LOG_EVERY` seconds.

    Args:
        items: each counts as done when the next one is requested.
        total: approximate sum of the sizes of all items.
        title: name of the work.
        unit: unit of the sizes, in the plural.
        size: gives the size of an item; 1 by default.
    """
    start = last_line = time.perf_counter()
    done = 0
    with tqdm(total=total, desc=title, unit=unit, leave=False, disable=not on_terminal()) as bar:
        for item in items:
            yield item
            bar.update(size(item))
            done = min(total, done + size(item))
            now = time.perf_counter()
            if now - last_line > LOG_EVERY:
                last_line = now
                seconds = now - start
                logger.info(
                    "%s: %d of %d %s, %.1f %s/s, %s to go",
                    title, done, total, unit, done / seconds, unit,
                    format_duration((total - done) * seconds / done), extra=PERIODIC,
                )  # fmt: skip


def log_environment(device: torch.device) -> None:
    """Log the versions of the software, the device and the number of threads."""
    lines = [
        f"nasfcos {_version('nasfcos')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, torchvision {_version('torchvision')}, "
        f"CUDA {torch.version.cuda or 'not built in'}",
        f"{distributed.world_size()} process(es); this one on {_describe(device)}, "
        f"{torch.get_num_threads()} threads on {distributed.available_cores()} CPU cores",
    ]
    logger.info("environment:\n%s", "\n".join(f"  {line}" for line in lines))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
