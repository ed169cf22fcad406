"""Training in this process: stopping, resuming, divergence."""

import importlib
import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from nasfcos import engine
from nasfcos.config import ConfigError, load_config
from nasfcos.data import DataError, build_train_loader
from nasfcos.engine.checkpoint import CheckpointError, load_checkpoint
from nasfcos.engine.monitor import NonFiniteLossError, StepMonitor
from nasfcos.engine.run import Run, save_run
from nasfcos.engine.step import forward_backward, update
from nasfcos.locks import only_one
from nasfcos.models import build_detector
from nasfcos.models.weights import WeightsError
from nasfcos.signals import Interrupted

# Attributes of the package with these names may be functions.
train_module = importlib.import_module("nasfcos.engine.train")
trainer_module = importlib.import_module("nasfcos.engine.trainer")
CPU = torch.device("cpu")
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def final_weights(cfg):
    return load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_final.pth")["model"]


def metrics(cfg):
    text = (Path(cfg.OUTPUT_DIR) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def interrupt_in(monkeypatch, steps):
    """Send SIGTERM to this process in the `steps`-th optimizer step; one more step follows."""
    calls = iter(range(1, 10**6))

    def update_and_signal(*args):
        if next(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)

    monkeypatch.setattr(trainer_module, "update", update_and_signal)


class Killed(BaseException):
    """Stands for the death of the process."""


def kill_in(monkeypatch, steps):
    """Stop the training in the `steps`-th optimizer step, as if the process were killed."""
    calls = iter(range(1, 10**6))

    def update_or_end(*args):
        if next(calls) == steps:
            raise Killed
        update(*args)

    monkeypatch.setattr(trainer_module, "update", update_or_end)


def test_what_is_odd_about_the_test_set_is_told_once(config, tmp_path, caplog):
    data = tmp_path / "odd"
    shutil.copytree(config().DATASETS.ROOT, data)
    cfg = config("TEST.EVAL_PERIOD", 2, "DATASETS.ROOT", data)
    file = data / cfg.DATASETS.CUSTOM.val.ANNOTATIONS
    tree = json.loads(file.read_text())
    tree["annotations"][0]["bbox"][2] = -5
    file.write_text(json.dumps(tree))
    (data / cfg.DATASETS.CUSTOM.val.IMAGES / tree["images"][1]["file_name"]).unlink()
    engine.train(cfg, CPU)
    assert caplog.text.count("data set val: 1 boxes not finite, without area") == 1
    assert caplog.text.count(f"{tree['images'][1]['file_name']} is skipped") == 1
    assert len([line for line in metrics(cfg) if "eval/val/AP" in line]) == 4


def test_a_run_leaves_everything_that_was_promised(config):
    cfg = config("TEST.EVAL_PERIOD", 4)
    results = engine.train(cfg, CPU)
    output = Path(cfg.OUTPUT_DIR)
    written = json.loads((output / "inference/val/metrics.json").read_text())
    assert results["val"]["AP50"] == pytest.approx(written["AP50"], abs=1e-12)
    names = {path.name for path in output.iterdir()}
    assert names == {
        "config.yaml", "inference", "metrics.jsonl", "model_0000003.pth", "model_0000004.pth",
        "model_0000006.pth", "model_final.pth", "tensorboard", "train.lock", "training.png",
    }  # fmt: skip
    assert load_config(output / "config.yaml") == cfg

    lines = metrics(cfg)
    training = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in training] == [1, 2, 4, 6, 8]
    for line in training:
        terms = line["loss_cls"] + line["loss_box"] + line["loss_centerness"]
        assert line["loss"] == pytest.approx(terms)
        assert {"lr", "time", "data_time", "images_per_s", "memory_mb"} < line.keys()
    assert training[0]["lr"] == pytest.approx(0.005 * (1 / 3 + 2 / 9))
    assert training[-1]["lr"] == pytest.approx(0.0005)
    tests = [line for line in lines if "eval/val/AP" in line]
    assert [line["iteration"] for line in tests] == [4, 8]
    assert tests[-1]["eval/val/AP50"] == results["val"]["AP50"]

    boxes = json.loads((output / "inference" / "val" / "bbox.json").read_text())
    assert {box["image_id"] for box in boxes} <= set(range(1, 8))
    assert {box["category_id"] for box in boxes} <= {10, 20}
    figures = json.loads((output / "inference" / "val" / "metrics.json").read_text())
    assert figures["AP50"] == results["val"]["AP50"]

    state = load_checkpoint(output / "model_final.pth")
    assert state["iteration"] == 8 and state["classes"] == ["white", "red"]
    assert state["sampler"] == {"images": 32}


def test_the_loss_falls(config):
    cfg = config("SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "(35,)", "SOLVER.LOG_PERIOD", 10)
    engine.train(cfg, CPU, skip_test=True)
    losses = [line["loss"] for line in metrics(cfg)]
    assert losses[-1] < 0.5 * losses[0]


def test_sigterm_saves_and_the_resumed_run_ends_bit_identical(config, monkeypatch):
    whole = config(output="whole")
    engine.train(whole, CPU, skip_test=True)
    cut = config(output="cut")
    interrupt_in(monkeypatch, 4)
    with pytest.raises(Interrupted, match="after iteration 5.*model_0000005.pth") as stopped:
        engine.train(cut, CPU)
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    engine.train(cut, CPU, resume=True, skip_test=True)
    assert_same_weights(final_weights(cut), final_weights(whole))
    optimizers = [load_checkpoint(Path(c.OUTPUT_DIR) / "model_final.pth")["optimizer"]
                  for c in (cut, whole)]  # fmt: skip
    for index, moments in optimizers[0]["state"].items():
        expected = optimizers[1]["state"][index]["momentum_buffer"]
        assert torch.equal(moments["momentum_buffer"], expected)
    # 6 is both the first line of the resumed run and a regular one.
    assert [line["iteration"] for line in metrics(cut)] == [1, 2, 4, 6, 8]


def test_an_evaluation_that_was_cut_off_is_made_up_and_changes_no_bit(config, monkeypatch):
    whole = config("TEST.EVAL_PERIOD", 3, output="whole")
    engine.train(whole, CPU, skip_test=True)
    cut = config("TEST.EVAL_PERIOD", 3, output="cut")

    def stop_while_testing(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal is not heeded")

    monkeypatch.setattr(trainer_module, "test", stop_while_testing)
    for resume in (False, True):
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            engine.train(cut, CPU, resume=resume, skip_test=True)
        assert [path.name for path in Path(cut.OUTPUT_DIR).glob("model_*")] == ["model_0000003.pth"]
    monkeypatch.undo()
    engine.train(cut, CPU, resume=True, skip_test=True)
    assert_same_weights(final_weights(cut), final_weights(whole))

    def evaluations(cfg):
        return [line for line in metrics(cfg) if "eval/val/AP" in line]

    assert [line["iteration"] for line in evaluations(whole)] == [3, 6]
    assert evaluations(cut) == evaluations(whole)


def test_resuming_passes_over_a_broken_checkpoint(config, monkeypatch, caplog):
    whole = config(output="whole")
    engine.train(whole, CPU, skip_test=True)
    cut = config(output="cut")
    interrupt_in(monkeypatch, 5)
    with pytest.raises(Interrupted):
        engine.train(cut, CPU)
    broken = Path(cut.OUTPUT_DIR) / "model_0000006.pth"
    broken.write_bytes(broken.read_bytes()[:100_000])
    with caplog.at_level(logging.INFO, logger="nasfcos"):
        engine.train(cut, CPU, resume=True, skip_test=True)
    assert "passed over" in caplog.text and "model_0000006.pth" in caplog.text
    assert "model_0000003.pth, after iteration 3" in caplog.text
    assert_same_weights(final_weights(cut), final_weights(whole))


def test_a_damaged_checkpoint_costs_no_other(config, monkeypatch, caplog):
    """It must not collide with the new checkpoint of the same number, nor count as one to keep."""
    cut = config("SOLVER.KEEP_CHECKPOINTS", 1, "SOLVER.CHECKPOINT_PERIOD", 1)
    output = Path(cut.OUTPUT_DIR)
    interrupt_in(monkeypatch, 2)
    with pytest.raises(Interrupted):
        engine.train(cut, CPU)
    (output / "model_0000007.pth").write_bytes(b"damaged")
    interrupt_in(monkeypatch, 1)
    with caplog.at_level(logging.WARNING, logger="nasfcos"), pytest.raises(Interrupted):
        engine.train(cut, CPU, resume=True)
    assert "model_0000007.pth cannot be read and was renamed" in caplog.text
    found = sorted(path.name for path in output.glob("model_*"))
    assert found == ["model_0000005.pth", "model_0000007.pth.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_is_set_aside_when_it_is_resumed(config):
    cfg = config("SOLVER.MAX_ITER", 3, "SOLVER.LOG_PERIOD", 1)
    output = Path(cfg.OUTPUT_DIR)
    engine.train(cfg, CPU, skip_test=True)
    lines = (output / "metrics.jsonl").read_text()
    (output / "model_final.pth").write_bytes(b"damaged")
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, resume=True, skip_test=True)
    assert load_checkpoint(output / "model_final.pth")["iteration"] == 1
    assert [line["iteration"] for line in metrics(cfg)] == [1]
    assert (output / "earlier_1" / "metrics.jsonl").read_text() == lines
    assert (output / "earlier_1" / "model_final.pth").read_bytes() == b"damaged"


def test_resuming_nothing_starts_and_resuming_the_finished_tests(config, caplog):
    cfg = config()
    with caplog.at_level(logging.INFO, logger="nasfcos"):
        engine.train(cfg, CPU, resume=True, skip_test=True)
        assert "nothing to resume from" in caplog.text
        before = final_weights(cfg)
        results = engine.train(cfg, CPU, resume=True)
    assert "finished already" in caplog.text
    assert_same_weights(final_weights(cfg), before)
    assert set(results) == {"val"}


def test_resuming_with_another_config_says_what_differs_and_uses_it(config, caplog):
    engine.train(config("SOLVER.MAX_ITER", 4), CPU, skip_test=True)
    longer = config("SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 0.001)
    with caplog.at_level(logging.WARNING, logger="nasfcos"):
        engine.train(longer, CPU, resume=True, skip_test=True)
    assert "SOLVER.MAX_ITER: 4 -> 6" in caplog.text
    assert "SOLVER.BASE_LR: 0.005 -> 0.001" in caplog.text
    assert metrics(longer)[-1]["iteration"] == 6
    assert metrics(longer)[-2]["lr"] == pytest.approx(0.001)


def test_resuming_another_model_is_refused(config):
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    with pytest.raises(CheckpointError, match="another model") as refused:
        engine.train(config("MODEL.NECK.CHANNELS", 96), CPU, resume=True)
    lines = str(refused.value).splitlines()
    assert "size mismatch" in lines[1] and lines[-1].endswith("more") and len(lines) < 20


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_backbone_may_be_frozen_and_set_free_midway(config, optimizer, caplog):
    for iterations, freeze_at in ((2, 0), (4, 2), (6, 0)):
        cfg = config(
            "SOLVER.OPTIMIZER", optimizer, "SOLVER.MAX_ITER", iterations,
            "MODEL.BACKBONE.FREEZE_AT", freeze_at,
        )  # fmt: skip
        engine.train(cfg, CPU, resume=True, skip_test=True)
        warned = "start without moments" in caplog.text
        assert warned == (iterations == 6)
    assert [line["iteration"] for line in metrics(cfg)][-1] == 6


def test_resuming_with_another_optimizer_is_refused(config):
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER adamw.*those of sgd.*MODEL.WEIGHT"):
        engine.train(config("SOLVER.OPTIMIZER", "adamw"), CPU, resume=True)


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "LOCK_TIMEOUT", 0.1)
    first = config("SOLVER.MAX_ITER", 2)
    engine.train(first, CPU, skip_test=True)
    with only_one(tmp_path / "out" / train_module.LOCK_FILE, "busy"):
        for resume in (False, True):
            with pytest.raises(ConfigError, match="another training is running in OUTPUT_DIR"):
                engine.train(first, CPU, resume=resume)
        assert (tmp_path / "out" / "model_final.pth").exists()
    engine.train(first, CPU, skip_test=True)


def test_a_config_that_somebody_keeps_in_the_output_folder_is_left_alone(config, config_file):
    cfg = config("SOLVER.MAX_ITER", 1)
    kept = Path(cfg.OUTPUT_DIR) / "config.yaml"
    kept.parent.mkdir()
    for text in (f"_BASE_: {config_file}\n", f"# my notes\n{cfg.dump()}", "# notes\n", "\tno YAML"):
        kept.write_text(text)
        for resume in (False, True):
            with pytest.raises(ConfigError, match="out/config.yaml was not written by a run"):
                engine.train(cfg, CPU, skip_test=True, resume=resume)
        assert kept.read_text() == text
    kept.write_text("")  # as left by a crash of the machine
    engine.train(cfg, CPU, skip_test=True)
    engine.train(load_config(kept), CPU, skip_test=True, resume=True)
    assert load_config(kept) == cfg


def test_a_fault_of_the_test_data_is_said_before_the_training(config, tmp_path):
    typo = config("DATASETS.TEST", ["vall"])
    with pytest.raises(ConfigError, match="no data set 'vall'.*'val'"):
        engine.train(typo, CPU)
    with pytest.raises(ConfigError, match="no data set 'vall'"):
        engine.train(config("DATASETS.TEST", ["vall"], "TEST.EVAL_PERIOD", 1), CPU, skip_test=True)
    assert not list((tmp_path / "out").glob("model_*"))
    engine.train(config("DATASETS.TEST", ["vall"], "SOLVER.MAX_ITER", 1), CPU, skip_test=True)


def test_a_new_run_in_a_used_folder_does_not_mix_with_the_old(config):
    cfg = config("SOLVER.MAX_ITER", 4)
    engine.train(cfg, CPU, skip_test=True)
    engine.train(config("SOLVER.MAX_ITER", 2), CPU, skip_test=True)
    output = Path(cfg.OUTPUT_DIR)
    assert load_checkpoint(output / "model_final.pth")["iteration"] == 2
    assert load_checkpoint(output / "earlier_1" / "model_final.pth")["iteration"] == 4
    assert not (output / "model_0000003.pth").exists()


def test_a_run_killed_before_its_first_checkpoint_keeps_its_figures(config, monkeypatch):
    cfg = config("SOLVER.LOG_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 8)
    output = Path(cfg.OUTPUT_DIR)
    folders = []
    for resume in (False, True, False):
        kill_in(monkeypatch, steps=3)
        with pytest.raises(Killed):
            engine.train(cfg, CPU, resume=resume)
        monkeypatch.undo()
        assert [line["iteration"] for line in metrics(cfg)] == [1, 2]
        folders.append((output / "metrics.jsonl").read_text())
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    asides = sorted(output.glob("earlier_*"))
    assert [(aside / "metrics.jsonl").read_text() for aside in asides] == folders

    kill_in(monkeypatch, steps=1)  # before its first metrics: it leaves nothing to move aside
    with pytest.raises(Killed):
        engine.train(cfg, CPU)
    monkeypatch.undo()
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    assert len(list(output.glob("earlier_*"))) == len(asides) + 1  # for the run before


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(config, tmp_path):
    cfg = config("SOLVER.MAX_ITER", 1)
    engine.train(cfg, CPU, skip_test=True)
    before = run_files(cfg)
    for overrides in (
        ("MODEL.WEIGHT", str(tmp_path / "nowhere.pth")),
        ("SOLVER.ACCUMULATE", 3),
        ("DATASETS.ROOT", str(tmp_path / "nowhere")),
    ):
        with pytest.raises((ConfigError, DataError, WeightsError)):
            engine.train(config(*overrides), CPU)
        assert run_files(cfg) == before


def run_files(cfg):
    """Modification times of a run's files."""
    files = [path for path in Path(cfg.OUTPUT_DIR).iterdir() if path.suffix != ".lock"]
    return {path.name: path.stat().st_mtime_ns for path in files}


def test_fine_tuning_in_the_folder_of_the_weights(config):
    cfg = config("SOLVER.MAX_ITER", 1)
    engine.train(cfg, CPU, skip_test=True)
    trained = final_weights(cfg)
    weight = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    tuned = config("MODEL.WEIGHT", weight, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0)
    engine.train(tuned, CPU, skip_test=True)
    conv = "head.cls_logits.weight"
    assert torch.equal(final_weights(tuned)[conv], trained[conv])
    assert (Path(cfg.OUTPUT_DIR) / "earlier_1" / "model_final.pth").exists()


@pytest.mark.parametrize("name", ["model_final.pth", "model_0000000.pth"])
@pytest.mark.parametrize("seed", [3, -1])
def test_a_killed_fine_tuning_in_the_folder_of_the_weights_goes_on(config, monkeypatch, name, seed):
    """Killed before its first checkpoint, after the file of MODEL.WEIGHT was moved aside."""
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    output = Path(config().OUTPUT_DIR)
    if name != "model_final.pth":
        (output / "model_final.pth").rename(output / name)
    weight = (output / name).read_bytes()
    overrides = ("MODEL.WEIGHT", str(output / name), "SOLVER.MAX_ITER", 4, "SEED", seed)

    kill_in(monkeypatch, steps=1)
    with pytest.raises(Killed):
        engine.train(config(*overrides), CPU)
    monkeypatch.undo()
    assert (output / "earlier_1" / name).read_bytes() == weight
    found = [path.name for path in output.glob("model_*")]
    assert found == ["model_0000000.pth"]
    engine.train(config(*overrides), CPU, resume=True, skip_test=True)

    seed = yaml.safe_load((output / "config.yaml").read_text())["SEED"]
    source = str(output / "earlier_1" / name)
    whole = config("MODEL.WEIGHT", source, "SOLVER.MAX_ITER", 4, "SEED", seed, output="whole")
    engine.train(whole, CPU, skip_test=True)
    assert not (Path(whole.OUTPUT_DIR) / "model_0000000.pth").exists()
    assert_same_weights(final_weights(config()), final_weights(whole))


def test_resuming_with_the_classes_in_another_order_is_refused(config):
    engine.train(config("SOLVER.MAX_ITER", 1), CPU, skip_test=True)
    swapped = config("DATASETS.CUSTOM.train.CLASSES", ["red", "white"])
    with pytest.raises(CheckpointError, match="label 1 is 'white' there.*'red' in the data"):
        engine.train(swapped, CPU, resume=True)


def test_resuming_with_another_batch_size_goes_on_with_the_next_image(config, monkeypatch):
    starts = []

    def build(*args, **kwargs):
        starts.append(kwargs["start_iteration"])
        return build_train_loader(*args, **kwargs)

    monkeypatch.setattr(train_module, "build_train_loader", build)
    engine.train(config("SOLVER.MAX_ITER", 3), CPU, skip_test=True)  # 12 images
    smaller = config("SOLVER.MAX_ITER", 5, "SOLVER.IMS_PER_BATCH", 2)
    engine.train(smaller, CPU, resume=True, skip_test=True)  # and 4
    assert starts == [0, 6]
    state = load_checkpoint(Path(smaller.OUTPUT_DIR) / "model_final.pth")
    assert state["iteration"] == 5 and state["sampler"] == {"images": 16}
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH 3.*after 16 images"):
        engine.train(config("SOLVER.IMS_PER_BATCH", 3), CPU, resume=True)


def test_the_class_names_are_those_of_the_start(config, data_root, tmp_path, monkeypatch):
    """Editing or deleting annotations while the job runs does not change its checkpoints."""
    root = tmp_path / "data"
    shutil.copytree(data_root, root)

    def update_without_annotations(*args):
        (root / "train" / "annotations.json").unlink(missing_ok=True)
        update(*args)

    monkeypatch.setattr(trainer_module, "update", update_without_annotations)
    cfg = config("DATASETS.ROOT", str(root), "SOLVER.MAX_ITER", 1)
    engine.train(cfg, CPU, skip_test=True)
    state = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    assert state["classes"] == ["white", "red"]


def test_fine_tuning_starts_at_zero_with_a_fresh_optimizer(config):
    first = config(output="first")
    engine.train(first, CPU, skip_test=True)
    weight = str(Path(first.OUTPUT_DIR) / "model_final.pth")
    second = config(
        "MODEL.WEIGHT", weight, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0, output="second"
    )
    engine.train(second, CPU, skip_test=True)
    state = load_checkpoint(Path(second.OUTPUT_DIR) / "model_final.pth")
    assert state["iteration"] == 1
    assert [line["iteration"] for line in metrics(second)] == [1]
    trained, tuned = final_weights(first), state["model"]
    assert all(torch.equal(trained[k], tuned[k]) for k in trained if k.endswith("weight"))
    # The moments are those of one step: the gradients alone.
    model = build_detector(second).to(memory_format=torch.channels_last)
    model.load_state_dict(trained)
    images, targets = next(iter(build_train_loader(second)))
    forward_backward(model.train(), images, targets, NO_SCALING)
    named = [p for n, p in model.named_parameters() if p.requires_grad and "bias" not in n]
    momentum = state["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.allclose(momentum, named[0].grad + 1e-4 * named[0], atol=1e-6)


def test_the_same_seed_gives_the_same_run_and_minus_one_a_new_one(config):
    runs = {}
    for name, seed in {"a": 3, "b": 3, "c": -1, "d": -1}.items():
        cfg = config("SEED", seed, "SOLVER.MAX_ITER", 2, output=name)
        engine.train(cfg, CPU, skip_test=True)
        runs[name] = final_weights(cfg)
    assert_same_weights(runs["a"], runs["b"])
    first = "backbone.stem.conv1.weight"
    assert not torch.equal(runs["c"][first], runs["d"][first])
    # The random seed is recorded, and kept when the run is resumed.
    drawn = yaml.safe_load((Path(cfg.OUTPUT_DIR) / "config.yaml").read_text())["SEED"]
    longer = config("SEED", -1, "SOLVER.MAX_ITER", 4, output="d")
    engine.train(longer, CPU, resume=True, skip_test=True)
    assert yaml.safe_load((Path(cfg.OUTPUT_DIR) / "config.yaml").read_text())["SEED"] == drawn
    whole = config("SEED", drawn, "SOLVER.MAX_ITER", 4, output="e")
    engine.train(whole, CPU, skip_test=True)
    assert_same_weights(final_weights(whole), final_weights(longer))


def test_divergence_stops_before_anything_is_poisoned(config):
    cfg = config("SOLVER.BASE_LR", 1e6, "SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(NonFiniteLossError) as error:
        engine.train(cfg, CPU)
    message = str(error.value)
    assert "not finite" in message and "iteration" in message
    kept = sorted(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
    for path in kept:
        weights = load_checkpoint(path)["model"].values()
        assert all(torch.isfinite(w).all() for w in weights)
    assert (str(kept[-1]) if kept else "no checkpoint yet") in message
    assert not (Path(cfg.OUTPUT_DIR) / "model_final.pth").exists()


def test_a_non_finite_loss_names_iteration_images_and_checkpoint():
    monitor = StepMonitor(Path("output/model_0000100.pth"))
    files = ["a.jpg", "b.jpg"]
    good = {"loss_cls": torch.tensor(1.0), "loss_box": torch.tensor(2.0)}
    means, stop = monitor.submit(107, good, files, stop=False)
    assert means == good and not stop
    assert monitor.submit(108, good, files, stop=True)[1]
    bad = good | {"loss_box": torch.tensor(math.inf)}
    pattern = r"iteration 109.*loss_box inf.*a\.jpg, b\.jpg.*model_0000100\.pth"
    with pytest.raises(NonFiniteLossError, match=pattern):
        monitor.submit(109, bad, files, stop=False)


def test_weights_that_are_not_finite_are_never_saved(config, tmp_path):
    cfg = config()
    model = build_detector(cfg)
    optimizer = engine.build_optimizer(cfg, model)
    scheduler = engine.build_lr_scheduler(cfg, optimizer)
    run = Run(model, optimizer, scheduler, NO_SCALING, ["white", "red"], iteration=4)
    with torch.no_grad():
        model.backbone.stem.conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="iteration 4"):
        save_run(cfg, run, tmp_path / "model_0000004.pth", StepMonitor())
    assert not (tmp_path / "model_0000004.pth").exists()


def test_bfloat16_trains_and_keeps_float32_weights(config):
    cfg = config("SOLVER.AMP", "bf16", "SOLVER.MAX_ITER", 2, "SOLVER.ACCUMULATE", 2)
    engine.train(cfg, CPU, skip_test=True)
    assert {w.dtype for w in final_weights(cfg).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("SOLVER.AMP", "fp16"), "SOLVER.AMP fp16 needs a GPU"),
        (("SOLVER.ACCUMULATE", 3), "SOLVER.IMS_PER_BATCH"),
        (("TEST.DTYPE", "float16"), "TEST.DTYPE float16 needs a GPU"),
    ],
)
def test_what_cannot_be_done_is_refused(config, overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        engine.train(config(*overrides), CPU)
    assert not list((tmp_path / "out").glob("model_*"))  # refused before the training, not after it


def test_what_no_test_needs_is_not_refused(config):
    cfg = config("TEST.DTYPE", "float16", "SOLVER.MAX_ITER", 1)
    engine.train(cfg, CPU, skip_test=True)
    with pytest.raises(ConfigError, match="TEST.DTYPE float16"):
        engine.train(config("TEST.DTYPE", "float16", "TEST.EVAL_PERIOD", 1), CPU, skip_test=True)


def test_a_misspelt_part_is_found_before_anything_is_read(config):
    cfg = config("MODEL.HEAD.NAME", "fcoss", "DATASETS.ROOT", "/nowhere")
    with pytest.raises(ConfigError, match=r"MODEL\.HEAD\.NAME is 'fcoss'.*Did you mean 'fcos'"):
        engine.train(cfg, CPU)
