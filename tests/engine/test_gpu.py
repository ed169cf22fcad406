"""Training on a GPU compared with the CPU. `pytest -m gpu` runs all tests that need a GPU."""

import json
import math
from pathlib import Path

import pytest
import torch

from nasfcos import engine
from nasfcos.config import load_config
from nasfcos.data import build_train_loader
from nasfcos.engine.monitor import StepMonitor
from nasfcos.engine.step import forward_backward, update
from nasfcos.models import build_detector
from nasfcos.transfer import to_device

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def losses(cfg):
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


@pytest.mark.parametrize("amp, tolerance", [("off", 1e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_training_starts_as_on_the_cpu_and_ends(config_file, tmp_path, amp, tolerance):
    found = {}
    for device in (CPU, GPU):
        overrides = ["OUTPUT_DIR", str(tmp_path / device.type), "MODEL.DEVICE", device.type]
        cfg = load_config(config_file, [*overrides, "SOLVER.LOG_PERIOD", 1])
        if device == GPU:
            cfg = load_config(config_file, [*overrides, "SOLVER.LOG_PERIOD", 1, "SOLVER.AMP", amp])
        metrics = engine.train(cfg, device)
        assert math.isfinite(metrics["val"]["AP"])
        found[device] = losses(cfg)
    assert found[GPU][0] == pytest.approx(found[CPU][0], rel=tolerance)
    assert len(found[GPU]) == len(found[CPU]) and all(map(math.isfinite, found[GPU]))


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_a_step_never_waits_for_the_gpu(config_file, head):
    cfg = load_config(config_file, ["MODEL.DEVICE", "cuda", "MODEL.HEAD.NAME", head])
    model = build_detector(cfg).to(GPU, memory_format=torch.channels_last).train()
    optimizer = engine.build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    monitor = StepMonitor()
    batches = iter(build_train_loader(cfg))

    def step(number):
        images, targets = batch
        images = [to_device(image, GPU) for image in images]
        terms = forward_backward(model, images, targets, scaler, amp=torch.bfloat16)
        monitor.submit(number, terms, [target["file_name"] for target in targets], stop=False)
        update(optimizer, scaler)

    batch = next(batches)
    step(1)  # a warm-up, in which libraries choose their kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.finish() is False
