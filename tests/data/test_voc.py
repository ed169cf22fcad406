"""PASCAL VOC annotations as they are found in the wild."""

import pytest

from nasfcos.data import DataError, build_dataset, class_names
from nasfcos.data.remarks import Oddity
from nasfcos.data.voc import read_voc


def test_pixels_from_one_and_difficult_objects(make_config, write_voc):
    entry = write_voc(
        {"b": [("cat", (11, 6, 30, 15), 0), ("ant", (1, 1, 60, 40), 1)], "a": []},
    )
    cfg = make_config("DATASETS.TRAIN", ("mine",), mine=entry)
    assert class_names(cfg) == ["ant", "cat"]
    data = build_dataset(cfg, "mine")
    assert [record.file_name for record in data.records] == ["b.jpg", "a.jpg"]
    assert [record.image_id for record in data.records] == [1, 2]
    record = data.records[0]
    assert record.boxes.tolist() == [[10, 5, 29, 14], [0, 0, 59, 39]]
    assert record.labels.tolist() == [2, 1] and record.ignored.tolist() == [False, True]
    target = data[0][1]  # the difficult one is not trained on
    assert target["boxes"].tolist() == [[10, 5, 29, 14]] and target["labels"].tolist() == [2]


def test_difficult_in_words(write_voc, tmp_path):
    marks = ("1", "True", "yes", "0", "False", "no", "")
    write_voc({"a": [("cat", (1, 1, 9, 9), mark) for mark in marks]})
    found = read_voc(tmp_path / "xml", tmp_path / "images", None, ("cat",))
    assert found.records[0].ignored.tolist() == [True] * 3 + [False] * 4


def test_without_split_all_files_are_taken(make_config, write_voc):
    entry = write_voc({"b": [("cat", (1, 1, 9, 9), 0)], "a": []})
    del entry["SPLIT"]
    data = build_dataset(make_config("DATASETS.TRAIN", ("mine",), mine=entry), "mine")
    assert [record.file_name for record in data.records] == ["a.jpg", "b.jpg"]


def test_what_a_mac_leaves_beside_the_annotations_is_not_read(write_voc, tmp_path):
    write_voc({"a": [("cat", (1, 1, 9, 9), 0)]})
    (tmp_path / "xml" / "._a.xml").write_bytes(b"\x00\x05\x16\x07")
    found = read_voc(tmp_path / "xml", tmp_path / "images", None, ("cat",))
    assert [record.file_name for record in found.records] == ["a.jpg"]


def test_files_beside_the_images_are_not_taken_for_them(make_config, write_voc, tmp_path):
    entry = write_voc({"a": [("cat", (1, 1, 9, 9), 0)], "b": []}) | {"ANNOTATIONS": "images"}
    for path in (tmp_path / "xml").iterdir():
        path.rename(tmp_path / "images" / path.name)
    for name in ("a.txt", "b.json", "classes.txt"):
        (tmp_path / "images" / name).write_text("{}")
    (tmp_path / "images" / "b.jpg").rename(tmp_path / "images" / "b.JPG")
    data = build_dataset(make_config("DATASETS.TRAIN", ("mine",), mine=entry), "mine")
    assert [record.file_name for record in data.records] == ["a.jpg", "b.JPG"]
    assert data[0][0].size == data[1][0].size == (60, 40)


def test_of_two_images_of_one_name_the_annotated_one_is_taken(write_voc, write_image, tmp_path):
    args = (tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))
    for annotated, chosen, ambiguous in (
        ("a.png", "a.png", False), ("a.jpg", "a.jpg", False), ("old.jpg", "a.jpg", True)
    ):  # fmt: skip
        write_voc({"a": []}, tag=f"<filename>{annotated}</filename>")
        write_image("a.png")
        found = read_voc(*args)
        assert found.records[0].file_name == chosen
        assert ("several image files" in str(found.remarks)) == ambiguous


def test_a_missing_image_has_the_name_in_the_split(write_voc, tmp_path):
    args = (tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))
    write_voc({"a": []}, tag="<filename>x.jpg</filename>")
    (tmp_path / "images" / "a.jpg").unlink()
    assert read_voc(*args).records[0].file_name == "a.jpg"
    (tmp_path / "images" / "x.jpg").touch()
    assert read_voc(*args).records[0].file_name == "x.jpg"


def test_odd_boxes_are_counted(write_voc, tmp_path):
    boxes = [(0, 0, 80, 20), (30, 10, 20, 20), (70, 5, 80, 9), ("x", 1, 5, 5), ("2.5", 2, 9, 9)]
    write_voc({"a": [("cat", box, 0) for box in boxes] + [("dog", (1, 1, 5, 5), 0)]})
    found = read_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))
    assert found.records[0].boxes.tolist() == [[0, 0, 59, 19], [1.5, 1, 8, 8]]
    assert found.remarks.lines() == [
        "1 boxes clipped to their image",
        "3 boxes not finite, without area or outside of their image dropped",
        "1 boxes of other classes dropped ('dog': 1)",
    ]


def test_a_misspelt_class_is_pointed_out(write_voc, tmp_path):
    objects = [(name, (1, 1, 9, 9), 0) for name in ("WBC", "Platelets", "Platelets", "RBC", "")]
    write_voc({"a": objects})
    found = read_voc(tmp_path / "xml", tmp_path / "images", None, ("WBC", "Plaetlets"))
    assert found.remarks.lines() == [
        "4 boxes of other classes dropped ('Platelets': 2, 'RBC': 1, '': 1)",
        "1 classes without an object ('Plaetlets'. Did you mean 'Platelets'?)",
    ]


def test_name_spaces_and_other_xml(write_voc, tmp_path):
    write_voc({"a": [("cat", (1, 1, 9, 9), 0)]})
    file = tmp_path / "xml" / "a.xml"
    text = file.read_text()
    file.write_text(text.replace("<annotation>", "<annotation xmlns='http://x.org/voc'>"))
    args = (tmp_path / "xml", tmp_path / "images", None, ("cat",))
    assert read_voc(*args).records[0].labels.tolist() == [1]
    file.write_text(text.replace("annotation>", "project>"))
    with pytest.raises(DataError, match=r"a\.xml: not a VOC annotation.*<project>"):
        read_voc(*args)


def test_missing_or_zero_size_is_read_from_the_image(write_voc, tmp_path):
    for tag in ("", "<size><width>0</width><height>0</height></size>"):
        write_voc({"a": [("cat", (1, 1, 90, 90), 0)]}, tag=tag)
        found = read_voc(tmp_path / "xml", tmp_path / "images", None, ("cat",))
        assert (found.records[0].height, found.records[0].width) == (40, 60)
        assert found.records[0].boxes.tolist() == [[0, 0, 59, 39]]


def test_a_box_beyond_the_annotated_size_is_clipped_to_the_file(write_voc, tmp_path):
    swapped = "<size><width>40</width><height>60</height></size>"
    boxes = [(45, 5, 58, 30), (5, 5, 70, 50)]
    write_voc(
        {"a": [("cat", box, 0) for box in boxes], "b": [("cat", (1, 1, 9, 9), 0)]}, tag=swapped
    )
    args = (tmp_path / "xml", tmp_path / "images", None, ("cat",))
    found = read_voc(*args)
    sizes = [(record.height, record.width) for record in found.records]
    assert sizes == [(40, 60), (60, 40)]  # of b, nothing says that the file had to be opened
    assert found.records[0].boxes.tolist() == [[44, 4, 57, 29], [4, 4, 59, 39]]
    assert found.remarks.lines() == [
        "1 boxes clipped to their image", f"1 {Oddity.OTHER_SIZE.value}"
    ]  # fmt: skip
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    assert read_voc(*args).records[0].boxes.tolist() == [[4, 4, 39, 49]]


def test_split_lists_of_one_class_have_a_second_column(write_voc, tmp_path):
    write_voc({"a": [], "b": []})
    (tmp_path / "split.txt").write_text("a -1\nb  1\n\n")
    found = read_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))
    assert [record.file_name for record in found.records] == ["a.jpg", "b.jpg"]


def test_names_may_have_spaces(write_voc, tmp_path):
    write_voc({"my image 1": [], "my image 2": []})
    (tmp_path / "xml" / "my image.xml").write_text((tmp_path / "xml/my image 1.xml").read_text())
    split = tmp_path / "split.txt"
    for text, expected in (
        ("my image 2\nmy image 2\n", ["my image 2.jpg"]),
        ("my image 1\n", ["my image 1.jpg"]),
        ("my image 1 -1\nmy image 2 1\n", ["my image 1.jpg", "my image 2.jpg"]),
        ("my image 1\nmy image 2\n", ["my image 1.jpg", "my image 2.jpg"]),
    ):
        split.write_text(text)
        found = read_voc(tmp_path / "xml", tmp_path / "images", split, ("cat",))
        assert [record.file_name for record in found.records] == expected


def test_malformed_xml_names_file_and_line(make_config, write_voc, tmp_path):
    entry = write_voc({"a": []})
    (tmp_path / "xml" / "a.xml").write_text("<annotation>\n<object>\n</annotation>")
    cfg = make_config("DATASETS.TRAIN", ("mine",), mine={**entry, "CLASSES": ["cat"]})
    with pytest.raises(DataError, match=r"a\.xml, line 3, column \d+"):
        build_dataset(cfg, "mine")


@pytest.mark.parametrize(
    ("split", "xml", "message"),
    [("a\n", "<annotation>\n<object>", r"a\.xml, line 2, column \d+: not valid XML"),
     ("\n", "<annotation/>", r"split\.txt: lists no image"),
     ("a.jpg\n", "<annotation/>", r"split\.txt: none of the listed.*a\.jpg\.xml.*without folder"),
     ("a\n", "<annotation/>", r"split\.txt: no object.*as CLASSES")],
)  # fmt: skip
def test_why_the_classes_are_not_known(make_config, write_voc, tmp_path, split, xml, message):
    entry = write_voc({"a": []})
    (tmp_path / "split.txt").write_text(split)
    (tmp_path / "xml" / "a.xml").write_text(xml)
    for train in ("mine",), ("mine", "other"), ("other",):
        gone = {**entry, "IMAGES": "gone"}
        cfg = make_config("DATASETS.TRAIN", train, mine=entry, other=gone)
        with pytest.raises(DataError, match=message):
            build_dataset(cfg, "mine")


@pytest.mark.parametrize("encoding", ["gbk", "none-such"])
def test_encodings_that_cannot_be_read_name_the_file(write_voc, tmp_path, encoding):
    write_voc({"a": []})
    (tmp_path / "xml" / "a.xml").write_bytes(
        f'<?xml version="1.0" encoding="{encoding}"?><annotation></annotation>'.encode()
    )
    with pytest.raises(DataError, match=r"a\.xml: cannot be decoded.*UTF-8"):
        read_voc(tmp_path / "xml", tmp_path / "images", None, ("cat",))


def test_encodings_of_the_split(write_voc, tmp_path):
    write_voc({"a": [], "b": []})
    split = tmp_path / "split.txt"
    args = (tmp_path / "xml", tmp_path / "images", split, ("cat",))
    split.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [record.file_name for record in read_voc(*args).records] == ["a.jpg", "b.jpg"]
    for content in ("a\n\xe9\n".encode("latin-1"), "a\n".encode("utf-16")):
        split.write_bytes(content)
        with pytest.raises(DataError, match=r"split\.txt: not a UTF-8 text file"):
            read_voc(*args)


def test_listed_images_without_annotation_file(write_voc, tmp_path):
    write_voc({"a": [("cat", (1, 1, 9, 9), 0)], "b": []})
    (tmp_path / "xml" / "b.xml").unlink()
    args = (tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))
    with pytest.raises(DataError, match=r"b\.xml.*DATASETS\.MAX_BAD_IMAGES"):
        read_voc(*args, max_missing=0)
    found = read_voc(*args, max_missing=1)
    assert len(found.records) == 1 and "b.xml" in str(found.remarks)
    (tmp_path / "xml" / "a.xml").unlink()
    with pytest.raises(DataError, match="2 of the 2 listed images have no annotation file.*a.xml"):
        read_voc(*args, max_missing=10)


def test_unannotated_split_needs_no_xml(write_voc, tmp_path):
    write_voc({"a": []})
    found = read_voc(
        tmp_path / "none", tmp_path / "images", tmp_path / "split.txt", ("cat",), False
    )
    assert not found.has_annotations
    assert (found.records[0].height, found.records[0].width) == (40, 60)


def test_empty_split_is_an_error(write_voc, tmp_path):
    write_voc({"a": []})
    (tmp_path / "split.txt").write_text("\n")
    with pytest.raises(DataError, match="split.txt: lists no image"):
        read_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "split.txt", ("cat",))


def test_real_blood_cells(make_config, real_data):
    folder = {"FORMAT": "voc", "IMAGES": "bccd/JPEGImages", "ANNOTATIONS": "bccd/Annotations"}
    cfg = make_config(
        *("DATASETS.ROOT", str(real_data), "DATASETS.TRAIN", ("bccd_train",)),
        bccd_train={**folder, "SPLIT": "bccd/ImageSets/Main/trainval.txt"},
        bccd_test={**folder, "SPLIT": "bccd/ImageSets/Main/test.txt"},
    )
    train, test = build_dataset(cfg, "bccd_train"), build_dataset(cfg, "bccd_test")
    assert train.classes == test.classes == ("Platelets", "RBC", "WBC")
    assert len(train) + len(test) == 364
    image, target = test[0]
    assert image.size == (640, 480) and len(target["boxes"])
