"""The state of a training run: saving it, resuming it, and starting in a used folder."""

from __future__ import annotations

import logging
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.tree import with_settings
from ..download import local_path
from . import distributed
from .checkpoint import (
    CheckpointError,
    check_classes,
    checkpoint_files,
    checkpoint_path,
    differing_keys,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from .monitor import NonFiniteLossError, StepMonitor
from .run_folder import make_aside, set_aside
from .solver import restore_solver

logger = logging.getLogger(__name__)

# Most lines of an error message about tensors that do not fit.
SHOWN = 10


@dataclass
class Run:
    """Everything that changes during training; all of it goes into a checkpoint.

    Attributes:
        classes: names of classes 1..N.
        iteration: number of finished iterations.
        images: number of images taken from the training data so far.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    classes: list[str]
    iteration: int = 0
    images: int = 0

    def state(self, cfg: CfgNode, random_states: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint (see checkpoint.py).

        Args:
            cfg: the config tree.
            random_states: the result of `random_state` on each process, by rank.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration,
            "sampler": {"images": self.images},
            "random": random_states,
            "config": cfg.dump(),
            "classes": self.classes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the content of a checkpoint.

        Raises:
            CheckpointError: the checkpoint belongs to another model, or to other classes.
        """
        check_classes(state["classes"], self.classes, "the checkpoint to resume from")
        try:
            self.model.load_state_dict(state["model"])
            restore_solver(self.optimizer, self.scheduler, state, state["iteration"])
        except (RuntimeError, ValueError) as error:
            lines = str(error).splitlines()  # one per tensor, perhaps hundreds
            more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            problems = "\n".join(lines[:SHOWN] + more)
            raise CheckpointError(
                f"the checkpoint to resume from belongs to another model: {problems}"
            ) from error
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if distributed.rank() < len(state["random"]):
            set_random_state(state["random"][distributed.rank()])
        self.iteration = state["iteration"]
        self.images = state["sampler"]["images"]


def save_run(cfg: CfgNode, run: Run, path: Path, monitor: StepMonitor) -> None:
    """Write a checkpoint; every process calls this, process 0 writes.

    Raises:
        NonFiniteLossError: a weight is not finite, so that the checkpoint would be useless.
    """
    distributed.broadcast_buffers(run.model)
    floats = [t for t in run.model.state_dict().values() if t.is_floating_point()]
    if not torch.stack([torch.isfinite(t).all() for t in floats]).all():
        raise NonFiniteLossError(
            f"iteration {run.iteration} left weights that are not finite; they are not saved. "
            f"{monitor.remedy()}"
        )
    random_states = distributed.all_gather(random_state())
    if distributed.rank() == 0:
        save_checkpoint(run.state(cfg, random_states), path)
        logger.info("saved %s", path)
    monitor.last_good = path


def find_checkpoint(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, as (path, content), or None.

    Process 0 reads it and sends it to the others, which need not share its disk.
    """
    main = distributed.rank() == 0
    found = newest_checkpoint(output, rename_damaged=True) if main else None
    found = distributed.broadcast(found)
    if found is None:
        logger.info("nothing to resume from in %s: starting from scratch", output)
    return found


def with_seed(cfg: CfgNode, state: dict[str, Any] | None) -> CfgNode:
    """The config with SEED -1 replaced by the seed of the resumed run, or by a random one."""
    if cfg.SEED >= 0:
        return cfg
    if state is not None:
        seed = yaml.safe_load(state["config"])["SEED"]
    else:
        seed = distributed.broadcast(secrets.randbelow(2**31))
    logger.info("SEED is -1: the seed of this run is %d", seed)
    return with_settings(cfg, {"SEED": seed})


def report_resume(cfg: CfgNode, path: Path, state: dict[str, Any]) -> None:
    """Log what a run resumes from, and which settings have changed since.

    Args:
        cfg: the config tree of the resumed run.
        path: the checkpoint.
        state: its content.

    Raises:
        ConfigError: the checkpoint has the moments of another kind of optimizer.
    """
    logger.info("resuming from %s, after iteration %d", path, state["iteration"])
    optimizer = yaml.safe_load(state["config"])["SOLVER"]["OPTIMIZER"]
    if optimizer != cfg.SOLVER.OPTIMIZER:
        raise ConfigError(
            f"cannot resume with SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER}: the moments in {path} "
            f"are those of {optimizer}. Resume with that, or start a new run from its weights, by "
            f"MODEL.WEIGHT {path} and without --resume"
        )
    if changes := differing_keys(cfg, state["config"]):
        logger.warning(
            "the config differs from that of the checkpoint (then -> now); this run uses:\n%s",
            "\n".join(f"  {change}" for change in changes),
        )
    if len(state["random"]) != distributed.world_size():
        logger.warning(
            "the checkpoint was written by %d process(es), this run has %d",
            len(state["random"]), distributed.world_size(),
        )  # fmt: skip


def batches_done(cfg: CfgNode, images: int) -> int:
    """The number of batches of the current size that `images` training images make.

    Raises:
        ConfigError: the number of images is not a multiple of the batch size.
    """
    if images % cfg.SOLVER.IMS_PER_BATCH:
        raise ConfigError(
            f"cannot resume with SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: the checkpoint "
            f"was saved after {images} images, which is no multiple of it. Resume with the "
            "SOLVER.IMS_PER_BATCH of the run or one that divides this number"
        )
    return images // cfg.SOLVER.IMS_PER_BATCH


def set_earlier_run_aside(cfg: CfgNode, run: Run) -> Path | None:
    """Move what an earlier run left in OUTPUT_DIR into a subfolder, for a run that starts anew.

    Metrics are kept even if the earlier run has no readable checkpoint.

    If MODEL.WEIGHT is among the moved files, the path is invalid afterwards, and a run killed
    before its first checkpoint could neither resume nor start again. In that case a checkpoint of
    iteration 0 is written before the move. If the run is killed before the move is complete,
    --resume finds the earlier run; after the move it finds this one.

    Returns:
        The checkpoint of iteration 0, if one was written.
    """
    main, figures = distributed.rank() == 0, Path(cfg.OUTPUT_DIR) / "metrics.jsonl"
    earlier = checkpoint_files(cfg.OUTPUT_DIR) if main else []
    ran = earlier or main and figures.exists() and figures.stat().st_size
    weight = local_path(cfg.MODEL.WEIGHT) if cfg.MODEL.WEIGHT else None
    moves_weight = weight is not None and any(map(weight.samefile, earlier))
    first = checkpoint_path(cfg.OUTPUT_DIR, 0) if distributed.broadcast(moves_weight) else None
    aside = make_aside(cfg.OUTPUT_DIR) if ran else None
    if first is not None:
        if first in earlier:  # the earlier run began in the same way; its file gets replaced
            shutil.copy2(first, aside)
            earlier.remove(first)
        save_run(cfg, run, first, StepMonitor())
    if aside is not None:
        set_aside(earlier, aside)
        logger.warning("%s holds an earlier run; its files are in %s now", cfg.OUTPUT_DIR, aside)
    return first
