"""Training a detector: from a config to ``model_final.pth``."""

from __future__ import annotations

import contextlib
import logging
import random
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.run_file import JOURNAL, check_run_config, write_run_config
from ..data import build_train_loader, class_names
from ..locks import only_one
from ..models import build_detector, load_weights
from ..models.build import find_parts
from ..signals import Interrupted, StopRequest
from . import distributed
from .checkpoint import checkpoint_files
from .curves import plot_training
from .metrics import MetricsWriter
from .monitor import NonFiniteLossError
from .run import (
    Run,
    batches_done,
    find_checkpoint,
    report_resume,
    set_earlier_run_aside,
    with_seed,
)
from .solver import build_lr_scheduler, build_optimizer
from .test import test_sets
from .trainer import Trainer

logger = logging.getLogger(__name__)

# In OUTPUT_DIR. After a run was killed, its loader's workers hold the lock for some seconds more.
LOCK_FILE = "train.lock"
LOCK_TIMEOUT = 15.0  # seconds


def train(
    cfg: CfgNode, device: torch.device, resume: bool = False, skip_test: bool = False
) -> dict[str, dict]:
    """Train a detector, then test it; every process of the job calls this.

    Writes to OUTPUT_DIR: config.yaml, checkpoints and model_final.pth, metrics.jsonl, TensorBoard
    files, training.png and the results of the tests.

    Args:
        cfg: the config tree.
        device: device of this process (see `distributed.session`).
        resume: continue from the newest checkpoint in OUTPUT_DIR, if there is one.
        skip_test: do not test the finished model.

    Returns:
        The final metrics by data set, on process 0 (empty with `skip_test`).

    Raises:
        ConfigError, DataError, CheckpointError: the config, the data or the checkpoint to resume
            from is not usable.
        NonFiniteLossError: training diverged.
        Interrupted: by SIGTERM or SIGINT, after a checkpoint was written.
    """
    check_training(cfg, device, _tests(cfg, skip_test))
    if distributed.rank() != 0:
        return _train(cfg, device, resume, skip_test)
    # A second run in the same folder would move this one's files aside while it is running.
    busy = (
        f"another training is running in OUTPUT_DIR {cfg.OUTPUT_DIR}: wait for its end, or name "
        "another folder"
    )
    if (Path(cfg.OUTPUT_DIR) / JOURNAL).exists():
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds an architecture search ({JOURNAL}), whose files a "
            "training would replace: name another folder"
        )
    # A config beside checkpoints is that of their run, damaged or not.
    if not checkpoint_files(cfg.OUTPUT_DIR):
        check_run_config(cfg)
    with only_one(Path(cfg.OUTPUT_DIR) / LOCK_FILE, busy, LOCK_TIMEOUT):
        return _train(cfg, device, resume, skip_test)


def _train(cfg: CfgNode, device: torch.device, resume: bool, skip_test: bool) -> dict[str, dict]:
    main = distributed.rank() == 0
    output = Path(cfg.OUTPUT_DIR)
    cfg, run, checkpoint = _resume_or_start(cfg, device, resume)
    # Built now, so that errors in the test data are reported before the training.
    datasets = test_sets(cfg, run.classes) if _tests(cfg, skip_test) else {}
    loader = None
    if run.iteration < cfg.SOLVER.MAX_ITER:
        loader = build_train_loader(
            cfg,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_iteration=batches_done(cfg, run.images),
        )

    # Files of an earlier run are not touched until every process is ready to start.
    distributed.barrier()
    if checkpoint is None:
        checkpoint = set_earlier_run_aside(cfg, run)
    if main:
        write_run_config(cfg)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(MetricsWriter(output, run.iteration)) if main else None
        trainer = Trainer(cfg, run, device, datasets, stop, writer, resumed_from=checkpoint)
        try:
            trainer.train(loader)
        except RuntimeError as error:
            # The signal may have ended the loader's workers or another process as well.
            if not stop.signum or isinstance(error, NonFiniteLossError):
                raise
            raise Interrupted(
                stop.signum, f"stopped in the middle of iteration {run.iteration + 1} ({error}); "
                "--resume goes on from the last checkpoint",
            ) from error  # fmt: skip
        with stop.heeded_at_once():
            results = {} if skip_test else trainer.evaluate()
    if main:
        try:
            plot_training(output / "metrics.jsonl", output / "training.png")
        except ValueError as error:
            logger.warning("no curves: %s", error)
    return results


def _resume_or_start(
    cfg: CfgNode, device: torch.device, resume: bool
) -> tuple[CfgNode, Run, Path | None]:
    """Build the run, in the state of OUTPUT_DIR's newest checkpoint if it is to resume from one.

    Returns:
        The config with its actual seed, the run, and the checkpoint it resumes from, if any.
    """
    path, state = (find_checkpoint(Path(cfg.OUTPUT_DIR)) if resume else None) or (None, None)
    cfg = with_seed(cfg, state)
    run = _build_run(cfg, device, pretrained=state is None)
    if state is not None:
        report_resume(cfg, path, state)
        run.restore(state)
    return cfg, run, path


def _build_run(cfg: CfgNode, device: torch.device, pretrained: bool) -> Run:
    """The run before its first iteration, with the weights of MODEL.WEIGHT if `pretrained`.

    Seeds the random generators: for the model alike on all processes, then differently on each.
    """
    _seed_everything(cfg.SEED)
    # Convolutions are faster on channels-last maps, which follow from channels-last weights.
    model = build_detector(cfg).to(device, memory_format=torch.channels_last)
    if cfg.MODEL.WEIGHT and pretrained:
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
    return run


def _tests(cfg: CfgNode, skip_test: bool) -> bool:
    """Whether the run tests its model, at the end or in between."""
    return not skip_test or cfg.TEST.EVAL_PERIOD > 0


def check_training(cfg: CfgNode, device: torch.device, tests: bool) -> None:
    """Check that the config's parts exist and that a device supports its training and testing.

    Args:
        cfg: the config tree.
        device: device to train on.
        tests: whether the model is tested as well.

    Raises:
        ConfigError: a part is unknown, or a setting is not supported on the device.
    """
    find_parts(cfg)
    if device.type == "cuda":
        return
    if cfg.SOLVER.AMP == "fp16":
        raise ConfigError("SOLVER.AMP fp16 needs a GPU; use bf16 or off")
    if cfg.MODEL.SYNC_BN and distributed.world_size() > 1:
        raise ConfigError("MODEL.SYNC_BN needs GPUs (one per process); set it to False on CPUs")
    if tests and cfg.TEST.DTYPE == "float16":  # otherwise refused only after the training
        raise ConfigError("TEST.DTYPE float16 needs a GPU; use bfloat16 or float32 on CPUs")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
