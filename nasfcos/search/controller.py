"""The controller (paper, section 3.3): an LSTM writes architectures, PPO teaches it which are good.

The whole algorithm stands here, to be read from top to bottom. Names are those of PPO (Schulman et
al., 2017): the policy gives every decision a distribution over its allowed choices; the ratio is
that of a choice's probability under the policy now and when it was proposed; the advantage is how
much better than expected an architecture was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .space import Choices, Space

ROUNDS, WARMING = 40, 1.2
"""Batches that are sampled at most to fill one with new graphs, each at a higher temperature."""

FARTHEST = 5.0
"""Deviations from the baseline beyond which a reward is no better and no worse."""

NORMAL_MEDIAN = 0.6745
"""Median distance of normally distributed numbers from their mean, in standard deviations."""


class Encoded(NamedTuple):
    """Sequences as tensors: B of them, T decisions, at most M choices each."""

    choices: Tensor
    """int64 [B, T]."""
    masks: Tensor
    """bool [B, T, M]: what could have been chosen."""


class Controller(nn.Module):
    """The policy: an LSTM with one step a decision, fed with the choice before.

    Decisions of a kind (inputs, operations, aggregations, the split) share an embedding of their
    choices and an output layer, which for input nodes has the size of the last cell's choice; each
    decision adds a bias of its own, so that the LSTM need not count steps to know its place. All
    is in double precision, on the CPU: it is tiny, and a resumed search must make the same choices.

    Args:
        space: whose sequences are written.
        hidden: size of the LSTM's state and of the embeddings.
        generator: of the initial weights.
    """

    def __init__(self, space: Space, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        sizes: dict[str, int] = {}
        for decision in space.decisions:
            sizes[decision.kind] = max(sizes.get(decision.kind, 0), len(decision.choices))
        self.width = max(sizes.values())
        # On the meta device modules are made without drawing from the global random state.
        with torch.device("meta"):
            self.start = nn.Parameter(torch.empty(hidden))
            self.embed = nn.ModuleDict({k: nn.Embedding(n, hidden) for k, n in sizes.items()})
            self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
            self.output = nn.ModuleDict({k: nn.Linear(hidden, n) for k, n in sizes.items()})
            self.bias = nn.Parameter(torch.empty(len(space.decisions), self.width))
        self.to_empty(device="cpu").double()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
        nn.init.zeros_(self.bias)

    def sample(
        self, count: int, generator: torch.Generator, temperature: float = 1.0
    ) -> list[Choices]:
        """Sequences drawn from the policy, or from a more even one (`temperature` above 1).

        All are valid.
        """
        sequences: list[Choices] = [()] * count
        uniform = torch.rand(
            count, len(self.space.decisions), generator=generator, dtype=torch.double
        )
        state = None
        with torch.no_grad():
            inputs = self.start.expand(count, 1, -1)
            for step, decision in enumerate(self.space.decisions):
                features, state = self.lstm(inputs, state)
                mask = self._padded([self.space.mask(prefix) for prefix in sequences])
                log_probs = self._log_probs(features[:, 0], step, mask)
                probabilities = (log_probs / temperature).exp()
                # Inverse of the distribution function, which need not end at one; it does not grow
                # at masked choices, so that they are never hit.
                below = probabilities.cumsum(1)
                chosen = (below <= uniform[:, step, None] * below[:, -1:]).sum(1)
                sequences = [(*prefix, int(c)) for prefix, c in zip(sequences, chosen, strict=True)]
                inputs = self.embed[decision.kind](chosen)[:, None]
        return sequences

    def encode(self, sequences: Sequence[Choices]) -> Encoded:
        masks = [
            self._padded([self.space.mask(sequence[:t]) for t in range(len(sequence))])
            for sequence in sequences
        ]
        return Encoded(torch.tensor(sequences), torch.stack(masks))

    def forward(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Of every decision of every sequence, under the mask:

        Returns:
            log-probability of its choice, and entropy of its distribution, both [B, T].
        """
        choices, masks = encoded
        decisions = self.space.decisions
        inputs = [self.start.expand(len(choices), -1)]
        for step, decision in enumerate(decisions[:-1]):
            inputs.append(self.embed[decision.kind](choices[:, step]))
        features, _ = self.lstm(torch.stack(inputs, 1))
        log_probs = torch.stack(
            [self._log_probs(features[:, t], t, masks[:, t]) for t in range(len(decisions))], 1
        )
        chosen = log_probs.gather(2, choices[..., None])[..., 0]
        # 0 * log 0 = 0, in value and in gradient.
        entropy = -(log_probs.exp() * log_probs.masked_fill(~masks, 0)).sum(2)
        return chosen, entropy

    def _log_probs(self, features: Tensor, step: int, mask: Tensor) -> Tensor:
        """[B, M], minus infinity where masked."""
        logits = self.output[self.space.decisions[step].kind](features)
        logits = F.pad(logits, (0, self.width - logits.shape[1])) + self.bias[step]
        return logits.masked_fill(~mask, -torch.inf).log_softmax(1)

    def _padded(self, masks: Sequence[np.ndarray]) -> Tensor:
        padded = torch.zeros(len(masks), self.width, dtype=torch.bool)
        for row, mask in zip(padded, masks, strict=True):
            row[: len(mask)] = torch.from_numpy(mask)
        return padded


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, negated, as the mean over the decisions.

    Args:
        log_probs: of the choices under the policy now, [B, T].
        old: of the same when they were proposed, [B, T].
        advantages: of the sequences, [B].
        clip: beyond 1 - clip and 1 + clip a ratio gains nothing more.
    """
    ratio = (log_probs - old).exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


class PPO:
    """Proposes what the controller samples, and teaches it by PPO. A strategy (`strategies`).

    A sample that writes a graph known already is drawn again: its trial would not be run, and in a
    small space the policy would settle on the best of the first batches and find nothing new. Each
    new draw is at a higher temperature, up to all but uniform. In a large space this hardly ever
    happens before the policy has converged, and what is learnt from are its own samples.

    Args:
        space: of the architectures.
        seed: of the controller's weights and samples.
        hidden: size of the controller.
        lr: of Adam.
        epochs: passes over each batch.
        clip: of the probability ratio.
        entropy: weight of the bonus for the mean entropy of a decision (nats).
        baseline_decay: of the moving average of rewards that an advantage is measured from, and of
            that of their squared distances from it, which advantages are divided by the root of.
        clip_grad_norm: largest norm of the gradient; 0: not clipped.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        hidden: int,
        lr: float,
        epochs: int,
        clip: float,
        entropy: float,
        baseline_decay: float,
        clip_grad_norm: float,
    ) -> None:
        self.seed = seed
        self.epochs = epochs
        self.clip = clip
        self.entropy = entropy
        self.decay = baseline_decay
        self.clip_grad_norm = clip_grad_norm
        self.space = space
        self.batches = 0
        self.known: set[str] = set()
        self.worst = math.inf
        self.baseline: float | None = None
        self.spread = 0.0
        self.controller = Controller(space, hidden, self._generator("weights"))
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=lr, eps=1e-5)

    def propose(self, count: int) -> list[Choices]:
        """Samples of the policy; the same ones until something is learnt."""
        generator = self._generator(f"batch {self.batches}")
        known = set(self.known)
        proposals: list[Choices] = []
        repeats: list[Choices] = []
        with _one_thread():
            for attempt in range(ROUNDS):
                for choices in self.controller.sample(count, generator, WARMING**attempt):
                    key = self.space.key(choices)
                    (repeats if key in known else proposals).append(choices)
                    known.add(key)
                if len(proposals) >= count:
                    break
        return (proposals + repeats)[:count]

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        """An update of the policy. A failed trial, whose reward is not finite, counts as the worst
        so far; it is left out before there is any.

        Returns:
            of the last pass: `policy_loss`, mean `entropy` of a decision in nats, `kl` from the
            policy that proposed, the share of `clipped` ratios; and the `baseline`, all that if
            any reward was finite so far.
        """
        self.batches += 1
        self.known.update(self.space.key(choices) for choices in batch)
        self.worst = min([self.worst, *filter(math.isfinite, rewards)])
        if self.worst == math.inf:
            return {}
        with _one_thread():
            return self._update(batch, torch.tensor(rewards, dtype=torch.double))

    def _update(self, batch: Sequence[Choices], rewards: Tensor) -> dict[str, float]:
        advantages = self._advantages(rewards)
        encoded = self.controller.encode(batch)
        with torch.no_grad():
            old, _ = self.controller(encoded)
        for _ in range(self.epochs):
            log_probs, entropy = self.controller(encoded)
            loss = policy_loss(log_probs, old, advantages, self.clip)
            self.optimizer.zero_grad()
            (loss - self.entropy * entropy.mean()).backward()
            if self.clip_grad_norm:
                nn.utils.clip_grad_norm_(self.controller.parameters(), self.clip_grad_norm)
            self.optimizer.step()
        ratio = (log_probs.detach() - old).exp()
        return {
            "policy_loss": loss.item(),
            "entropy": entropy.mean().item(),
            "kl": (ratio - 1 - ratio.log()).mean().item(),
            "clipped": ((ratio - 1).abs() > self.clip).double().mean().item(),
            "baseline": self.baseline,
        }

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Rewards measured from their moving average, in units of their moving deviation from it.

        Not in those of the batch: five rewards that happen to be alike are not a lesson. A loss has
        no upper bound, so rewards count as at most `FARTHEST` deviations away: one beyond all
        others would make them look the same for a hundred batches.
        """
        finite = rewards.isfinite()
        if self.baseline is None:
            self.baseline = rewards[finite].quantile(0.5).item()
            distances = (rewards[finite] - self.baseline).abs()
            self.spread = (distances.quantile(0.5).item() / NORMAL_MEDIAN) ** 2
        rewards = torch.where(finite, rewards, self.worst)
        limit = FARTHEST * self.spread**0.5 or math.inf
        distances = (rewards - self.baseline).clamp(-limit, limit)
        self.baseline += (1 - self.decay) * distances.mean().item()
        self.spread += (1 - self.decay) * (distances.square().mean().item() - self.spread)
        return distances / (self.spread**0.5 + 1e-8)

    def _generator(self, purpose: str) -> torch.Generator:
        """Of its own for each purpose, so that nothing depends on how often another was used."""
        seed = random.Random(f"{self.seed}: {purpose}").getrandbits(63)
        return torch.Generator().manual_seed(seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are then of one order whatever the machine's number of cores; and it is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
