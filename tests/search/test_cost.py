"""Multiply-adds against a hand count and the published numbers; latency; penalties."""

import math
import time

import pytest
import torch
from torch import nn

import nasfcos
from nasfcos.config import get_defaults
from nasfcos.models.layers import ModulatedDeformConv, SeparableConv
from nasfcos.search.cost import Objective, build_objective, latency_ms, multiply_adds
from tests.operators import FORMATS


def test_hand_count():
    height, width, channels = 12, 10, 8
    places = height * width
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1),
        SeparableConv(channels, 5, 6, nn.BatchNorm2d),
        ModulatedDeformConv(channels, 6),
    )
    images = torch.rand(2, 3, 2 * height, 2 * width)
    deformable = 9 * channels * (6 + 5) + 9 * channels * 54  # with its offsets and masks
    by_hand = 2 * places * (27 * channels + 25 * channels + channels**2 + deformable)
    assert multiply_adds(net, images) == pytest.approx(by_hand / 1e9, rel=1e-9)


def test_counting_leaves_the_module_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    multiply_adds(net, torch.rand(1, 3, 4, 4))
    assert net.training
    for name, x in net.state_dict().items():
        assert x.device.type == "cpu" and torch.equal(x, before[name])


@pytest.mark.parametrize(
    "config, channels, published",
    [
        ("baselines/R_50_FPN_FCOS", 256, 169.9),
        ("search/R_50_NAS_head", 128, 104.0),
        ("search/R_50_NAS_head", 256, 189.6),
        ("baselines/Mobile_FPN_FCOS", 256, 105.4),
        ("search/Mobile_NAS_head", 128, 39.3),
        ("search/Mobile_NAS_head", 256, 121.8),
    ],
)
def test_published_figures(config, channels, published, request):
    """The numbers in the paper's table agree with an input of 800 x 1088 within 2 %."""
    path = request.config.rootpath / "configs" / f"{config}.yaml"
    overrides = ["MODEL.NECK.CHANNELS", channels, "MODEL.NUM_CLASSES", 80]
    model = nasfcos.build_detector(nasfcos.load_config(path, overrides))
    whole = nn.Sequential(model.backbone, model.neck, model.head)
    counted = multiply_adds(whole.to("meta"), torch.empty(1, 3, 800, 1088, device="meta"))
    assert counted == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_on_every_device(request, format):
    """Our operators count the same where they are computed as where PyTorch's replace them."""
    cfg = nasfcos.load_config(request.config.rootpath / "configs/demo/nas_fcos.yaml",
                              ["MODEL.NUM_CLASSES", 3])  # fmt: skip
    model = nasfcos.build_detector(cfg)
    whole = nn.Sequential(model.backbone, model.neck, model.head)
    image = torch.rand(1, 3, 64, 96).contiguous(memory_format=format)
    counted = multiply_adds(whole, image)
    assert counted == multiply_adds(whole.to("meta"), image.to("meta"))


def test_latency_is_the_shortest_run():
    class Sleeps(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            time.sleep(0.2 if self.calls == 5 else 0.01)

    net = Sleeps()
    assert 10 <= latency_ms(net, torch.zeros(1), repetitions=5) < 100
    assert net.calls == 8


def test_each_stage_has_a_target_of_its_own():
    cfg = get_defaults()
    cfg.SEARCH.OBJECTIVE.COST, cfg.SEARCH.OBJECTIVE.WEIGHT = "flops", 1.0
    cfg.SEARCH.OBJECTIVE.TARGET, cfg.SEARCH.OBJECTIVE.TARGET_HEAD = 2.0, 4.0
    assert build_objective(cfg, "fpn").penalty(8.0, 0.0) == 3.0
    assert build_objective(cfg, "head").penalty(8.0, 0.0) == 1.0


def test_a_cost_that_was_not_measured_is_not_free():
    assert math.isnan(Objective("latency", target=1.0, weight=1.0).penalty(1.0, math.nan))
    assert Objective("flops", target=1.0, weight=1.0).penalty(1.0, math.nan) == 0.0
    assert Objective().penalty(math.nan, math.nan) == 0.0
