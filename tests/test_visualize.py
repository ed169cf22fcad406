"""Boxes on images, and sheets."""

import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.visualize import (
    class_color,
    draw_detections,
    image_grid,
)

GREY = 90


def canvas(height=240, width=320):
    return np.full((height, width, 3), GREY, np.uint8)


def detections(*rows):
    """Rows (x0, y0, x1, y1, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def changed(picture):
    return (picture != GREY).any(axis=2)


def test_a_box_lies_on_its_pixels_and_leaves_its_inside_alone():
    picture = draw_detections(canvas(), detections((100, 80, 200, 180, 0.9, 2)), ["cat", "dog"])
    color = class_color(2)
    for x, y in ((100, 130), (200, 130), (150, 180), (150, 80)):
        assert tuple(picture[y, x]) == color
    assert not changed(picture)[95:170, 110:190].any()
    assert not changed(picture)[:, 201:].any() and not changed(picture)[181:].any()
    # The tag sits on the box, to its left.
    assert changed(picture)[70:80, 100:130].mean() > 0.95


def test_the_image_given_is_not_drawn_on():
    array = canvas()
    image = Image.fromarray(array)
    draw_detections(array, detections((10, 10, 90, 90, 0.9, 1)))
    draw_detections(image, detections((10, 10, 90, 90, 0.9, 1)))
    assert (array == GREY).all() and (np.array(image) == GREY).all()


def test_images_of_all_kinds_give_the_same_picture():
    found = detections((20, 40, 90, 90, 0.9, 1))
    expected = draw_detections(canvas(), found)
    tensor = torch.from_numpy(canvas()).permute(2, 0, 1)
    for image in (Image.fromarray(canvas()), tensor, tensor.float() / 255):
        np.testing.assert_array_equal(draw_detections(image, found), expected)


def test_weak_detections_are_not_drawn_but_all_of_a_target_is():
    found = detections((20, 40, 90, 90, 0.29, 1), (120, 40, 190, 90, 0.31, 1))
    marks = changed(draw_detections(canvas(), found))
    assert not marks[:, :100].any() and marks[:, 115:].any()
    target = {key: found[key] for key in ("boxes", "labels")}
    assert changed(draw_detections(canvas(), target))[:, :100].any()
    assert not changed(draw_detections(canvas(), detections())).any()


@pytest.mark.parametrize("corner", [(0, 0), (290, 0), (0, 215), (290, 215), (100, 0), (290, 100)])
def test_tags_stay_inside_of_the_picture(corner):
    """A tag at any border is as large as one with room all around."""
    names = ["a long class name"]

    def tag_area(x, y):
        box = (x, y, x + 29, y + 24)
        with_text = changed(draw_detections(canvas(), detections((*box, 0.9, 1)), names))
        return with_text.sum()

    free = tag_area(60, 100)
    # Inside the box the tag covers some of its outline; cut off it would lose far more.
    assert tag_area(*corner) > 0.85 * free


def test_names_wider_than_the_picture_are_shortened():
    picture = draw_detections(canvas(60, 40), detections((5, 20, 30, 50, 0.9, 1)), ["x" * 500])
    assert picture.shape == (60, 40, 3)


def test_boxes_beyond_the_picture_and_of_one_pixel_are_drawn():
    picture = draw_detections(
        canvas(), detections((-50, -50, 900, 900, 0.9, 1), (5, 5, 5, 5, 1, 2))
    )
    assert picture.shape == canvas().shape and changed(picture).any()


def test_the_best_detection_lies_on_top():
    box = (50, 60, 150, 160)
    for first, second in ((0.9, 0.5), (0.5, 0.9)):
        picture = draw_detections(canvas(), detections((*box, first, 1), (*box, second, 2)))
        assert tuple(picture[150, 50]) == class_color(1 if first > second else 2)


def test_tags_avoid_each_other():
    """Two boxes with the same upper edge: both texts can be read, so both tags show whole."""
    alone = changed(draw_detections(canvas(), detections((50, 100, 150, 160, 0.9, 1)))).sum()
    both = draw_detections(
        canvas(), detections((50, 100, 150, 160, 0.9, 1), (52, 100, 150, 160, 0.8, 2))
    )
    second = (both == np.array(class_color(2))).all(axis=2)
    assert second[161:190].sum() > 100  # below the box, as the place above it is taken
    assert changed(both).sum() > 1.2 * alone


def test_line_and_text_grow_with_the_image():
    def outline(scale):
        box = [side * scale for side in (50, 60, 150, 160)]
        picture = draw_detections(canvas(240 * scale, 320 * scale), detections((*box, 0.9, 1)))
        return changed(picture)[110 * scale, : 100 * scale].sum()

    assert outline(8) >= 4 * outline(1)


def test_colors_are_stable_and_neighbours_differ():
    colors = np.array([class_color(label) for label in range(1, 81)], float)
    assert (colors == [class_color(label) for label in range(1, 81)]).all()
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    for k in range(1, 6):
        assert np.diagonal(distances, k).min() > 60
    assert distances[np.triu_indices(80, 1)].min() > 0


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (np.zeros((9, 9), np.uint8), r"uint8 \[9, 9\]"),
        (np.zeros((9, 8, 3), float), r"float64 \[9, 8, 3\]"),
        (torch.zeros(9, 8, 3), r"torch.float32 \[9, 8, 3\]"),
        (torch.zeros(3, 8, 9, dtype=torch.int64), r"torch.int64 \[3, 8, 9\]"),
    ],
)
def test_what_is_no_image_is_refused_as_it_was_given(bad, given):
    with pytest.raises(ValueError, match=f"RGB array .* not {given}"):
        draw_detections(bad, detections())


def test_a_sheet_holds_every_image_with_its_scaled_boxes():
    images = [canvas(100, 200), canvas(200, 100), torch.full((3, 50, 50), GREY / 255)]
    found = [
        detections((0, 0, 199, 99, 0.9, 1)),
        detections((0, 0, 99, 199, 0.9, 1)),
        detections(),
    ]
    sheet = image_grid(images, found, ["cat"], columns=3, cell_size=100)
    assert sheet.shape == (104, 308, 3)
    for index, (color, grey) in enumerate(((True, True), (True, True), (False, True))):
        cell = sheet[:, 2 + 102 * index : 102 + 102 * index]
        assert (cell == np.array(class_color(1))).all(axis=2).any() == color
        assert (cell == GREY).all(axis=2).any() == grey
    # The box around the first image (100 x 50, in the middle of its cell) follows its border.
    assert tuple(sheet[2 + 25 + 40, 2]) == tuple(sheet[2 + 25 + 49, 60]) == class_color(1)
    assert image_grid(images, cell_size=60).shape[1] == 2 + 2 * 62
    with pytest.raises(ValueError, match="at least one"):
        image_grid([])
