"""Checkpoints of a training run: writing, reading, finding the newest, checking what is in them.

A checkpoint is written whole or not at all, and read without executing anything. It is a torch file
of plain containers and tensors:

====================  =============================================================================
``model``             the model's state dict
``optimizer``         the optimizer's state dict; likewise ``scheduler`` and ``scaler``
``iteration``         number of finished iterations
``sampler``           position in the training data: ``{"images": number taken so far}``
``random``            states of the random generators, one entry per process
``config``            the config tree of the run as YAML text
``classes``           names of classes 1..N
====================  =============================================================================
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from yacs.config import CfgNode

from ..config.defaults import get_defaults
from ..config.tree import leaves
from ..files import replacing
from ..torch_files import TorchFileError, read_torch_file

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
# The keys of every checkpoint; a file that lacks one was not written by a training run.
CONTENT = {
    "model", "optimizer", "scheduler", "scaler", "iteration", "sampler", "random", "config",
    "classes",
}  # fmt: skip
DAMAGED = ".damaged"  # appended to the name of a checkpoint that cannot be read
NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the file."""


def checkpoint_path(output_dir: str | os.PathLike[str], iteration: int) -> Path:
    """Path of the checkpoint that is written after `iteration`."""
    return Path(output_dir) / f"model_{iteration:07d}.pth"


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` atomically: at any moment the file is the old one, the new one, or
    absent.

    Raises:
        CheckpointError: the file cannot be written; nothing of it is left behind.
    """
    path = Path(path)
    try:
        for stale in path.parent.glob(".model_*.pth"):  # left by a killed process
            stale.unlink()
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError ("unexpected pos") that does not say so.
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {why}. {_free_space(path.parent)}"
        ) from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is damaged, or is not a checkpoint of a training run.
    """
    try:
        state = read_torch_file(path)
    except TorchFileError as error:
        raise CheckpointError(str(error)) from error
    missing = CONTENT - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint of a training run: it has no {', '.join(sorted(missing))}"
        )
    return state


def newest_checkpoint(
    output_dir: str | os.PathLike[str], rename_damaged: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint in `output_dir` with the most iterations.

    Damaged files are named in the log and skipped.

    Args:
        output_dir: folder to look in.
        rename_damaged: rename the skipped files that are newer than the one found to
            ``*.damaged``. A run that resumes will reach their iterations again, and they would then
            count among its newest checkpoints.

    Returns:
        The path and the content of the checkpoint; None if there is none that can be read.

    Raises:
        OSError: a file could not be read because of its disk or its permissions; it may be intact.
    """
    folder = Path(output_dir)
    found, damaged = None, []
    # The final one comes first because its name does not tell its iteration.
    candidates = [(-1, folder / FINAL)] * (folder / FINAL).exists()
    candidates += numbered_checkpoints(folder)[::-1]
    for iteration, path in candidates:
        if found is not None and found[1]["iteration"] >= iteration:
            break
        if (state := _try_load(path)) is None:
            damaged.append(path)
            continue
        found = path, state
        if path.name != FINAL:
            break
    if found is not None and rename_damaged:
        for path in damaged:
            aside = path.replace(path.with_name(path.name + DAMAGED))
            logger.warning("%s cannot be read and was renamed to %s", path, aside.name)
    return found


def numbered_checkpoints(output_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(iteration, path) of a folder's checkpoints except the final one, by rising iteration."""
    paths = Path(output_dir).glob("model_*.pth")
    matches = [(NUMBERED.fullmatch(path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in matches if match)


def checkpoint_files(output_dir: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints in a folder, readable or not, in the order in which they were written."""
    folder = Path(output_dir)
    files = [path for _, path in numbered_checkpoints(folder)]
    files += [folder / FINAL] * (folder / FINAL).exists()
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def check_classes(recorded: Sequence[str] | None, wanted: Sequence[str], source: str) -> None:
    """Check that the labels of the weights mean the same as the labels of the data.

    Args:
        recorded: names of classes 1..N that the weights were trained for. None: unknown; nothing is
            checked.
        wanted: names of classes 1..N in the data.
        source: where the weights come from, for the message.

    Raises:
        CheckpointError: the names or their order differ.
    """
    if recorded is None or list(recorded) == list(wanted):
        return
    pairs = enumerate(zip_longest(recorded, wanted), 1)
    label, (then, now) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    there, here = ("no class" if name is None else repr(name) for name in (then, now))
    raise CheckpointError(
        f"the classes of {source} are not those of the data of DATASETS.TRAIN: label {label} is "
        f"{there} there ({len(recorded)} classes), but {here} in the data ({len(wanted)} classes). "
        "Use the data it was trained on, or give its classes in its order as CLASSES of your sets "
        "in DATASETS.CUSTOM"
    )


def random_state() -> dict[str, Any]:
    """The states of this process's random generators, in plain containers and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # A run on the CPU must not touch a GPU: querying it would allocate memory there.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def differing_keys(cfg: CfgNode, saved_text: str) -> list[str]:
    """The settings in which `cfg` differs from the config text of a checkpoint, one line each.

    A key that was introduced after the checkpoint was written counts as having had its default.
    """
    texts = cfg.dump(), saved_text, get_defaults().dump()
    now, then, defaults = (dict(leaves(yaml.safe_load(text))) for text in texts)
    then = {key: value for key, value in defaults.items() if key in now} | then
    absent = object()
    return [
        f"{key}: {_shown(then, key)} -> {_shown(now, key)}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key, absent) != then.get(key, absent)
    ]


def _shown(tree: dict[str, Any], key: str) -> str:
    return repr(tree[key]) if key in tree else "(absent)"


def _try_load(path: Path) -> dict[str, Any] | None:
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        logger.warning("passed over: %s", error)
        return None


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"Its folder cannot be used ({error})"
    return (
        f"Its disk has {free / 1e6:,.0f} MB free; if that is too little, delete older checkpoints "
        "or other files, or set OUTPUT_DIR to another disk, and go on with --resume"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on systems that can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
