"""The proxy task: a decoder is trained for a moment on cached maps, and judged by its losses.

As in the paper (section 4): the backbone is frozen and its maps are cached, a trial trains the
decoder only, with Adam and Polyak averaging, and the reward is the negative sum of the losses on
meta-val. Where the paper is silent:

- The weights that are judged are a running average: those after the first iteration, then
  ``avg = POLYAK * avg + (1 - POLYAK) * w`` after each one. Running statistics of batch norms are
  copied, not averaged again: with their momentum of 0.1 they are such an average over the same
  last iterations already. They too start from the first batch, not from zero mean and unit
  variance, of which ten iterations would leave a third.
- All trials of a stage, but for repetitions, see the same batches in the same order. The plain
  head of the FPN stage starts from the same weights in all of them too: with others for each FPN,
  luck with the head would weigh as much in a reward as the FPN does. What is searched starts from
  weights that follow from the genotype.
- Meta-val is judged as if it were one batch: the sum of a loss over all of it, divided by what that
  loss is normalised by over all of it. So the reward does not depend, but for rounding, on how
  meta-val is cut into batches.
- The learning rate is constant and gradients are not clipped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
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

# Characters of an error's message that a trial's reason quotes.
REASON_LENGTH = 300


@dataclass
class ProxyTask:
    """All that a worker needs to run trials of a stage; picklable.

    Attributes:
        cfg: of the search.
        stage: "fpn" or "head".
        train, val: folders of the caches of meta-train and meta-val: of C2..C5, in the head stage
            of P3..P7.
        num_classes: object classes, background not counted.
        device: that the trials run on, as MODEL.DEVICE names it: "auto" is for the worker to find.
        seed: of the search.
        examples: of the two; None: opened from the folders by `open`, or else the first trial. With
            a pickled task they do not go.
    """

    cfg: CfgNode
    stage: str
    train: Path
    val: Path
    num_classes: int
    device: str
    seed: int
    examples: tuple[Examples, Examples] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "examples": None}

    def open(self) -> None:
        """Open the caches, unless they are.

        Raises:
            CacheError: one of them does not.
        """
        if self.examples is None:
            cfg, device = stage_config(self.cfg, self.stage), resolve_device(self.device)
            self.examples = tuple(
                open_examples(cfg, folder, self.num_classes, device)
                for folder in (self.train, self.val)
            )

    def run(self, job: TrialJob) -> TrialResult:
        """Run one trial. Its result follows from the seed, the job, the caches and, on CPUs, the
        number of threads, to the last bit (GPUs add in varying order).

        Trouble of the trial is a result. What no other trial could run with either is raised: a
        cache that does not open, a GPU that has failed (`DeviceLost`).
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
        """None: the GPU's memory did not suffice, and a cache has left it: to be tried again."""
        training = None
        seed = self.seed + job.repeat
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
            # Costs are known before the training, so that it may be judged by the objective.
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
            expected = isinstance(error, (NonFiniteLossError, torch.OutOfMemoryError))
            logger.warning("trial %d: %s", job.index, reason, exc_info=not expected)
            return TrialResult(FAILED, reason=reason)

    def _latency(self, decoder: Decoder, maps: list[Tensor]) -> float:
        if self.cfg.SEARCH.OBJECTIVE.COST != "latency":
            return math.nan
        milliseconds = latency_ms(decoder.eval(), maps)
        decoder.train()
        return milliseconds


def _check_gpu(device: torch.device) -> None:
    """Raises `DeviceLost` where nothing will run in this process any more."""
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
    """Train to the end, or to the first threshold that the reward less the penalty misses; each is
    judged on all of val.

    Returns:
        Status, reward, losses and the curve.
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
