"""Searched architectures: operations, the written form (genotype), and its validation.

A genotype is a nested list (paper, section 3.2; the release's files use the same form):
one ``[[in0, in1, op0, op1, agg]]`` per FPN cell, then, if the head is searched too, ``[i]`` and the
list of head operations. Nodes 0..3 are the adapted backbone maps C2..C5; node ``4 + k`` is the
output of cell ``k``. The head layers before ``i`` have separate weights at each pyramid level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

FPN_OPS = (
    "sep_conv_3x3",
    "sep_conv_3x3_dil3",
    "sep_conv_5x5_dil6",
    "skip_connect",
    "def_conv_3x3",
)
AGGREGATIONS = ("psum", "cat")
HEAD_OPS = (
    "conv1x1",
    "conv3x3",
    "sep_conv_3x3",
    "sep_conv_3x3_dil3",
    "skip_connect",
    "def_conv_3x3",
)

SKIP = HEAD_OPS.index("skip_connect")
PSUM = AGGREGATIONS.index("psum")

NUM_INPUTS = 4
"""Number of backbone maps (C2..C5), the first nodes."""

NUM_OUTPUTS = 3
"""Number of cell outputs that must stay unconsumed: P3..P5."""


class GenotypeError(ValueError):
    """A genotype from which no network can be built; the message says where and why."""


@dataclass(frozen=True)
class Cell:
    """One FPN cell: a unary operation on each of two nodes, then an aggregation.

    Attributes:
        inputs: the two nodes.
        ops: indices into `FPN_OPS`, one for each input.
        aggregation: index into `AGGREGATIONS`.
    """

    inputs: tuple[int, int]
    ops: tuple[int, int]
    aggregation: int


@dataclass(frozen=True)
class Genotype:
    """A searched decoder.

    Attributes:
        cells: the FPN cells in the order in which they are computed.
        head_split: index of the first head layer whose weights all levels share; None if the head
            is not searched.
        head_ops: indices into `HEAD_OPS`, first layer first; empty if the head is not searched.
    """

    cells: tuple[Cell, ...]
    head_split: int | None = None
    head_ops: tuple[int, ...] = ()

    @classmethod
    def parse(cls, config: Sequence) -> Genotype:
        """Read the nested-list form.

        Raises:
            GenotypeError: the list is malformed, an index is out of range (or that of a node that
                does not exist yet), or fewer than three cell outputs are unconsumed.
        """
        items = _as_list(config, "the genotype")
        cells: list[Cell] = []
        while len(cells) < len(items) and _is_cell(items[len(cells)]):
            cells.append(_parse_cell(items[len(cells)], len(cells)))
        rest = items[len(cells) :]
        head_split, head_ops = _parse_head(rest, len(cells)) if rest else (None, ())
        genotype = cls(tuple(cells), head_split, head_ops)
        free = len(genotype.unconsumed)
        if free < NUM_OUTPUTS:
            raise GenotypeError(
                f"{free} cell outputs are left unconsumed, but P3, P4 and P5 need {NUM_OUTPUTS}: "
                "let fewer cells take other cells' outputs as inputs"
            )
        return genotype

    def to_list(self) -> list:
        """The nested-list form; `parse` reads it back to an equal genotype."""
        items: list = [[[*c.inputs, *c.ops, c.aggregation]] for c in self.cells]
        if self.head_split is not None:
            items += [[self.head_split], list(self.head_ops)]
        return items

    @property
    def consumed(self) -> frozenset[int]:
        """Nodes that are an input of some cell."""
        return frozenset(node for cell in self.cells for node in cell.inputs)

    @property
    def unconsumed(self) -> tuple[int, ...]:
        """Cell outputs that are no input of any cell, oldest first."""
        consumed = self.consumed
        made = range(NUM_INPUTS, NUM_INPUTS + len(self.cells))
        return tuple(node for node in made if node not in consumed)

    @property
    def pyramid_nodes(self) -> tuple[int, int, int]:
        """The nodes that become P3, P4 and P5; P3 is the newest unconsumed output."""
        p5, p4, p3 = self.unconsumed[-NUM_OUTPUTS:]
        return p3, p4, p5

    @property
    def extra_nodes(self) -> tuple[int, ...]:
        """The other unconsumed outputs, which are added to each of P3, P4 and P5."""
        return self.unconsumed[:-NUM_OUTPUTS]

    def describe(self) -> str:
        """The architecture in words, one line per cell, level and head layer."""
        names = node_names(len(self.cells))
        lines = []
        for name, cell in zip(names[NUM_INPUTS:], self.cells, strict=True):
            a, b = (
                f"{FPN_OPS[op]}({names[node]})"
                for op, node in zip(cell.ops, cell.inputs, strict=True)
            )
            lines.append(f"{name} = {AGGREGATIONS[cell.aggregation]}({a}, {b})")
        extra = "".join(f" + {names[node]}" for node in self.extra_nodes)
        for level, node in zip((3, 4, 5), self.pyramid_nodes, strict=True):
            lines.append(f"P{level} = {names[node]}{extra}")
        if self.head_split is not None:
            for i, op in enumerate(self.head_ops):
                owner = "per level" if i < self.head_split else "shared"
                lines.append(f"head layer {i}: {HEAD_OPS[op]} ({owner})")
        return "\n".join(lines)


def node_names(cells: int) -> list[str]:
    """Names of the nodes: C2..C5, then N4, N5, ... for the outputs of `cells` cells."""
    made = range(NUM_INPUTS, NUM_INPUTS + cells)
    return [f"C{i + 2}" for i in range(NUM_INPUTS)] + [f"N{node}" for node in made]


def canonical(genotype: Genotype) -> Genotype:
    """The canonical form of a genotype: equal for two genotypes iff they describe the same graph.

    The graph does not change when the inputs of a sum are swapped together with their operations,
    when the cells are computed in another order that keeps P3, P4, P5 and the set of extra nodes,
    or when skips in the head are moved (the canonical split counts layers with weights only). Two
    cells with equal expressions are not merged: each has its own weights, so a graph that uses one
    of them twice differs from a graph that uses each once.

    `cat` is not commutative: its grouped conv computes the first half of the output channels from
    the first input. A convolution after it could learn either order, but a sum would pair different
    channels.

    There are no dead cells to remove: an unconsumed output is a level or part of every level, and
    from any other cell a chain of consumers leads to an unconsumed output.
    """
    cells = _canonical_cells(genotype.cells)
    if genotype.head_split is None:
        return Genotype(cells)
    split = sum(op != SKIP for op in genotype.head_ops[: genotype.head_split])
    ops = tuple(sorted(genotype.head_ops, key=lambda op: op == SKIP))  # stable: skips last
    return Genotype(cells, split, ops)


@lru_cache(maxsize=1 << 14)
def _canonical_cells(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The smallest list of cells, compared as tuples, that describes the same graph.

    Cells are placed one after the other, always the smallest of those whose inputs are placed.
    Only cells with equal expressions tie; which of them comes first matters where other cells use
    them differently, so every alternative is followed until another one has a smaller cell.
    """
    graph = Genotype(cells)
    uses: dict[int, list[tuple[int, int, int]]] = {NUM_INPUTS + k: [] for k in range(len(cells))}
    for consumer, cell in enumerate(cells):
        for slot, (node, op) in enumerate(zip(cell.inputs, cell.ops, strict=True)):
            if node >= NUM_INPUTS:
                uses[node].append((consumer, op, 0 if cell.aggregation == PSUM else slot))
    # Nodes that must be placed before a node: its inputs; and extras before P5 before P4 before P3.
    before = {NUM_INPUTS + k: set(cell.inputs) for k, cell in enumerate(cells)}
    outputs = graph.unconsumed[-NUM_OUTPUTS:]
    for i, node in enumerate(outputs):
        before[node].update(graph.extra_nodes, outputs[:i])

    written: list[tuple] = []
    ways = [{node: node for node in range(NUM_INPUTS)}]  # old node -> new node
    for new in range(NUM_INPUTS, NUM_INPUTS + len(cells)):
        smallest: tuple | None = None
        longer: list[dict[int, int]] = []
        for way in ways:
            followed = []
            for node, cell in enumerate(cells, NUM_INPUTS):
                if node in way or not before[node] <= way.keys():
                    continue
                pairs = [(way[i], op) for i, op in zip(cell.inputs, cell.ops, strict=True)]
                if cell.aggregation == PSUM:
                    pairs.sort()
                code = (*pairs, cell.aggregation)
                if smallest is None or code < smallest:
                    smallest, longer, followed = code, [], []
                # Equal cells that are used by the same cells in the same way are interchangeable.
                if code == smallest and uses[node] not in followed:
                    followed.append(uses[node])
                    longer.append({**way, node: new})
        written.append(smallest)
        ways = longer
    return tuple(
        Cell((a, b), (op_a, op_b), aggregation) for (a, op_a), (b, op_b), aggregation in written
    )


def _as_list(value: object, what: str) -> list:
    if not isinstance(value, (list, tuple)):
        raise GenotypeError(f"{what} must be a list, not {value!r}")
    return list(value)


def _is_cell(item: object) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 1 and isinstance(item[0], (list, tuple))


def _index(value: object, names: int | Sequence[str], where: str) -> int:
    count = names if isinstance(names, int) else len(names)
    if isinstance(value, bool) or not isinstance(value, int):
        raise GenotypeError(f"{where} must be an integer, not {value!r}")
    if not 0 <= value < count:
        choice = (
            f"nodes 0..{count - 1} exist by then"
            if isinstance(names, int)
            else ", ".join(f"{i} {name}" for i, name in enumerate(names))
        )
        raise GenotypeError(f"{where} is {value}, but the choice is: {choice}")
    return value


def _parse_cell(item: Sequence, k: int) -> Cell:
    decisions = list(item[0])
    if len(decisions) != 5:
        raise GenotypeError(
            f"cell {k} has {len(decisions)} decisions; it takes five: [in0, in1, op0, op1, agg]"
        )
    nodes = NUM_INPUTS + k
    in0, in1 = (_index(decisions[i], nodes, f"cell {k}, input {i}") for i in (0, 1))
    op0, op1 = (_index(decisions[2 + i], FPN_OPS, f"cell {k}, operation {i}") for i in (0, 1))
    return Cell((in0, in1), (op0, op1), _index(decisions[4], AGGREGATIONS, f"cell {k}, agg"))


def _parse_head(rest: list, num_cells: int) -> tuple[int, tuple[int, ...]]:
    if len(rest) != 2:
        raise GenotypeError(
            f"after {num_cells} cells of the form [[in0, in1, op0, op1, agg]] come nothing, or [i] "
            f"and the list of head operations; there are {len(rest)} entries: {rest!r}"
        )
    split, ops = _as_list(rest[0], "the head's split [i]"), _as_list(rest[1], "the head operations")
    if len(split) != 1:
        raise GenotypeError(f"the head's split must be a list of one integer, not {split!r}")
    if not ops:
        raise GenotypeError("the list of head operations is empty")
    head_ops = tuple(_index(op, HEAD_OPS, f"head operation {i}") for i, op in enumerate(ops))
    head_split = split[0]
    if isinstance(head_split, bool) or not isinstance(head_split, int):
        raise GenotypeError(f"the head's split must be an integer, not {head_split!r}")
    if not 0 <= head_split <= len(ops):
        raise GenotypeError(
            f"the head's split is {head_split}, but it must lie in 0..{len(ops)}, the number of "
            "head operations"
        )
    return head_split, head_ops
