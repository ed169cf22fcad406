"""Pictures of architectures: nothing overlaps, everything is there, files are whole."""

import random
import runpy
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from nasfcos.drawing import (
    draw_architecture,
    node_strides,
    operation_color,
    save_architecture,
    short_name,
)
from nasfcos.genotype import (
    AGGREGATIONS,
    FPN_OPS,
    HEAD_OPS,
    Genotype,
    GenotypeError,
)
from tests.known import PUBLISHED

ROOT = Path(__file__).parents[1]


def random_genotype(seed, cells=None, head=None):
    """A valid genotype of 3 to 7 cells, with a head of 1 to 8 layers or without one."""
    draw = random.Random(seed)
    cells = cells or draw.randint(3, 7)
    head = draw.choice((None, *range(1, 9))) if head is None else head
    rest = []
    if head:
        rest = [[draw.randint(0, head)], [draw.randrange(len(HEAD_OPS)) for _ in range(head)]]
    while True:
        items = [
            [[
                *(draw.randrange(4 + k) for _ in range(2)),
                *(draw.randrange(len(FPN_OPS)) for _ in range(2)),
                draw.randrange(len(AGGREGATIONS)),
            ]]
            for k in range(cells)
        ]  # fmt: skip
        try:
            return Genotype.parse(items + rest)
        except GenotypeError:
            pass


class Picture:
    """The extents in pixels of what a figure shows."""

    def __init__(self, figure):
        renderer = FigureCanvasAgg(figure).get_renderer()
        (axes,) = figure.axes
        self.frame = figure.bbox
        self.texts = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts]
        # Without the width of the outline, which touching parts may share.
        self.boxes = [
            (patch.get_gid(), patch.get_path().get_extents(patch.get_transform()))
            for patch in axes.patches
        ]
        self.lines = [
            Bbox(axes.transData.transform(points)[[0, 1]])
            for line in axes.lines
            if line.get_gid() == "line"
            for points in zip(line.get_xydata()[:-1], line.get_xydata()[1:], strict=True)
        ]

    def of_kind(self, *kinds):
        return [box for kind, box in self.boxes if kind in kinds]


def overlap(a, b, slack=0.5):
    """Whether two extents share more than `slack` pixels in both directions."""
    width = min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
    height = min(a.ymax, b.ymax) - max(a.ymin, b.ymin)
    return width > slack and height > slack


def holds(outer, inner):
    return (
        outer.xmin <= inner.xmin and outer.xmax >= inner.xmax
        and outer.ymin <= inner.ymin and outer.ymax >= inner.ymax
    )  # fmt: skip


def crosses(line, box, slack=1.5):
    """Whether a horizontal or vertical line runs through a box, more than along its edge."""
    return (
        min(line.xmax, box.xmax - slack) >= max(line.xmin, box.xmin + slack)
        and min(line.ymax, box.ymax - slack) >= max(line.ymin, box.ymin + slack)
    )  # fmt: skip


def assert_legible(genotype, title=None):
    picture = Picture(draw_architecture(genotype, title))
    for what, extent in [*picture.texts, *picture.boxes]:
        assert holds(picture.frame, extent), f"{what} leaves the picture"
    for (one, a), (other, b) in combinations(picture.texts, 2):
        assert not overlap(a, b), f"{one!r} and {other!r}"
    nodes, operations = picture.of_kind("node"), picture.of_kind("operation")
    assert not any(overlap(a, b) for a, b in combinations(nodes, 2))
    assert not any(overlap(a, b) for a, b in combinations(operations, 2))
    for box in nodes + operations:
        for text, extent in picture.texts:
            assert holds(box, extent) or not overlap(box, extent), f"{text!r} leaves its box"
        for other in nodes:
            assert holds(other, box) or not overlap(other, box)
    for line in picture.lines:
        for text, extent in picture.texts:
            assert not crosses(line, extent), f"a line through {text!r}"
        assert not any(crosses(line, box) for box in nodes + operations)
    sheets = [*operations, *picture.of_kind("sheet")]
    head = [box for box in sheets if not any(holds(node, box) for node in nodes)]
    assert not any(overlap(sheet, node) for sheet in head for node in nodes)


@pytest.mark.parametrize("seed", range(50))
def test_nothing_overlaps_whatever_the_genotype(seed):
    assert_legible(random_genotype(seed), title=f"Architecture {seed}")


@pytest.mark.parametrize(
    "genotype",
    [
        PUBLISHED,
        # Every output is left over: four of them are added to the levels.
        Genotype.parse([[[k % 4, k % 4, 2, 1, 0]] for k in range(7)]),
        # As deep as seven cells can be, and as many as a user may ask for.
        Genotype.parse([[[3 + k, 0, 2, 2, 1]] for k in range(5)] + [[[3, 2, 1, 1, 1]]] * 2),
        random_genotype(0, cells=12, head=12),
    ],
    ids=["published", "wide", "deep", "large"],
)
def test_extremes_are_legible(genotype):
    assert_legible(genotype, title="A long title " * 20)


def texts(genotype, title=None):
    return [text for text, _ in Picture(draw_architecture(genotype, title)).texts]


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_every_node_operation_and_level_is_there(seed):
    genotype = random_genotype(seed, head=6)
    shown = texts(genotype, "named")
    nodes = [f"C{i}" for i in range(2, 6)] + [f"N{4 + k}" for k in range(len(genotype.cells))]
    for name in ["named", *nodes, "P3", "P4", "P5", "P6", "P7", "1/64", "1/128"]:
        assert name in shown
    used = [FPN_OPS[op] for cell in genotype.cells for op in cell.ops]
    used += [HEAD_OPS[op] for op in genotype.head_ops for _ in range(2)]  # two towers
    for name in set(used):
        assert name in shown  # the legend
        assert shown.count(short_name(name)) == used.count(name) + 1
    for k, aggregation in enumerate(AGGREGATIONS):
        assert shown.count(aggregation) == sum(c.aggregation == k for c in genotype.cells)
    unused = 4 - len(genotype.consumed & set(range(4)))
    assert shown.count("not used") == unused
    assert ("unused cell outputs, added to P3, P4 and P5" in shown) == bool(genotype.extra_nodes)


def test_the_head_shows_which_layers_are_shared():
    cells = [[[0, 1, 0, 0, 0]]] * 3
    split, joint = "separate weights per level", "weights shared across levels"

    def head(i):
        return Picture(draw_architecture(Genotype.parse([*cells, [i], [0, 1, 2, 3]])))

    def captions(picture):
        return [text.replace("\n", " ") for text, _ in picture.texts]

    assert joint in captions(head(0)) and split not in captions(head(0))
    assert joint not in captions(head(4)) and split in captions(head(4))
    assert joint in captions(head(3)) and split in captions(head(3))
    # Each layer of its own is a stack of five in both towers; its top sheet has the name.
    assert [len(head(i).of_kind("sheet")) for i in (0, 1, 4)] == [0, 8, 32]
    assert "class scores" not in texts(Genotype.parse(cells))


def test_a_cell_has_the_resolution_of_its_larger_input():
    genotype = Genotype.parse([[[3, 1, 0, 0, 0]], [[3, 3, 0, 0, 0]], [[2, 5, 0, 0, 0]],
                               [[4, 2, 0, 0, 0]], [[0, 4, 0, 0, 0]]])  # fmt: skip
    assert node_strides(genotype) == [4, 8, 16, 32, 8, 32, 16, 8, 4]


def test_operations_differ_in_colour_and_short_name():
    names = dict.fromkeys((*FPN_OPS, *HEAD_OPS))
    assert len({operation_color(name) for name in names}) == len(names)
    assert short_name("sep_conv_5x5_dil6") == "sep 5×5 d6"
    assert short_name("conv1x1") == "conv 1×1"
    assert len({short_name(name) for name in names}) == len(names)


def test_the_same_genotype_gives_the_same_picture():
    one, other = (FigureCanvasAgg(draw_architecture(PUBLISHED)) for _ in range(2))
    one.draw()
    other.draw()
    assert np.array_equal(one.buffer_rgba(), other.buffer_rgba())


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_files_have_the_format_of_their_suffix(tmp_path, suffix, start):
    path = tmp_path / "new" / f"a.{suffix}"
    save_architecture(PUBLISHED, path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt must end in one of \.png"):
        save_architecture(PUBLISHED, tmp_path / "new" / "a.txt")
    assert list(tmp_path.iterdir()) == []


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "draw_architecture.py", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_the_tool_draws_a_config(tmp_path):
    path = tmp_path / "picture.png"
    config = ("--config-file", "configs/search/R_50_NAS_head.yaml")
    done = run_tool(*config, "--title", "Published", "--output", path)
    assert done.returncode == 0, done.stderr
    assert "N4 = cat(def_conv_3x3(C5), def_conv_3x3(C5))" in done.stdout + done.stderr
    height, width = matplotlib.image.imread(path).shape[:2]
    assert height > 1000 and width > 1000


def test_the_tool_says_that_there_is_nothing_to_draw(tmp_path):
    path = tmp_path / "picture.png"
    none = run_tool(
        "--config-file", "configs/search/R_50_NAS_head.yaml", "--output", path,
        "MODEL.GENOTYPE", "[]", "MODEL.NECK.NAME", "fpn", "MODEL.HEAD.TOWER", "plain",
    )  # fmt: skip
    assert none.returncode == 2 and not path.exists()
    assert "MODEL.GENOTYPE is empty" in none.stdout + none.stderr


def test_the_tool_refuses_an_unknown_suffix(tmp_path, monkeypatch, capsys):
    path = tmp_path / "picture.txt"
    tool = ROOT / "tools" / "draw_architecture.py"
    monkeypatch.setattr(sys, "argv", ["tool", "--config-file", "a.yaml", "--output", str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tool), run_name="__main__")
    assert end.value.code == 2
    assert "--output must end in one of .png" in capsys.readouterr().err
