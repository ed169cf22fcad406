"""The fine-tuned backbone: which runs it is taken from."""

import json
import math

import pytest
import torch

from nasfcos.config import load_config
from nasfcos.data.catalog import find_dataset
from nasfcos.search import select
from nasfcos.search.prepare import backbone_changes, is_run_of, prepare_backbone, prepare_config
from nasfcos.search.select import (
    SUMMARY,
    TEST,
    TRAIN,
    Selected,
    _annotations_hash,
    by_merit,
    outdated,
    read_ranking,
    train_in_full,
    write_ranking,
)
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


def test_what_a_full_training_found_out_may_be_damaged(config_file, tmp_path, caplog):
    cfg = load_config(config_file, ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", 2])
    found = train_in_full(cfg, CPU)
    caplog.set_level("INFO")
    (tmp_path / "run" / SUMMARY).write_text("")
    assert train_in_full(cfg, CPU) == found
    assert "training is finished already" in caplog.text


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


def test_a_full_training_is_for_the_annotations_that_it_had(config_file, tmp_path, monkeypatch):
    cfg = load_config(config_file, ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", 2])
    final = tmp_path / "run" / "model_final.pth"

    def files_of(key):
        return [find_dataset(cfg, name).annotations for name in cfg.DATASETS[key]]

    def change(key):
        for path in files_of(key):
            content = json.loads(path.read_text())
            content["annotations"] = content["annotations"][:-1]
            path.write_text(json.dumps(content))

    found = train_in_full(cfg, CPU)
    trained = final.stat().st_mtime_ns
    summary = tmp_path / "run" / SUMMARY
    tested = json.loads(summary.read_text())
    assert train_in_full(cfg, CPU) == found and found.keys() == {"AP", "AP50"}
    change("TEST")
    train_in_full(cfg, CPU)
    assert final.stat().st_mtime_ns == trained
    assert json.loads(summary.read_text())[TEST] != tested[TEST]
    assert not list((tmp_path / "run").glob("earlier_*"))
    change("TRAIN")
    with monkeypatch.context() as patch:  # what is cut off at its start is not forgotten
        patch.setattr(select, "train", lambda *args, **to: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_in_full(cfg, CPU)
    train_in_full(cfg, CPU)
    assert final.stat().st_mtime_ns != trained
    assert (tmp_path / "run" / "earlier_1" / "model_final.pth").stat().st_mtime_ns == trained
    # A summary of a time without hashes is taken as it is.
    summary.write_text('{"AP": 0.25, "AP50": 0.5}')
    assert train_in_full(cfg, CPU) == {"AP": 0.25, "AP50": 0.5}


def test_of_one_folder_for_two_sets_each_counts_its_own_annotations(config_file, tmp_path):
    for folder in ("images", "xml"):
        (tmp_path / folder).mkdir()
    xml = "<annotation><object><name>cat</name></object></annotation>"
    entries = {}
    for name in ("train", "val"):
        (tmp_path / "xml" / f"{name}.xml").write_text(xml)
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
        entries[f"voc_{name}"] = {"FORMAT": "voc", "IMAGES": str(tmp_path / "images"),
                                  "ANNOTATIONS": str(tmp_path / "xml"),
                                  "SPLIT": str(tmp_path / f"{name}.txt")}  # fmt: skip
    out = tmp_path / "run"
    cfg = load_config(config_file, ["DATASETS.CUSTOM", entries, "OUTPUT_DIR", str(out),
                                    "DATASETS.TRAIN", ["voc_train"],
                                    "DATASETS.TEST", ["voc_val"]])  # fmt: skip
    out.mkdir()
    hashes = {key: _annotations_hash(cfg, key) for key in (TRAIN, TEST)}
    (out / SUMMARY).write_text(json.dumps({"AP": 0.5, "AP50": 0.5, **hashes}))
    assert outdated(cfg) == []
    (tmp_path / "xml" / "._val.xml").write_bytes(b"of a Mac")
    assert outdated(cfg) == []
    (tmp_path / "xml" / "val.xml").write_text(xml.replace("cat", "cat "))
    assert outdated(cfg) == ["annotations of DATASETS.TEST"]


def test_a_ranking_comes_back_as_it_was_written(tmp_path):
    rows = [
        Selected("head", 1, [[[0, 1, 0, 0, 0]], [0]], -1.0, -1.1, 10, 1e6, AP=0.5, AP50=0.6),
        Selected("fpn", 2, [[[0, 1, 0, 0, 0]]], math.nan, math.nan, 10, math.nan),
    ]
    write_ranking(tmp_path / "ranking.json", rows)
    assert repr(read_ranking(tmp_path / "ranking.json")) == repr(rows)
    assert sorted(read_ranking(tmp_path / "ranking.json"), key=by_merit)[0].AP == 0.5
