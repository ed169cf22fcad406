"""An ONNX file finds, in ONNX Runtime, what the detector finds."""

import dataclasses
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import nasfcos
from nasfcos.engine import launch
from nasfcos.models.onnx import OPSET, translations
from nasfcos.ops import nms_mask
from tests.known import ROOT
from tests.models.test_export import SIZES, by_parts, images
from tests.models.test_inference import lively
from tests.ops.test_nms import random_boxes
from tests.small import SMALL

onnxruntime = pytest.importorskip("onnxruntime", "1.25")


def session(file, classes=None):
    """A function from a file's inputs by name to its outputs by name."""
    runtime = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    if classes is not None:
        assert json.loads(runtime.get_modelmeta().custom_metadata_map["classes"]) == classes
    names = [output.name for output in runtime.get_outputs()]
    return lambda **inputs: dict(zip(names, runtime.run(None, inputs), strict=True))


def check(found, expected):
    """Compare detections; those with nearly equal scores may be in another order."""
    assert found["counts"].tolist() == [len(x["scores"]) for x in expected]
    for image, (count, wanted) in enumerate(zip(found["counts"], expected, strict=True)):
        np.testing.assert_allclose(found["scores"][image, :count], wanted["scores"], rtol=1e-4)
        rows = np.concatenate([found["boxes"][image], found["labels"][image, :, None]], axis=1)
        wanted_rows = torch.cat([wanted["boxes"], wanted["labels"][:, None]], dim=1).numpy()
        distance = np.abs(rows[:count, None] - wanted_rows).max(axis=2)
        assert distance.min(axis=0).max() < 1e-3 and distance.min(axis=1).max() < 1e-3
        assert all(not found[name][image, count:].any() for name in wanted)


@pytest.mark.parametrize(
    "name, factor",
    [
        ("Mobile_NAS_head", 1),
        ("R_50_NAS_retinanet", 1000),
        pytest.param("other operations", 1, marks=pytest.mark.slow),
    ],
)
def test_finds_the_same(name, factor, tmp_path):
    model = lively(name)
    with torch.no_grad():  # scores that keep their order under rounding
        model.head.cls_logits.weight *= factor
    fast = nasfcos.optimize_for_inference(model)
    # No choice among nearly equal scores at the end.
    fast.head.post_process = dataclasses.replace(fast.head.post_process, detections_per_image=5000)
    nasfcos.export_onnx(nasfcos.export_detector(fast, images()), tmp_path / "detector.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["detector.onnx"]
    found = session(tmp_path / "detector.onnx")(images=images().numpy(), sizes=SIZES.numpy())
    assert found["scores"].shape == (2, 5000) and 100 < found["counts"].min()
    check(found, by_parts(fast, images(), SIZES))


class Mask(nn.Module):
    def __init__(self, threshold, legacy):
        super().__init__()
        self.threshold, self.legacy = threshold, legacy

    def forward(self, boxes, labels, counts):
        return nms_mask(boxes, labels, counts, self.threshold, self.legacy)


def nms_inputs(grid=None):
    """Boxes of several classes and images, one of them empty."""
    rows = [random_boxes(200, seed, grid=grid) for seed in range(4)]
    boxes, _, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"boxes": boxes, "labels": labels + 1, "counts": torch.tensor([200, 0, 1, 131])}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("grid", [None, 10])
def test_suppresses_the_same(grid, legacy, tmp_path):
    """Also for IoUs that equal the threshold."""
    given = nms_inputs(grid)
    for threshold in (0.5, 0.6, 0.7):
        program = torch.export.export(Mask(threshold, legacy), tuple(given.values()))
        written = torch.onnx.export(
            program, opset_version=OPSET, custom_translation_table=translations(), verbose=False
        )
        written.save(tmp_path / "nms.onnx")
        run = session(tmp_path / "nms.onnx")
        for counts in (given["counts"], torch.zeros(4, dtype=torch.int64)):
            inputs = given | {"counts": counts}
            (kept,) = run(**{name: x.numpy() for name, x in inputs.items()}).values()
            assert kept.any() == counts.any()
            assert (kept == nms_mask(*inputs.values(), threshold, legacy).numpy()).all()


def test_what_cannot_be_written(tmp_path, monkeypatch):
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_densebox"), torch.bfloat16)
    program = nasfcos.export_detector(fast, images(1))
    with pytest.raises(ValueError, match="in float32, not torch.bfloat16"):
        nasfcos.export_onnx(program, tmp_path / "detector.onnx")
    program = torch.export.export(Mask(0.0, True), tuple(nms_inputs().values()))
    with pytest.raises(ValueError, match="TEST.NMS_IOU 0"):
        nasfcos.export_onnx(program, tmp_path / "detector.onnx")
    other = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(ValueError, match="what export_detector made"):
        nasfcos.export_onnx(other, tmp_path / "detector.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install 'nasfcos.onnx.'"):
        nasfcos.export_onnx(program, tmp_path / "detector.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Run tools/export.py in this process for an output name; returns its exit code."""
    (tmp_path / "empty.yaml").touch()
    monkeypatch.setattr(launch, "log_to_console", lambda: None)  # pytest's own log is enough

    def run(name, *settings):
        arguments = ["--config-file", tmp_path / "empty.yaml", "--output", tmp_path / name]
        arguments = ["export.py", *arguments, "--size", 96, 128, *settings]
        monkeypatch.setattr(sys, "argv", [str(x) for x in arguments])
        return runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]()

    return run


@pytest.mark.parametrize(
    "setting, message",
    [
        (("TEST.DTYPE", "bfloat16"), "TEST.DTYPE: a detector for ONNX must be in float32"),
        (("TEST.NMS_IOU", "0"), "TEST.NMS_IOU 0"),
        ((), "pip install 'nasfcos[onnx]'"),
    ],
)
def test_the_tool_says_what_cannot_be_written(setting, message, tool, monkeypatch, caplog):
    """They are reported before weights are looked for."""
    if not setting:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert tool("a.onnx", *setting) == 2 and message in caplog.text


def test_the_tool(tmp_path):
    settings = [
        *SMALL, "TEST.SCORE_THRESHOLD", 0.05, "TEST.DETECTIONS_PER_IMAGE", 5000,
        "MODEL.WEIGHT", tmp_path / "model.pth",
    ]  # fmt: skip
    torch.manual_seed(0)
    model = nasfcos.build_detector(nasfcos.load_config(None, [*settings, "MODEL.NUM_CLASSES", 3]))
    nn.init.normal_(model.head.cls_logits.weight, std=0.1)
    torch.save({"model": model.state_dict(), "classes": ["ox", "ass", "cow"]}, settings[-1])

    predictor = nasfcos.Predictor(nasfcos.load_config(None, settings))
    (tmp_path / "empty.yaml").touch()
    common = ["--config-file", tmp_path / "empty.yaml", "--output"]
    onnx, pt2 = tmp_path / "deep" / "a.onnx", tmp_path / "deep" / "a.pt2"
    for arguments in ([onnx, "--uint8", *settings], [pt2, "--size", 96, 128, *settings]):
        command = [sys.executable, ROOT / "tools" / "export.py", *common, *arguments]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    assert str(ROOT).encode() not in onnx.read_bytes()
    run = session(onnx, ["ox", "ass", "cow"])
    for canvas, size in (((160, 192), (150, 188)), ((251, 170), (251, 170))):
        picture, size = images(1, canvas).mul(255).to(torch.uint8), torch.tensor([size])
        expected = by_parts(predictor.model, picture, size)
        assert len(expected[0]["scores"]) > 50
        check(run(images=picture.numpy(), sizes=size.numpy()), expected)
    files = {"classes.json": ""}
    program = torch.export.load(pt2, extra_files=files).module()
    found = {name: x.numpy() for name, x in program(images(1), SIZES[1:]).items()}
    check(found, by_parts(predictor.model, images(1), SIZES[1:]))
    assert json.loads(files["classes.json"]) == ["ox", "ass", "cow"]
