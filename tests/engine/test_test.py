import pytest
import torch

from nasfcos.config import ConfigError, load_config
from nasfcos.engine import load_test_weights
from nasfcos.engine.checkpoint import FINAL, save_checkpoint
from nasfcos.engine.test import merge, to_original_size
from nasfcos.engine.train import build_model
from nasfcos.models.weights import WeightsError

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

    model = build_model(config(), CPU)
    probe = model.head.box_pred.bias

    def loaded(cfg, prefer_config=False):
        with torch.no_grad():
            probe.zero_()
        load_test_weights(cfg, model, prefer_config)
        return probe[0].item()

    with pytest.raises(ConfigError, match="nothing to test.*MODEL.WEIGHT"):
        load_test_weights(config(), model)

    files = {}
    for value, path in ((1.0, tmp_path / "given.pth"), (2.0, tmp_path / "out" / FINAL)):
        with torch.no_grad():
            probe.fill_(value)
        state = {"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "iteration": 1}
        save_checkpoint(state, path)
        files[value] = str(path)
    given = config("MODEL.WEIGHT", files[1.0])
    assert loaded(given, prefer_config=True) == 1.0  # named on the command line
    assert loaded(given) == 2.0  # named in the file, where training started from
    (tmp_path / "out" / FINAL).unlink()
    assert loaded(given) == 1.0

    cut = model.state_dict()
    del cut["head.box_pred.bias"]
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="head.box_pred.bias"):
        load_test_weights(config("MODEL.WEIGHT", str(tmp_path / "cut.pth")), model)
