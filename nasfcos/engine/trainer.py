"""The training loop."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from ..data.build import Batch, BatchLoader
from ..data.dataset import DetectionDataset
from ..signals import Interrupted, StopRequest
from ..transfer import to_device
from . import distributed
from .checkpoint import FINAL, checkpoint_path
from .logging import PERIODIC, on_terminal
from .metrics import Meter, MetricsWriter, format_duration
from .monitor import StepMonitor
from .run import Run, save_run
from .run_folder import remove_old_checkpoints
from .step import forward_backward, update
from .test import test

logger = logging.getLogger(__name__)

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains a run from its current iteration to SOLVER.MAX_ITER.

    Logs, writes checkpoints and evaluates at the periods of the config.

    Args:
        cfg: the config tree.
        run: state of the training.
        device: device of this process.
        datasets: test sets by name; if empty, nothing is evaluated.
        stop: tells whether this process was asked to stop.
        writer: receives the metrics; None on all processes but the first.
        resumed_from: checkpoint that holds the current state of the run, if there is one.
    """

    def __init__(
        self,
        cfg: CfgNode,
        run: Run,
        device: torch.device,
        datasets: Mapping[str, DetectionDataset],
        stop: StopRequest,
        writer: MetricsWriter | None,
        resumed_from: Path | None,
    ) -> None:
        self.cfg = cfg
        self.run = run
        self.device = device
        self.datasets = datasets
        self.stop = stop
        self.writer = writer
        self.resumed_from = resumed_from
        self.monitor = StepMonitor(resumed_from)
        self.output = Path(cfg.OUTPUT_DIR)

    def train(self, loader: BatchLoader | None) -> None:
        """Train the remaining iterations and write the final checkpoint.

        Args:
            loader: yields a batch for each remaining iteration; None if there are none.

        Raises:
            NonFiniteLossError: training diverged.
            Interrupted: a process was asked to stop; a checkpoint was written.
        """
        run, solver, start = self.run, self.cfg.SOLVER, self.run.iteration
        if loader is None:
            logger.info("training is finished already: iteration %d of %d", start, solver.MAX_ITER)
            if self.resumed_from != self.output / FINAL:
                save_run(self.cfg, run, self.output / FINAL, self.monitor)
            return
        if self._lacks_evaluation():
            logger.info("iteration %d has not been evaluated yet", start)
            with self.stop.heeded_at_once():
                self.evaluate()
        model = distributed.parallel(run.model.train())
        meter = Meter(solver.IMS_PER_BATCH, self.device)
        logger.info("training from iteration %d to %d", start, solver.MAX_ITER)
        with tqdm(
            total=solver.MAX_ITER, initial=start, unit="it", disable=not on_terminal()
        ) as bar:
            began = waiting_since = time.perf_counter()
            for batch in islice(loader, solver.MAX_ITER - start):
                data_time = time.perf_counter() - waiting_since
                rate = run.scheduler.get_last_lr()[0]
                losses, stopping = self._step(model, batch)
                meter.add(losses, data_time)
                bar.update()

                done = run.iteration == solver.MAX_ITER
                if _due(run.iteration, solver.LOG_PERIOD) or done or run.iteration == start + 1:
                    figures = {**meter.read(), "lr": rate}
                    per_iteration = (time.perf_counter() - began) / (run.iteration - start)
                    self._log(figures, per_iteration * (solver.MAX_ITER - run.iteration))
                    bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
                periods = (self.cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD)
                if stopping or done or any(_due(run.iteration, period) for period in periods):
                    paused = time.perf_counter()
                    self._pause(stopping)
                    meter.pause(time.perf_counter() - paused)
                waiting_since = time.perf_counter()

    def evaluate(self) -> dict[str, dict]:
        """Test the current model and write its overall metrics.

        Returns:
            All metrics by data set, as `test`.
        """
        distributed.broadcast_buffers(self.run.model)
        results = test(self.cfg, self.run.model, self.datasets)
        figures = {
            f"eval/{name}/{figure}": value
            for name, metrics in results.items()
            for figure, value in metrics.items()
            if isinstance(value, float)
        }
        if self.writer is not None and figures:
            self.writer.write(self.run.iteration, figures)
        return results

    def _step(self, model: torch.nn.Module, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """Train one iteration.

        Args:
            model: the run's model, as wrapped by `distributed.parallel`.
            batch: images and targets of this process.

        Returns:
            The loss terms and whether to stop, as `StepMonitor.submit`.
        """
        run, solver, (images, targets) = self.run, self.cfg.SOLVER, batch
        images = [to_device(image, self.device) for image in images]
        amp = AMP_TYPES[solver.AMP]
        losses = forward_backward(model, images, targets, run.scaler, solver.ACCUMULATE, amp)
        files = [target["file_name"] for target in targets]
        asked = bool(self.stop.signum)
        losses, stopping = self.monitor.submit(run.iteration + 1, losses, files, stop=asked)
        update(run.optimizer, run.scaler, solver.CLIP_GRAD_NORM)
        run.scheduler.step()
        run.iteration += 1
        run.images += solver.IMS_PER_BATCH
        return losses, stopping

    def _pause(self, stopping: bool) -> None:
        """Write a checkpoint and, if it is due, evaluate; between iterations or after the last.

        Raises:
            Interrupted: the run was asked to stop before its last iteration.
        """
        iteration = self.run.iteration
        done = iteration == self.cfg.SOLVER.MAX_ITER
        stopping |= self.monitor.finish()
        path = self.output / FINAL if done else checkpoint_path(self.output, iteration)
        save_run(self.cfg, self.run, path, self.monitor)
        if distributed.rank() == 0:
            remove_old_checkpoints(self.output, self.cfg.SOLVER.KEEP_CHECKPOINTS, iteration)
        if stopping and not done:
            raise Interrupted(
                self.stop.signum or signal.SIGTERM,
                f"stopped after iteration {iteration}; --resume goes on from {path}",
            )
        if _due(iteration, self.cfg.TEST.EVAL_PERIOD) and not done:
            with self.stop.heeded_at_once():
                self.evaluate()

    def _lacks_evaluation(self) -> bool:
        """Whether the resumed run was stopped between a checkpoint and the evaluation due then."""
        iteration = self.run.iteration
        if iteration == 0 or not _due(iteration, self.cfg.TEST.EVAL_PERIOD):
            return False
        lacks = self.writer is not None and not self.writer.has_evaluation(iteration)
        judged = any(dataset.has_annotations for dataset in self.datasets.values())
        return distributed.broadcast(lacks and judged)

    def _log(self, figures: dict[str, float], seconds_left: float) -> None:
        iteration = self.run.iteration
        terms = "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("loss"))
        logger.info(
            "iteration %d/%d  %s  lr %.3g  %.3f s (data %.3f)  %.1f images/s  %.0f MiB  %s to go",
            iteration, self.cfg.SOLVER.MAX_ITER, terms, figures["lr"], figures["time"],
            figures["data_time"], figures["images_per_s"], figures["memory_mb"],
            format_duration(seconds_left), extra=PERIODIC,
        )  # fmt: skip
        if self.writer is not None:
            self.writer.write(iteration, figures)


def _due(iteration: int, period: int) -> bool:
    return period > 0 and iteration % period == 0
