"""Training: from a config to ``model_final.pth``."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.run_file import check_run_config, write_run_config
from ..data import build_train_loader, class_names, num_classes
from ..data.build import Batch, BatchLoader
from ..data.dataset import DetectionDataset
from ..locks import only_one
from ..models import build_detector, load_weights
from ..models.build import find_parts
from ..signals import Interrupted, StopRequest
from ..transfer import to_device
from . import distributed
from .checkpoint import FINAL, checkpoint_files, checkpoint_path, remove_old_checkpoints
from .curves import plot_training
from .logging import PERIODIC, on_terminal
from .metrics import Meter, MetricsWriter, format_duration
from .monitor import NonFiniteLossError, StepMonitor
from .run import (
    Run,
    batches_done,
    find_checkpoint,
    report_resume,
    save_run,
    set_earlier_run_aside,
    with_seed,
)
from .solver import build_lr_scheduler, build_optimizer
from .test import test, test_sets

logger = logging.getLogger(__name__)

# In OUTPUT_DIR. The loader's workers of a killed run hold on to it for some seconds.
LOCK_FILE = "train.lock"
LOCK_TIMEOUT = 15.0

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(cfg: CfgNode, device: torch.device) -> nn.Module:
    """The config's detector, freshly initialised, on `device`; classes follow from the data."""
    return build_detector(cfg, num_classes(cfg)).to(device)


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
    check_training(cfg, device, _tests(cfg, skip_test))
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
    path, state = (find_checkpoint(output) if resume else None) or (None, None)
    cfg = with_seed(cfg, state)
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
        report_resume(cfg, path, state)
        run.restore(state)
        del state
    # What is wrong with them is said now, not after the training.
    datasets = test_sets(cfg, run.classes) if _tests(cfg, skip_test) else {}
    loader = None
    if run.iteration < cfg.SOLVER.MAX_ITER:
        loader = build_train_loader(
            cfg,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_iteration=batches_done(cfg, run.images),
        )

    # Nothing of an earlier run is touched until every process is ready to start.
    distributed.barrier()
    if path is None:
        path = set_earlier_run_aside(cfg, run)
    if main:
        write_run_config(cfg)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(MetricsWriter(output, run.iteration)) if main else None
        try:
            _iterate(cfg, run, loader, datasets, device, stop, writer, path)
        except RuntimeError as error:
            # The signal may have ended the loader's workers or another process as well.
            if not stop.signum or isinstance(error, NonFiniteLossError):
                raise
            raise Interrupted(
                stop.signum, f"stopped in the middle of iteration {run.iteration + 1} ({error}); "
                "--resume goes on from the last checkpoint",
            ) from error  # fmt: skip
        with stop.heeded_at_once():
            results = {} if skip_test else _evaluate(cfg, run, datasets, writer)
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
    datasets: Mapping[str, DetectionDataset],
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
            save_run(cfg, run, final, monitor)
        return
    if _lacks_evaluation(cfg, run, datasets, writer):
        logger.info("iteration %d has not been evaluated yet", start)
        with stop.heeded_at_once():
            _evaluate(cfg, run, datasets, writer)
    model = distributed.parallel(run.model.train())
    meter = Meter(solver.IMS_PER_BATCH, device)
    logger.info("training from iteration %d to %d", start, solver.MAX_ITER)
    with tqdm(total=solver.MAX_ITER, initial=start, unit="it", disable=not on_terminal()) as bar:
        began = waiting_since = time.perf_counter()
        for batch in islice(loader, solver.MAX_ITER - start):
            data_time = time.perf_counter() - waiting_since
            rate = run.scheduler.get_last_lr()[0]
            losses, stopping = _step(cfg, run, model, batch, device, monitor, stop)
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
            periods = (cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD)
            if stopping or done or any(_due(run.iteration, period) for period in periods):
                paused = time.perf_counter()
                _pause(cfg, run, datasets, monitor, stopping, stop, writer)
                meter.pause(time.perf_counter() - paused)
            waiting_since = time.perf_counter()


def _step(
    cfg: CfgNode,
    run: Run,
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    monitor: StepMonitor,
    stop: StopRequest,
) -> tuple[dict[str, Tensor], bool]:
    """One iteration of a run, whose model `distributed.parallel` made `model` of.

    Returns:
        The loss terms and whether to stop, as `StepMonitor.submit`.
    """
    solver, (images, targets) = cfg.SOLVER, batch
    losses = forward_backward(
        model,
        [to_device(image, device) for image in images],
        targets,
        run.scaler,
        solver.ACCUMULATE,
        AMP_TYPES[solver.AMP],
    )
    files = [target["file_name"] for target in targets]
    losses, stopping = monitor.submit(run.iteration + 1, losses, files, stop=bool(stop.signum))
    update(run.optimizer, run.scaler, solver.CLIP_GRAD_NORM)
    run.scheduler.step()
    run.iteration += 1
    run.images += solver.IMS_PER_BATCH
    return losses, stopping


def _pause(
    cfg: CfgNode,
    run: Run,
    datasets: Mapping[str, DetectionDataset],
    monitor: StepMonitor,
    stopping: bool,
    stop: StopRequest,
    writer: MetricsWriter | None,
) -> None:
    """Between two iterations, or after the last: a checkpoint, and the evaluation if it is due.

    Raises:
        Interrupted: the run is to stop, and is not done.
    """
    done = run.iteration == cfg.SOLVER.MAX_ITER
    stopping |= monitor.finish()
    output = Path(cfg.OUTPUT_DIR)
    path = output / FINAL if done else checkpoint_path(output, run.iteration)
    save_run(cfg, run, path, monitor)
    if distributed.rank() == 0:
        remove_old_checkpoints(output, cfg.SOLVER.KEEP_CHECKPOINTS, run.iteration)
    if stopping and not done:
        raise Interrupted(
            stop.signum or signal.SIGTERM,
            f"stopped after iteration {run.iteration}; --resume goes on from {path}",
        )
    if _due(run.iteration, cfg.TEST.EVAL_PERIOD) and not done:
        with stop.heeded_at_once():
            _evaluate(cfg, run, datasets, writer)


def _due(iteration: int, period: int) -> bool:
    return period > 0 and iteration % period == 0


def _lacks_evaluation(
    cfg: CfgNode,
    run: Run,
    datasets: Mapping[str, DetectionDataset],
    writer: MetricsWriter | None,
) -> bool:
    """Whether the run that is resumed was stopped between a checkpoint and its evaluation."""
    if run.iteration == 0 or not _due(run.iteration, cfg.TEST.EVAL_PERIOD):
        return False
    lacks = writer is not None and not writer.has_evaluation(run.iteration)
    judged = any(dataset.has_annotations for dataset in datasets.values())
    return distributed.broadcast(lacks and judged)


def _log(cfg: CfgNode, iteration: int, figures: dict[str, float], per_iteration: float) -> None:
    terms = "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("loss"))
    logger.info(
        "iteration %d/%d  %s  lr %.3g  %.3f s (data %.3f)  %.1f images/s  %.0f MiB  %s to go",
        iteration, cfg.SOLVER.MAX_ITER, terms, figures["lr"], figures["time"],
        figures["data_time"], figures["images_per_s"], figures["memory_mb"],
        format_duration(per_iteration * (cfg.SOLVER.MAX_ITER - iteration)),
        extra=PERIODIC,
    )  # fmt: skip


def _evaluate(
    cfg: CfgNode,
    run: Run,
    datasets: Mapping[str, DetectionDataset],
    writer: MetricsWriter | None,
) -> dict[str, dict]:
    """Test the model as it is, and note the overall figures."""
    distributed.broadcast_buffers(run.model)
    results = test(cfg, run.model, datasets)
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


def check_training(cfg: CfgNode, device: torch.device, tests: bool) -> None:
    """See that the config's parts are there, and that its training can be done on a device, and its
    tests, if there are any.

    Raises:
        ConfigError: it cannot.
    """
    find_parts(cfg)
    if device.type == "cuda":
        return
    if cfg.SOLVER.AMP == "fp16":
        raise ConfigError("SOLVER.AMP fp16 needs a GPU; use bf16 or off")
    if cfg.MODEL.SYNC_BN and distributed.world_size() > 1:
        raise ConfigError("MODEL.SYNC_BN needs GPUs (one per process); set it to False on CPUs")
    if tests and cfg.TEST.DTYPE == "float16":  # which testing would refuse, after the training
        raise ConfigError("TEST.DTYPE float16 needs a GPU; use bfloat16 or float32 on CPUs")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
