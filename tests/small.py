"""A small real model of random weights, as a checkpoint and as a predictor."""

import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.config import load_config
from nasfcos.models.build import build_detector
from nasfcos.predictor import Predictor

CLASSES = ["cat", "dog", "ox"]

SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.NECK.NAME", "fpn", "MODEL.NECK.CHANNELS", 64),
    *("MODEL.RESNET.BLOCKS", [1, 1, 1, 1], "MODEL.RESNET.STEM_CHANNELS", 8),
    *("MODEL.HEAD.NUM_CONVS", 1, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
    # A fresh model is sure of nothing; these let some of it through.
    *("TEST.SCORE_THRESHOLD", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
]


def small_config(*overrides):
    return load_config(None, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def cfg():
    return small_config()


@pytest.fixture(scope="module")
def checkpoint(cfg, tmp_path_factory):
    torch.manual_seed(0)
    model = build_detector(cfg, len(CLASSES))
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict(), "classes": CLASSES}, path)
    return path


@pytest.fixture(scope="module")
def predictor(cfg, checkpoint):
    return Predictor(cfg, checkpoint)


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    return blobs.resize((250, 150), Image.Resampling.BICUBIC)
