"""Metrics of a training run: averaging them, and writing and reading ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends lines to ``metrics.jsonl`` and scalars to ``tensorboard/`` in the output folder.

    Training lines hold ``iteration``, ``loss`` and its terms, ``lr``, ``time`` and ``data_time``
    (seconds per iteration), ``images_per_s`` and ``memory_mb``; evaluation lines hold ``iteration``
    and ``eval/<data set>/<metric>``. A value that is not finite is written as null.

    Args:
        output_dir: output folder of the run.
        start: number of finished iterations; existing lines beyond it are dropped.
    """

    def __init__(self, output_dir: str | os.PathLike[str], start: int = 0) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        truncate_metrics(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = tensorboard_writer(Path(output_dir) / "tensorboard", start)

    def write(self, iteration: int, figures: dict[str, float]) -> None:
        """Write one line; `figures` has the names listed in the description of the class."""
        finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            tag = name if "/" in name else f"train/{name}"
            self._tensorboard.add_scalar(tag, value, iteration)

    def has_evaluation(self, iteration: int) -> bool:
        """Whether the file has the metrics of an evaluation after `iteration`."""
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return any(
            line["iteration"] == iteration and any(name.startswith("eval/") for name in line)
            for line in lines
        )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: str | os.PathLike[str]) -> dict[int, dict[str, float]]:
    """Read a ``metrics.jsonl``: {iteration: {name: value}}, in order of iteration.

    Lines of the same iteration are merged. A line that goes back to an earlier iteration was
    written by a resumed run: the lines beyond that iteration are dropped. Lines that cannot be
    parsed (the last one of a killed run) are skipped, and counted in the log.
    """
    history: dict[int, dict[str, float]] = {}
    broken = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                iteration = int(entry["iteration"])
            except (ValueError, TypeError, KeyError):
                broken += 1
                continue
            while history and (last := next(reversed(history))) > iteration:  # keys rise
                del history[last]
            history.setdefault(iteration, {}).update(
                (name, float(value))
                for name, value in entry.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            )
    if broken:
        logger.warning("%s: %d lines that are not JSON skipped", path, broken)
    return history


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines beyond `iteration`, and incomplete ones that a killed process left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: dropped an incomplete line", path)
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class Meter:
    """Averages losses and times between two log lines, without waiting for the device.

    Args:
        images_per_iteration: number of images per iteration, over all processes.
        device: device of this process, whose memory is reported.
    """

    def __init__(self, images_per_iteration: int, device: torch.device) -> None:
        self._images = images_per_iteration
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._count = 0
        self._data_time = 0.0
        self._since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Add an iteration: its loss terms, and the seconds spent waiting for its data."""
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0) + value
        self._count += 1
        self._data_time += data_time

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` that were spent on something other than training."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Means over the iterations since the last call, named as in `MetricsWriter`; no ``lr``.

        Waits for the device.
        """
        losses = {name: float(value) / self._count for name, value in self._losses.items()}
        seconds = (time.perf_counter() - self._since) / self._count
        figures = {
            "loss": math.fsum(losses.values()),
            **losses,
            "time": seconds,
            "data_time": self._data_time / self._count,
            "images_per_s": self._images / seconds,
            "memory_mb": memory_mb(self._device),
        }
        self._begin()
        return figures


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: that of tensors on a GPU, that of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def format_duration(seconds: float) -> str:
    """``1 d 02:03:04`` or ``02:03:04``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def tensorboard_writer(folder: Path, start: int) -> SummaryWriter:
    """A TensorBoard writer that continues the curves after step `start` (0: starts them anew)."""
    from torch.utils.tensorboard import SummaryWriter  # importing it takes a second

    return SummaryWriter(folder, purge_step=start + 1 if start else 0)
