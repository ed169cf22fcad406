"""One training step: gradient accumulation and clipping."""

import pytest
import torch

from nasfcos.data import build_train_loader
from nasfcos.engine.step import forward_backward, update
from nasfcos.models import build_detector

CPU = torch.device("cpu")
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model, images, targets, parts):
    model.zero_grad()
    losses = forward_backward(model, images, targets, NO_SCALING, parts)
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def without_batch_norm(config):
    cfg = config("MODEL.NECK.NAME", "fpn", "MODEL.GENOTYPE", "[]", "MODEL.RESNET.NORM", "frozen_bn")
    torch.manual_seed(0)
    return build_detector(cfg).train(), *next(iter(build_train_loader(cfg)))


def test_parts_give_the_mean_of_their_gradients(config):
    model, images, targets = without_batch_norm(config)
    losses, together = gradients(model, images, targets, parts=2)
    halves = [gradients(model, images[i : i + 2], targets[i : i + 2], 1) for i in (0, 2)]
    for name, value in losses.items():
        assert value == pytest.approx(float((halves[0][0][name] + halves[1][0][name]) / 2))
    for name, gradient in together.items():
        expected = (halves[0][1][name] + halves[1][1][name]) / 2
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_parts_with_equal_normalisers_give_the_gradient_of_the_whole(config):
    model, images, targets = without_batch_norm(config)
    images, targets = images[:2] * 2, targets[:2] * 2
    _, whole = gradients(model, images, targets, parts=1)
    _, parts = gradients(model, images, targets, parts=2)
    scale = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6 * scale)


def test_the_gradient_is_clipped_to_its_norm():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([30.0, 40.0])
    update(optimizer, NO_SCALING, clip_norm=5.0)
    assert weight.tolist() == pytest.approx([-3.0, -4.0], rel=1e-4)
    weight.grad = torch.tensor([0.3, 0.4])
    update(optimizer, NO_SCALING, clip_norm=5.0)
    assert weight.tolist() == pytest.approx([-3.3, -4.4], rel=1e-4)
    assert weight.grad is None
