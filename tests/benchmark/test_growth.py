import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nasfcos.benchmark import growth, plots
from nasfcos.benchmark.growth import (
    AXES,
    Axis,
    format_growth,
    has_errors,
    measure_growth,
)
from nasfcos.benchmark.measure import Case, Skip, Variant
from nasfcos.benchmark.plots import plot_growth
from nasfcos.benchmark.setting import Setting


@pytest.fixture
def setting(tmp_path):
    return Setting(torch.device("cpu"), tmp_path, quick=True)


def made_up(setting):
    def case(value):
        if value == 2:
            raise Skip("not this one")
        if value == 3:
            raise OSError("disk gone")
        return Case("", [Variant("linear", lambda: torch.ones(value * 2**18))])

    return case


@pytest.fixture
def made_up_axis(monkeypatch):
    axis = Axis("things", "things (n)", "tensors", (1, 2, 3, 4, 8, 16), made_up)
    monkeypatch.setattr(growth, "AXES", (axis,))


def test_a_curve_has_what_could_be_measured(made_up_axis, setting):
    report = measure_growth(["things"], Setting(setting.device, setting.folder))
    assert has_errors(report)
    json.dumps(report, allow_nan=False)
    (axis,) = report["axes"]
    (curve,) = axis["curves"]
    assert [point["x"] for point in curve["points"]] == [1, 4, 8, 16]
    assert axis["left_out"] == {"2": "not this one"}
    assert axis["errors"] == {"3": "OSError: disk gone"}
    if curve["points"][0]["memory_bytes"] is not None:  # n MiB
        assert curve["memory_exponent"] == pytest.approx(1, abs=0.1)
    text = format_growth(report)
    assert "2: skipped: not this one" in text and "3: FAILED: OSError: disk gone" in text
    assert "linear" in text and "exponent" in text


@pytest.mark.parametrize("raised, key", [(Skip, "left_out"), (MemoryError, "errors")])
def test_an_axis_that_cannot_be_prepared_does_not_end_the_others(
    raised, key, made_up_axis, setting, monkeypatch
):
    def prepare(setting):
        raise raised("too large")

    monkeypatch.setattr(growth, "AXES", (replace(AXES[0], prepare=prepare), *growth.AXES))
    report = measure_growth([AXES[0].name, "things"], setting)
    first, second = report["axes"]
    assert not first["curves"] and "too large" in first[key]["all values"]
    assert "all values: " in format_growth(report)
    assert second["curves"]


def test_ctrl_c_leaves_the_axes_that_are_done(made_up_axis, setting, monkeypatch):
    def stop(setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(growth, "AXES", (*growth.AXES, replace(AXES[0], prepare=stop)))
    report = measure_growth([], setting)
    assert report["interrupted"] and [axis["name"] for axis in report["axes"]] == ["things"]
    text = format_growth(report)
    assert "linear" in text and text.endswith("Interrupted: the rest was not measured.")


def test_quick_takes_the_smaller_values(made_up_axis, setting):
    (axis,) = measure_growth(["things"], setting)["axes"]
    assert [point["x"] for point in axis["curves"][0]["points"]] == [1]


def test_an_unknown_axis_lists_those_there_are(setting):
    with pytest.raises(ValueError, match="no axis is called 'x'; there are image, .*processes"):
        measure_growth(["x"], setting)


@pytest.mark.parametrize("name", ["objects", "classes", "detections"])
def test_the_axes_of_parts(name, setting):
    report = measure_growth([name], setting)
    assert not has_errors(report)
    (axis,) = report["axes"]
    values = next(a.values for a in AXES if a.name == name)[:3]
    assert axis["curves"]
    for curve in axis["curves"]:
        assert [point["x"] for point in curve["points"]] == list(values)
        assert all(point["seconds"]["median"] > 0 for point in curve["points"])
        assert math.isfinite(curve["time_exponent"])


def test_a_picture_of_an_axis(made_up_axis, setting, tmp_path):
    (axis,) = measure_growth(["things"], Setting(setting.device, setting.folder))["axes"]
    plot_growth(axis, tmp_path / "plots" / "growth.png")
    with Image.open(tmp_path / "plots" / "growth.png") as picture:
        assert picture.width > 2 * picture.height
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_a_picture_without_memory(made_up_axis, setting, tmp_path):
    """As on systems that do not tell the memory of a call."""
    (axis,) = measure_growth(["things"], Setting(setting.device, setting.folder))["axes"]
    for point in axis["curves"][0]["points"]:
        point["memory_bytes"] = None
    plot_growth(axis, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").exists()


def test_two_values_are_bars_without_an_exponent(setting, monkeypatch, tmp_path):
    def prepare(setting):
        return lambda value: Case("", [Variant("work", lambda: torch.ones(value * 2**18))])

    monkeypatch.setattr(growth, "AXES", (Axis("things", "things", "tensors", (1, 2), prepare),))
    (axis,) = measure_growth(["things"], setting)["axes"]
    (curve,) = axis["curves"]
    assert len(curve["points"]) == 2
    assert curve["time_exponent"] is None and curve["memory_exponent"] is None
    drawn = []
    draw = plots._draw_bars
    monkeypatch.setattr(plots, "_draw_bars", lambda *a: drawn.append(a[-1]) or draw(*a))
    plot_growth(axis, tmp_path / "growth.png")
    assert drawn == [[1, 2]] and (tmp_path / "growth.png").exists()


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    result = tmp_path / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "nasfcos.benchmark.scaling", "cpu", "Mobile_NAS_head", "64", "64", result),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=growth.machine.ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["processes"] == 2 and found["agree"]
    assert len(found["seconds"]) == 7 and min(found["seconds"]) > 0
