"""The split into meta-train and meta-val."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml

from nasfcos.config import load_config
from nasfcos.data import DataError, build_dataset, build_train_loader, class_names
from nasfcos.search.split import (
    plan_split,
    split_training_data,
    stratified_split,
    without_paths,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def lacking(presence, in_second):
    """Classes of two or more images that one of the sides is without."""
    there = presence[in_second].any(0) & presence[~in_second].any(0)
    return int((~there & (presence.sum(0) > 1)).sum())


# ----------------------------------------------------------------------------------- the algorithm
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.8])
def test_classes_are_shared_out_in_proportion(fraction):
    frequency = np.array([0.9, 0.5, 0.2, 0.05, 0.02])
    presence = rng().random((1000, 5)) < frequency
    in_second = stratified_split(presence, fraction, rng())
    assert abs(in_second.mean() - fraction) < 0.01
    shares = presence[in_second].sum(0) / presence.sum(0)
    assert abs(shares - fraction).max() < 0.03


def test_every_class_is_on_both_sides_where_that_is_possible():
    """Small hard cases against the best of all splits."""
    solvable = 0
    for seed in range(150):
        presence = rng(seed).random((8, 9)) < 0.28
        pinned = presence[:, presence.sum(0) == 1].any(1)
        splits = [np.array(s) for s in itertools.product([False, True], repeat=8)]
        best = min(lacking(presence, s) for s in splits if not (s & pinned).any())
        found = stratified_split(presence, 0.3, rng(seed))
        assert not (found & pinned).any()
        assert lacking(presence, found) == best
        solvable += best == 0
    assert solvable > 50


def test_hard_cases_need_moves_that_lead_uphill():
    """Each class in three images only, and more classes than images."""
    for seed in range(8):
        presence = np.zeros((60, 100), bool)
        for k in range(100):
            presence[rng([seed, k]).choice(60, 3, replace=False), k] = True
        assert lacking(presence, stratified_split(presence, 0.3, rng(seed))) == 0


def test_one_image_of_a_large_set_is_enough_for_a_tiny_fraction():
    presence = np.ones((50, 1), bool)
    assert stratified_split(presence, 0.001, rng()).sum() == 1


@pytest.mark.parametrize("fraction", [0, 1, float("nan")])
def test_fractions_that_are_none(fraction):
    with pytest.raises(ValueError, match="within 0..1"):
        stratified_split(np.ones((4, 1), bool), fraction, rng())


# ------------------------------------------------------------------------------------ with the data
def content(cfg, name):
    with open(cfg.DATASETS.CUSTOM[name].ANNOTATIONS) as file:
        return json.load(file)


def assert_same_record(one, other):
    for field in ("file_name", "image_id", "height", "width"):
        assert getattr(one, field) == getattr(other, field)
    for field in ("boxes", "labels", "ignored"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_the_ordinary_readers_see_the_same_images(config_file, tmp_path):
    cfg = load_config(config_file, ["DATASETS.TRAIN", ["train", "val"]])
    split = split_training_data(cfg, tmp_path / "split", seed=0)
    assert split.DATASETS.TRAIN == ("train_train", "val_train")
    assert split.DATASETS.TEST == ("train_val", "val_val")
    assert split.is_frozen() and cfg.DATASETS.TRAIN == ("train", "val")
    assert class_names(split) == class_names(cfg) == ["white", "red"]
    counts = {}
    for name in ("train", "val"):
        before = {r.image_id: r for r in build_dataset(cfg, name).records}
        parts = [build_dataset(split, f"{name}_{part}") for part in ("train", "val")]
        counts[name] = [len(part) for part in parts]
        after = [r for part in parts for r in part.records]
        assert len(after) == len(before)
        for record in after:
            assert_same_record(record, before[record.image_id])
        image, target = parts[1][0]
        assert target["original_size"] == (image.height, image.width)
    assert sum(c[1] for c in counts.values()) == pytest.approx(0.3 * 27, abs=1)
    images, _ = next(iter(build_train_loader(split)))
    assert len(images) == split.SOLVER.IMS_PER_BATCH


def test_a_written_config_is_read_back(config_file, tmp_path):
    split = split_training_data(load_config(config_file), tmp_path, seed=0)
    path = tmp_path / "split.yaml"
    path.write_text(split.dump())
    again = load_config(path)
    assert again.DATASETS == split.DATASETS
    assert len(build_dataset(again, "train_val")) == len(build_dataset(split, "train_val"))


def test_same_seed_same_files_left_alone(config_file, tmp_path, caplog):
    cfg = load_config(config_file)

    def files(folder, seed):
        split = split_training_data(cfg, tmp_path / folder, seed)
        names = split.DATASETS.TRAIN + split.DATASETS.TEST
        return [Path(split.DATASETS.CUSTOM[name].ANNOTATIONS) for name in names]

    paths = files("a", seed=4)
    assert [path.name for path in paths] == ["train_train.json", "train_val.json"]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths]
    assert files("a", seed=4) == paths
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths] == before

    paths[0].write_text("{")
    with caplog.at_level(logging.WARNING):
        files("a", seed=4)
    assert "train_train.json is damaged" in caplog.text
    assert [p.read_bytes() for p in files("b", seed=4)] == [content for _, content in before]

    # Another split has a folder of its own.
    assert {path.parent for path in files("a", seed=5)} != {path.parent for path in paths}
    assert paths[1].read_bytes() == before[1][1]


# Images by the categories of their boxes; an id below zero is a crowd.
def write_coco(folder, images, names=("a", "b", "c")):
    annotations = [
        {
            "id": 100 * i + k,
            "image_id": i,
            "category_id": 10 * abs(category),
            "bbox": [2.5 + k, 3, 10.25, 20],
            "area": 205,
            "iscrowd": int(category < 0),
        }
        for i, categories in enumerate(images, 1)
        for k, category in enumerate(categories)
    ]
    tree = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 60, "width": 80}
            for i in range(1, len(images) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(names, 1)],
    }
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "own.json").write_text(json.dumps(tree))


def own_config(folder, *overrides, **entry):
    entry = {"FORMAT": "coco", "IMAGES": "images", "ANNOTATIONS": "own.json", **entry}
    own = {"TRAIN": ["own"], "ROOT": str(folder), "CUSTOM": {"own": entry}}
    (folder / "own.yaml").write_text(yaml.safe_dump({"DATASETS": own}))
    return load_config(folder / "own.yaml", overrides)


def ids(cfg, name):
    return {image["id"] for image in content(cfg, name)["images"]}


def test_labels_follow_the_training_classes_and_crowds_stay(tmp_path):
    write_coco(tmp_path, [[1, -3], [1, 3], [3], [1, 2, -1], [2]])
    cfg = own_config(tmp_path, CLASSES=["c", "a"])
    split = split_training_data(cfg, tmp_path / "split", seed=0)
    assert content(split, "own_val")["categories"] == [
        {"id": 1, "name": "c"},
        {"id": 2, "name": "a"},
    ]
    before = {r.image_id: r for r in build_dataset(cfg, "own").records}
    seen = 0
    for name in ("own_train", "own_val"):
        for record in build_dataset(split, name).records:
            assert_same_record(record, before[record.image_id])
            seen += record.ignored.sum()
    assert seen == 2
    # The only class of image 5 is not among CLASSES.
    assert ids(split, "own_train") | ids(split, "own_val") == {1, 2, 3, 4}


@pytest.mark.parametrize("skip", [True, False])
def test_images_without_boxes(tmp_path, skip):
    """An image with a crowd only has no box to train on."""
    write_coco(tmp_path, [[1], [1], [1], [1], [], [], [-1], [-1]])
    cfg = own_config(tmp_path, "DATALOADER.SKIP_EMPTY", skip, "SEARCH.META_VAL", 0.5)
    split = split_training_data(cfg, tmp_path / "split", seed=1)
    train, val = ids(split, "own_train"), ids(split, "own_val")
    assert not train & val
    assert train | val == (set(range(1, 5)) if skip else set(range(1, 9)))
    assert len(train) == len(val)
    assert len(val & {1, 2, 3, 4}) == 2


def test_the_only_image_of_a_class_trains(tmp_path, caplog):
    write_coco(tmp_path, [[1], [1, 2], [1], [1]])
    cfg = own_config(tmp_path, "SEARCH.META_VAL", 0.7)
    for seed in range(4):
        split = split_training_data(cfg, tmp_path / str(seed), seed)
        assert 2 in ids(split, "own_train")
    assert "class b has boxes in one image only" in caplog.text
    assert "no boxes of these classes in own: c" in caplog.text


def test_an_impossible_split_is_told(tmp_path, caplog):
    """Of three images, each two share a class: one class has to be on one side."""
    write_coco(tmp_path, [[1, 2], [2, 3], [1, 3]])
    split = split_training_data(own_config(tmp_path), tmp_path / "split", seed=0)
    assert len(ids(split, "own_train")) + len(ids(split, "own_val")) == 3
    assert caplog.text.count("no split that has it there was found") == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[1], []], "at least two images"),
        ([[], [-1]], "no image of own has a box"),
        ([[1], [2]], "each has the only boxes of some class"),
    ],
)
def test_too_little_data(tmp_path, images, message):
    write_coco(tmp_path, images)
    with pytest.raises(DataError, match=message):
        split_training_data(own_config(tmp_path), tmp_path / "split", seed=0)
    assert not list(tmp_path.glob("split/*"))


def test_data_without_annotations(tmp_path):
    write_coco(tmp_path, [[1], [1]])
    tree = json.loads((tmp_path / "own.json").read_text())
    del tree["annotations"]
    (tmp_path / "own.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="own cannot be split: it has no annotations"):
        split_training_data(own_config(tmp_path), tmp_path / "split", seed=0)


def test_a_plan_writes_nothing(config_file, tmp_path):
    cfg = load_config(config_file)
    split = plan_split(cfg, tmp_path / "split", seed=4)
    assert not (tmp_path / "split").exists()
    split.write()
    assert split.cfg == split_training_data(cfg, tmp_path / "split", seed=4)
    assert {path.parent.name for path in split.files} == {split.name}
    assert all(path.read_text() == content for path, content in split.files.items())


def test_a_split_is_known_wherever_it_lies(config_file, tmp_path, data_root):
    cfg = load_config(config_file)

    def data(cfg):
        return without_paths(yaml.safe_load(cfg.dump())["DATASETS"])

    first = data(split_training_data(cfg, tmp_path / "a", seed=4))
    assert data(split_training_data(cfg, tmp_path / "b", seed=4)) == first
    (tmp_path / "data").symlink_to(data_root)
    moved = load_config(config_file, ["DATASETS.ROOT", str(tmp_path / "data")])
    assert data(split_training_data(moved, tmp_path / "c", seed=4)) == first
    assert data(split_training_data(cfg, tmp_path / "a", seed=5)) != first
    other = load_config(config_file, ["DATASETS.TRAIN", ["val"]])
    assert data(split_training_data(other, tmp_path / "a", seed=4)) != first
    assert data(moved) != data(cfg)  # only what a split names is known by its content
