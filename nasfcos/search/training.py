"""The training of a trial: some iterations on cached maps, evaluated with averaged weights.

:mod:`.proxy` gives the reasons for the details.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from yacs.config import CfgNode

from ..engine.monitor import NonFiniteLossError
from .decoder import Decoder
from .examples import Examples

# Iterations between two checks of the losses, each of which makes the host wait for the GPU.
CHECK_EVERY = 10


class Training:
    """Trains a decoder step by step, and evaluates its averaged weights at any time.

    Args:
        decoder: decoder to train, in place; it is moved to the device of the examples.
        examples: examples to train on.
        order: [iterations, batch] indices of the examples.
        lr: learning rate of Adam.
        polyak: decay of the running average of the weights.
        bf16: whether to train in mixed precision with bfloat16.

    Attributes:
        done: number of finished iterations.
        averaged: the decoder with averaged weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        examples: Examples,
        order: Tensor,
        lr: float,
        polyak: float,
        bf16: bool = False,
    ) -> None:
        self.decoder = decoder.to(examples.device, memory_format=torch.channels_last).train()
        self.examples = examples
        self.order = order
        self.done = 0
        # Maps can be in bfloat16: decoders begin with convolutions, to which autocast would convert
        # them anyway.
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        trained = [p for p in self.decoder.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
        self.averaged = copy.deepcopy(self.decoder)
        self._average = get_ema_multi_avg_fn(polyak)
        both = self.averaged, self.decoder
        self._parameters = [list(model.parameters()) for model in both]
        self._buffers = list(zip(*(model.buffers() for model in both), strict=True))
        self._losses = torch.zeros(len(order), device=examples.device)

    def advance(self, until: int) -> None:
        """Train until `until` iterations are done.

        Raises:
            NonFiniteLossError: the loss became infinite or nan.
        """
        while self.done < until:
            with _momentum(self.decoder, 1.0 if self.done == 0 else None):
                loss = self._step(self.order[self.done])
            self._losses[self.done] = loss
            self.done += 1
            if self.done % CHECK_EVERY == 0 or self.done == until:
                self._check()

    def _step(self, indices: Tensor) -> Tensor:
        maps, assignment = self.examples.batch(indices, self._dtype)
        with self._autocast():
            terms = self.decoder.head.loss_terms(self.decoder(maps), assignment)
            loss = sum(term.loss for term in terms.values())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Update `averaged` like PyTorch's AveragedModel, which makes the host wait for the GPU."""
        if self.done == 0:
            torch._foreach_copy_(*self._parameters)
        else:
            self._average(*self._parameters, None)  # it does not use the number of updates
        for own, buffer in self._buffers:
            own.copy_(buffer)

    def _check(self) -> None:
        finite = self._losses[: self.done].isfinite()
        if not finite.all():
            first = int(finite.long().argmin())
            value = self._losses[first].item()
            raise NonFiniteLossError(f"the loss is {value} at iteration {first + 1}")

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The losses of the averaged decoder on all examples, by name.

        Raises:
            NonFiniteLossError: a loss is infinite or nan.
        """
        model = self.averaged.eval()
        totals: dict[str, Tensor] = {}
        for indices in torch.arange(len(examples)).split(self.order.shape[1]):
            maps, assignment = examples.batch(indices, self._dtype)
            with self._autocast():
                terms = model.head.loss_terms(model(maps), assignment)
            for name, (loss, weight) in terms.items():
                weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device)
                totals[name] = totals.get(name, 0) + torch.stack((loss * weight, weight))
        sums = {name: total.tolist() for name, total in totals.items()}
        losses = {name: loss / weight if weight else 0.0 for name, (loss, weight) in sums.items()}
        if not math.isfinite(sum(losses.values())):
            parts = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NonFiniteLossError(
                f"after iteration {self.done} the losses on meta-val are: {parts}"
            )
        return losses

    def _autocast(self) -> torch.autocast:
        bf16 = self._dtype == torch.bfloat16
        return torch.autocast(self.examples.device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def _momentum(model: nn.Module, momentum: float | None) -> Iterator[None]:
    """Set the momentum of all batch norms within the block; None: leave it as it is."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and momentum is not None]
    own = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, own, strict=True):
            norm.momentum = value


def batch_order(count: int, iterations: int, batch: int, seed: int) -> Tensor:
    """[iterations, batch] indices below `count`: random permutations, one after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(iterations * batch / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: iterations * batch].view(iterations, batch)


def build_training(
    cfg: CfgNode, decoder: Decoder, examples: Examples, iterations: int, seed: int
) -> Training:
    """A training of some iterations with the settings of SEARCH.PROXY.

    Args:
        cfg: config of the search.
        decoder: decoder to train.
        examples: examples to train on.
        iterations: number of iterations.
        seed: seed of the order of the examples.
    """
    proxy = cfg.SEARCH.PROXY
    order = batch_order(len(examples), iterations, proxy.BATCH, seed)
    return Training(decoder, examples, order, proxy.LR, proxy.POLYAK, proxy.AMP == "bf16")
