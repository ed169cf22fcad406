"""The controller (paper, section 3.3): an LSTM that writes architectures and is trained by PPO.

The whole algorithm is in this file, to be read from top to bottom. The names are those of PPO
(Schulman et al., 2017). The policy gives each decision a distribution over its allowed choices. The
ratio compares the probability of a choice under the current policy with that under the policy that
proposed it. The advantage of an architecture is how much better it was than expected.
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

MAX_ROUNDS = 40
"""How often a batch is sampled at most until it is full of new graphs."""

ROUND_TEMPERATURE = 1.2
"""Factor on the temperature from one of these rounds to the next."""

MAX_DEVIATIONS = 5.0
"""Rewards farther from the baseline than this, in standard deviations, are clipped."""

NORMAL_MEDIAN = 0.6745
"""Median distance of normally distributed numbers from their mean, in standard deviations."""


class Encoded(NamedTuple):
    """B sequences of T decisions as tensors; M is the largest number of choices of a decision."""

    choices: Tensor
    """int64 [B, T]."""
    masks: Tensor
    """bool [B, T, M]: True for the choices that were allowed."""


class Controller(nn.Module):
    """The policy: an LSTM with one step per decision, whose input is the previous choice.

    Decisions of the same kind (inputs, operations, aggregations, the split) share an embedding of
    their choices and an output layer; for input nodes, both have the size that the last cell needs.
    Each decision adds its own bias, so that the LSTM need not count steps to know which one it is
    at. Everything is in double precision and on the CPU: the network is tiny, and a resumed search
    must make the same choices.

    Args:
        space: search space of the sequences.
        hidden: size of the LSTM's state and of the embeddings.
        generator: random generator for the initial weights.
    """

    def __init__(self, space: Space, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        sizes: dict[str, int] = {}
        for decision in space.decisions:
            sizes[decision.kind] = max(sizes.get(decision.kind, 0), len(decision.choices))
        self.width = max(sizes.values())
        # On the meta device, building modules does not draw from the global random state.
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
        """Draw valid sequences from the policy.

        Args:
            count: number of sequences.
            generator: random generator for the draws.
            temperature: above 1, the distributions are flatter than the policy's.
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
                # Inverse transform sampling. The cumulative sum need not end at 1; it does not
                # grow at masked choices, so they are never drawn.
                below = probabilities.cumsum(1)
                chosen = (below <= uniform[:, step, None] * below[:, -1:]).sum(1)
                sequences = [(*prefix, int(c)) for prefix, c in zip(sequences, chosen, strict=True)]
                inputs = self.embed[decision.kind](chosen)[:, None]
        return sequences

    def encode(self, sequences: Sequence[Choices]) -> Encoded:
        """Sequences as tensors, with the masks under which their choices were made."""
        masks = [
            self._padded([self.space.mask(sequence[:t]) for t in range(len(sequence))])
            for sequence in sequences
        ]
        return Encoded(torch.tensor(sequences), torch.stack(masks))

    def forward(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Evaluate sequences under the current policy.

        Returns:
            The log-probability of each choice and the entropy (in nats) of the distribution that
            it was drawn from, both [B, T].
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
        """Log-probabilities of the choices of one decision, [B, M]; minus infinity if masked."""
        logits = self.output[self.space.decisions[step].kind](features)
        logits = F.pad(logits, (0, self.width - logits.shape[1])) + self.bias[step]
        return logits.masked_fill(~mask, -torch.inf).log_softmax(1)

    def _padded(self, masks: Sequence[np.ndarray]) -> Tensor:
        padded = torch.zeros(len(masks), self.width, dtype=torch.bool)
        for row, mask in zip(padded, masks, strict=True):
            row[: len(mask)] = torch.from_numpy(mask)
        return padded


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate objective (equation 7), negated and averaged over the decisions.

    Args:
        log_probs: log-probabilities of the choices under the current policy, [B, T].
        old: log-probabilities under the policy that proposed them, [B, T].
        advantages: advantages of the sequences, [B].
        clip: a ratio below 1 - clip or above 1 + clip brings no further gain.
    """
    ratio = (log_probs - old).exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


class PPO:
    """A strategy (`strategies`): proposes samples of the controller and trains it by PPO.

    A sample of a graph that is known already is drawn again. Its trial would not be run, and in a
    small space the policy would settle on the best of the first batches and find nothing new. Each
    round of draws has a higher temperature, up to an almost uniform distribution. In a large space
    this hardly ever happens before the policy has converged, so it learns from its own samples.

    Args:
        space: search space of the architectures.
        seed: seed of the controller's weights and samples.
        hidden: size of the controller's state.
        lr: learning rate of Adam.
        epochs: passes over each batch.
        clip: clipping range of the probability ratio.
        entropy: weight of the bonus for the mean entropy of a decision (nats).
        baseline_decay: decay of the moving mean of rewards (the baseline) and of the moving
            variance that normalises advantages.
        clip_grad_norm: largest norm of the gradient; 0: no clipping.
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
        self.variance = 0.0
        self.controller = Controller(space, hidden, self._generator("weights"))
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=lr, eps=1e-5)

    def propose(self, count: int) -> list[Choices]:
        """Samples of the policy; the same ones until the next `learn`."""
        generator = self._generator(f"batch {self.batches}")
        known = set(self.known)
        proposals: list[Choices] = []
        duplicates: list[Choices] = []
        with _one_thread():
            for attempt in range(MAX_ROUNDS):
                temperature = ROUND_TEMPERATURE**attempt
                for choices in self.controller.sample(count, generator, temperature):
                    key = self.space.key(choices)
                    (duplicates if key in known else proposals).append(choices)
                    known.add(key)
                if len(proposals) >= count:
                    break
        return (proposals + duplicates)[:count]

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        """Update the policy. A failed trial, whose reward is not finite, counts as the worst so
        far; before the first finite reward, nothing is learnt.

        Returns:
            Statistics of the last pass: `policy_loss`, mean `entropy` of a decision in nats, `kl`
            divergence from the policy that proposed, share of `clipped` ratios; and the new
            `baseline`. Empty as long as no reward was finite.
        """
        self.batches += 1
        self.known.update(self.space.key(choices) for choices in batch)
        self.worst = min([self.worst, *filter(math.isfinite, rewards)])
        if self.worst == math.inf:
            return {}
        with _one_thread():
            return self._update(batch, torch.tensor(rewards, dtype=torch.double))

    def _update(self, batch: Sequence[Choices], rewards: Tensor) -> dict[str, float]:
        advantages = self._update_baseline(rewards)
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

    def _update_baseline(self, rewards: Tensor) -> Tensor:
        """Update the moving mean and variance of the rewards.

        The batch is not normalised by its own deviation: small differences between five rewards
        that happen to be alike teach nothing. A loss has no upper bound, so rewards are clipped to
        `MAX_DEVIATIONS` from the baseline: a single outlier would make all others look the same
        for a hundred batches.

        Returns:
            The advantages: clipped distances of the rewards from the old baseline, in units of the
            new standard deviation.
        """
        finite = rewards.isfinite()
        if self.baseline is None:
            self.baseline = rewards[finite].quantile(0.5).item()
            distances = (rewards[finite] - self.baseline).abs()
            self.variance = (distances.quantile(0.5).item() / NORMAL_MEDIAN) ** 2
        rewards = torch.where(finite, rewards, self.worst)
        distances = rewards - self.baseline
        if self.variance > 0:
            limit = MAX_DEVIATIONS * self.variance**0.5
            distances = distances.clamp(-limit, limit)
        self.baseline += (1 - self.decay) * distances.mean().item()
        self.variance += (1 - self.decay) * (distances.square().mean().item() - self.variance)
        return distances / (self.variance**0.5 + 1e-8)

    def _generator(self, purpose: str) -> torch.Generator:
        """A separate generator per purpose, so that none depends on how often another was used."""
        seed = random.Random(f"{self.seed}: {purpose}").getrandbits(63)
        return torch.Generator().manual_seed(seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: sums then do not depend on the number of cores, and it is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
