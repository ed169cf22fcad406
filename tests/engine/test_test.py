import json

import pytest
import torch

from nasfcos import engine
from nasfcos.config import ConfigError, load_config
from nasfcos.data import DataError, build_dataset
from nasfcos.engine import load_test_model
from nasfcos.engine.checkpoint import CONTENT, FINAL, CheckpointError, save_checkpoint
from nasfcos.engine.test import merge, to_original_size
from nasfcos.engine.weights import newest_weights
from nasfcos.models import build_detector
from nasfcos.models.weights import WeightsError
from nasfcos.predictor import Predictor

CPU = torch.device("cpu")


def test_boxes_go_back_to_the_original_per_axis_and_stay_inside():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 99.0, 199.0]])
    scaled = to_original_size(boxes, size=(200, 100), original=(50, 300))
    assert scaled.tolist() == [[30.0, 5.0, 90.0, 10.0], [0.0, 0.0, 297.0, 49.0]]


def test_shares_become_one_and_an_image_tested_twice_is_an_error():
    one, other = {1: {"scores": "a"}}, {2: {"scores": "b"}}
    assert merge([one, other, {}]) == {1: {"scores": "a"}, 2: {"scores": "b"}}
    with pytest.raises(RuntimeError, match="3.*two processes"):
        merge([one | {3: {}}, {3: {}}])


def test_which_weights_are_tested(config_file, tmp_path):
    def config(*overrides):
        return load_config(config_file, ["OUTPUT_DIR", str(tmp_path / "out"), *overrides])

    model = build_detector(config())
    probe = model.head.box_pred.bias

    def in_a_file(weight):
        file = tmp_path / "with_weight.yaml"
        file.write_text(f"_BASE_: {config_file}\nMODEL: {{WEIGHT: '{weight}'}}\n")
        return load_config(file, ["OUTPUT_DIR", str(tmp_path / "out")])

    def loaded(cfg):
        tested, _ = load_test_model(cfg, CPU)
        return tested.head.box_pred.bias[0].item()

    with pytest.raises(ConfigError, match="no checkpoint.*MODEL.WEIGHT"):
        load_test_model(config(), CPU)

    files = {}
    for value, path in ((1.0, tmp_path / "given.pth"), (2.0, tmp_path / "out" / FINAL)):
        with torch.no_grad():
            probe.fill_(value)
        state = dict.fromkeys(CONTENT) | {"model": model.state_dict(), "iteration": 1}
        save_checkpoint(state, path)
        files[value] = str(path)
    assert loaded(config("MODEL.WEIGHT", files[1.0])) == 1.0  # named on the command line
    assert loaded(config("MODEL.WEIGHT", "")) == 2.0  # as of a training from random weights
    started_from = in_a_file(files[1.0])
    assert loaded(started_from) == 2.0
    backbone = "catalog://ImageNetPretrained/MSRA/R-50"
    assert loaded(in_a_file(backbone)) == 2.0
    with pytest.raises(ConfigError, match="R-50 is a backbone"):  # no fallback
        loaded(config("MODEL.WEIGHT", backbone))
    (tmp_path / "out" / FINAL).unlink()
    assert loaded(started_from) == 1.0

    cut = model.state_dict()
    del cut["head.box_pred.bias"]
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="head.box_pred.bias"):
        load_test_model(config("MODEL.WEIGHT", str(tmp_path / "cut.pth")), CPU)


@pytest.fixture
def trained(config_file, tmp_path):
    """The tiny job's config; its OUTPUT_DIR has a checkpoint for the classes "white" and "red"."""
    cfg = load_config(config_file, [])
    state = dict.fromkeys(CONTENT) | {"iteration": 1, "classes": ["white", "red"]}
    state["model"] = build_detector(cfg).state_dict()
    save_checkpoint(state, tmp_path / "out" / FINAL)
    return cfg


def test_weights_for_classes_in_another_order_are_refused(trained, config_file):
    load_test_model(trained, CPU)
    swapped = load_config(config_file, ["DATASETS.CUSTOM.train.CLASSES", ["red", "white"]])
    message = "model_final.pth.*label 1 is 'white' there.*'red' in the data"
    with pytest.raises(CheckpointError, match=message):
        load_test_model(swapped, CPU)
    fewer = load_config(config_file, ["DATASETS.CUSTOM.train.CLASSES", ["white"]])
    with pytest.raises(CheckpointError, match="label 2 is 'red' there.*no class in the data"):
        load_test_model(fewer, CPU)


def test_without_the_training_annotations_the_weights_say_which_classes(
    trained, config_file, data_root, tmp_path
):
    # By its own category ids, this test set would have "red" as label 1.
    (tmp_path / "data" / "val").mkdir(parents=True)
    content = json.loads((data_root / "val" / "annotations.json").read_text())
    content["categories"] = [{"id": 10, "name": "red"}, {"id": 20, "name": "white"}]
    (tmp_path / "data" / "val" / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "data" / "val" / "images").symlink_to(data_root / "val" / "images")
    cfg = load_config(config_file, ["DATASETS.ROOT", str(tmp_path / "data")])
    with pytest.raises(DataError, match="train"):
        build_detector(cfg)

    model, classes = load_test_model(cfg, CPU)
    assert classes == ["white", "red"] and model.head.cls_logits.out_channels == 2
    assert build_dataset(cfg, "val", classes).category_ids == (20, 10)
    results = engine.test(cfg, model, engine.test_sets(cfg, classes))
    assert list(results["val"]["per_class"]) == ["white", "red"]


def test_newest_weights_are_read_once_and_named_by_their_file(trained, tmp_path):
    path = tmp_path / "out" / FINAL
    weights = newest_weights(trained.OUTPUT_DIR)
    path.unlink()
    assert weights.name == str(path) and weights.classes == ["white", "red"]
    assert newest_weights(trained.OUTPUT_DIR) is None
    assert Predictor(trained, weights).class_names == ["white", "red"]
