"""`evaluate` on data sets read from files."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nasfcos.data import DatasetSpec
from nasfcos.data.dataset import load_dataset
from nasfcos.evaluation import EvaluationError, evaluate, format_metrics
from nasfcos.evaluation.coco import METRICS

EMPTY = {
    "boxes": torch.zeros(0, 4),
    "scores": torch.zeros(0),
    "labels": torch.zeros(0, dtype=torch.int64),
}


def detection(*rows):
    """Rows (x0, y0, x1, y1, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


@pytest.fixture
def coco_set(tmp_path):
    """Two images, no `info`, `segmentation`, `iscrowd` or `area`; category ids with a gap."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 80)).save(tmp_path / "images" / name)
    content = {
        "images": [
            {"id": 10, "file_name": "a.png", "height": 80, "width": 100},
            {"id": 4, "file_name": "b.png", "height": 80, "width": 100},
        ],
        "categories": [
            {"id": 3, "name": "cat"},
            {"id": 17, "name": "dog"},
            {"id": 9, "name": "ox"},
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 30]},
            {"id": 2, "image_id": 4, "category_id": 17, "bbox": [0, 0, 50, 40]},
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return DatasetSpec("pets", "coco", tmp_path / "images", path)


@pytest.fixture
def voc_set(tmp_path):
    for folder in ("images", "xml"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "a.png")
    objects = [("cat", 0, (11, 11, 30, 40)), ("cat", 1, (51, 11, 70, 40)), ("dog", 0, (1, 1, 9, 9))]
    (tmp_path / "xml" / "a.xml").write_text(
        "<annotation><filename>a.png</filename>"
        "<size><width>100</width><height>80</height></size>"
        + "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            "</bndbox></object>"
            for name, difficult, (x0, y0, x1, y1) in objects
        )
        + "</annotation>"
    )
    return DatasetSpec(
        "voc pets", "voc", tmp_path / "images", tmp_path / "xml", classes=("cat", "dog", "ox")
    )


PERFECT = {10: detection((10, 10, 29, 39, 0.9, 1)), 4: detection((0, 0, 49, 39, 0.75, 3))}


def test_boxes_and_labels_go_back_to_coco_and_all_is_found(coco_set, tmp_path):
    out = tmp_path / "out" / "inference"
    metrics = evaluate(load_dataset(coco_set), PERFECT, out)
    assert json.loads((out / "bbox.json").read_text()) == [
        {"image_id": 4, "category_id": 17, "bbox": [0, 0, 50, 40], "score": 0.75},
        {"image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 30], "score": pytest.approx(0.9)},
    ]
    assert metrics["AP"] == metrics["AR1"] == 1
    assert math.isnan(metrics["APl"])  # no large object
    # Label 2 is the category with the second smallest id, of which there is no object.
    assert {name: figures["AP"] for name, figures in metrics["per_class"].items()} == {
        "cat": 1, "ox": pytest.approx(math.nan, nan_ok=True), "dog": 1,
    }  # fmt: skip
    written = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["AP"] == 1 and written["APl"] is None
    assert written["per_class"]["ox"]["AP"] is None
    assert sorted(path.name for path in out.iterdir()) == ["bbox.json", "metrics.json"]


def test_nothing_is_written_without_a_folder(coco_set, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    evaluate(load_dataset(coco_set), PERFECT)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_without_an_entry_count_and_are_reported(coco_set, caplog):
    dataset = load_dataset(coco_set)
    metrics = evaluate(dataset, {10: PERFECT[10]})
    assert "1 of 2 images" in caplog.text
    assert metrics["AP"] == 0.5
    caplog.clear()
    assert evaluate(dataset, {10: PERFECT[10], 4: EMPTY})["AP"] == 0.5
    assert "images have no entry" not in caplog.text
    assert evaluate(dataset, {})["AP"] == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({99: EMPTY}, "image id 99.*another data set"),
        ({10: detection((0, 0, 9, 9, math.nan, 1))}, "image 10 of pets: a score is not finite"),
        ({10: detection((0, 0, math.inf, 9, 0.5, 1))}, "image 10 of pets: a box coordinate"),
        ({10: detection((0, 0, 9, 9, 0.5, 4))}, r"image 10 of pets: a label is not in 1\.\.3"),
        ({10: detection((0, 0, 9, 9, 0.5, 0))}, "image 10 of pets: a label"),
        ({10: {**EMPTY, "scores": torch.ones(2)}}, r"image 10 of pets: boxes \[0, 4\], scores \[2"),
    ],
)
def test_impossible_detections_are_refused_before_anything_is_written(
    coco_set, tmp_path, bad, message
):
    with pytest.raises(EvaluationError, match=message):
        evaluate(load_dataset(coco_set), {**PERFECT, **bad}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_without_objects_has_no_figures(coco_set, caplog, tmp_path):
    content = json.loads(coco_set.annotations.read_text())
    content["annotations"] = []
    coco_set.annotations.write_text(json.dumps(content))
    metrics = evaluate(load_dataset(coco_set), PERFECT, tmp_path / "out")
    assert all(math.isnan(metrics[name]) for name in METRICS)
    assert "no objects" in caplog.text
    assert "-1" not in format_metrics(metrics)


def test_without_annotations_only_the_submission_is_written(coco_set, tmp_path):
    content = json.loads(coco_set.annotations.read_text())
    del content["annotations"]
    for absent in (content, {**content, "annotations": None}):
        coco_set.annotations.write_text(json.dumps(absent))
        assert evaluate(load_dataset(coco_set), PERFECT, tmp_path / "out") == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bbox.json"]
    assert "no annotations" in format_metrics({})


def test_a_class_that_only_the_training_data_has_can_be_detected(coco_set):
    spec = replace(coco_set, classes=("bird", "cat", "ox", "dog"), adopted=True)
    found = {10: detection((10, 10, 29, 39, 0.9, 2), (0, 0, 9, 9, 0.8, 1)),
             4: detection((0, 0, 49, 39, 0.75, 4))}  # fmt: skip
    metrics = evaluate(load_dataset(spec), found)
    assert metrics["AP"] == 1 and math.isnan(metrics["per_class"]["bird"]["AP"])


def test_crowds_are_ignored_not_missed(coco_set):
    content = json.loads(coco_set.annotations.read_text())
    crowd = {"id": 3, "image_id": 4, "category_id": 17, "bbox": [60, 0, 40, 40], "iscrowd": 1}
    content["annotations"].append(crowd)
    coco_set.annotations.write_text(json.dumps(content))
    inside = detection((0, 0, 49, 39, 0.75, 3), (65, 5, 80, 30, 0.9, 3))
    assert evaluate(load_dataset(coco_set), {**PERFECT, 4: inside})["AP"] == 1


def test_voc_sets_have_both_kinds_of_figures(voc_set, tmp_path):
    dataset = load_dataset(voc_set)
    # VOC counts from 1: the box (11, 11, 30, 40) is (10, 10, 29, 39) here.
    found = detection((10, 10, 29, 39, 0.9, 1), (50, 10, 69, 39, 0.95, 1))
    metrics = evaluate(dataset, {1: found}, tmp_path / "out")
    assert metrics["per_class"]["cat"] == {
        name: pytest.approx(1.0) for name in ("AP", "AP50", "AP75", "AP50_voc2007", "AP50_voc")
    }
    assert metrics["per_class"]["dog"]["AP50_voc"] == metrics["per_class"]["dog"]["AP"] == 0
    assert math.isnan(metrics["per_class"]["ox"]["AP50_voc"])
    for name in ("AP", "AP50", "AP50_voc2007", "AP50_voc"):
        assert metrics[name] == pytest.approx(0.5)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP50_voc"] == 0.5
    assert evaluate(dataset, {})["AP50_voc"] == 0


def test_the_table_shows_every_figure_and_class(voc_set):
    metrics = evaluate(load_dataset(voc_set), {1: detection((10, 10, 29, 39, 0.9, 1))})
    table = format_metrics(metrics)
    for name in (*METRICS, "AP50_voc2007", "AP50_voc", "cat", "dog", "ox"):
        assert name in table.split()
    lines = table.splitlines()
    header = next(line for line in lines if line.startswith("class")).split()
    cat = next(line for line in lines if line.startswith("cat")).split()
    assert float(cat[header.index("AP50_voc")]) == 1
    ox = next(line for line in lines if line.startswith("ox")).split()
    assert ox[1:] == ["-"] * (len(header) - 1)
