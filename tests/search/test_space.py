import itertools
import pickle
import random
from collections import Counter

import numpy as np
import pytest

from nasfcos.config import ConfigError, get_defaults
from nasfcos.genotype import HEAD_OPS, Genotype, GenotypeError
from nasfcos.search.space import FPNSpace, HeadSpace, build_space, given_cells
from tests.known import PUBLISHED

FPN3 = FPNSpace(3, ["skip_connect"], ["psum"])
FPN4 = FPNSpace(4, ["def_conv_3x3"], ["cat"])
HEAD = HeadSpace(PUBLISHED.cells, 3, ["def_conv_3x3", "skip_connect"])


def is_buildable(space, choices):
    try:
        Genotype.parse(space._build(choices).to_list())
    except GenotypeError:
        return False
    return True


@pytest.mark.parametrize(
    "space, start", [(FPN3, ()), (FPN4, (0, 1, 0, 0, 0)), (HEAD, ())], ids=["fpn3", "fpn4", "head"]
)
def test_masks_are_exact(space, start):
    """Against all sequences that begin with `start`, filtered by building them."""
    rest = itertools.product(*(range(len(d.choices)) for d in space.decisions[len(start) :]))
    valid = [start + choices for choices in rest if is_buildable(space, start + choices)]
    prefixes = {choices[:t] for choices in valid for t in range(len(choices) + 1)}
    for prefix in prefixes:
        if len(start) <= len(prefix) < len(space.decisions):
            mask = space.mask(prefix)
            assert mask.dtype == bool and mask.shape == (len(space.decisions[len(prefix)].choices),)
            assert mask.tolist() == [(*prefix, c) in prefixes for c in range(len(mask))]
    in_space = itertools.takewhile(lambda c: c[: len(start)] == start, iter(space))
    if not start:
        assert list(in_space) == valid
        assert space.size() == len(valid)


@pytest.mark.parametrize("cells", [3, 4, 7])
def test_size_of_fpn_spaces(cells):
    """Against a count that keeps which outputs are taken, not only how many."""
    ways = Counter({frozenset(): 1})
    for k in range(cells):
        pairs = list(itertools.product(range(4 + k), repeat=2))
        counted = Counter()
        for taken, count in ways.items():
            for pair in pairs:
                counted[taken | {node for node in pair if node >= 4}] += count
        ways = counted
    valid = sum(count for taken, count in ways.items() if cells - len(taken) >= 3)
    assert FPNSpace(cells, ["skip_connect"], ["cat"]).size() == valid
    assert FPNSpace(cells).size() == valid * (5 * 5 * 2) ** cells


def test_size_of_head_spaces():
    assert HEAD.size() == 4 * 2**3
    assert HeadSpace(PUBLISHED.cells, 6).size() == 7 * 6**6


def test_every_sample_builds_and_reads_back():
    space, rng = FPNSpace(7), np.random.default_rng(0)
    for _ in range(200):
        choices = space.sample(rng)
        genotype = space.genotype(choices)
        assert Genotype.parse(genotype.to_list()) == genotype
        assert space.choices(genotype) == choices


def test_samples_are_uniform():
    """Chi-square over the last inputs of an FPN, where most depends on what was taken before."""
    inputs = itertools.product(*(range(4 + k // 2) for k in range(8)))
    sequences = Counter(nodes[6:] for nodes in inputs if len({n for n in nodes if n >= 4}) <= 1)
    rng = random.Random(1)
    draws = 100 * len(sequences)
    drawn = Counter(FPN4.sample(rng)[15:17] for _ in range(draws))
    assert drawn.keys() <= sequences.keys()
    chi2 = 0.0
    for last, count in sequences.items():
        expected = draws * count / FPN4.size()
        chi2 += (drawn[last] - expected) ** 2 / expected
    freedom = len(sequences) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_samples_reach_every_head():
    rng = random.Random(2)
    drawn = Counter(HEAD.sample(rng) for _ in range(100 * HEAD.size()))
    assert drawn.keys() == set(HEAD)
    assert min(drawn.values()) > 60 and max(drawn.values()) < 140


def test_restricted_operations_keep_their_global_indices():
    space = HeadSpace(PUBLISHED.cells, 2, ["def_conv_3x3", "conv1x1"])
    genotype = space.genotype((1, 0, 1))
    assert genotype.cells == PUBLISHED.cells
    assert [HEAD_OPS[op] for op in genotype.head_ops] == ["def_conv_3x3", "conv1x1"]
    assert genotype.head_split == 1
    assert space.choices(genotype) == (1, 0, 1)


def test_genotypes_outside_the_space():
    fpn = FPNSpace(7, ["skip_connect", "sep_conv_3x3"])
    with pytest.raises(ValueError, match="cell0.op0 is def_conv_3x3, but this space has only"):
        fpn.choices(PUBLISHED)
    with pytest.raises(ValueError, match="5 cells, not 7"):
        FPNSpace(5).choices(PUBLISHED)
    with pytest.raises(ValueError, match="3 layers, not 6"):
        HEAD.choices(PUBLISHED)
    with pytest.raises(ValueError, match="head.op0 is def_conv_3x3"):
        HeadSpace(PUBLISHED.cells, 6, ["conv1x1"]).choices(PUBLISHED)


def test_invalid_sequences_name_the_decision():
    with pytest.raises(ValueError, match="takes 15 choices, not 2"):
        FPN3.genotype((0, 0))
    with pytest.raises(ValueError, match=r"cell1.in1 is 5, but must lie in 0\.\.4 \(C2, .*N4\)"):
        FPN3.genotype((0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="cell1.in0 must not be N4: fewer than 3"):
        FPN3.genotype((0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 5, 0, 0, 0, 0))


@pytest.mark.parametrize("space", [FPN4, HEAD], ids=["fpn4", "head"])
def test_neighbours_differ_in_one_decision_and_are_all(space):
    choices = space.sample(random.Random(3))
    near = set()
    for step, decision in enumerate(space.decisions):
        for choice in range(len(decision.choices)):
            other = (*choices[:step], choice, *choices[step + 1 :])
            if other != choices and all(space.mask(other[:t])[c] for t, c in enumerate(other)):
                near.add(other)
    found = space.neighbours(choices)
    assert set(found) == near and len(found) == len(near) > 0


def test_key():
    assert HEAD.key((1, 1, 0, 1)) == HEAD.key((0, 0, 1, 1))  # a skip has nothing of its own
    assert HEAD.key((1, 0, 1, 1)) == HEAD.key((2, 0, 1, 1)) != HEAD.key((0, 0, 1, 1))
    # Heads of one operation and of skips: w layers with weights, of which 0..w are not shared.
    assert len({HEAD.key(choices) for choices in HEAD}) == 1 + 2 + 3 + 4
    assert FPN3.key((0, 3, *[0] * 13)) == FPN3.key((3, 0, *[0] * 13))
    other = HeadSpace(FPN3.genotype((0,) * 15).cells, 3, ["def_conv_3x3", "skip_connect"])
    assert other.key((0, 0, 0, 0)) != HEAD.key((0, 0, 0, 0))  # on another FPN


def test_decisions():
    space = FPNSpace(4)
    assert [d.name for d in space.decisions[5:10]] == [
        "cell1.in0", "cell1.in1", "cell1.op0", "cell1.op1", "cell1.agg",
    ]  # fmt: skip
    assert space.decisions[5].choices == ("C2", "C3", "C4", "C5", "N4")
    assert [d.kind for d in space.decisions[5:10]] == ["in", "in", "op", "op", "agg"]
    assert [d.name for d in HEAD.decisions] == ["head.split", "head.op0", "head.op1", "head.op2"]
    assert HEAD.decisions[0].choices == ("0", "1", "2", "3")
    assert [d.kind for d in HEAD.decisions] == ["split", "op", "op", "op"]
    assert "20 decisions" in space.describe() and "sep_conv_5x5_dil6" in space.describe()
    assert "32 valid sequences" in HEAD.describe()
    assert pickle.loads(pickle.dumps(space)).size() == space.size()


def test_build_space():
    cfg = get_defaults()
    cfg.SEARCH.SPACE.CELLS = 5
    cfg.SEARCH.SPACE.HEAD_LAYERS = 2
    fpn = build_space(cfg, "fpn", None)
    assert fpn.stage == "fpn" and len(fpn.decisions) == 25
    cells = fpn.genotype(fpn.sample(random.Random(0))).cells
    head = build_space(cfg, "head", cells)
    assert head.stage == "head" and head.genotype((2, 0, 1)).cells == cells


def test_a_head_alone_needs_an_fpn():
    cfg = get_defaults()
    cfg.MODEL.GENOTYPE = PUBLISHED.to_list()
    assert given_cells(cfg) == PUBLISHED.cells
    cfg.MODEL.GENOTYPE = []
    with pytest.raises(ConfigError, match=r"MODEL\.GENOTYPE must name"):
        given_cells(cfg)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FPNSpace(2), "2 cells cannot make P3"),
        (lambda: FPNSpace(4, ["conv3x3"]), "no FPN operation is called 'conv3x3'"),
        (lambda: FPNSpace(4, []), "name at least one FPN operation"),
        (lambda: FPNSpace(4, aggregations=["cat", "cat"]), "aggregation, and none of them twice"),
        (lambda: HeadSpace(PUBLISHED.cells, 0), "needs a layer"),
        (lambda: HeadSpace(PUBLISHED.cells[:2], 3), "fewer than 3 outputs"),
    ],
)
def test_impossible_spaces(make, message):
    with pytest.raises(ValueError, match=message):
        make()
