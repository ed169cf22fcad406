"""Which implementation runs: the compiled kernel if there is one, otherwise the reference."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nasfcos.ops
from nasfcos.ops import library

SCRIPT = """
import logging
import torch
logging.basicConfig(format="%(levelname)s %(message)s")
from nasfcos import ops
from nasfcos.ops.library import has_compiled

assert not any(has_compiled(name, "cpu") for name in ("nms", "sigmoid_focal_loss"))
boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 60, 60]])
for _ in range(2):
    assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5, legacy=True).tolist() == [1, 2]
logits = torch.zeros(2, 3, requires_grad=True)
ops.sigmoid_focal_loss(logits, torch.tensor([0, 2])).backward()
assert logits.grad.abs().sum() > 0
x = torch.ones(1, 4, 5, 6, requires_grad=True)
ops.modulated_deform_conv2d(
    x, torch.full((1, 36, 5, 6), torch.nan), torch.ones(1, 18, 5, 6), torch.ones(2, 4, 3, 3),
    padding=1, offset_groups=2,
).sum().backward()
ops.depthwise_conv2d(x, torch.ones(4, 1, 3, 3), 2).sum().backward()
ops.rectified_pairs(x, torch.ones(2, 2, 1, 1)).sum().backward()
ops.conv3x3(x, torch.ones(4, 4, 3, 3)).sum().backward()
ops.weighted_sum(x, x, torch.ones(4, 1, 1), torch.ones(4, 1, 1)).sum().backward()
ops.group_norm_relu(x, torch.ones(4), torch.zeros(4), 2, 1e-5).sum().backward()
compiled = torch.compile(ops.sigmoid_focal_loss, fullgraph=True, backend="aot_eager")
assert torch.equal(
    compiled(logits, torch.tensor([0, 2])), ops.sigmoid_focal_loss(logits, torch.tensor([0, 2]))
)
"""


@pytest.mark.parametrize("library_file", ["absent", "broken"])
def test_package_without_a_working_extension(tmp_path, library_file):
    shutil.copytree(Path(nasfcos.ops.__file__).parent, tmp_path / "nasfcos" / "ops")
    (tmp_path / "nasfcos" / "__init__.py").touch()
    if library_file == "broken":
        (tmp_path / "nasfcos" / "_C.so").write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING") == 1, result.stderr
    assert "slower" in result.stderr and "pip install" in result.stderr
    reason = "was not compiled" if library_file == "absent" else "does not load"
    assert reason in result.stderr


def test_either_all_kernels_are_compiled_for_the_cpu_or_none():
    compiled = {name: library.has_compiled(name, "cpu") for name in library._SCHEMAS}
    assert len(set(compiled.values())) == 1, compiled
