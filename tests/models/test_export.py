"""The exported program finds what the detector finds."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nasfcos
from nasfcos.models import build_detector
from nasfcos.models.inference import InferenceDetector
from tests.models.test_inference import RESNET, SMALL, head_outputs, lively


def images(count=2, size=(96, 128), seed=1):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


SIZES = torch.tensor([[96, 128], [70, 101]])


def by_parts(fast, batch, sizes):
    """A detector's own detections, with convolutions not fused with their sum and activation, as in
    an exported graph, so that both round alike."""
    pictures = [image[:, :h, :w] for image, (h, w) in zip(batch, sizes.tolist(), strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return fast(pictures)


def check(found, expected):
    """Compare detections in fixed shapes with lists of all detections, which may have more ties."""
    room = found["scores"].shape[1]
    expected = [{name: x[:room] for name, x in wanted.items()} for wanted in expected]
    assert found["counts"].tolist() == [len(x["scores"]) for x in expected]
    for image, (count, wanted) in enumerate(zip(found["counts"], expected, strict=True)):
        for name, values in wanted.items():
            torch.testing.assert_close(found[name][image, :count], values, rtol=1e-4, atol=1e-3)
            assert not found[name][image, count:].any()


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("R_50_NAS_head", torch.float32),
        ("R_50_NAS_head", torch.bfloat16),
        ("R_50_NAS_retinanet", torch.float32),
        ("other operations", torch.float32),
    ],
)
def test_finds_the_same(name, dtype):
    fast = nasfcos.optimize_for_inference(lively(name), dtype)
    program = nasfcos.export_detector(fast, torch.zeros(2, 3, 96, 128)).module()
    found = program(images(), SIZES)
    assert found["boxes"].shape == (2, 100, 4) and found["counts"].all()
    check(found, by_parts(fast, images(), SIZES))


@pytest.mark.parametrize(
    "name",
    [
        "R_50_NAS_head",
        pytest.param("R_50_NAS_retinanet", marks=pytest.mark.slow),
        pytest.param("other operations", marks=pytest.mark.slow),
    ],
)
def test_one_program_for_any_size(name):
    fast = nasfcos.optimize_for_inference(lively(name))
    program = nasfcos.export_detector(fast, images(), any_size=True).module()
    for canvas in ((129, 160), (150, 370), (320, 192)):
        sizes = torch.tensor([canvas, [canvas[0] - 20, canvas[1] - 7]])
        found = program(images(2, canvas), sizes)
        assert found["boxes"].shape == (2, 100, 4) and found["counts"].all()
        check(found, by_parts(fast, images(2, canvas), sizes))
    with pytest.raises((RuntimeError, AssertionError)):
        program(images(2, (128, 160)), torch.tensor([[128, 160]] * 2))


def test_bytes_of_a_size_that_is_padded_and_other_numbers_of_detections():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_densebox"))
    batch, size = images(1, (70, 101)).mul(255).to(torch.uint8), torch.tensor([[70, 101]])

    def found_above(threshold, **settings):
        fast.head.post_process = dataclasses.replace(
            fast.head.post_process, score_threshold=threshold, **settings
        )
        expected = by_parts(fast, batch, size)
        found = nasfcos.export_detector(fast, torch.zeros_like(batch)).module()(batch, size)
        check(found, expected)
        return len(expected[0]["scores"]), found["scores"].shape[1]

    logits, *_ = head_outputs(fast, batch[0])
    best = max(x.max() for x in logits).sigmoid().item()
    assert found_above(0.05) == (100, 100)
    some, room = found_above(0.98 * best)
    assert 0 < some < room == 100
    assert found_above(1.02 * best) == (0, 100)
    # TEST.PRE_NMS_TOP_N from each of five levels.
    some, room = found_above(0.05, detections_per_image=10000)
    assert 100 < some < room == 5000


@pytest.mark.gpu
def test_on_a_gpu():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_head").cuda())
    program = nasfcos.export_detector(fast, torch.zeros(1, 3, 96, 128)).module()
    found = {name: x.cpu() for name, x in program(images(1), SIZES[:1]).items()}
    expected = by_parts(fast, images(1), SIZES[:1])
    check(found, [{name: x.cpu() for name, x in y.items()} for y in expected])


LOAD = """
import sys, torch, nasfcos
program = torch.export.load(sys.argv[1]).module()
torch.save(program(*torch.load(sys.argv[2])), sys.argv[3])
"""


def test_another_process_loads_it(tmp_path):
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_head"))
    program = nasfcos.export_detector(fast, images(1))
    assert program.example_inputs[0][0].untyped_storage().nbytes() == 4  # no picture in the file
    torch.export.save(program, tmp_path / "detector.pt2")
    torch.save((images(1), SIZES[:1]), tmp_path / "images.pt")
    files = [tmp_path / name for name in ("detector.pt2", "images.pt", "found.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    check(torch.load(tmp_path / "found.pt"), by_parts(fast, images(1), SIZES[:1]))


def test_for_a_gpu_that_is_not_there():
    cfg = nasfcos.load_config(None, [*SMALL, *RESNET])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = InferenceDetector(build_detector(cfg, 7).eval(), torch.float32, False)
            program = nasfcos.export_detector(model, torch.zeros(1, 3, 96, 128))
    (results,) = program.graph.find_nodes(op="output")
    assert [x.meta["val"].device.type for x in results.args[0]] == ["cuda"] * 4


def test_what_cannot_be_exported():
    model = lively("R_50_NAS_densebox")
    with pytest.raises(TypeError, match="not a Detector: .*optimize_for_inference"):
        nasfcos.export_detector(model, images())
    fast = nasfcos.optimize_for_inference(model)
    for batch, given in (
        (images()[0], r"\[3, 96, 128\]"),
        (images(0), r"\[0, 3, 96, 128\]"),
    ):
        with pytest.raises(ValueError, match=rf"tensor \[N, 3, H, W\] .*, not {given}"):
            nasfcos.export_detector(fast, batch)
    for batch, given in (
        (images().long(), "int64"),
        (images()[..., :0], r"\[3, 96, 0\]"),
        (images()[:, :1], r"\[1, 96, 128\]"),
    ):
        with pytest.raises(ValueError, match=given):
            nasfcos.export_detector(fast, batch)
    with pytest.raises(TypeError, match="not a list"):
        nasfcos.export_detector(fast, list(images()))
    fast.head.post_process = dataclasses.replace(fast.head.post_process, pre_nms_top_n=4000)
    with pytest.raises(ValueError, match="PRE_NMS_TOP_N above 3276"):
        nasfcos.export_detector(fast, images())
