"""The fine-tuned backbone: which runs it is taken from."""

import pytest
import torch

from nasfcos.config import load_config
from nasfcos.search.prepare import backbone_changes, is_run_of, prepare_backbone, prepare_config
from nasfcos.search.split import split_training_data

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(config_file, tmp_path):
    """The split config, with overrides, of a search in a folder below `tmp_path`."""

    def make(folder, *overrides):
        cfg = load_config(config_file, ["SEARCH.PREPARE.OVERRIDES", ["SOLVER.MAX_ITER", 2],
                                        "SOLVER.CHECKPOINT_PERIOD", 1, *overrides])  # fmt: skip
        return split_training_data(cfg, tmp_path / folder / "split", seed=0)

    return make


def weights(detector):
    return torch.cat([x.detach().float().flatten() for x in detector.backbone.parameters()])


def test_a_backbone_is_taken_from_where_the_search_was_moved(make, tmp_path, caplog):
    caplog.set_level("INFO")
    first = weights(prepare_backbone(make("one"), CPU, tmp_path / "one/backbone"))
    assert "iteration 2/2" in caplog.text
    caplog.clear()
    (tmp_path / "one").rename(tmp_path / "two")
    neutral = ("MODEL.DEVICE", "auto", "DATALOADER.NUM_WORKERS", 1, "TEST.NMS_IOU", 0.4,
               "SOLVER.LOG_PERIOD", 5, "SEARCH.TRIALS.FPN", 5)  # fmt: skip
    cfg = make("two", *neutral)
    again = weights(prepare_backbone(cfg, CPU, tmp_path / "two/backbone"))
    assert "iteration" not in caplog.text and torch.equal(first, again)

    plain = prepare_config(make("two", "SOLVER.BASE_LR", 0.25), tmp_path / "two/backbone")
    assert backbone_changes(plain, tmp_path / "two/backbone") == ["SOLVER.BASE_LR: 0.005 -> 0.25"]
    other = prepare_config(make("two", "SEARCH.META_VAL", 0.5), tmp_path / "two/backbone")
    assert "DATASETS.SPLIT" in "".join(backbone_changes(other, tmp_path / "two/backbone"))
    assert backbone_changes(plain, tmp_path / "nowhere") == []
    # In a comparison it matters how a detector is tested.
    tested = prepare_config(cfg, tmp_path / "two/backbone")
    assert not is_run_of(tested, tmp_path / "two/backbone")
    assert "TEST.NMS_IOU" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_run_is_known_without_its_config_file(make, tmp_path, damage):
    folder = tmp_path / "one/backbone"
    prepare_backbone(make("one"), CPU, folder)
    file = folder / "config.yaml"
    if damage == "missing":  # killed while the run was set aside
        file.unlink()
    else:
        text = file.read_text()
        file.write_text("" if damage == "empty" else text[: len(text) // 2])
    assert backbone_changes(prepare_config(make("one"), folder), folder) == []
    # One of a time when a key was not there yet.
    text = prepare_config(make("one"), folder).dump()
    file.write_text("".join(ln for ln in text.splitlines(keepends=True) if "BETA2" not in ln))
    assert backbone_changes(prepare_config(make("one"), folder), folder) == []
    later = prepare_config(make("one", "SOLVER.BETA2", 0.9), folder)
    assert backbone_changes(later, folder) == ["SOLVER.BETA2: 0.999 -> 0.9"]
    changed = prepare_config(make("one", "SOLVER.BASE_LR", 0.25), folder)
    assert backbone_changes(changed, folder) == ["SOLVER.BASE_LR: 0.005 -> 0.25"]


def test_a_damaged_backbone_is_trained_to_its_end_again(make, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "one/backbone"
    first = weights(prepare_backbone(make("one"), CPU, folder))
    final = folder / "model_final.pth"
    final.write_bytes(final.read_bytes()[:-100])
    caplog.clear()
    again = weights(prepare_backbone(make("one"), CPU, folder))
    assert f"{final} cannot be read" in caplog.text and "goes on from what is left" in caplog.text
    assert "training from iteration 1 to 2" in caplog.text
    torch.testing.assert_close(first, again)
