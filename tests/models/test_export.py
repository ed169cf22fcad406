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


def check(found, expected):
    """Detections of fixed shapes against lists of as many as there are."""
    assert found["counts"].tolist() == [len(x["scores"]) for x in expected]
    for image, (count, wanted) in enumerate(zip(found["counts"], expected, strict=True)):
        for name, values in wanted.items():
            torch.testing.assert_close(found[name][image, :count], values, rtol=1e-4, atol=1e-3)
            assert not found[name][image, count:].any()


@pytest.mark.parametrize("name", ["R_50_NAS_head", "R_50_NAS_retinanet", "other operations"])
def test_finds_the_same(name):
    fast = nasfcos.optimize_for_inference(lively(name))
    program = nasfcos.export_detector(fast, torch.zeros(2, 3, 96, 128)).module()
    found = program(images())
    assert found["boxes"].shape == (2, 100, 4) and found["counts"].any()
    check(found, fast(list(images())))


def test_bytes_of_a_size_that_is_padded_and_fewer_detections_than_room():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_densebox"))
    batch = images(1, (70, 101)).mul(255).to(torch.uint8)

    def found_above(threshold):
        fast.head.post_process = dataclasses.replace(
            fast.head.post_process, score_threshold=threshold
        )
        expected = fast(list(batch))
        check(nasfcos.export_detector(fast, torch.zeros_like(batch)).module()(batch), expected)
        return len(expected[0]["scores"])

    logits, *_ = head_outputs(fast, batch[0])
    best = max(x.max() for x in logits).sigmoid().item()
    assert found_above(0.05) == 100
    assert 0 < found_above(0.98 * best) < 100
    assert found_above(1.02 * best) == 0


def test_bfloat16():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_densebox"), torch.bfloat16)
    found = nasfcos.export_detector(fast, images()).module()(images())
    assert found["scores"].dtype == torch.float32
    for scores, expected in zip(found["scores"], fast(list(images())), strict=True):
        # Compiled or not, sums are rounded to bfloat16 at other places.
        torch.testing.assert_close(scores.max(), expected["scores"].max(), rtol=0.05, atol=0)


LOAD = """
import sys, torch, nasfcos
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_another_process_loads_it(tmp_path):
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_head"))
    torch.export.save(nasfcos.export_detector(fast, images(1)), tmp_path / "detector.pt2")
    torch.save(images(1), tmp_path / "images.pt")
    files = [tmp_path / name for name in ("detector.pt2", "images.pt", "found.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    check(torch.load(tmp_path / "found.pt"), fast(list(images(1))))


def test_for_a_gpu_that_is_not_there():
    cfg = nasfcos.load_config(None, [*SMALL, *RESNET])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = InferenceDetector(build_detector(cfg, 7).eval(), torch.float32, False)
            program = nasfcos.export_detector(model, torch.zeros(1, 3, 96, 128))
    (results,) = program.graph.find_nodes(op="output")
    assert [x.meta["val"].device.type for x in results.args[0]] == ["cuda"] * 4


def test_what_cannot_be_exported():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_densebox"))
    with pytest.raises(ValueError, match=r"must be \[N, 3, H, W\], not \[3, 96, 128\]"):
        nasfcos.export_detector(fast, images()[0])
    fast.head.post_process = dataclasses.replace(fast.head.post_process, pre_nms_top_n=4000)
    with pytest.raises(ValueError, match="PRE_NMS_TOP_N above 3276"):
        nasfcos.export_detector(fast, images())
