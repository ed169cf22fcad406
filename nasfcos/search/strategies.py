"""Search strategies behind one interface: PPO, random search and evolution."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from yacs.config import CfgNode

from .controller import PPO
from .space import Choices, Rng, Space

REDRAWS = 1000
"""Draws of a new graph before a known one is accepted (the space may be exhausted)."""


class Strategy(Protocol):
    """Proposes architectures in batches, and learns from their rewards.

    A strategy is a pure function of its seed and of the batches it has learnt: a fresh one that
    learns the same batches in the same order makes the same proposals from then on. This is how a
    search resumes. So `propose` changes no state, and returns the same until the next `learn`.
    """

    def propose(self, count: int) -> list[Choices]:
        """`count` architectures to try next; known graphs only if no new ones are found."""

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        """Learn from the rewards of a batch.

        Args:
            batch: architectures, in the order in which they were proposed.
            rewards: reward of each; not finite for a failed trial.

        Returns:
            Statistics for the log, by name.
        """


class RandomSearch:
    """Draws uniformly from the valid sequences, but no graph twice as long as there are new ones.

    Args:
        space: search space of the architectures.
        seed: seed of the draws.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.batches = 0
        self.known: set[str] = set()

    def propose(self, count: int) -> list[Choices]:
        rng = random.Random(f"{self.seed}: batch {self.batches}")
        known = set(self.known)
        proposals = []
        for _ in range(count):
            proposals.append(self._draw(rng, known))
            known.add(self.space.key(proposals[-1]))
        return proposals

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        self.batches += 1
        self.known.update(self.space.key(choices) for choices in batch)
        return {}

    def _draw(self, rng: Rng, known: set[str]) -> Choices:
        for _ in range(REDRAWS):
            choices = self.space.sample(rng)
            if self.space.key(choices) not in known:
                break
        return choices


class Evolution(RandomSearch):
    """Regularised evolution (Real et al., 2019): the oldest members die, not the worst.

    The parent is the best of a random sample of the population; a child differs from it in one
    decision and is a new graph. Failed trials do not enter the population. Until it is full, the
    parent is `start`. Without one, and if a parent has no new child left, draws are random.

    Args:
        space: search space of the architectures.
        seed: seed of the draws.
        population: size of the population, which holds the latest architectures.
        tournament: size of the sample that a parent is chosen from.
        start: architecture that the search starts from, if any.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        population: int,
        tournament: int,
        start: Choices | None = None,
    ) -> None:
        super().__init__(space, seed)
        self.start = start
        self.tournament = tournament
        self.population: deque[tuple[float, Choices]] = deque(maxlen=population)

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        super().learn(batch, rewards)
        self.population += (
            (reward, choices)
            for reward, choices in zip(rewards, batch, strict=True)
            if math.isfinite(reward)
        )
        if not self.population:
            return {}
        members = [reward for reward, _ in self.population]
        return {
            "population_mean": sum(members) / len(members),
            "population_best": max(members),
        }

    def _draw(self, rng: random.Random, known: set[str]) -> Choices:
        parent = self.start
        if len(self.population) == self.population.maxlen:
            rivals = rng.sample(self.population, self.tournament)
            _, parent = max(rivals, key=lambda member: member[0])
        if parent is not None:
            children = self.space.neighbours(parent)
            for child in rng.sample(children, len(children)):
                if self.space.key(child) not in known:
                    return child
        return super()._draw(rng, known)


def build_strategy(
    cfg: CfgNode, space: Space, seed: int, start: Choices | None = None
) -> Strategy:
    """The strategy that SEARCH.STRATEGY names, with its settings.

    Args:
        cfg: config of the search.
        space: search space of the architectures.
        seed: seed of the strategy.
        start: architecture that is tried first (`StageRunner.run`) and that evolution breeds from.
    """
    name = cfg.SEARCH.STRATEGY
    if name == "random":
        return RandomSearch(space, seed)
    if name == "evolution":
        settings = cfg.SEARCH.EVOLUTION
        return Evolution(
            space,
            seed,
            population=settings.POPULATION,
            tournament=settings.TOURNAMENT,
            start=start,
        )
    settings = cfg.SEARCH.PPO
    return PPO(
        space,
        seed,
        hidden=settings.HIDDEN,
        lr=settings.LR,
        epochs=settings.EPOCHS,
        clip=settings.CLIP,
        entropy=settings.ENTROPY,
        baseline_decay=settings.BASELINE_DECAY,
        clip_grad_norm=settings.CLIP_GRAD_NORM,
    )
