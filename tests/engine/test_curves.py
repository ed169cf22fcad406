"""Reading the metrics file, and drawing its curves."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from nasfcos.engine.curves import plot_training
from nasfcos.engine.metrics import read_metrics


def write_lines(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_lines_are_joined_by_iteration_and_broken_ones_skipped(tmp_path, caplog):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        {"iteration": 20, "loss": 2.0, "lr": 0.1},
        {"iteration": 20, "eval/a/AP": 0.3},
        {"iteration": 20, "eval/b/AP": None, "note": "text"},
        "[1, 2]",
        '{"iteration": 40, "loss": 1',
    )
    assert read_metrics(path) == {20: {"iteration": 20, "loss": 2.0, "lr": 0.1, "eval/a/AP": 0.3}}
    assert "2 lines" in caplog.text


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        *({"iteration": i, "loss": 1.0} for i in (10, 20, 30, 40)),
        {"iteration": 40, "eval/a/AP": 0.4},
        *({"iteration": i, "loss": 2.0} for i in (20, 30)),
    )
    history = read_metrics(path)
    assert {i: line["loss"] for i, line in history.items()} == {10: 1.0, 20: 2.0, 30: 2.0}


def test_the_curves_show_what_there_is(tmp_path):
    training = [
        {"iteration": i, "loss": 3 / i + 0.3, "loss_cls": 2 / i, "loss_box": 1 / i, "lr": 0.01}
        for i in range(1, 200)
    ]
    evaluation = [
        {"iteration": i, f"eval/{name}/{figure}": i / 400}
        for i in (100, 199)
        for name in ("a", "b")
        for figure in ("AP", "AP50")
    ]
    widths = []
    for lines in (training, evaluation, training + evaluation):
        metrics = write_lines(
            tmp_path / "metrics.jsonl", *sorted(lines, key=lambda x: x["iteration"])
        )
        plot_training(metrics, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            widths.append(picture.width)
            assert np.asarray(picture.convert("RGB")).std() > 5
    assert widths[1] < widths[0] < widths[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_run_of_one_line_is_drawn_or_refused(tmp_path, value):
    path = write_lines(tmp_path / "metrics.jsonl", {"iteration": 1, "loss": value})
    if math.isnan(value):
        with pytest.raises(ValueError, match="no line with a loss"):
            plot_training(path, tmp_path / "curves.png")
        assert not (tmp_path / "curves.png").exists()
    else:
        plot_training(path, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").exists()
