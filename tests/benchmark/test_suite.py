import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nasfcos import files
from nasfcos.benchmark import growth, suite
from nasfcos.benchmark.measure import Case, Skip, Variant
from nasfcos.benchmark.setting import Setting
from nasfcos.benchmark.suite import BENCHMARKS, Benchmark, choose, has_failures, run
from tests.benchmark import reports

ROOT = Path(__file__).parents[2]


def names(*patterns):
    return [benchmark.name for benchmark in choose(patterns)]


def test_benchmarks_are_chosen_by_name_beginning_or_pattern():
    assert names("focal_loss") == ["focal_loss"]
    assert names("nms") == ["nms/1000", "nms/5000"]
    assert names("inference/R_50_NAS_head", "limits") == ["limits", "inference/R_50_NAS_head"]
    assert {name.split("/")[0] for name in names("*/Mobile_NAS_head")} == {
        "inference", "throughput", "onnx", "stages", "training",
    }  # fmt: skip
    assert choose([]) == list(BENCHMARKS)
    assert len({b.name for b in BENCHMARKS}) == len(BENCHMARKS)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="no benchmark is called 'inferense'.* focal_loss"):
        choose(["limits", "inferense"])


def test_a_report_of_good_missing_and_broken_work(tmp_path, capsys):
    folders = []

    def good(setting):
        folders.append(setting.folder)
        (setting.folder / "file").write_text("x")
        case = Case(
            "sums",
            [
                Variant("rival", lambda: sum(range(2000)), theirs=True),
                Variant("ours", lambda: sum(range(1000)), limit="rival", amount=5),
                Variant("broken", lambda: 1 / 0),
            ],
            rivals=["rival"],
            amount=10,
            unit="numbers",
        )
        case.unavailable["other"] = "not installed"
        case.variants[0].amount = 10
        return case

    def missing(setting):
        raise Skip("no such machine")

    def broken(setting):
        raise OSError("disk gone")

    benchmarks = [Benchmark("good", good), Benchmark("missing", missing), Benchmark("bad", broken)]
    report = run(benchmarks, Setting(torch.device("cpu"), tmp_path, quick=True))
    assert has_failures(report)
    json.dumps(report, allow_nan=False)
    case, skipped, bad = report["cases"]
    assert skipped == {"name": "missing", "status": "skipped", "reason": "no such machine"}
    assert bad == {"name": "bad", "status": "failed", "reason": "OSError: disk gone"}
    rival, ours, fault, other = case["variants"]
    assert rival["theirs"] and rival["ratios"] == {}
    assert ours["unit"] == "numbers/s" and ours["limit"] == "rival"
    seconds = ours["seconds"]["median"]
    assert ours["rate"]["median"] == pytest.approx(5 / seconds)
    assert ours["ratios"].keys() == {"rival"}
    assert ours["share"]["count"] == ours["seconds"]["count"]
    assert fault["status"] == "failed" and "ZeroDivisionError" in fault["reason"]
    assert other["reason"] == "not installed"
    assert [folder.parent for folder in folders] == [tmp_path] and not folders[0].exists()
    assert not has_failures(
        run(benchmarks[1:2], Setting(torch.device("cpu"), tmp_path, quick=True))
    )
    assert "[2/3] missing" in capsys.readouterr().err


def test_ctrl_c_leaves_what_was_measured(tmp_path):
    def fine(setting):
        return Case("nothing", [Variant("ours", lambda: None)])

    def stop(setting):
        raise KeyboardInterrupt

    benchmarks = [Benchmark("a", fine), Benchmark("b", stop), Benchmark("c", fine)]
    report = run(benchmarks, Setting(torch.device("cpu"), tmp_path, quick=True))
    assert report["interrupted"]
    assert [case["name"] for case in report["cases"]] == ["a"]


def main_of(tool, monkeypatch, *arguments):
    """The exit code of a tool's `main` with these arguments."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
    try:
        return module.main()
    except SystemExit as end:
        return end.code


def test_from_the_command_line_to_a_comparison(tmp_path, monkeypatch, capsys):
    first = tmp_path / "first.json"
    command = [
        *(sys.executable, ROOT / "tools" / "benchmark.py", "--quick", "--threads", "1"),
        *("--size", "64", "96", "--only", "nms/1000", "assignment/fcos", "--json", first),
    ]
    measured = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert measured.returncode == 0, measured.stderr
    assert "[1/2] assignment/fcos" in measured.stderr
    assert "nms/1000\n" in measured.stdout and "image 64x96" in measured.stdout
    report = json.loads(first.read_text())
    assert [case["name"] for case in report["cases"]] == ["assignment/fcos", "nms/1000"]
    assert report["machine"]["threads"] == 1 and "--quick" in report["machine"]["command"]
    ours = report["cases"][1]["variants"][1]
    assert ours["ratios"].keys() == {"torchvision"}

    def compare(*arguments):
        code = main_of("compare_benchmarks", monkeypatch, *arguments)
        return code, *capsys.readouterr()

    code, _, errors = compare(first, first)
    assert (code, errors) == (0, "")
    for figures in (ours["seconds"], ours["ratios"]["torchvision"]):
        for key in ("median", "q1", "q3"):
            figures[key] *= 1000
    report["machine"]["cores"] = 1000
    second = tmp_path / "second.json"
    second.write_text(json.dumps(report))
    code, text, errors = compare(first, second)
    assert code == 1
    assert "nms/1000: ours  slower  1000.00" in text
    assert "-> 1000" in errors
    assert compare(second, first, "--threshold", 2)[0] == 0
    report["cases"][1] = {"name": "nms/1000", "status": "failed", "reason": "OSError: x"}
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(report))
    code, text, _ = compare(first, broken)
    assert code == 1 and "nms/1000: ours  fails" in text and "slower" not in text
    code, _, errors = compare(first, tmp_path / "none.json")
    assert code == 2 and "none.json cannot be read" in errors


GROWTH = {"interrupted": True, "axes": []}


@pytest.fixture
def made_up_measurements(monkeypatch):
    """Replaces the real measurements; a list of those that were requested."""
    made = []
    monkeypatch.setattr(suite, "run", lambda *_: made.append("run") or reports.report())
    monkeypatch.setattr(growth, "measure_growth", lambda *_: made.append("growth") or GROWTH)
    return made


@pytest.mark.parametrize("tool", ["benchmark", "measure_growth"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    tool, made_up_measurements, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    outputs = [("--json", tmp_path), ("--json", tmp_path / "file" / "x.json")]
    if tool == "measure_growth":
        outputs.append(("--plots", tmp_path / "file"))
    for option, path in outputs:
        assert main_of(tool, monkeypatch, option, path) == 2
        error = capsys.readouterr().err
        assert f"error: {option}: " in error and str(path.parent) in error
    assert not made_up_measurements
    main_of(tool, monkeypatch, "--json", tmp_path / "new" / "x.json")
    assert made_up_measurements and (tmp_path / "new" / "x.json").exists()


@pytest.mark.parametrize(
    ("tool", "words"), [("benchmark", "a processor"), ("measure_growth", "Interrupted")]
)
def test_figures_are_printed_before_they_are_written(
    tool, words, made_up_measurements, tmp_path, monkeypatch, capsys
):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        main_of(tool, monkeypatch, "--json", tmp_path / "x.json")
    assert words in capsys.readouterr().out


def test_an_interrupted_measurement_of_growth_ends_as_interrupted(
    made_up_measurements, monkeypatch
):
    assert main_of("measure_growth", monkeypatch) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no benchmark is called 'nothing'"),
        (["--size", 1, 1], "--size"),
        (["--threads", 0], "--threads must be positive"),
        (["--images", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, monkeypatch, capsys):
    assert main_of("benchmark", monkeypatch, "--quick", *arguments) == 2
    assert message in capsys.readouterr().err
