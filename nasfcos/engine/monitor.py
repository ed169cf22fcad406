"""Checks of each step's losses without making the host wait for a GPU."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import distributed


class NonFiniteLossError(RuntimeError):
    """Training diverged. The message names the iteration, the images and the last checkpoint."""


@dataclass
class _Step:
    iteration: int
    names: list[str]  # of the loss terms
    own: Tensor  # the terms of this process
    agreed: Tensor  # means of the terms and of the requests to stop over all processes; on the CPU
    ready: torch.cuda.Event | None  # recorded when `agreed` has been copied from a GPU
    files: list[str]  # of this process's images


class StepMonitor:
    """Detects losses that are not finite, and requests to stop, on all processes in the same step.

    On the CPU, `submit` checks a step at once, before the optimizer uses its gradients. On a GPU
    this would make the host wait for the device in every step; there, a step is checked when the
    next one is submitted, or by `finish`, which must be called before anything computed since is
    saved or evaluated.

    Attributes:
        last_good: the newest checkpoint, named in errors.
    """

    def __init__(self, last_good: Path | None = None) -> None:
        self.last_good = last_good
        self._pending: deque[_Step] = deque()

    def submit(
        self, iteration: int, losses: dict[str, Tensor], files: list[str], stop: bool
    ) -> tuple[dict[str, Tensor], bool]:
        """Submit a step.

        Args:
            iteration: number of the step, from 1.
            losses: loss terms of this process, detached.
            files: names of this process's images.
            stop: whether this process was asked to stop.

        Returns:
            The means of the terms over all processes, on the device; and whether any process was
            asked to stop in the steps checked by this call.

        Raises:
            NonFiniteLossError: on every process, if a loss in the steps checked is not finite.
        """
        own = torch.stack(list(losses.values()))
        agreed = distributed.mean(torch.cat((own, torch.full_like(own[:1], float(stop)))))
        means = dict(zip(losses, agreed.unbind(), strict=False))
        ready = None
        if agreed.is_cuda:
            stream = torch.cuda.current_stream(agreed.device)
            agreed = torch.empty_like(agreed, device="cpu", pin_memory=True).copy_(
                agreed, non_blocking=True
            )
            ready = torch.cuda.Event()
            ready.record(stream)
        self._pending.append(_Step(iteration, list(losses), own, agreed, ready, files))
        return means, self._check(leave=0 if ready is None else 1)

    def finish(self) -> bool:
        """Check all steps submitted so far; returns and raises as `submit`."""
        return self._check(leave=0)

    def _check(self, leave: int) -> bool:
        stop = False
        while len(self._pending) > leave:
            step = self._pending.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            *terms, flag = step.agreed.tolist()
            if not all(map(math.isfinite, terms)):
                self._fail(step, terms)
            stop |= flag > 0
        return stop

    def _fail(self, step: _Step, terms: list[float]) -> None:
        culprit = not bool(torch.isfinite(step.own).all())
        shares = distributed.all_gather((culprit, step.files))
        files = [name for bad, names in shares if bad for name in names]
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(step.names, terms, strict=True))
        raise NonFiniteLossError(
            f"iteration {step.iteration}: the loss is not finite ({values}). Images of the batch: "
            f"{', '.join(files)}. {self.remedy()}"
        )

    def remedy(self) -> str:
        """Advice for the user after a divergence."""
        if self.last_good is None:
            where = "There is no checkpoint yet"
        else:
            where = f"The last good checkpoint is {self.last_good}"
        return (
            f"{where}. Check these images' annotations; a lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRAD_NORM keeps a training from diverging."
        )
