"""The results of full trainings: when they still hold, and how they are kept."""

import json
import math
import shutil

import pytest
import torch

from nasfcos.config import load_config
from nasfcos.data.catalog import find_dataset
from nasfcos.search import full_training
from nasfcos.search.full_training import (
    SUMMARY,
    TEST,
    TRAIN,
    _annotations_hash,
    outdated,
    train_in_full,
)
from nasfcos.search.ranking import Selected, by_merit, read_ranking, write_ranking

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_full_training_found_out_may_be_damaged(config_file, tmp_path, caplog):
    cfg = load_config(config_file, ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", 2])
    found = train_in_full(cfg, CPU)
    caplog.set_level("INFO")
    (tmp_path / "run" / SUMMARY).write_text("")
    assert train_in_full(cfg, CPU) == found
    assert "training is finished already" in caplog.text


def test_a_full_training_is_for_the_annotations_that_it_had(
    config_file, data_root, tmp_path, monkeypatch
):
    shutil.copytree(data_root, tmp_path / "data")
    cfg = load_config(
        config_file,
        ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", 2,
         "DATASETS.ROOT", str(tmp_path / "data")],
    )  # fmt: skip
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
    with monkeypatch.context() as patch:  # a training interrupted at its start is remembered
        patch.setattr(full_training, "train", lambda *args, **to: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_in_full(cfg, CPU)
    train_in_full(cfg, CPU)
    assert final.stat().st_mtime_ns != trained
    assert (tmp_path / "run" / "earlier_1" / "model_final.pth").stat().st_mtime_ns == trained
    # A summary without hashes is accepted.
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
