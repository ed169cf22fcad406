"""How a search chooses what to try next: PPO, random, or evolution, behind one interface."""

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
"""Draws that may give known graphs before one is proposed again (the space may be exhausted)."""


class Strategy(Protocol):
    """Proposes architectures in batches, and learns from their rewards.

    It is a pure function of its seed and of the batches learnt so far: a fresh one that learns the
    same batches in the same order proposes the same from then on, which is how a search resumes.
    So `propose` changes nothing, and repeats itself until something is learnt.
    """

    def propose(self, count: int) -> list[Choices]:
        """Architectures to try next; graphs learnt before only where no others are found."""

    def learn(self, batch: Sequence[Choices], rewards: Sequence[float]) -> dict[str, float]:
        """Take in what a batch was worth, in the order in which it was proposed.

        A reward that is not finite is that of a failed trial.

        Returns:
            figures for the log, by name.
        """


class RandomSearch:
    """Uniform over the valid sequences, but no graph twice while there are others.

    Args:
        space: of the architectures.
        seed: of the draws.
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
    """Regularised evolution (Real et al., 2019): the population dies of age, not of weakness.

    Failed trials do not enter it. Of some drawn from it the best is the parent; a child differs
    from that in one decision, and is a graph not tried before. Until the population is full, the
    parent is the architecture to start from; without one, and where a parent has no such child
    left, draws are random.

    Args:
        space: of the architectures.
        seed: of the draws.
        population: the youngest that may be parents.
        tournament: how many are drawn to find a parent.
        start: the architecture to start from, if there is one.
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
        of_population = [reward for reward, _ in self.population]
        return {
            "population_mean": sum(of_population) / len(of_population),
            "population_best": max(of_population),
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
        start: the architecture that is tried first (`run_stage`), from which evolution breeds.
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
