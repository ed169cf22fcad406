"""The search space: the decisions that make an architecture, and which choices are valid.

An architecture is written as a sequence of choices, one index per decision. Everything follows from
one count: the number of valid sequences that each next choice leads to. A choice with a count of
zero is masked, the sum of the counts at the first decision is the size of the space, and sampling
in proportion to them is uniform.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from yacs.config import CfgNode

from ..config import ConfigError
from ..genotype import (
    AGGREGATIONS,
    FPN_OPS,
    HEAD_OPS,
    NUM_INPUTS,
    NUM_OUTPUTS,
    Cell,
    Genotype,
    canonical,
    node_names,
)

Choices = tuple[int, ...]


class Rng(Protocol):
    """`random.Random` or `numpy.random.Generator`."""

    def random(self) -> float:
        """Uniform in [0, 1)."""


@dataclass(frozen=True)
class Decision:
    """One decision about an architecture.

    Attributes:
        name: "cell0.in0", "cell0.in1", "cell0.op0", "cell0.op1", "cell0.agg", "cell1.in0", ...;
            "head.split", "head.op0", ....
        choices: names of the choices: nodes "C2".."C5", "N4"..; operations; aggregations; or
            "0".."6" for the split.
    """

    name: str
    choices: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What is decided, whatever the position: "in", "op", "agg" or "split"."""
        return self.name.rpartition(".")[2].rstrip("0123456789")


def graph_key(genotype: Genotype) -> str:
    """A text that two genotypes share if and only if they describe the same graph.

    It is the canonical genotype of the whole decoder (`nasfcos.genotype.canonical`) as JSON.
    """
    return json.dumps(canonical(genotype).to_list(), separators=(",", ":"))


class Space(ABC):
    """The architectures of a stage: an `FPNSpace` or a `HeadSpace`.

    Iterating over a space gives every valid sequence once, in lexicographic order.

    Attributes:
        stage: "fpn" or "head".
        decisions: the decisions, in the order in which they are made.
    """

    stage: str
    decisions: tuple[Decision, ...]

    @abstractmethod
    def completions(self, prefix: Sequence[int]) -> list[int]:
        """For each choice of the decision after `prefix`, the number of valid sequences with it."""

    @abstractmethod
    def _build(self, choices: Sequence[int]) -> Genotype:
        """The genotype of choices that are in range, even if its FPN is invalid."""

    @abstractmethod
    def choices(self, genotype: Genotype) -> Choices:
        """The sequence that writes a genotype; the inverse of `genotype`.

        Only the part that this space searches (the cells or the head) is read.

        Raises:
            ValueError: the genotype is not in the space; the message says why.
        """

    def mask(self, prefix: Sequence[int]) -> np.ndarray:
        """Whether each choice of the decision after a valid prefix leads to a valid architecture.

        Returns:
            [number of choices] bool.
        """
        return np.array([count > 0 for count in self.completions(prefix)])

    def size(self) -> int:
        """The exact number of valid sequences."""
        return sum(self.completions(()))

    def sample(self, rng: Rng) -> Choices:
        """A sequence drawn uniformly from all valid sequences."""
        sequence: list[int] = []
        while len(sequence) < len(self.decisions):
            counts = self.completions(sequence)
            left = rng.random() * sum(counts)
            for choice, count in enumerate(counts):
                if count:
                    chosen = choice
                    left -= count
                    if left < 0:
                        break
            sequence.append(chosen)
        return tuple(sequence)

    def __iter__(self) -> Iterator[Choices]:
        def extend(prefix: Choices) -> Iterator[Choices]:
            if len(prefix) == len(self.decisions):
                yield prefix
                return
            for choice in np.flatnonzero(self.mask(prefix)):
                yield from extend((*prefix, int(choice)))

        return extend(())

    def genotype(self, choices: Sequence[int]) -> Genotype:
        """The architecture that a sequence describes.

        Raises:
            ValueError: the sequence is not valid; the message names the decision.
        """
        if len(choices) != len(self.decisions):
            raise ValueError(
                f"an architecture of this space takes {len(self.decisions)} choices, "
                f"not {len(choices)}"
            )
        for decision, choice in zip(self.decisions, choices, strict=True):
            if not 0 <= choice < len(decision.choices):
                raise ValueError(
                    f"{decision.name} is {choice}, but must lie in 0..{len(decision.choices) - 1} "
                    f"({', '.join(decision.choices)})"
                )
        genotype = self._build(choices)
        if len(genotype.unconsumed) < NUM_OUTPUTS:
            step = next(t for t, c in enumerate(choices) if not self.completions(choices[:t])[c])
            decision = self.decisions[step]
            raise ValueError(
                f"{decision.name} must not be {decision.choices[choices[step]]}: fewer than "
                f"{NUM_OUTPUTS} cell outputs would stay unconsumed for P3, P4 and P5"
            )
        return genotype

    def neighbours(self, choices: Sequence[int]) -> list[Choices]:
        """All valid sequences that differ from a valid one in exactly one decision."""
        found = []
        for step, decision in enumerate(self.decisions):
            for choice in range(len(decision.choices)):
                other = (*choices[:step], choice, *choices[step + 1 :])
                if choice == choices[step]:
                    continue
                if len(self._build(other).unconsumed) >= NUM_OUTPUTS:
                    found.append(other)
        return found

    def key(self, choices: Sequence[int]) -> str:
        """The `graph_key` of the architecture that a sequence describes."""
        return graph_key(self.genotype(choices))

    def describe(self) -> str:
        """The size and the choices of the space in words, for the log."""
        size = self.size()
        exact = f"{size:,}" if size < 10**9 else f"{size:.3g}"
        lines = [f"{len(self.decisions)} decisions, {exact} valid sequences"]
        return "\n".join([*lines, *self._describe()])

    @abstractmethod
    def _describe(self) -> list[str]: ...


class FPNSpace(Space):
    """Feature pyramids (paper, section 3.2): cells of two inputs, two operations, an aggregation.

    A choice of an input is valid as long as three cell outputs can remain unconsumed in the end.
    Each later cell adds one output, and consumes none if both its inputs are backbone maps.

    Args:
        cells: number of cells, at least three.
        ops: names from `FPN_OPS`.
        aggregations: names from `AGGREGATIONS`.
    """

    stage = "fpn"

    def __init__(
        self,
        cells: int,
        ops: Sequence[str] = FPN_OPS,
        aggregations: Sequence[str] = AGGREGATIONS,
    ) -> None:
        if cells < NUM_OUTPUTS:
            raise ValueError(f"{cells} cells cannot make P3, P4 and P5: at least {NUM_OUTPUTS}")
        self.cells = cells
        self._ops = _indices(ops, FPN_OPS, "FPN operation")
        self._aggregations = _indices(aggregations, AGGREGATIONS, "aggregation")
        decisions = []
        names = tuple(node_names(cells))
        for k in range(cells):
            decisions += [Decision(f"cell{k}.in{i}", names[: NUM_INPUTS + k]) for i in (0, 1)]
            decisions += [Decision(f"cell{k}.op{i}", tuple(ops)) for i in (0, 1)]
            decisions.append(Decision(f"cell{k}.agg", tuple(aggregations)))
        self.decisions = tuple(decisions)

    def _count(self, step: int, free: int) -> int:
        return _count_fpns(self.cells, step, free, len(self._ops), len(self._aggregations))

    def completions(self, prefix: Sequence[int]) -> list[int]:
        step = len(prefix)
        cell, slot = divmod(step, 5)
        taken = {node for k in range(cell) for node in prefix[5 * k : 5 * k + 2]}
        taken.update(prefix[5 * cell : 5 * cell + min(slot, 2)])
        unconsumed = set(range(NUM_INPUTS, NUM_INPUTS + cell)) - taken
        free = len(unconsumed)
        if slot >= 2:
            made = slot == 4
            after = self._count(step + 1, free + made)
            return [after] * len(self.decisions[step].choices)
        keeps = self._count(step + 1, free)
        takes = self._count(step + 1, free - 1) if free else 0
        return [takes if node in unconsumed else keeps for node in range(NUM_INPUTS + cell)]

    def _build(self, choices: Sequence[int]) -> Genotype:
        cells = []
        for start in range(0, len(choices), 5):
            in0, in1, op0, op1, aggregation = choices[start : start + 5]
            ops = (self._ops[op0], self._ops[op1])
            cells.append(Cell((in0, in1), ops, self._aggregations[aggregation]))
        return Genotype(tuple(cells))

    def choices(self, genotype: Genotype) -> Choices:
        if len(genotype.cells) != self.cells:
            raise ValueError(f"the space has {self.cells} cells, not {len(genotype.cells)}")
        sequence: list[int] = []
        for k, cell in enumerate(genotype.cells):
            sequence += cell.inputs
            for i, op in enumerate(cell.ops):
                sequence.append(_position(op, self._ops, FPN_OPS, f"cell{k}.op{i}"))
            sequence.append(
                _position(cell.aggregation, self._aggregations, AGGREGATIONS, f"cell{k}.agg")
            )
        self.genotype(sequence)
        return tuple(sequence)

    def _describe(self) -> list[str]:
        return [
            f"FPN cells: {self.cells}",
            f"operations: {', '.join(FPN_OPS[i] for i in self._ops)}",
            f"aggregations: {', '.join(AGGREGATIONS[i] for i in self._aggregations)}",
        ]


class HeadSpace(Space):
    """Heads (paper, section 3.2): a sequence of operations and the split.

    The split is the index of the first layer whose weights are shared by all pyramid levels.

    Args:
        fpn_cells: cells of the pyramid below the head, the same in all genotypes of the space.
        layers: number of operations.
        ops: names from `HEAD_OPS`.
    """

    stage = "head"

    def __init__(
        self, fpn_cells: Sequence[Cell], layers: int, ops: Sequence[str] = HEAD_OPS
    ) -> None:
        if layers < 1:
            raise ValueError(f"a searched head needs a layer at least, not {layers}")
        self.fpn_cells = tuple(fpn_cells)
        if len(Genotype(self.fpn_cells).unconsumed) < NUM_OUTPUTS:
            raise ValueError(
                f"the FPN of the head space leaves fewer than {NUM_OUTPUTS} outputs unconsumed"
            )
        self.layers = layers
        self._ops = _indices(ops, HEAD_OPS, "head operation")
        split = Decision("head.split", tuple(str(i) for i in range(layers + 1)))
        self.decisions = (split, *(Decision(f"head.op{i}", tuple(ops)) for i in range(layers)))

    def completions(self, prefix: Sequence[int]) -> list[int]:
        decisions_after = len(self.decisions) - len(prefix) - 1
        return [len(self._ops) ** decisions_after] * len(self.decisions[len(prefix)].choices)

    def _build(self, choices: Sequence[int]) -> Genotype:
        split, *ops = choices
        return Genotype(self.fpn_cells, split, tuple(self._ops[op] for op in ops))

    def choices(self, genotype: Genotype) -> Choices:
        if genotype.head_split is None or len(genotype.head_ops) != self.layers:
            raise ValueError(
                f"the space has heads of {self.layers} layers, not {len(genotype.head_ops)}"
            )
        ops = (
            _position(op, self._ops, HEAD_OPS, f"head.op{i}")
            for i, op in enumerate(genotype.head_ops)
        )
        return (genotype.head_split, *ops)

    def _describe(self) -> list[str]:
        return [
            f"head layers: {self.layers}",
            f"operations: {', '.join(HEAD_OPS[i] for i in self._ops)}",
        ]


def build_space(cfg: CfgNode, stage: str, cells: Sequence[Cell] | None) -> Space:
    """The search space of a stage.

    Args:
        cfg: config of the search.
        stage: "fpn" or "head".
        cells: cells of the FPN below the searched head; not used in the FPN stage.
    """
    settings = cfg.SEARCH.SPACE
    if stage == "fpn":
        return FPNSpace(settings.CELLS, settings.FPN_OPS, settings.AGGREGATIONS)
    return HeadSpace(cells, settings.HEAD_LAYERS, settings.HEAD_OPS)


def given_cells(cfg: CfgNode) -> tuple[Cell, ...]:
    """The cells of MODEL.GENOTYPE, for a search of the head alone.

    Raises:
        ConfigError: MODEL.GENOTYPE is empty.
    """
    if not cfg.MODEL.GENOTYPE:
        raise ConfigError(
            "the head is searched alone, so MODEL.GENOTYPE must name the cells of its FPN"
        )
    return Genotype.parse(cfg.MODEL.GENOTYPE).cells


def starting_choices(cfg: CfgNode, space: Space) -> Choices | None:
    """The sequence of MODEL.GENOTYPE, if SEARCH.FROM_GENOTYPE is set; else None.

    Raises:
        ConfigError: the genotype is not in the space.
    """
    if not cfg.SEARCH.FROM_GENOTYPE:
        return None
    if not cfg.MODEL.GENOTYPE:
        raise ConfigError("SEARCH.FROM_GENOTYPE is True, but MODEL.GENOTYPE is empty")
    try:
        return space.choices(Genotype.parse(cfg.MODEL.GENOTYPE))
    except ValueError as error:
        raise ConfigError(
            f"SEARCH.FROM_GENOTYPE: the {space.stage} stage cannot start from MODEL.GENOTYPE, for "
            f"{error} (see SEARCH.SPACE)"
        ) from None


@cache
def _count_fpns(cells: int, step: int, free: int, ops: int, aggregations: int) -> int:
    """Number of valid ways to make the decision with index `step` and all after it.

    Args:
        cells: number of cells.
        step: index of the decision.
        free: number of unconsumed cell outputs so far.
        ops: number of operations to choose from.
        aggregations: number of aggregations to choose from.
    """
    cell, slot = divmod(step, 5)
    if cell == cells:
        return int(free >= NUM_OUTPUTS)

    def after(free: int) -> int:
        return _count_fpns(cells, step + 1, free, ops, aggregations)

    if slot == 4:
        return aggregations * after(free + 1)
    if slot >= 2:
        return ops * after(free)
    count = (NUM_INPUTS + cell - free) * after(free)
    return count + (free * after(free - 1) if free else 0)


def _indices(names: Sequence[str], known: Sequence[str], what: str) -> tuple[int, ...]:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"name at least one {what}, and none of them twice: {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} is called {name!r}; there are: {', '.join(known)}")
    return tuple(known.index(name) for name in names)


def _position(index: int, subset: Sequence[int], known: Sequence[str], decision: str) -> int:
    if index not in subset:
        names = ", ".join(known[i] for i in subset)
        raise ValueError(f"{decision} is {known[index]}, but this space has only: {names}")
    return subset.index(index)
