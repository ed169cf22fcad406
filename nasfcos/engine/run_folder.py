"""The output folder of a run: old checkpoints are deleted, an earlier run is moved aside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..config.run_file import RUN_CONFIG
from .checkpoint import DAMAGED, numbered_checkpoints

# What a run leaves in its output folder beside checkpoints.
RUN_FILES = (RUN_CONFIG, "metrics.jsonl", "training.png", "tensorboard", "inference")


def remove_old_checkpoints(output_dir: str | os.PathLike[str], keep: int, iteration: int) -> None:
    """Delete all but the newest `keep` of the numbered checkpoints up to `iteration`.

    Checkpoints with a higher iteration belong to another run and are ignored.
    """
    own = [path for number, path in numbered_checkpoints(output_dir) if number <= iteration]
    for path in own[:-keep]:
        path.unlink(missing_ok=True)


def make_aside(output_dir: str | os.PathLike[str]) -> Path:
    """Create an empty subfolder ``earlier_<number>`` for the files of an earlier run."""
    number = 1
    while (aside := Path(output_dir) / f"earlier_{number}").exists() and any(aside.iterdir()):
        number += 1
    aside.mkdir(exist_ok=True)
    return aside


def set_aside(checkpoints: Sequence[Path], aside: Path) -> None:
    """Move the checkpoints and other files of an earlier run into the subfolder `aside`.

    A new run in the same folder must not mix its checkpoints with those of an earlier one, or
    --resume would continue the wrong run.

    Args:
        checkpoints: files to move, newest last. The newest is the last of all files to be moved, so
            that after an interruption --resume finds the newest state of the earlier run or none.
        aside: destination, a subfolder of the output folder.
    """
    folder = aside.parent
    others = [folder / name for name in RUN_FILES] + sorted(folder.glob(f"model_*{DAMAGED}"))
    for path in (*others, *checkpoints):
        if path.exists():
            path.rename(aside / path.name)
