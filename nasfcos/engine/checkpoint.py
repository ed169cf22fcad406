"""Checkpoints: written whole or not at all, read without executing anything, found again.

A checkpoint is a torch file of plain containers and tensors:

====================  =============================================================================
``model``             the model's state dict
``optimizer``         of the optimizer's state dict; likewise ``scheduler`` and ``scaler``
``iteration``         finished iterations
``sampler``           position in the training data: ``{"images"}`` taken so far
``random``            states of the random generators, one entry for each process
``config``            the config tree of the run as YAML text
``classes``           names of classes 1..N
====================  =============================================================================
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from yacs.config import CfgNode

from ..config import ConfigError, is_weight_given
from ..config.defaults import get_defaults
from ..config.run_file import RUN_CONFIG
from ..config.tree import leaves
from ..files import replacing
from ..models.weights import Weights, read_weights
from ..torch_files import TorchFileError, read_torch_file

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
# All that a run writes: whatever lacks a part of it was written by something else.
CONTENT = {
    "model", "optimizer", "scheduler", "scaler", "iteration", "sampler", "random", "config",
    "classes",
}  # fmt: skip
DAMAGED = ".damaged"  # follows the name of a file that could not be read
NUMBERED = re.compile(r"model_(\d{7,})\.pth")
# What a run leaves in its output folder beside checkpoints.
RUN_FILES = (RUN_CONFIG, "metrics.jsonl", "training.png", "tensorboard", "inference")

NEEDS_DETECTOR = (
    "testing and prediction need the weights of a trained detector. Name a checkpoint or a "
    "released model by MODEL.WEIGHT (such as MODEL.WEIGHT output/model_final.pth)."
)


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the file."""


def checkpoint_path(output_dir: str | os.PathLike[str], iteration: int) -> Path:
    """Where the checkpoint of a finished iteration belongs."""
    return Path(output_dir) / f"model_{iteration:07d}.pth"


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` so that the file is, at any moment, the old, the new, or absent.

    Raises:
        CheckpointError: the file could not be written; nothing of it is left behind.
    """
    path = Path(path)
    try:
        for stale in path.parent.glob(".model_*.pth"):  # of a process killed while writing
            stale.unlink()
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk by a RuntimeError ("unexpected pos") that does not call it so.
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {why}. {_free_space(path.parent)}"
        ) from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is broken, or no checkpoint of a training run.
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
    """The checkpoint of `output_dir` with the most iterations, and its content.

    Files that cannot be read are named in the log and passed over. None: there is nothing to read.

    Args:
        output_dir: the folder.
        rename_damaged: what is passed over for the one that is found is renamed to ``*.damaged``.
            A run that goes on from the one found would else come to their numbers again, and they
            would count among its newest.

    Raises:
        OSError: a file was not given to read, by its disk or for want of rights; it may be whole.
    """
    folder = Path(output_dir)
    found, damaged = None, []
    # The final one first: its name does not tell its iteration.
    candidates = [(-1, folder / FINAL)] * (folder / FINAL).exists() + _numbered(folder)[::-1]
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


def newest_weights(output_dir: str | os.PathLike[str]) -> Weights | None:
    """The weights of the newest checkpoint, named by its path; the file is read once."""
    found = newest_checkpoint(output_dir)
    return None if found is None else replace(read_weights(found[1]), name=str(found[0]))


def find_weights(cfg: CfgNode) -> Weights:
    """The trained detector of a config: MODEL.WEIGHT where it was given on purpose (on the command
    line, in the overrides of `load_config`, or in the tree), else OUTPUT_DIR's newest checkpoint,
    else MODEL.WEIGHT of the config file, from which the run in OUTPUT_DIR may have started.

    An ImageNet backbone as MODEL.WEIGHT does not count.

    Raises:
        ConfigError: there is none.
        WeightsError: MODEL.WEIGHT cannot be read.
    """
    given = is_weight_given(cfg)
    weights = None if given else newest_weights(cfg.OUTPUT_DIR)
    weights = _detector(cfg) if weights is None else weights
    if weights is not None:
        return weights
    source = cfg.MODEL.WEIGHT
    lacks = f"MODEL.WEIGHT {f'{source} is a backbone' if source else 'is empty'}"
    if not given:
        lacks = f"{cfg.OUTPUT_DIR} (OUTPUT_DIR) has no checkpoint and {lacks}"
    raise ConfigError(f"{lacks}: {NEEDS_DETECTOR}")


def _detector(cfg: CfgNode) -> Weights | None:
    source = cfg.MODEL.WEIGHT
    if not source or source.startswith(("catalog://", "torchvision://")):
        return None
    weights = read_weights(source)
    return weights if weights.kind == "detector" else None


def remove_old_checkpoints(output_dir: str | os.PathLike[str], keep: int, iteration: int) -> None:
    """Delete the numbered checkpoints up to that of `iteration`, but the newest `keep` of them.

    Those beyond, if there are any, are not of this run, and do not count: the one just saved stays.
    """
    done = [path for number, path in _numbered(Path(output_dir)) if number <= iteration]
    for path in done[:-keep]:
        path.unlink(missing_ok=True)


def checkpoint_files(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a folder, readable or not, in the order in which they were written."""
    folder = Path(output_dir)
    files = [path for _, path in _numbered(folder)]
    files += [folder / FINAL] * (folder / FINAL).exists()
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def make_aside(output_dir: str | os.PathLike[str]) -> Path:
    """An empty subfolder for the files of an earlier run."""
    number = 1
    while (aside := Path(output_dir) / f"earlier_{number}").exists() and any(aside.iterdir()):
        number += 1
    aside.mkdir(exist_ok=True)
    return aside


def set_aside(checkpoints: Sequence[Path], aside: Path) -> None:
    """Move an earlier run's checkpoints, and its other files, into a subfolder of theirs.

    A new run in the same folder must not mix its checkpoints with those of an earlier one, or
    --resume would go on from the wrong run.

    Args:
        checkpoints: the newest last: it is the last of all files to be moved, so that where this is
            cut off, --resume finds the earlier run's newest state or none of it.
        aside: the subfolder.
    """
    folder = aside.parent
    others = [folder / name for name in RUN_FILES] + sorted(folder.glob(f"model_*{DAMAGED}"))
    for path in (*others, *checkpoints):
        if path.exists():
            path.rename(aside / path.name)


def restore_solver(
    optimizer: Optimizer, scheduler: LambdaLR, state: dict[str, Any], iteration: int
) -> None:
    """Go on after `iteration`, with the moments of `state` and the settings of the current config.

    Learning rate, momentum and weight decay follow the config that both were built from, so that
    a changed config takes effect (and the same config gives the same numbers). So do the parameters
    that are trained: those that were not until now start without moments.

    Raises:
        CheckpointError: the moments are those of other parameters, or of parameters without names.
    """
    own = optimizer.state_dict()
    moments = _moments(optimizer, own, state["optimizer"])
    # What has none, as in a run that has made no step, keeps those of a fresh optimizer.
    optimizer.load_state_dict({**own, "state": own["state"] | moments})
    base = scheduler.base_lrs
    rates = [rate * at(iteration) for rate, at in zip(base, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**state["scheduler"], "base_lrs": base, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _moments(
    optimizer: Optimizer, own: dict[str, Any], saved: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """The saved moments by the numbers that the parameters have now, laid out as these are: a fused
    optimizer looks neither at shapes nor at strides."""
    names, saved_names = _numbers_by_name(own), _numbers_by_name(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for name, number in names.items():
        entry = saved["state"].get(saved_names.get(name), {})
        parameter = parameters[number]
        for key, value in entry.items():
            if value is None or value.dim() == 0:  # a step count, or momentum that is not there yet
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint to resume from has {key} of {list(value.shape)} for parameter "
                    f"{name} of {list(parameter.shape)}: it trained other parameters"
                )
            entry = {**entry, key: torch.empty_like(parameter, dtype=value.dtype).copy_(value)}
        if entry:
            moments[number] = entry
    if saved["state"] and (fresh := [name for name in names if name not in saved_names]):
        logger.warning(
            "%d parameters were not trained until now and start without moments: %s%s",
            len(fresh), fresh[0], ", ..." if len(fresh) > 1 else "",
        )  # fmt: skip
    return moments


def _numbers_by_name(optimizer_state: dict[str, Any]) -> dict[str, int]:
    groups = optimizer_state["param_groups"]
    if not all("param_names" in group for group in groups):
        raise CheckpointError(
            "the checkpoint to resume from does not name the parameters that it trained: start "
            "anew from it by MODEL.WEIGHT"
        )
    pairs = (zip(group["param_names"], group["params"], strict=True) for group in groups)
    return dict(itertools.chain(*pairs))


def check_classes(recorded: Sequence[str] | None, wanted: Sequence[str], source: str) -> None:
    """Make sure that the labels of some weights mean what they mean in the data.

    Args:
        recorded: the names of classes 1..N that the weights were trained for; None: unknown, and
            nothing to check.
        wanted: those of the data.
        source: of the weights, for the message.

    Raises:
        CheckpointError: other names, or the same in another order.
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
    """The states of this process's random generators, as plain containers and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # A run on the CPU leaves the GPUs alone: asking one would take some of its memory.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def differing_keys(cfg: CfgNode, saved_text: str) -> list[str]:
    """Keys whose values in `cfg` and in the config text of a checkpoint differ, one line each. Keys
    that are younger than the checkpoint had their defaults then."""
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


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a folder, oldest first."""
    found = []
    for path in folder.glob("model_*.pth"):
        if match := NUMBERED.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found)


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
    """Make the rename last through a power cut, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
