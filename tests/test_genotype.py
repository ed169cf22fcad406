import pytest

from nasfcos.genotype import PUBLISHED, Genotype, GenotypeError

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
