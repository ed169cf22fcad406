"""Training: from a config to ``model_final.pth``."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.run_file import check_run_config, write_run_config
from ..config.tree import with_settings
from ..data import build_dataset, build_train_loader, class_names, num_classes
from ..data.build import BatchLoader
from ..download import local_path
from ..locks import only_one
from ..models import build_detector, load_weights
from ..signals import Interrupted, StopRequest
from ..transfer import to_device
from . import distributed
from .checkpoint import (
    FINAL,
    CheckpointError,
    check_classes,
    checkpoint_files,
    checkpoint_path,
    differing_keys,
    make_aside,
    newest_checkpoint,
    random_state,
    remove_old_checkpoints,
    restore_solver,
    save_checkpoint,
    set_aside,
    set_random_state,
)
from .curves import plot_training
from .logging import PERIODIC, on_terminal
from .metrics import Meter, MetricsWriter, format_duration
from .monitor import NonFiniteLossError, StepMonitor
from .solver import build_lr_scheduler, build_optimizer
from .test import test

logger = logging.getLogger(__name__)

# In OUTPUT_DIR. The loader's workers of a killed run hold on to it for some seconds.
LOCK_FILE = "train.lock"
LOCK_TIMEOUT = 15.0

# Lines of a message about tensors that do not fit.
SHOWN = 10

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(cfg: CfgNode, device: torch.device) -> nn.Module:
    """The config's detector, freshly initialised, on `device`; classes follow from the data."""
    return build_detector(cfg, num_classes(cfg)).to(device)


@dataclass
class Run:
    """What changes while training; all of it is in a checkpoint."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    classes: list[str]  # names of classes 1..N
    iteration: int = 0
    images: int = 0  # taken from the training data so far

    def state(self, cfg: CfgNode, random_states: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint (see checkpoint.py)."""
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
        """Go on where `state` was saved.

        Raises:
            CheckpointError: it belongs to another model, or to other classes.
        """
        check_classes(state["classes"], self.classes, "the checkpoint to resume from")
        try:
            self.model.load_state_dict(state["model"])
            restore_solver(self.optimizer, self.scheduler, state, state["iteration"])
        except (RuntimeError, ValueError) as error:
            lines = str(error).splitlines()  # one for each tensor, hundreds perhaps
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


def train(
    cfg: CfgNode, device: torch.device, resume: bool = False, skip_test: bool = False
) -> dict[str, dict]:
    """Train as the config says, then test; every process of the job calls this.

    Leaves in OUTPUT_DIR: config.yaml, checkpoints and model_final.pth, metrics.jsonl, TensorBoard
    files, training.png and the results of the tests.

    Args:
        cfg: the config tree.
        device: this process's (see `distributed.session`).
        resume: go on from the newest checkpoint in OUTPUT_DIR, if there is one.
        skip_test: do not test the finished model.

    Returns:
        The final metrics by data set, on process 0 (empty with `skip_test`).

    Raises:
        ConfigError, DataError, CheckpointError: what was asked for cannot be done.
        NonFiniteLossError: training diverged.
        Interrupted: by SIGTERM or SIGINT, after a checkpoint was written.
    """
    check_device(cfg, device, _tests(cfg, skip_test))
    if distributed.rank() != 0:
        return _train(cfg, device, resume, skip_test)
    # Another run that starts here would move this one's files away under its hands.
    busy = (
        f"another training is running in OUTPUT_DIR {cfg.OUTPUT_DIR}: wait for its end, or name "
        "another folder"
    )
    if not checkpoint_files(cfg.OUTPUT_DIR):  # beside a run's it is the run's, damaged or not
        check_run_config(cfg)
    with only_one(Path(cfg.OUTPUT_DIR) / LOCK_FILE, busy, LOCK_TIMEOUT):
        return _train(cfg, device, resume, skip_test)


def _train(cfg: CfgNode, device: torch.device, resume: bool, skip_test: bool) -> dict[str, dict]:
    main = distributed.rank() == 0
    output = Path(cfg.OUTPUT_DIR)
    path, state = (_find_checkpoint(output) if resume else None) or (None, None)
    cfg = _with_seed(cfg, state)
    _seed_everything(cfg.SEED)
    # Convolutions are faster on channels-last maps, and those follow from channels-last weights.
    model = build_model(cfg, device).to(memory_format=torch.channels_last)
    if cfg.MODEL.WEIGHT and state is None:
        with distributed.first_on_machine():
            load_weights(model, cfg.MODEL.WEIGHT, strict=False)
    optimizer = build_optimizer(cfg, model)
    run = Run(
        model,
        optimizer,
        build_lr_scheduler(cfg, optimizer),
        torch.amp.GradScaler(device.type, enabled=cfg.SOLVER.AMP == "fp16"),
        class_names(cfg),
    )
    _seed_everything(cfg.SEED + distributed.rank())
    if state is not None:
        _report_resume(cfg, path, state)
        run.restore(state)
        del state
    if _tests(cfg, skip_test):
        for name in cfg.DATASETS.TEST:  # what is wrong with it is said now, not after the training
            build_dataset(cfg, name, run.classes)
    loader = None
    if run.iteration < cfg.SOLVER.MAX_ITER:
        loader = build_train_loader(
            cfg,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_iteration=_batches_done(cfg, run.images),
        )

    # Nothing of an earlier run is touched until every process is ready to start.
    distributed.barrier()
    if path is None:
        path = _set_earlier_run_aside(cfg, run)
    if main:
        write_run_config(cfg)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(MetricsWriter(output, run.iteration)) if main else None
        try:
            _iterate(cfg, run, loader, device, stop, writer, path)
        except RuntimeError as error:
            # The signal may have ended the loader's workers or another process as well.
            if not stop.signum or isinstance(error, NonFiniteLossError):
                raise
            raise Interrupted(
                stop.signum, f"stopped in the middle of iteration {run.iteration + 1} ({error}); "
                "--resume goes on from the last checkpoint",
            ) from error  # fmt: skip
        with stop.heeded_at_once():
            results = {} if skip_test else _evaluate(cfg, run, writer)
    if main:
        try:
            plot_training(output / "metrics.jsonl", output / "training.png")
        except ValueError as error:
            logger.warning("no curves: %s", error)
    return results


def forward_backward(
    model: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    scaler: torch.amp.GradScaler,
    parts: int = 1,
    amp: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of a process's share of a step, computed in `parts` of equal size.

    Each part normalises its losses by itself, as each process does; the step takes the mean over
    parts and processes. So P processes in K parts give the gradients of one process in P * K.

    Returns:
        The loss terms, mean over the parts, without graph.
    """
    size = len(images) // parts
    means: dict[str, Tensor] = {}
    for part in range(parts):
        these = slice(part * size, (part + 1) * size)
        waits = isinstance(model, DistributedDataParallel) and part < parts - 1
        with model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(images[0].device.type, dtype=amp, enabled=amp is not None):
                losses = model(images[these], targets[these])
            scaler.scale(sum(losses.values()) / parts).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach().float() / parts
    return means


def update(optimizer: Optimizer, scaler: torch.amp.GradScaler, clip_norm: float = 0.0) -> None:
    """Take a step along the gradients, clipped to a norm of `clip_norm` unless that is 0."""
    if clip_norm > 0:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _iterate(
    cfg: CfgNode,
    run: Run,
    loader: BatchLoader | None,
    device: torch.device,
    stop: StopRequest,
    writer: MetricsWriter | None,
    resumed_from: Path | None,
) -> None:
    """The loop over iterations, up to and with the final checkpoint.

    No `loader`: there is nothing left to train.
    """
    solver, start = cfg.SOLVER, run.iteration
    monitor = StepMonitor(resumed_from)
    final = Path(cfg.OUTPUT_DIR) / FINAL
    if loader is None:
        logger.info("training is finished already: iteration %d of %d", start, solver.MAX_ITER)
        if resumed_from != final:
            _save(cfg, run, final, monitor)
        return
    if _lacks_evaluation(cfg, run, writer):
        logger.info("iteration %d has not been evaluated yet", start)
        with stop.heeded_at_once():
            _evaluate(cfg, run, writer)
    model = distributed.parallel(run.model.train())
    meter = Meter(solver.IMS_PER_BATCH, device)
    logger.info("training from iteration %d to %d", start, solver.MAX_ITER)
    with tqdm(total=solver.MAX_ITER, initial=start, unit="it", disable=not on_terminal()) as bar:
        began = waiting_since = time.perf_counter()
        for images, targets in islice(loader, solver.MAX_ITER - start):
            data_time = time.perf_counter() - waiting_since
            losses = forward_backward(
                model,
                [to_device(image, device) for image in images],
                targets,
                run.scaler,
                solver.ACCUMULATE,
                AMP_TYPES[solver.AMP],
            )
            files = [target["file_name"] for target in targets]
            losses, stopping = monitor.submit(
                run.iteration + 1, losses, files, stop=bool(stop.signum)
            )
            rate = run.scheduler.get_last_lr()[0]
            update(run.optimizer, run.scaler, solver.CLIP_GRAD_NORM)
            run.scheduler.step()
            run.iteration += 1
            run.images += solver.IMS_PER_BATCH
            meter.add(losses, data_time)
            bar.update()

            done = run.iteration == solver.MAX_ITER
            if _due(run.iteration, solver.LOG_PERIOD) or done or run.iteration == start + 1:
                figures = {**meter.read(), "lr": rate}
                per_iteration = (time.perf_counter() - began) / (run.iteration - start)
                _log(cfg, run.iteration, figures, per_iteration)
                bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
                if writer is not None:
                    writer.write(run.iteration, figures)
            evaluate_now = _due(run.iteration, cfg.TEST.EVAL_PERIOD) and not done
            if stopping or done or evaluate_now or _due(run.iteration, solver.CHECKPOINT_PERIOD):
                paused = time.perf_counter()
                stopping |= monitor.finish()
                path = final if done else checkpoint_path(cfg.OUTPUT_DIR, run.iteration)
                _save(cfg, run, path, monitor)
                if distributed.rank() == 0:
                    keep = solver.KEEP_CHECKPOINTS
                    remove_old_checkpoints(cfg.OUTPUT_DIR, keep, run.iteration)
                if stopping and not done:
                    raise Interrupted(
                        stop.signum or signal.SIGTERM,
                        f"stopped after iteration {run.iteration}; --resume goes on from {path}",
                    )
                if evaluate_now:
                    with stop.heeded_at_once():
                        _evaluate(cfg, run, writer)
                meter.pause(time.perf_counter() - paused)
            waiting_since = time.perf_counter()


def _due(iteration: int, period: int) -> bool:
    return period > 0 and iteration % period == 0


def _lacks_evaluation(cfg: CfgNode, run: Run, writer: MetricsWriter | None) -> bool:
    """Whether the run that is resumed was stopped between a checkpoint and its evaluation."""
    if run.iteration == 0 or not _due(run.iteration, cfg.TEST.EVAL_PERIOD):
        return False
    lacks = writer is not None and not writer.has_evaluation(run.iteration)
    if lacks:  # or there is nothing to judge by
        sets = (build_dataset(cfg, name, run.classes) for name in cfg.DATASETS.TEST)
        lacks = any(dataset.has_annotations for dataset in sets)
    return distributed.broadcast(lacks)


def _log(cfg: CfgNode, iteration: int, figures: dict[str, float], per_iteration: float) -> None:
    terms = "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("loss"))
    logger.info(
        "iteration %d/%d  %s  lr %.3g  %.3f s (data %.3f)  %.1f images/s  %.0f MiB  %s to go",
        iteration, cfg.SOLVER.MAX_ITER, terms, figures["lr"], figures["time"],
        figures["data_time"], figures["images_per_s"], figures["memory_mb"],
        format_duration(per_iteration * (cfg.SOLVER.MAX_ITER - iteration)),
        extra=PERIODIC,
    )  # fmt: skip


def _save(cfg: CfgNode, run: Run, path: Path, monitor: StepMonitor) -> None:
    """Write a checkpoint from process 0; the others contribute their random states.

    Raises:
        NonFiniteLossError: a weight is not finite, so the file would be of no use.
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


def _set_earlier_run_aside(cfg: CfgNode, run: Run) -> Path | None:
    """Clear the folder for a run that starts from scratch: what an earlier one left is moved away.

    No figure is lost, not even where `newest_checkpoint` found nothing that can be read, or a run
    was killed before its first checkpoint.

    Where the weights that this run starts from are among the files to be moved, MODEL.WEIGHT leads
    nowhere from then on, and a run killed before its first checkpoint could neither go on nor start
    again. So the first checkpoint, of iteration 0, comes before the move. Killed between the two,
    or in the middle of the move, --resume finds the earlier run; afterwards it finds this one.

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
        if first in earlier:  # of a run that began like this one, to be replaced
            shutil.copy2(first, aside)
            earlier.remove(first)
        _save(cfg, run, first, StepMonitor())
    if aside is not None:
        set_aside(earlier, aside)
        logger.warning("%s holds an earlier run; its files are in %s now", cfg.OUTPUT_DIR, aside)
    return first


def _evaluate(cfg: CfgNode, run: Run, writer: MetricsWriter | None) -> dict[str, dict]:
    """Test the model as it is, and note the overall figures."""
    distributed.broadcast_buffers(run.model)
    results = test(cfg, run.model, run.classes)
    figures = {
        f"eval/{name}/{figure}": value
        for name, metrics in results.items()
        for figure, value in metrics.items()
        if isinstance(value, float)
    }
    if writer is not None and figures:
        writer.write(run.iteration, figures)
    return results


def _tests(cfg: CfgNode, skip_test: bool) -> bool:
    """Whether the run tests its model, at its end or on the way."""
    return not skip_test or cfg.TEST.EVAL_PERIOD > 0


def check_device(cfg: CfgNode, device: torch.device, tests: bool) -> None:
    """See that the config's training can be done on a device, and its tests, if there are any.

    Raises:
        ConfigError: it cannot.
    """
    if device.type == "cuda":
        return
    if cfg.SOLVER.AMP == "fp16":
        raise ConfigError("SOLVER.AMP fp16 needs a GPU; use bf16 or off")
    if cfg.MODEL.SYNC_BN and distributed.world_size() > 1:
        raise ConfigError("MODEL.SYNC_BN needs GPUs (one per process); set it to False on CPUs")
    if tests and cfg.TEST.DTYPE == "float16":  # which testing would refuse, after the training
        raise ConfigError("TEST.DTYPE float16 needs a GPU; use bfloat16 or float32 on CPUs")


def _find_checkpoint(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """What process 0 finds to resume from, on every process (they need not share its disk)."""
    main = distributed.rank() == 0
    found = newest_checkpoint(output, rename_damaged=True) if main else None
    found = distributed.broadcast(found)
    if found is None:
        logger.info("nothing to resume from in %s: starting from scratch", output)
    return found


def _batches_done(cfg: CfgNode, images: int) -> int:
    """Where to enter the stream of training images after `images` of them.

    Raises:
        ConfigError: in the middle of a batch.
    """
    if images % cfg.SOLVER.IMS_PER_BATCH:
        raise ConfigError(
            f"cannot resume with SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: the checkpoint "
            f"was saved after {images} images, which is no multiple of it. Resume with the "
            "SOLVER.IMS_PER_BATCH of the run or one that divides this number"
        )
    return images // cfg.SOLVER.IMS_PER_BATCH


def _with_seed(cfg: CfgNode, state: dict[str, Any] | None) -> CfgNode:
    """The config with an actual seed: where it has none, that of the resumed run or a new one."""
    if cfg.SEED >= 0:
        return cfg
    if state is not None:
        seed = yaml.safe_load(state["config"])["SEED"]
    else:
        seed = distributed.broadcast(secrets.randbelow(2**31))
    logger.info("SEED is -1: the seed of this run is %d", seed)
    return with_settings(cfg, {"SEED": seed})


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _report_resume(cfg: CfgNode, path: Path, state: dict[str, Any]) -> None:
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
            "the checkpoint is of a run of %d process(es), this one has %d",
            len(state["random"]), distributed.world_size(),
        )  # fmt: skip
