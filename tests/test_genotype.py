import itertools
import random

import networkx
import pytest

from nasfcos.genotype import (
    AGGREGATIONS,
    FPN_OPS,
    PSUM,
    Cell,
    Genotype,
    GenotypeError,
    canonical,
)
from tests.known import PUBLISHED

CELL = [[0, 1, 0, 3, 0]]


def test_published():
    assert PUBLISHED.unconsumed == (6, 8, 9, 10)
    assert PUBLISHED.pyramid_nodes == (10, 9, 8)
    assert PUBLISHED.extra_nodes == (6,)
    assert PUBLISHED.consumed & {0, 1, 2, 3} == {1, 2, 3}
    assert Genotype.parse(PUBLISHED.to_list()) == PUBLISHED
    text = PUBLISHED.describe()
    assert "N4 = cat(def_conv_3x3(C5), def_conv_3x3(C5))" in text
    assert "P3 = N10 + N6" in text and "head layer 3: conv1x1 (shared)" in text


def test_oldest_of_the_last_three_is_p5():
    genotype = Genotype.parse([CELL, CELL, CELL, CELL, [[4, 3, 0, 0, 1]]])
    assert genotype.unconsumed == (5, 6, 7, 8)
    assert genotype.pyramid_nodes == (8, 7, 6)
    assert genotype.extra_nodes == (5,)
    assert genotype.head_split is None


@pytest.mark.parametrize(
    "config, message",
    [
        ([[[0, 4, 0, 0, 0]], CELL, CELL], r"cell 0, input 1 is 4.*nodes 0\.\.3 exist"),
        ([CELL, [[5, 0, 0, 0, 0]], CELL], r"cell 1, input 0 is 5"),
        ([[[0, 1, 5, 0, 0]], CELL, CELL], r"cell 0, operation 0 is 5.*4 def_conv_3x3"),
        ([[[0, 1, 0, 0, 2]], CELL, CELL], r"cell 0, agg is 2.*0 psum, 1 cat"),
        ([[[0, 1, 0, 0, -1]], CELL, CELL], r"cell 0, agg is -1"),
        ([[[0, 1, 0, 0]], CELL, CELL], r"cell 0 has 4 decisions"),
        ([[[0, 1, 0, 0.0, 0]], CELL, CELL], r"cell 0, operation 1 must be an integer"),
        ([CELL, CELL], "2 cell outputs are left unconsumed"),
        ([CELL, CELL, CELL, [[4, 5, 0, 0, 0]]], "2 cell outputs are left unconsumed"),
        ([CELL, CELL, CELL, [0]], "after 3 cells"),
        ([CELL, CELL, CELL, [3], [0, 1]], r"split is 3, but it must lie in 0\.\.2"),
        ([CELL, CELL, CELL, [0, 1], [0, 1]], "a list of one integer"),
        ([CELL, CELL, CELL, [0], [6]], "head operation 0 is 6"),
        ([CELL, CELL, CELL, [0], []], "empty"),
        ("abc", "must be a list"),
    ],
)
def test_invalid(config, message):
    with pytest.raises(GenotypeError, match=message):
        Genotype.parse(config)


def random_fpn(rng, cells, ops=5, aggregations=2):
    while True:
        genotype = Genotype(
            tuple(
                Cell(
                    (rng.randrange(4 + k), rng.randrange(4 + k)),
                    (rng.randrange(ops), rng.randrange(ops)),
                    rng.randrange(aggregations),
                )
                for k in range(cells)
            )
        )
        if len(genotype.unconsumed) >= 3:
            return genotype


def rewritten(genotype, order, swaps):
    """The same cells in another order (positions in `genotype`), some sums with inputs swapped.

    None if a cell would come before its inputs, or another output become P3, P4 or P5.
    """
    new = {node: node for node in range(4)}
    new.update({4 + old: 4 + k for k, old in enumerate(order)})
    cells = []
    for old, swap in zip(order, swaps, strict=True):
        cell = genotype.cells[old]
        inputs, ops = tuple(new[node] for node in cell.inputs), cell.ops
        if max(inputs) >= 4 + len(cells):
            return None
        cells.append(
            Cell(inputs[::-1], ops[::-1], cell.aggregation)
            if swap and cell.aggregation == PSUM
            else Cell(inputs, ops, cell.aggregation)
        )
    other = Genotype(tuple(cells), genotype.head_split, genotype.head_ops)
    if tuple(new[node] for node in genotype.pyramid_nodes) != other.pyramid_nodes:
        return None
    return other


def as_graph(genotype):
    """The labelled graph, with a node for each use of a map, which equivalent genotypes share."""
    graph = networkx.DiGraph()
    for node in range(4):
        graph.add_node(node, label=f"C{node + 2}")
    for node, cell in enumerate(genotype.cells, 4):
        role = "inner" if node in genotype.consumed else "extra"
        if node in genotype.pyramid_nodes:
            role = f"P{3 + genotype.pyramid_nodes.index(node)}"
        graph.add_node(node, label=(AGGREGATIONS[cell.aggregation], role))
        for slot, (source, op) in enumerate(zip(cell.inputs, cell.ops, strict=True)):
            graph.add_node((node, slot), label=(FPN_OPS[op], cell.aggregation != PSUM and slot))
            graph.add_edge(source, (node, slot))
            graph.add_edge((node, slot), node)
    return graph


@pytest.mark.parametrize("ops", [1, 5])
def test_canonical_form_is_one_for_all_writings(ops):
    rng = random.Random(ops)
    differently_written = 0
    for _ in range(150):
        genotype = random_fpn(rng, 7, ops=ops, aggregations=1 if ops == 1 else 2)
        form = canonical(genotype)
        assert Genotype.parse(form.to_list()) == form == canonical(form)
        for _ in range(40):
            order = rng.sample(range(7), 7) if rng.random() < 0.9 else range(7)
            other = rewritten(genotype, order, [rng.random() < 0.5 for _ in range(7)])
            if other is not None:
                differently_written += other != genotype
                assert canonical(other) == form
    assert differently_written > 100


def test_canonical_forms_are_equal_only_for_equal_graphs():
    """All pairs of the four-cell FPNs on C4 and C5 with one operation, compared by networkx."""
    genotypes = []
    for nodes in itertools.product((3,), (3,), (2, 3, 4), (3, 4), *[(3, 4, 5)] * 2, (3, 5), (3, 6)):
        cells = tuple(Cell(pair, (4, 4), 0) for pair in zip(nodes[::2], nodes[1::2], strict=True))
        if len(Genotype(cells).unconsumed) >= 3:
            genotypes.append(Genotype(cells))
    rng = random.Random(0)
    genotypes += [random_fpn(rng, 5, ops=1, aggregations=a) for a in (1, 2) for _ in range(30)]
    # Equal cells, of which one is used twice or each once.
    twins = [[[3, 3, 4, 4, 0]]] * 2
    for pairs in itertools.product([(4, 4), (4, 5), (5, 4), (5, 5)], repeat=3):
        for aggregation in range(2):
            users = [[[a, b, 0, 4, aggregation]] for a, b in pairs]
            genotypes.append(Genotype.parse([*twins, *users]))
    described = [(canonical(genotype), as_graph(genotype)) for genotype in genotypes]
    equal = 0
    for (form_a, graph_a), (form_b, graph_b) in itertools.combinations(described, 2):
        same = networkx.vf2pp_is_isomorphic(graph_a, graph_b, node_label="label")
        assert same == (form_a == form_b)
        equal += same
    assert equal > 50


def test_canonical_head():
    def head(split, ops):
        return canonical(Genotype(PUBLISHED.cells, split, ops)).to_list()[-2:]

    assert head(2, (4, 1, 4, 0)) == [[1], [1, 0, 4, 4]]
    assert head(3, (4, 1, 4, 0)) == head(2, (4, 1, 4, 0)) == head(1, (1, 0, 4, 4))
    assert head(1, (1, 0, 4, 4)) != head(1, (0, 1, 4, 4))
    assert head(1, (1, 0, 4, 4)) != head(2, (1, 0, 4, 4))
    assert head(2, (4, 4)) == head(0, (4, 4)) == [[0], [4, 4]]
    assert canonical(Genotype(PUBLISHED.cells)).head_split is None
