"""Our own reference implementations give our results, or comparisons would mean nothing."""

import pytest
import torch

from nasfcos.benchmark.parts import (
    HEADS,
    flat,
    head_maps,
    our_head,
    their_anchors,
    their_head,
)
from nasfcos.benchmark.reference import fcos_detections, retinanet_detections
from nasfcos.models.heads.locations import flatten_map

CPU = torch.device("cpu")
SIZES = [(192, 256), (180, 240)]
CLASSES = 6


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["scores"]) > 10
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objects", [0, 20])
def test_fcos_by_loops(objects):
    maps = head_maps("fcos", SIZES[0], CPU, images=2, objects=objects, classes=CLASSES)
    head = our_head("fcos", CLASSES, CPU)
    by_loops = fcos_detections(maps, SIZES, head.post_process)
    found = head.detect(maps, SIZES)
    if objects:
        assert_same(found, by_loops)
    else:
        assert [len(x["scores"]) for x in found] == [len(x["scores"]) for x in by_loops]


def test_retinanet_by_loops():
    maps = head_maps("retinanet", SIZES[0], CPU, images=2, objects=8, classes=CLASSES)
    head = our_head("retinanet", CLASSES, CPU)
    assert_same(head.detect(maps, SIZES), retinanet_detections(head, maps, SIZES))


@pytest.mark.parametrize("name", HEADS)
def test_torchvision_gets_the_same_places(name):
    logits = head_maps(name, SIZES[0], CPU, classes=CLASSES)[0]
    flattened = flat(logits, CLASSES)
    ours = torch.cat([flatten_map(x, CLASSES) for x in logits], dim=1)
    assert torch.equal(flattened, ours)
    anchors = their_anchors(their_head(name, CLASSES, CPU), (192, 256), 1, CPU)
    assert [x.shape for x in anchors] == [(flattened.shape[1], 4)]
