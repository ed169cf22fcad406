"""The generated demo set."""

import json

import numpy as np
import pytest

from nasfcos.data import build_dataset
from nasfcos.data.demo import CLASSES, DemoSettings, draw_scene, make_demo_data
from nasfcos.data.demo.grounds import draw_ground

SMALL = DemoSettings(train=12, val=4, long_side=160, short_side=128, seed=5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "set"
    assert make_demo_data(folder, SMALL)
    return folder


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_seed_same_bytes(demo, tmp_path):
    make_demo_data(tmp_path / "again", SMALL)
    assert files(tmp_path / "again") == files(demo)
    other = DemoSettings(train=12, val=4, long_side=160, short_side=128, seed=6)
    make_demo_data(tmp_path / "other", other)
    assert files(tmp_path / "other")["train/000001.jpg"] != files(demo)["train/000001.jpg"]


def test_is_skipped_when_there_and_replaced_when_different(demo, tmp_path):
    folder = tmp_path / "set"
    small = DemoSettings(train=2, val=1, long_side=128, short_side=128)
    assert make_demo_data(folder, small)
    assert not make_demo_data(folder, small)
    assert make_demo_data(folder, DemoSettings(train=3, val=1, long_side=128, short_side=128))
    assert len(list((folder / "train").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # no scratch folder stays


def test_other_folders_are_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine"):
        make_demo_data(tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    from nasfcos.data.demo import writer

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(writer, "draw_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        make_demo_data(tmp_path / "set", SMALL)
    assert not list(tmp_path.iterdir())


def test_is_read_like_own_data(demo, make_config):
    entry = {
        "FORMAT": "coco",
        "IMAGES": str(demo / "train"),
        "ANNOTATIONS": str(demo / "annotations" / "train.json"),
    }
    data = build_dataset(make_config("DATASETS.TRAIN", ("demo",), demo=entry), "demo")
    content = json.loads((demo / "annotations" / "train.json").read_text())
    assert data.classes == CLASSES and len(data) == 12
    kept = sum(len(record.boxes) for record in data.records)
    assert kept == len(content["annotations"]) > 12
    assert data[0][0].size in ((160, 128), (128, 160))


def test_scenes_have_what_they_promise():
    scenes = [draw_scene(np.random.default_rng([1, i]), 256, 320) for i in range(60)]
    sides = [max(box[2:]) for _, objects in scenes for _, box, _ in objects]
    assert min(sides) < 24 and max(sides) > 120 and max(sides) <= 200
    assert {label for _, objects in scenes for label, _, _ in objects} == set(range(1, 7))
    assert any(not objects for _, objects in scenes)
    overlaps = 0
    for picture, objects in scenes:
        assert picture.dtype == np.uint8 and picture.std() > 5  # textured
        covered = np.zeros((256, 320), int)
        for _, (x, y, w, h), area in objects:
            assert x >= 0 and y >= 0 and x + w <= 320 and y + h <= 256
            assert min(w, h) >= 8 and 24 <= area <= w * h
            covered[y : y + h, x : x + w] += 1
        overlaps += covered.max(initial=0) > 1
    assert overlaps > 10


def test_boxes_begin_where_the_picture_differs_from_its_ground():
    """Checked at the first column and row of all objects (their shadows fall the other way)."""
    errors = []
    for i in range(40):
        ground = np.clip(draw_ground(np.random.default_rng([2, i]), 128, 160), 0, 1) * 255
        picture, objects = draw_scene(np.random.default_rng([2, i]), 128, 160)
        if objects:
            exposure = np.median(picture / np.maximum(ground, 1))
            changed = np.abs(picture - ground * exposure).max(2) > 30
            boxes = np.array([box for _, box, _ in objects])
            for axis in (0, 1):
                errors.append(abs(np.flatnonzero(changed.any(axis))[0] - boxes[:, axis].min()))
    assert len(errors) > 60
    assert np.median(errors) <= 1 and np.mean(np.array(errors) <= 3) > 0.9
