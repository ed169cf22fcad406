"""COCO files as they are found in the wild."""

import json
import math

import pytest
from PIL import Image

from nasfcos.data import build_dataset
from nasfcos.data.coco import coco_content, read_coco, read_coco_classes
from nasfcos.data.records import DataError
from nasfcos.data.remarks import Oddity


def read(tmp_path, classes=None):
    return read_coco(tmp_path / "ann.json", tmp_path / "images", classes)


def test_boxes_labels_and_gaps_in_the_ids(write_coco, tmp_path):
    write_coco([{"bbox": [10, 5, 20, 10]}, {"image_id": 2, "category_id": 7}])
    found = read(tmp_path)
    assert found.classes == ("dog", "cat") and found.category_ids == (3, 7)
    assert found.records[0].boxes.tolist() == [[10, 5, 29, 14]]
    assert found.records[0].boxes.dtype == "float32"
    assert [record.labels.tolist() for record in found.records] == [[1], [2]]
    assert found.has_annotations and not found.remarks


def test_no_segmentation_area_or_iscrowd_is_fine_and_crowds_are_flagged(write_coco, tmp_path):
    write_coco([{}, {"iscrowd": 1, "bbox": [0, 0, 50, 30], "segmentation": {"counts": []}}])
    record = read(tmp_path).records[0]
    assert record.ignored.tolist() == [False, True]


def test_images_without_annotations_stay(write_coco, tmp_path):
    write_coco([{}])
    record = read(tmp_path).records[1]
    assert record.image_id == 2
    assert record.boxes.shape == (0, 4) and record.labels.shape == (0,)


def test_bad_boxes_are_dropped_or_clipped_and_counted(write_coco, tmp_path):
    write_coco(
        [
            {"bbox": [50, 30, 30, 30]},  # sticks out
            {"bbox": [70, 10, 10, 10]},  # outside
            {"bbox": [10, 10, 0, 10]},
            {"bbox": [10, 10, 1, 10]},  # one pixel wide: dropped by the release too
            {"bbox": [10, 10, -5, 10]},
            {"bbox": [math.nan, 1, 5, 5]},
            {"bbox": [1, 1, math.inf, 5]},
            {"bbox": [1, 1, 10**400, 5]},
            {"bbox": [1e308, 1, 1e308, 5]},
            {"bbox": None},
            {"bbox": []},
            {"bbox": ["1", "2", "5", "6"]},  # numbers as text
            {"bbox": [[1, 2], [5, 6]]},
            {"bbox": [True, True, 5, 6]},
            {"image_id": 99},
            {"category_id": 99},
            {"image_id": [1]},
            {"category_id": {"id": 3}},
            {"category_id": "3"},
        ]
    )
    found = read(tmp_path)
    assert found.records[0].boxes.tolist() == [[50, 30, 59, 39]]
    assert found.remarks.lines() == [
        "8 annotations dropped whose bbox is not four finite numbers",
        "3 annotations dropped whose image_id or category_id is not a number",
        "1 boxes clipped to their image",
        "5 boxes not finite, without area or outside of their image dropped",
        "1 boxes of unknown categories dropped",
        "1 boxes of unlisted images dropped",
    ]


def test_crowds_are_0_and_1(write_coco, tmp_path):
    write_coco([{"iscrowd": value} for value in (0, 1, False, True, None, 1.0, "0", "no", 2, [])])
    found = read(tmp_path)
    assert found.records[0].ignored.tolist() == [False, True, False, True, False, True]
    assert found.remarks.lines() == ["4 annotations dropped whose iscrowd is neither 0 nor 1"]


def test_classes_choose_and_order_categories(write_coco, tmp_path):
    write_coco([{"category_id": 3}, {"category_id": 7}])
    assert read(tmp_path, ("cat", "dog")).records[0].labels.tolist() == [2, 1]
    only = read(tmp_path, ("cat",))
    assert only.records[0].labels.tolist() == [1] and only.category_ids == (7,)
    with pytest.raises(DataError, match="'bird'.*'dog', 'cat'"):
        read(tmp_path, ("bird", "cat"))


def test_ids_of_its_own_making_are_told(write_coco, tmp_path):
    write_coco([], categories=(), annotations=None)
    found = read(tmp_path, ("cat", "dog"))
    assert found.category_ids == (1, 2)
    assert found.remarks.lines() == [
        "2 classes without a category in the file, so with ids counted from 1 in results"
    ]


def test_adopted_classes_may_be_absent(write_coco, tmp_path):
    write_coco([{"category_id": 3}, {"category_id": 1}, {"category_id": 7}])
    classes = ("bird", "dog", "ant")
    found = read_coco(tmp_path / "ann.json", tmp_path / "images", classes, adopted=True)
    assert found.classes == classes
    assert found.category_ids == (2, 3, 4)  # neither a category nor used without being one
    assert found.records[0].labels.tolist() == [2]
    assert found.remarks.lines() == [
        "1 boxes of unknown categories dropped",
        "2 classes without a category in the file, so without objects in it ('bird', 'ant')",
    ]
    with pytest.raises(DataError, match="no category called 'bird', 'ant'"):
        read_coco(tmp_path / "ann.json", tmp_path / "images", ("bird", "ant"), adopted=True)


def test_two_categories_of_one_id_are_refused(write_coco, tmp_path):
    write_coco([{}], categories=((3, "dog"), (7, "cat"), (3, "ant")))
    message = r"ann\.json: the categories 'dog' and 'ant' have the same id"
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    write_coco([{}], categories=((3, "dog"), (7, "cat"), (3, "dog")))  # the same one twice
    assert read(tmp_path).classes == ("dog", "cat")


def test_size_missing_in_the_file_is_read_from_the_image(write_coco, tmp_path):
    write_coco([{"bbox": [50, 30, 30, 30]}])
    content = json.loads((tmp_path / "ann.json").read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    record = read(tmp_path).records[0]
    assert (record.height, record.width) == (40, 60)
    assert record.boxes.tolist() == [[50, 30, 59, 39]]


def test_size_that_is_no_number_is_read_from_the_image(write_coco, tmp_path):
    write_coco([{"bbox": [50, 30, 30, 30]}])
    content = json.loads((tmp_path / "ann.json").read_text())
    for size in ("abc", math.inf, math.nan, -60, [60]):
        content["images"][0]["width"] = size
        (tmp_path / "ann.json").write_text(json.dumps(content))
        assert read(tmp_path).records[0].width == 60


def write_sizes(tmp_path, *sizes):
    """Replace the annotated (height, width) of the images in turn."""
    path = tmp_path / "ann.json"
    content = json.loads(path.read_text())
    for image, (height, width) in zip(content["images"], sizes, strict=True):
        image |= {"height": height, "width": width}
    path.write_text(json.dumps(content))


def test_a_box_beyond_the_annotated_size_is_clipped_to_the_file(write_coco, tmp_path):
    boxes = [{"bbox": [45, 5, 10, 30]}, {"bbox": [5, 5, 70, 50]}, {"image_id": 2}]
    write_coco(boxes, sizes=((40, 60), (40, 60)))
    write_sizes(tmp_path, (60, 40), (60, 40))
    found = read(tmp_path)
    assert [(r.height, r.width) for r in found.records] == [(40, 60), (60, 40)]
    assert found.records[0].boxes.tolist() == [[45, 5, 54, 34], [5, 5, 59, 39]]
    assert found.remarks.lines() == [
        "1 boxes clipped to their image", f"1 {Oddity.OTHER_SIZE.value}"
    ]  # fmt: skip
    (tmp_path / "images" / "1.png").unlink()
    assert read(tmp_path).records[0].boxes.tolist() == [[5, 5, 39, 54]]


@pytest.mark.parametrize(
    ("annotated", "size"),  # of a file whose 40 x 60 stored pixels are displayed as 60 x 40
    [((40, 60), (40, 60)), ((60, 40), (60, 40)), ((30, 30), (60, 40))],
)
def test_the_size_of_a_turned_file_is_that_of_the_loaded_image(
    make_config, write_coco, tmp_path, annotated, size
):
    entry = write_coco([{"bbox": [5, 5, 70, 70]}], sizes=((40, 60),))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "1.png", exif=exif)
    write_sizes(tmp_path, annotated)
    dataset = build_dataset(make_config("DATASETS.TRAIN", ("mine",), mine=entry), "mine")
    image, target = dataset[0]
    assert (dataset.records[0].height, dataset.records[0].width) == size
    assert (image.height, image.width) == target["original_size"] == size
    assert target["boxes"].tolist() == [[5, 5, size[1] - 1, size[0] - 1]]


def test_without_annotations(write_coco, tmp_path):
    write_coco([], annotations=None)
    found = read(tmp_path)
    assert not found.has_annotations and found.classes == ("dog", "cat")
    path = tmp_path / "ann.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))
    assert not read(tmp_path).has_annotations


def test_byte_order_mark(write_coco, tmp_path):
    write_coco([{}])
    path = tmp_path / "ann.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(tmp_path).records) == 2


def test_whole_numbers_written_as_fractions_are_ids_too(write_coco, tmp_path):
    write_coco([{"image_id": 1.0, "category_id": 3.0}])
    path = tmp_path / "ann.json"
    content = json.loads(path.read_text())
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = float(entry["id"])
    path.write_text(json.dumps(content))
    found = read(tmp_path)
    assert type(found.records[0].image_id) is int and found.records[0].labels.tolist() == [1]
    assert [type(i) for i in found.category_ids] == [int, int]


def test_malformed_files_name_file_and_line(write_coco, tmp_path):
    path = tmp_path / "ann.json"
    path.write_text('{"images": [\n  {"id": 1,}\n]}')
    with pytest.raises(DataError, match=r"ann\.json, line 2, column \d+"):
        read(tmp_path)
    path.write_text('[{"image_id": 1, "score": 0.5}]')
    with pytest.raises(DataError, match="results file"):
        read(tmp_path)
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path)
    write_coco([], annotations={"1": []})
    with pytest.raises(DataError, match="'annotations' must be a list"):
        read(tmp_path)
    write_coco([], images=[{"id": 1}])
    with pytest.raises(DataError, match="file_name"):
        read(tmp_path)
    write_coco([], images=[{"id": 1, "file_name": None}])
    with pytest.raises(DataError, match="the file_name of image 1 is not text: None"):
        read(tmp_path)
    write_coco([], images=[{"id": "1", "file_name": "1.png"}])
    with pytest.raises(DataError, match="the id of an image must be an integer, not '1'"):
        read(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="ann.json"):
        read(tmp_path)
    path.write_text('{"images": [], "categories": [{"id": 1}]}')
    with pytest.raises(DataError, match="category"):
        read(tmp_path)


def test_two_categories_of_one_name_are_refused_where_it_is_wanted(write_coco, tmp_path):
    write_coco([{}, {"category_id": 7}], categories=((3, "dog"), (7, "cat"), (9, "dog")))
    found = read(tmp_path, ("cat",)).records
    assert [label for record in found for label in record.labels.tolist()] == [1]
    for classes in (None, ("dog", "cat")):
        with pytest.raises(DataError, match=r"ann\.json: several categories are called 'dog'"):
            read(tmp_path, classes)
    with pytest.raises(DataError, match="'dog'"):
        read_coco_classes(tmp_path / "ann.json")


def test_what_is_written_is_read_again(write_coco, tmp_path):
    write_coco([{"bbox": [10.25, 5, 20.5, 10]}, {"image_id": 2, "category_id": 7, "iscrowd": 1}])
    before = read(tmp_path)
    content = coco_content(before.records, before.classes)
    (tmp_path / "ann.json").write_text(json.dumps(content))
    after = read(tmp_path)
    assert coco_content(after.records, after.classes) == content
    assert after.classes == before.classes and after.category_ids == (1, 2)
    assert content["annotations"][0]["bbox"] == [10.25, 5, 20.5, 10]
    assert content["annotations"][0]["area"] == 205
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 1]
