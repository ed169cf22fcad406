"""COCO metrics against pycocotools, which defines them."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nasfcos.evaluation.coco import METRICS, coco_metrics, complete_annotations


def reference(image_ids, annotations, results, category_ids) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in image_ids],
            "annotations": copy.deepcopy(annotations),
            "categories": [{"id": i} for i in category_ids],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def random_set(seed: int, images: int, classes: int, objects: int, found: int):
    """Detections near objects and at random, on a coarse grid of scores so that many tie.

    Category and image ids have gaps, the last category has no object, some images have neither
    objects nor detections, some objects are crowds, and areas differ from those of the boxes.
    """
    rng = np.random.default_rng(seed)
    image_ids = [int(i) for i in rng.permutation(3 * images)[:images]]
    category_ids = sorted(int(i) for i in rng.permutation(200)[:classes] + 1)

    def random_box():
        return [*rng.uniform(0, 400, 2), *np.exp(rng.uniform(1.5, 5.5, 2))]

    annotations, results = [], []
    for image_id in image_ids:
        here = []
        for _ in range(rng.integers(0, objects)):
            box = [float(x) for x in random_box()]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_ids[rng.integers(0, classes - 1)],
                "bbox": box,
                "area": box[2] * box[3] * float(rng.uniform(0.4, 1)),
                "iscrowd": int(rng.random() < 0.15),
            }
            here.append(annotation)
            annotations.append(annotation)
        if rng.random() < 0.15:
            continue
        for _ in range(rng.integers(0, found)):
            category_id = category_ids[rng.integers(0, classes)]
            box = np.array(random_box())
            if here and rng.random() < 0.6:
                target = here[rng.integers(len(here))]
                category_id = target["category_id"]
                box = np.array(target["bbox"])
                box += rng.normal(0, 0.05, 4) * np.tile(box[2:], 2)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [float(x) for x in (*box[:2], *box[2:].clip(min=1))],
                    "score": round(float(rng.random()), 2),
                }
            )
    return image_ids, annotations, results, category_ids


def two_objects(ids):
    """Annotations with these ids in image 1, and results that find both."""
    entry = {"image_id": 1, "category_id": 1}
    boxes = ([0, 0, 9, 9], [50, 50, 9, 9])
    annotations = [{**entry, "id": i, "bbox": box} for i, box in zip(ids, boxes, strict=True)]
    return annotations, [{**entry, "bbox": box, "score": 0.9} for box in boxes]


@pytest.mark.parametrize(
    "shape", [(20, 6, 12, 40), (4, 2, 10, 400), (40, 10, 4, 6)], ids=["mixed", "over 100", "sparse"]
)
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(seed, shape):
    image_ids, annotations, results, category_ids = random_set(seed, *shape)
    names = [f"class {i}" for i in category_ids]
    metrics = coco_metrics(image_ids, annotations, results, category_ids, names)
    expected = reference(image_ids, annotations, results, category_ids)

    ours = [-1 if math.isnan(metrics[name]) else metrics[name] for name in METRICS]
    assert ours == pytest.approx(expected.stats.tolist(), abs=1e-9)
    assert max(ours) > 0.05

    precision = expected.eval["precision"][:, :, :, 0, 2]
    for k, name in enumerate(names):
        here = metrics["per_class"][name]
        for figure, part in {
            "AP": precision[:, :, k],
            "AP50": precision[0, :, k],
            "AP75": precision[5, :, k],
        }.items():
            part = part[part > -1]
            if part.size:
                assert here[figure] == pytest.approx(part.mean(), abs=1e-9)
            else:
                assert math.isnan(here[figure])
    assert math.isnan(metrics["per_class"][names[-1]]["AP"])  # the class without objects


@pytest.mark.parametrize("first", [20231215123456700, 2**62])
def test_neighbouring_ids_beyond_floating_point_are_told_apart(first):
    image_ids, annotations, results, category_ids = random_set(3, 20, 4, 6, 12)
    expected = coco_metrics(image_ids, annotations, results, category_ids, "abcd")
    image_ids = [first + i for i in image_ids]
    category_ids = [first + i for i in category_ids]
    annotations, results = (
        [
            {**x, "image_id": first + x["image_id"], "category_id": first + x["category_id"]}
            for x in entries
        ]
        for entries in (annotations, results)
    )
    found = coco_metrics(image_ids, annotations, results, category_ids, "abcd")
    for figure in METRICS:
        assert found[figure] == pytest.approx(expected[figure], abs=1e-12, nan_ok=True)
    for name in "abc":
        assert found["per_class"][name] == expected["per_class"][name]


def test_nothing_found_is_zero_and_nothing_to_find_is_not_a_number():
    image_ids, annotations, results, category_ids = random_set(0, 5, 3, 8, 10)
    names = list("abc")
    assert coco_metrics(image_ids, annotations, [], category_ids, names)["AP"] == 0
    for no_truth in (
        coco_metrics(image_ids, [], results, category_ids, names),
        coco_metrics(image_ids, [], [], category_ids, names),
        coco_metrics([], [], [], category_ids, names),
    ):
        assert all(math.isnan(no_truth[name]) for name in METRICS)
        assert math.isnan(no_truth["per_class"]["a"]["AP50"])


def test_only_the_given_categories_and_images_count():
    image_ids, annotations, results, category_ids = random_set(1, 12, 4, 8, 20)
    chosen_images, chosen = image_ids[:8], category_ids[:2]

    def only(entries):
        return [e for e in entries if e["image_id"] in chosen_images and e["category_id"] in chosen]

    expected = reference(chosen_images, only(annotations), only(results), chosen)
    metrics = coco_metrics(chosen_images, annotations, only(results), chosen, ["a", "b"])
    assert metrics["AP"] == pytest.approx(expected.stats[0], abs=1e-9)
    assert set(metrics["per_class"]) == {"a", "b"}


def test_missing_keys_are_filled_in():
    bare = {"id": 7, "image_id": 1, "category_id": 2, "bbox": [0, 0, 10, 20]}
    assert complete_annotations([bare]) == [{**bare, "area": 200, "iscrowd": 0}]
    assert "area" not in bare
    kept = complete_annotations([{**bare, "area": 12.5, "iscrowd": 1, "segmentation": []}])
    assert (kept[0]["area"], kept[0]["iscrowd"]) == (12.5, 1)
    for area in ("12", math.nan, None, [1]):
        assert complete_annotations([{**bare, "area": area}])[0]["area"] == 200


@pytest.mark.parametrize(
    ("key", "value"),
    [("bbox", value) for value in (
        None, [], [1, 2, 3], [0, 0, math.nan, 4], "0 0 1 1", ["0", "0", "5", "5"], [[0, 0], [5, 5]],
     )]
    + [("image_id", [1]), ("image_id", "1"), ("category_id", [1]), ("category_id", "1")]
    + [("iscrowd", "no"), ("iscrowd", 2)],
)  # fmt: skip
def test_what_a_data_set_drops_needs_not_be_found(key, value):
    good = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}
    results = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.9}]
    annotations = [good, {**good, "id": 2, key: value}, "text", {}]
    assert coco_metrics([1], annotations, results, [1], ["a"])["AP"] == 1


@pytest.mark.parametrize(
    "ids",
    [(3, 3), (None, None), (-1, -2), (2**63, 2**63 + 1), (2**64, 1), ("a", "b"), (1.0, 2.0),
     ([1], [2]), (True, 2), (0, -1)],
    ids=str,
)  # fmt: skip
def test_ids_that_cannot_serve_are_replaced(ids, caplog):
    annotations, results = two_objects(ids)
    assert coco_metrics([1], annotations, results, [1], ["a"])["AP"] == 1
    assert "numbered anew" in caplog.text
    without = [{key: a[key] for key in a if key != "id"} for a in annotations]
    assert coco_metrics([1], without, results, [1], ["a"])["AP"] == 1


@pytest.mark.parametrize("ids", [(2**31, 2**53 + 1), (2**63 - 2, 2**63 - 1)])
def test_large_ids_serve(ids, caplog):
    annotations, results = two_objects(ids)
    assert coco_metrics([1], annotations, results, [1], ["a"])["AP"] == 1
    assert not caplog.text


def test_an_annotation_with_id_0_is_pointed_out(caplog):
    entry = {"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
    complete_annotations([entry])
    assert "id 0" in caplog.text
