"""What is compiled where a toolkit does not work."""

import os
import subprocess
import sys

import pytest

from tests.known import ROOT
from tests.operators import needs_compiled

SCRIPT = """
import runpy, sys, torch
torch.cuda.is_available = lambda: True
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py")
"""


@needs_compiled("nms")
@pytest.mark.parametrize("asked, compiled", [("", True), ("1", False)])
def test_a_toolkit_that_does_not_work_costs_only_the_operators_for_cuda(asked, compiled, tmp_path):
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (tmp_path / "nasfcos").mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "one.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "csrc" / "cuda" / "two.cu").write_text("int two() { return 2; }\n")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 99.0\n[ \"$1\" = --version ]\n")
    nvcc.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={
            **os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "NASFCOS_CUDA": asked,
            "NASFCOS_STRICT": "", "NASFCOS_NO_EXT": "", "TORCH_CUDA_ARCH_LIST": "9.0",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "nasfcos" / "_C.so").exists() == compiled, result.stderr
    assert ("compiling for CUDA failed" in result.stderr) == compiled
    assert ("plain PyTorch will serve, which is slower" in result.stderr) != compiled
