"""The comparison of configs through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from nasfcos.config import load_config  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_config(config_file, tmp_path):
    def write(name, tree):
        path = config_file.with_name(name)
        path.write_text(yaml.safe_dump({"_BASE_": config_file.name, **tree}))
        return path

    return write


def compare(folder, *configs, seeds, code):
    command = [sys.executable, ROOT / "tools/compare_configs.py", "--configs", *configs]
    command += ["--seeds", str(seeds), "--output", folder, "SOLVER.MAX_ITER", "2"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_each_config_with_each_seed(config_file, write_config, tmp_path):
    other = write_config("plain.yaml", {"MODEL": {"NECK": {"NAME": "fpn"}}})
    table, _ = compare(tmp_path / "out", config_file, other, seeds=2, code=0)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {str(config_file), str(other)}
    assert all(len(runs) == 2 for runs in results.values())
    assert table.endswith((tmp_path / "out/results.md").read_text() + "\n")
    for number, file in enumerate((config_file, other)):
        for seed in (0, 1):
            run = tmp_path / "out" / f"{number}_{file.stem}" / f"seed_{seed}"
            cfg = load_config(run / "config.yaml")
            assert cfg.SEED == seed and cfg.MODEL.NECK.NAME == load_config(file).MODEL.NECK.NAME
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/model_final.pth")}
    compare(tmp_path / "out", config_file, other, seeds=2, code=0)
    assert len(before) == 4 and all(p.stat().st_mtime_ns == t for p, t in before.items())


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"DATASETS": {"TEST": []}}, "DATASETS.TEST is empty"),
        ({"DATASETS": {"TRAIN": ["gone"]}}, "gone"),
        ({"TEST": {"DTYPE": "float16"}}, "float16 needs a GPU"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    config_file, write_config, tmp_path, tree, message
):
    _, error = compare(
        tmp_path / "out", config_file, write_config("bad.yaml", tree), seeds=1, code=2
    )
    assert message in error and not list(tmp_path.glob("out/*/*/*"))
