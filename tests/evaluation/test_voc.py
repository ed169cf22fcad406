"""VOC AP against cases worked out by hand and against the rules spelled out one by one."""

import numpy as np
import pytest

from nasfcos.evaluation.voc import Boxes, voc_average_precision

FIRST, SECOND, FAR = [0, 0, 9, 9], [50, 50, 59, 59], [200, 200, 240, 240]


def truth(*rows):
    """Rows (image, label, box, difficult)."""
    image, label, box, difficult = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Boxes(
        image=np.array(image, np.int64),
        label=np.array(label, np.int64),
        box=np.array(box, np.float64).reshape(-1, 4),
        difficult=np.array(difficult, bool),
    )


def found(*rows):
    """Rows (image, label, box, score)."""
    image, label, box, score = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Boxes(
        image=np.array(image, np.int64),
        label=np.array(label, np.int64),
        box=np.array(box, np.float64).reshape(-1, 4),
        score=np.array(score, np.float64),
    )


def single(ground_truth, detections, **options):
    eleven_point, area = voc_average_precision(ground_truth, detections, 1, **options)
    return float(eleven_point[0]), float(area[0])


def test_all_found_without_a_mistake():
    objects = truth((1, 1, FIRST, False), (2, 1, SECOND, False))
    assert single(objects, found((1, 1, FIRST, 0.9), (2, 1, SECOND, 0.2))) == (1.0, 1.0)


def test_half_found():
    # Right, then wrong: precision 1 up to recall 1/2. Levels 0 to 0.5 are six of eleven.
    objects = truth((1, 1, FIRST, False), (1, 1, SECOND, False))
    result = single(objects, found((1, 1, FIRST, 0.9), (1, 1, FAR, 0.8)))
    assert result == pytest.approx((6 / 11, 1 / 2))


def test_a_mistake_before_the_last_object():
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3 up to recall 1.
    objects = truth((1, 1, FIRST, False), (1, 1, SECOND, False))
    detections = found((1, 1, FIRST, 0.9), (1, 1, FAR, 0.8), (1, 1, SECOND, 0.7))
    assert single(objects, detections) == pytest.approx(((6 * 1 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2))


def test_a_second_detection_of_an_object_is_wrong():
    # Wrong second detection of the first object (its score decides, not its overlap).
    objects = truth((1, 1, FIRST, False), (1, 1, SECOND, False))
    detections = found((1, 1, FIRST, 0.8), (1, 1, [0, 0, 9, 8], 0.9), (1, 1, SECOND, 0.7))
    assert single(objects, detections)[1] == pytest.approx((1 + 2 / 3) / 2)


def test_a_detection_does_not_fall_back_to_its_second_best_object():
    # Both detections overlap the first object most, though the second overlaps enough as well.
    objects = truth((1, 1, [0, 0, 9, 9], False), (1, 1, [0, 2, 9, 11], False))
    detections = found((1, 1, [0, 0, 9, 9], 0.9), (1, 1, [0, 0, 9, 9], 0.8))
    assert single(objects, detections)[1] == pytest.approx(1 / 2)


def test_difficult_objects_neither_help_nor_harm():
    objects = truth((1, 1, FIRST, True), (1, 1, SECOND, False))
    on_difficult = [(1, 1, FIRST, 0.95), (1, 1, FIRST, 0.9)]
    assert single(objects, found(*on_difficult, (1, 1, SECOND, 0.5))) == (1.0, 1.0)
    assert single(objects, found((1, 1, SECOND, 0.5))) == (1.0, 1.0)
    # ... but a detection that misses them is wrong like any other.
    assert single(objects, found((1, 1, FAR, 0.95), (1, 1, SECOND, 0.5)))[1] == pytest.approx(0.5)


def test_both_corners_are_inside_a_box():
    # 10 x 10 against 10 x 5 pixels: exactly one half, which reaches the threshold. Without the
    # "+1" it would be 4/9.
    objects = truth((1, 1, [0, 0, 9, 9], False))
    assert single(objects, found((1, 1, [0, 0, 9, 4], 0.9))) == (1.0, 1.0)
    assert single(objects, found((1, 1, [0, 0, 9, 4], 0.9)), iou_threshold=0.51) == (0.0, 0.0)


def test_a_recall_of_exactly_three_tenths_reaches_its_level():
    # 0.1 * 3 > 0.3 in floating point, which must not cost the level 0.3.
    objects = truth(*((image, 1, FIRST, False) for image in range(10)))
    detections = found(*((image, 1, FIRST, 0.9) for image in range(3)))
    assert single(objects, detections) == pytest.approx((4 / 11, 3 / 10))


def test_classes_and_images_do_not_mix():
    objects = truth((1, 1, FIRST, False), (1, 2, SECOND, False), (2, 2, FIRST, False))
    detections = found((2, 1, FIRST, 0.9), (1, 2, FIRST, 0.8), (1, 2, SECOND, 0.7))
    eleven_point, area = voc_average_precision(objects, detections, 3)
    assert area[:2] == pytest.approx([0.0, 0.25])
    assert np.isnan(area[2]) and np.isnan(eleven_point[2])  # nothing to find


def test_nothing_found_or_nothing_to_find():
    objects = truth((1, 1, FIRST, False))
    assert single(objects, found()) == (0.0, 0.0)
    for without in (truth(), truth((1, 1, FIRST, True))):
        assert np.isnan(single(without, found((1, 1, FIRST, 0.9)))).all()
        assert np.isnan(single(without, found())).all()


def one_by_one(objects: Boxes, detections: Boxes, label: int) -> tuple[float, float]:
    """The devkit's rules as loops."""
    taken = set()
    right, wrong = [0], [0]
    for d in sorted(range(len(detections.score)), key=lambda d: -detections.score[d]):
        if detections.label[d] != label:
            continue
        best, best_iou = None, -1.0
        for g in range(len(objects.label)):
            if objects.label[g] == label and objects.image[g] == detections.image[d]:
                a, b = detections.box[d], objects.box[g]
                w = min(a[2], b[2]) - max(a[0], b[0]) + 1
                h = min(a[3], b[3]) - max(a[1], b[1]) + 1
                inter = w * h if w > 0 and h > 0 else 0.0
                union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
                union += (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - inter
                if inter / union > best_iou:
                    best, best_iou = g, inter / union
        if best_iou >= 0.5 and objects.difficult[best]:
            continue
        hit = best_iou >= 0.5 and best not in taken
        if hit:
            taken.add(best)
        right.append(right[-1] + hit)
        wrong.append(wrong[-1] + (not hit))
    needed = sum(
        objects.label[g] == label and not objects.difficult[g] for g in range(len(objects.label))
    )
    if needed == 0:
        return float("nan"), float("nan")
    points = [(t / needed, t / (t + f)) for t, f in zip(right[1:], wrong[1:], strict=True)]
    eleven = sum(
        max((p for r, p in points if round(r * needed) * 10 >= level * needed), default=0.0)
        for level in range(11)
    )
    area, previous = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - previous) * max(p for _, p in points[i:])
        previous = recall
    return eleven / 11, area


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_rules_one_by_one(seed):
    rng = np.random.default_rng(seed)
    images, classes, count = 7, 4, 60
    corner = rng.integers(0, 80, (count, 2))
    box = np.concatenate([corner, corner + rng.integers(3, 40, (count, 2))], axis=1)
    objects = Boxes(
        image=rng.integers(0, images, count),
        label=rng.integers(1, classes, count),  # none of the last class
        box=box.astype(np.float64),
        difficult=rng.random(count) < 0.2,
    )
    near = rng.integers(0, count, 200)
    detections = Boxes(
        image=np.where(rng.random(200) < 0.9, objects.image[near], 0),
        label=np.where(rng.random(200) < 0.9, objects.label[near], classes),
        box=(box[near] + rng.integers(-4, 5, (200, 4))).astype(np.float64),
        score=rng.permutation(200) / 200,
    )
    eleven_point, area = voc_average_precision(objects, detections, classes)
    expected = np.array([one_by_one(objects, detections, c + 1) for c in range(classes)])
    np.testing.assert_allclose(eleven_point, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(area, expected[:, 1], atol=1e-12)
    assert 0.1 < np.nanmean(area) < 1
