"""The proxy task: a decoder is trained briefly on cached maps and judged by its losses.

As in the paper (section 4), the backbone is frozen and its maps are cached. A trial trains only the
decoder, with Adam and Polyak averaging. The reward is the negative sum of the losses on meta-val.
What the paper leaves open is done as follows:

- The weights that are evaluated are a running average: the weights after the first iteration, then
  ``avg = POLYAK * avg + (1 - POLYAK) * w`` after each further one. Running statistics of batch
  norms are copied, because with their momentum of 0.1 they already are an average over the same
  last iterations. They start from the first batch, too: a third of an initial zero mean and unit
  variance would be left after ten iterations.
- All trials of a stage, except re-evaluations, see the same batches in the same order. In the FPN
  stage, the plain head has the same initial weights in all trials: otherwise luck with the head
  would influence a reward as much as the FPN does. Searched parts get initial weights that follow
  from the genotype.
- Meta-val is evaluated as if it were one batch: each loss is summed over all of it and divided by
  its normaliser over all of it. So the reward does not depend, except for rounding, on how meta-val
  is split into batches.
- The learning rate is constant, and gradients are not clipped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from ..engine.distributed import resolve_device
from ..engine.monitor import NonFiniteLossError
from ..transfer import free_gpu_memory
from .cost import build_objective, latency_ms, multiply_adds
from .decoder import Decoder, build_decoder, proxy_config, stage_config
from .examples import Examples, make_room, open_examples
from .records import COMPLETE, FAILED, PRUNED, DeviceLost, TrialJob, TrialResult
from .training import Training, build_training

logger = logging.getLogger(__name__)

# Length to which the message of an error is cut in a trial's reason.
REASON_LENGTH = 300


def open_cached_examples(task: ProxyTask, device: torch.device) -> tuple[Examples, Examples]:
    """The examples of the task's caches of meta-train and meta-val.

    Raises:
        CacheError: a cache cannot be opened.
    """
    cfg = stage_config(task.cfg, task.stage)
    return tuple(
        open_examples(cfg, folder, task.num_classes, device) for folder in (task.train, task.val)
    )


@dataclass
class ProxyTask:
    """Everything that a worker needs to run trials of a stage; picklable.

    Attributes:
        cfg: config of the search.
        stage: "fpn" or "head".
        train, val: directories of the caches of meta-train and meta-val; they hold C2..C5, in the
            head stage P3..P7.
        num_classes: number of object classes, without background.
        device: device of the trials, as in MODEL.DEVICE; each worker resolves "auto" for itself.
        seed: seed of the search.
        open_examples: opens the examples of meta-train and meta-val on a device.
        examples: the opened examples; opened lazily, and dropped when the task is pickled.
    """

    cfg: CfgNode
    stage: str
    train: Path
    val: Path
    num_classes: int
    device: str
    seed: int
    open_examples: Callable[[ProxyTask, torch.device], tuple[Examples, Examples]] = (
        open_cached_examples
    )
    examples: tuple[Examples, Examples] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "examples": None}

    def open(self) -> None:
        """Open the examples if they are not open yet.

        Raises:
            CacheError: a cache cannot be opened.
        """
        if self.examples is None:
            self.examples = self.open_examples(self, resolve_device(self.device))

    def run(self, job: TrialJob) -> TrialResult:
        """Run a trial.

        The result is determined, to the last bit, by the seed, the job, the caches and, on CPUs,
        the number of threads. (GPUs add numbers in varying order.) An error of the trial is a
        result, too.

        Raises:
            CacheError: a cache cannot be opened, so no other trial could run either.
            DeviceLost: the GPU has failed.
        """
        started = time.perf_counter()
        self.open()
        result = None
        while result is None:
            result = self._try(job, *self.examples)
            if result is None or result.status == FAILED:
                free_gpu_memory()
        return replace(result, seconds=time.perf_counter() - started)

    def _try(self, job: TrialJob, train: Examples, val: Examples) -> TrialResult | None:
        """Run a trial; None if a cache has left the GPU to make room, for another attempt."""
        training = None
        seed = self.seed + job.seed_offset
        try:
            decoder = build_decoder(
                proxy_config(self.cfg, self.stage, job.genotype),
                train.channels if self.stage == "fpn" else None,
                self.num_classes,
                seed,
            )
            iterations = self.cfg.SEARCH.PROXY.ITERATIONS
            training = build_training(self.cfg, decoder, train, iterations, seed)
            maps, _ = val.batch(torch.zeros(1, dtype=torch.int64))
            flops, latency = multiply_adds(decoder, maps), self._latency(decoder, maps)
            # Costs are measured first, because early stopping compares objectives.
            penalty = build_objective(self.cfg, self.stage).penalty(flops, latency)
            status, reward, losses, curve = _judge(
                training, val, iterations, job.thresholds, penalty
            )
            return TrialResult(
                status,
                reward,
                losses,
                curve,
                params=sum(p.numel() for p in decoder.parameters() if p.requires_grad),
                flops=flops,
                latency=latency,
            )
        except Exception as error:
            if train.device.type == "cuda":
                _check_gpu(train.device)
            if isinstance(error, torch.OutOfMemoryError) and make_room(train, val):
                return None
            message = " ".join(str(error).split())
            reason = f"{type(error).__name__}: {message[:REASON_LENGTH]}"
            if training is not None:
                reason += f" (after {training.done} iterations)"
            # The reason is logged by the process that asked for the trial.
            if not isinstance(error, (NonFiniteLossError, torch.OutOfMemoryError)):
                logger.warning("unexpected error in trial %d", job.index, exc_info=True)
            return TrialResult(FAILED, reason=reason)

    def _latency(self, decoder: Decoder, maps: list[Tensor]) -> float:
        if self.cfg.SEARCH.OBJECTIVE.COST != "latency":
            return math.nan
        milliseconds = latency_ms(decoder.eval(), maps)
        decoder.train()
        return milliseconds


def _check_gpu(device: torch.device) -> None:
    """Raise `DeviceLost` if the GPU cannot be used by this process any more."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(f"{device} has failed: {error}") from error


def _judge(
    training: Training,
    val: Examples,
    iterations: int,
    thresholds: Sequence[tuple[int, float]],
    penalty: float,
) -> tuple[str, float, dict[str, float], tuple[tuple[int, float], ...]]:
    """Train to the end, or until the reward minus the penalty is below a threshold.

    Each reward is computed on all of meta-val.

    Returns:
        Status, reward, losses and curve of the trial.
    """
    curve = []
    rungs = [rung for rung in thresholds if rung[0] < iterations]
    for iteration, threshold in (*rungs, (iterations, -math.inf)):
        training.advance(iteration)
        losses = training.evaluate(val)
        reward = -sum(losses.values())
        if iteration < iterations:
            curve.append((iteration, reward))
        if reward - penalty < threshold:
            return PRUNED, reward, losses, tuple(curve)
    return COMPLETE, reward, losses, tuple(curve)
