"""make, and an environment that is there."""

import os
import shutil
import subprocess

import pytest

from tests.known import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def test_another_interpreter_or_torch_is_not_passed_over(tmp_path):
    # `make test PYTHON=...` hands its own variables to every make below it.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "TORCH")
    env = {name: value for name, value in os.environ.items() if name not in inherited}

    def make(*words):
        arguments = ["make", *words, f"VENV={tmp_path}"]
        return subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)

    given = ("PYTHON=python3.10", "TORCH='torch>=2.6' torchvision")
    made = make("--dry-run", "install", *given).stdout
    (record,) = [line for line in made.splitlines() if line.startswith("printf")]
    made_with = {"MADE_WITH": "python3.10 'torch>=2.6' torchvision"}
    subprocess.run(record, shell=True, check=True, env=env | made_with)
    (tmp_path / ".installed").touch()
    assert make("install").returncode == 0
    assert make("install", *given).returncode == 0
    for other in ("PYTHON=python3.12", "TORCH=torch==2.11.0 torchvision"):
        result = make("install", other)
        assert result.returncode != 0
        assert "was made with python3.10 'torch>=2.6' torchvision." in result.stdout
        assert "put clean before install" in result.stdout
