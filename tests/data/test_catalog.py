"""Names of data sets, own entries, and the errors for faulty ones."""

import pytest

from nasfcos.config import ConfigError
from nasfcos.data import DataError, build_dataset, class_names, find_dataset, num_classes
from nasfcos.data.catalog import COCO_CLASSES

ENTRY = {"FORMAT": "coco", "IMAGES": "images", "ANNOTATIONS": "ann.json"}


def test_root_from_config_then_environment_then_default(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("NASFCOS_DATA", "/elsewhere")
    for root, expected in ((str(tmp_path), str(tmp_path)), ("", "/elsewhere")):
        with pytest.raises(DataError, match="DATASETS.ROOT") as error:
            find_dataset(make_config("DATASETS.ROOT", root), "coco_2017_val")
        assert f"{expected}/coco/val2017" in str(error.value)
    monkeypatch.delenv("NASFCOS_DATA")
    with pytest.raises(DataError, match="datasets/coco/val2017"):
        find_dataset(make_config("DATASETS.ROOT", ""), "coco_2017_val")


def test_built_in_layouts(make_config, tmp_path):
    voc = tmp_path / "voc" / "VOC2012"
    for folder in (voc / "JPEGImages", voc / "ImageSets" / "Main", tmp_path / "coco" / "test2017"):
        folder.mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    annotations = tmp_path / "coco" / "annotations" / "image_info_test-dev2017.json"
    annotations.parent.mkdir()
    annotations.write_text("{}")
    cfg = make_config()
    test_dev = find_dataset(cfg, "coco_2017_test_dev")
    assert test_dev.annotations == annotations
    assert not test_dev.has_annotations
    voc_test = find_dataset(cfg, "voc_2012_test")  # has no XML folder
    assert voc_test.split.name == "test.txt" and not voc_test.has_annotations


def test_classes_of_built_in_sets_need_no_files(make_config):
    assert num_classes(make_config("DATASETS.TRAIN", ("coco_2017_train",))) == 80
    names = class_names(make_config("DATASETS.TRAIN", ("voc_2007_trainval", "voc_2012_trainval")))
    assert len(names) == 20 and names[0] == "aeroplane"


def test_num_classes_of_the_config_comes_first(make_config):
    assert num_classes(make_config("MODEL.NUM_CLASSES", 7)) == 7


def test_classes_of_own_data_follow_from_the_annotations(make_config, write_coco):
    cfg = make_config("DATASETS.TRAIN", ("mine",), mine=write_coco([{}]))
    assert class_names(cfg) == ["dog", "cat"]  # ids 3 and 7
    assert num_classes(cfg) == 2


def test_class_names_notice_a_changed_file(make_config, write_coco, tmp_path):
    import os

    cfg = make_config("DATASETS.TRAIN", ("mine",), mine=write_coco([{}]))
    assert num_classes(cfg) == 2
    write_coco([{}], categories=((1, "a"), (2, "b"), (3, "c")))
    os.utime(tmp_path / "ann.json", (1, 1))
    assert class_names(cfg) == ["a", "b", "c"]


def test_classes_given_are_not_read_from_files(make_config):
    cfg = make_config("DATASETS.TRAIN", ("mine",), mine={**ENTRY, "CLASSES": ["x", "y", "z"]})
    assert class_names(cfg) == ["x", "y", "z"]


def test_training_sets_must_agree_on_classes(make_config):
    cfg = make_config(
        *("DATASETS.TRAIN", ("a", "b")),
        a={**ENTRY, "CLASSES": ["x", "y"]},
        b={**ENTRY, "CLASSES": ["y", "x"]},
    )
    with pytest.raises(ConfigError, match=r"DATASETS\.CUSTOM\.b\.CLASSES"):
        class_names(cfg)


def test_unknown_name_gets_the_nearest_and_a_recipe(make_config):
    with pytest.raises(ConfigError) as error:
        find_dataset(make_config(), "coco_2017_trian")
    assert "'coco_2017_train'" in str(error.value)
    assert "DATASETS.CUSTOM.coco_2017_trian" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FORMAT": "cocoo"}, r"DATASETS\.CUSTOM\.mine\.FORMAT.*Did you mean 'coco'"),
        ({"FORMAT": ["coco"]}, r"DATASETS\.CUSTOM\.mine\.FORMAT is \['coco'\], but must be 'coco'"),
        ({"FORMAT": None}, r"DATASETS\.CUSTOM\.mine\.FORMAT is missing"),
        ({"IMAGES": None}, r"DATASETS\.CUSTOM\.mine\.IMAGES is missing"),
        ({"IMAGES": 3}, r"DATASETS\.CUSTOM\.mine\.IMAGES must be text, not 3"),
        ({"ANOTATIONS": "x"}, r"DATASETS\.CUSTOM\.mine\.ANOTATIONS.*'ANNOTATIONS'"),
        ({"SPLIT": "x.txt"}, r"DATASETS\.CUSTOM\.mine\.SPLIT is unknown for FORMAT coco"),
        ({"CLASSES": "cat, dog"}, r"DATASETS\.CUSTOM\.mine\.CLASSES must be a list"),
        ({"CLASSES": ["a", 2]}, r"DATASETS\.CUSTOM\.mine\.CLASSES must be a list"),
        ({"CLASSES": ["a", "a"]}, r"DATASETS\.CUSTOM\.mine\.CLASSES names a class twice"),
    ],
)
def test_faulty_entries_name_their_key(make_config, change, message):
    entry = {key: value for key, value in {**ENTRY, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        find_dataset(make_config(mine=entry), "mine")


def test_entry_that_is_no_section(make_config):
    with pytest.raises(ConfigError, match=r"DATASETS\.CUSTOM\.mine must be a section"):
        find_dataset(make_config(mine="images/"), "mine")


@pytest.mark.parametrize(("key", "what"), [("IMAGES", "folder"), ("ANNOTATIONS", "file")])
def test_missing_files_name_path_and_key(make_config, write_coco, key, what, tmp_path):
    entry = {**write_coco([{}]), key: "gone"}
    with pytest.raises(DataError) as error:
        find_dataset(make_config(mine=entry), "mine")
    text = str(error.value)
    assert str(tmp_path / "gone") in text and f"DATASETS.CUSTOM.mine.{key}" in text and what in text


def test_annotation_path_that_is_a_folder(make_config, write_coco):
    entry = {**write_coco([{}]), "ANNOTATIONS": "images"}
    with pytest.raises(DataError, match="is not a file"):
        find_dataset(make_config(mine=entry), "mine")


def test_test_set_takes_the_training_order_of_classes(make_config, write_voc, tmp_path):
    entry = write_voc({"a": [("cell", (1, 1, 20, 20), 0)], "b": [("acid", (1, 1, 9, 9), 0)]})
    (tmp_path / "only_a.txt").write_text("a")
    cfg = make_config(
        *("DATASETS.TRAIN", ("train",)), train=entry, test={**entry, "SPLIT": "only_a.txt"}
    )
    test = build_dataset(cfg, "test")
    assert test.classes == ("acid", "cell")
    assert test.records[0].labels.tolist() == [2]


def test_test_set_with_other_classes_is_refused(make_config, write_coco):
    train = {**ENTRY, "CLASSES": ["dog"]}
    cfg = make_config("DATASETS.TRAIN", ("train",), train=train, test=write_coco([{}]))
    with pytest.raises(ConfigError, match=r"'cat'.*DATASETS\.CUSTOM\.test\.CLASSES"):
        build_dataset(cfg, "test")
    given = {**write_coco([{}]), "CLASSES": ["cat", "dog"]}
    cfg = make_config("DATASETS.TRAIN", ("train",), train=train, test=given)
    with pytest.raises(ConfigError, match="labels must mean the same"):
        build_dataset(cfg, "test")


def test_test_set_may_lack_classes_of_the_training_data(make_config, write_coco, tmp_path):
    entry = write_coco([{}])
    (tmp_path / "ann.json").rename(tmp_path / "train.json")
    train = {**entry, "ANNOTATIONS": "train.json"}
    test = write_coco([{"image_id": 1}], categories=((3, "cat"),))
    cfg = make_config("DATASETS.TRAIN", ("train",), train=train, test=test)
    for classes in (None, ["dog", "cat"]):
        found = build_dataset(cfg, "test", classes)
        assert found.classes == ("dog", "cat") and found.category_ids == (1, 3)
        assert found.records[0].labels.tolist() == [2]
    own = {**test, "CLASSES": ["dog", "cat"]}  # asked for by name, so it must be there
    cfg = make_config("DATASETS.TRAIN", ("own",), own=own)
    with pytest.raises(DataError, match="has no category called 'dog'.*CLASSES"):
        build_dataset(cfg, "own")
    message = "has classes that the training data does not have: 'cat'"
    with pytest.raises(ConfigError, match=message):
        other = write_coco([{}], categories=((3, "cat"),))
        cfg = make_config("DATASETS.TRAIN", ("a",), a={**train, "CLASSES": ["dog"]}, test=other)
        build_dataset(cfg, "test")


def test_test_set_alone_keeps_its_own_classes(make_config, write_coco):
    cfg = make_config("DATASETS.TRAIN", ("train",), train=ENTRY | {"ANNOTATIONS": "gone.json"},
                      test=write_coco([{}]))  # fmt: skip
    assert build_dataset(cfg, "test").classes == ("dog", "cat")


def test_real_coco(make_config, real_data):
    cfg = make_config("DATASETS.ROOT", str(real_data))
    train = build_dataset(cfg, "coco_2017_train")
    assert len(train) == 64 and train.classes == COCO_CLASSES
    assert train.category_ids[-1] == 90 and len(train.category_ids) == 80
    assert sum(len(record.boxes) for record in train.records) == 542
    record = train.records[0]
    assert record.image_id == 9
    assert record.boxes[0].tolist() == pytest.approx([1.08, 187.69, 611.67, 472.53], abs=1e-3)
    assert train.classes[record.labels[0] - 1] == "bowl"
