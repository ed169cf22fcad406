import logging
import math

import pytest
import torch
from torch import nn

from nasfcos.config import load_config
from nasfcos.engine import build_lr_scheduler, build_optimizer
from nasfcos.engine.checkpoint import CheckpointError
from nasfcos.engine.solver import restore_solver, zero_momentum

# Learning rates of the released training (weights; biases have twice these) by iteration.
RELEASED = {
    1: 0.0033466666666666666,
    2: 0.0033599999999999997,
    100: 0.004666666666666667,
    250: 0.006666666666666666,
    499: 0.009986666666666668,
    500: 0.01,
    501: 0.01,
    59999: 0.01,
    60000: 0.001,
    60001: 0.001,
    80000: 0.0001,
    89999: 0.0001,
    90000: 0.0001,
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.extra_bias_scale = nn.Parameter(torch.ones(()))


def solver(*overrides):
    cfg = load_config(None, overrides)
    model = Small()
    optimizer = build_optimizer(cfg, model)
    return cfg, model, optimizer, build_lr_scheduler(cfg, optimizer)


def rates(scheduler, iterations):
    """The weights' learning rate at iterations 1, 2, ..., as the optimizer sees it."""
    found = {}
    for t in range(1, iterations + 1):
        found[t] = scheduler.optimizer.param_groups[0]["lr"]
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_released_rates_at_every_turn():
    _, _, optimizer, scheduler = solver()
    optimizer.step()  # otherwise the scheduler warns
    for t, rate in RELEASED.items():
        scheduler.last_epoch = t - 2
        scheduler.step()
        weights, biases = optimizer.param_groups
        assert weights["lr"] == pytest.approx(rate, rel=1e-12)
        assert biases["lr"] == pytest.approx(2 * rate, rel=1e-12)


def test_first_iterations_have_their_rates_without_a_step_before():
    _, _, _, scheduler = solver()
    found = rates(scheduler, 2)
    assert found == {t: pytest.approx(RELEASED[t], rel=1e-12) for t in (1, 2)}


def test_constant_warmup():
    overrides = ("SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_ITERS", 3)
    found = rates(solver(*overrides)[3], 3)
    assert list(found.values()) == pytest.approx([0.01 / 3, 0.01 / 3, 0.01])


def test_cosine_falls_to_zero_at_the_end():
    overrides = ("SOLVER.SCHEDULE", "cosine", "SOLVER.MAX_ITER", 10, "SOLVER.WARMUP_ITERS", 0)
    found = rates(solver(*overrides)[3], 11)
    assert found[5] == pytest.approx(0.005)
    assert found[2] == pytest.approx(0.01 * (1 + math.cos(0.2 * math.pi)) / 2)
    assert found[10] == pytest.approx(0, abs=1e-18)
    assert found[11] == pytest.approx(0, abs=1e-18)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_have_their_own_group_and_frozen_parameters_none(name):
    _, model, optimizer, _ = solver("SOLVER.OPTIMIZER", name)
    weights, biases = optimizer.param_groups
    assert {id(p) for p in weights["params"]} == {id(model.conv.weight), id(model.norm.weight)}
    assert {id(p) for p in biases["params"]} == {
        id(model.conv.bias), id(model.norm.bias), id(model.extra_bias_scale)
    }  # fmt: skip
    assert weights["weight_decay"] == 1e-4
    assert biases["weight_decay"] == 0
    assert biases["initial_lr"] == 2 * weights["initial_lr"] == 0.02


def test_restored_solver_has_the_moments_of_then_and_the_rates_of_now():
    _, model, optimizer, scheduler = solver()
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()
        scheduler.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}

    _, other, fresh, fresh_scheduler = solver("SOLVER.BASE_LR", 0.1)
    restore_solver(fresh, fresh_scheduler, state, 3)
    momentum = fresh.state[other.conv.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.conv.weight]["momentum_buffer"])
    assert rates(fresh_scheduler, 2) == {
        1: pytest.approx(10 * RELEASED[1] * (1 + 2 * 4 / 500) / (1 + 2 * 1 / 500)),
        2: pytest.approx(10 * RELEASED[1] * (1 + 2 * 5 / 500) / (1 + 2 * 1 / 500)),
    }


def test_adamw_forgets_as_the_config_says():
    overrides = ("SOLVER.OPTIMIZER", "adamw", "SOLVER.MOMENTUM", 0.8, "SOLVER.BETA2", 0.98)
    assert solver(*overrides)[2].param_groups[1]["betas"] == (0.8, 0.98)


def trained(model, optimizer, scheduler, steps=3):
    """Train some steps; returns the optimizer's and scheduler's part of a checkpoint."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_moments_follow_their_parameters_when_others_are_trained(name, caplog):
    """In this example the groups keep their lengths, and most positions keep their shapes."""
    cfg, model, optimizer, scheduler = solver("SOLVER.OPTIMIZER", name)
    state = trained(model, optimizer, scheduler)
    other = Small()
    other.conv.requires_grad_(False)
    other.frozen.requires_grad_(True)
    resumed = build_optimizer(cfg, other)
    with caplog.at_level(logging.WARNING, logger="nasfcos"):
        restore_solver(resumed, build_lr_scheduler(cfg, resumed), state, 3)
    assert "2 parameters were not trained until now" in caplog.text
    assert "frozen.weight" in caplog.text
    key = {"sgd": "momentum_buffer", "adamw": "exp_avg"}[name]
    for kept in ("norm.weight", "norm.bias", "extra_bias_scale"):
        before, after = (m.get_parameter(kept) for m in (model, other))
        assert torch.equal(resumed.state[after][key], optimizer.state[before][key])
    assert other.frozen.weight not in resumed.state
    trained(other, resumed, build_lr_scheduler(cfg, resumed), steps=1)


def test_moments_without_names_are_refused():
    _, model, optimizer, scheduler = solver()
    state = trained(model, optimizer, scheduler)
    del state["optimizer"]["param_groups"][1]["param_names"]
    with pytest.raises(CheckpointError, match="does not name the parameters"):
        restore_solver(optimizer, scheduler, state, 3)


def test_restored_moments_lie_as_their_parameters_do():
    """Fused optimizers rely on it."""
    moments = {}
    for last in (False, True):
        cfg, model, optimizer, scheduler = solver("SOLVER.OPTIMIZER", "adamw")
        model.conv = nn.Conv2d(3, 4, 3)
        model.conv.weight.data = torch.arange(108.0).view(4, 3, 3, 3) / 108
        optimizer = build_optimizer(cfg, model)
        state = trained(model, optimizer, build_lr_scheduler(cfg, optimizer))
        if last:
            model = model.to(memory_format=torch.channels_last)
        resumed = build_optimizer(cfg, model)
        restore_solver(resumed, build_lr_scheduler(cfg, resumed), state, 3)
        trained(model, resumed, build_lr_scheduler(cfg, resumed), steps=1)
        moments[last] = model.conv.weight.detach()
    torch.testing.assert_close(moments[True], moments[False])


def test_restored_before_the_first_step_momentum_stays_zero():
    _, model, optimizer, scheduler = solver()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    zero_momentum(optimizer)
    restore_solver(optimizer, scheduler, state, 0)
    assert not optimizer.state[model.conv.weight]["momentum_buffer"].any()


def test_fused_sgd_skips_a_first_step_that_overflows():
    weights = {}
    for fused in (False, True):
        junk = [torch.full((1000,), 1e30) for _ in range(50)]  # may be left in new memory
        del junk
        parameter = nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=fused)
        if fused:
            zero_momentum(optimizer)
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (math.inf, 1.0, -2.0, math.inf, 0.5):
            scaler.scale(parameter.sum() * gradient).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights[fused] = parameter.detach()
    torch.testing.assert_close(weights[True], weights[False])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_there_need_not_be_biases(name):
    cfg = load_config(None, ["SOLVER.OPTIMIZER", name])
    model = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    state = trained(model, optimizer, scheduler)
    resumed = build_optimizer(cfg, model)
    restore_solver(resumed, build_lr_scheduler(cfg, resumed), state, 3)
    assert len(resumed.state) == 1
