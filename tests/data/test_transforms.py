"""Sizes, boxes and colours."""

import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.data.transforms import (
    EvalTransform,
    TrainTransform,
    flip_boxes,
    resize,
    resize_fast,
    resized_shape,
    scale_boxes,
    to_uint8_tensor,
)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1066)),  # 1066.67 is truncated
        (640, 480, (1066, 800)),
        (427, 640, (800, 1199)),
        (500, 500, (800, 800)),
        (800, 1333, (800, 1333)),
        (300, 600, (666, 1332)),  # 1333 * 300 / 600 = 666.5 rounds to even
        (100, 1000, (133, 1330)),
        (1000, 100, (1330, 133)),
        (2, 10000, (1, 1333)),  # never zero, and the long side no longer than allowed
        (10000, 1, (1333, 1)),
        (1, 2000, (1, 1333)),
    ],
)
def test_resized_shape(height, width, expected):
    assert resized_shape(height, width, 800, 1333) == expected


def test_boxes_scale_by_the_ratio_of_each_axis_and_mirror():
    boxes = torch.tensor([[10.0, 5.0, 29.0, 14.0]])
    assert scale_boxes(boxes, (40, 60), (80, 180)).tolist() == [[30, 10, 87, 28]]
    smaller = boxes * torch.tensor([0.75, 0.6, 0.75, 0.6])
    assert torch.equal(scale_boxes(boxes.long(), (40, 60), (24, 45)), smaller)
    assert flip_boxes(boxes, 60).tolist() == [[30, 5, 49, 14]]
    assert torch.equal(flip_boxes(flip_boxes(boxes, 60), 60), boxes)
    assert flip_boxes(torch.zeros(0, 4), 60).shape == (0, 4)


def test_resize_is_pils_antialiased_bilinear():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, ::2] = 255  # fine stripes become grey only with antialiasing
    small = to_uint8_tensor(resize(Image.fromarray(pixels), (4, 4)))
    assert small.shape == (3, 4, 4) and small.dtype == torch.uint8
    assert (small[:, :, 1:3].float() - 127.5).abs().max() < 20


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "shape", [(80, 107), (61, 90), (60, 89), (30, 44), (17, 25), (59, 95), (60, 95), (200, 20)]
)
def test_fast_resize_is_the_other_one_but_for_a_step_of_brightness(shape, flip):
    rough = np.random.default_rng(1).integers(0, 255, (60, 89, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(rough).resize((12, 9)).resize((89, 60)))
    for pixels in (rough, smooth):
        found = resize_fast(pixels, shape, flip)
        expected = to_uint8_tensor(resize(Image.fromarray(pixels), shape))
        expected = expected.flip(2) if flip else expected
        assert found.shape == expected.shape == (3, *shape) and found.dtype == torch.uint8
        assert found.is_contiguous()
        assert (found.int() - expected.int()).abs().max() <= 1


def test_tensor_of_a_picture():
    pixels = np.random.default_rng(1).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    assert (to_uint8_tensor(Image.fromarray(pixels)).numpy() == pixels.transpose(2, 0, 1)).all()


def picture():
    """A black picture with one white rectangle that is its only object."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:41, 10:31] = 255
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        "labels": torch.tensor([1]),
        "image_id": 5,
        "original_size": (60, 100),
    }
    return pixels, target


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_follow_their_pixels(flip):
    image, target = picture()
    transform = TrainTransform(min_sizes=(120,), max_size=1000, flip_prob=flip)
    out, moved = transform(image, target, np.random.default_rng(0))
    assert out.shape == (3, 120, 200) and moved["image_id"] == 5
    rows, columns = (out[0] > 127).nonzero().unbind(1)
    seen = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]).float()
    assert (seen - moved["boxes"][0]).abs().max() <= 1.5
    assert target["boxes"].tolist() == [[10, 20, 30, 40]]  # the caller's target is untouched


def test_boxes_are_those_of_the_whole_picture_when_a_smaller_version_is_given():
    pixels, target = picture()
    transform = TrainTransform(min_sizes=(30,), max_size=1000, flip_prob=0)
    whole, moved = transform(pixels, target, np.random.default_rng(0))
    half, same = transform(pixels[::2, ::2], target, np.random.default_rng(0))
    assert moved["boxes"].tolist() == same["boxes"].tolist() == [[5, 10, 15, 20]]
    assert half.shape == whole.shape == (3, 30, 50)


def test_sizes_are_drawn_from_the_list_or_the_range():
    image, target = picture()
    rng = np.random.default_rng(0)
    several = TrainTransform(min_sizes=(30, 60, 90), max_size=1000)
    heights = {several(image, target, rng)[0].shape[1] for _ in range(40)}
    assert heights == {30, 60, 90}
    ranged = TrainTransform(min_sizes=(30,), max_size=1000, size_range=(40, 43))
    heights = {ranged(image, target, rng)[0].shape[1] for _ in range(60)}
    assert heights == {40, 41, 42, 43}


def test_flips_come_at_their_probability():
    image, target = picture()
    transform = TrainTransform(min_sizes=(60,), max_size=1000, flip_prob=0.25)
    flips = [
        transform(image, target, np.random.default_rng([0, i]))[1]["boxes"][0, 0] > 50
        for i in range(300)
    ]
    assert 0.17 < np.mean(flips) < 0.33


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_changes_the_picture_reproducibly(part):
    pixels = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    image, target = pixels, {**picture()[1], "original_size": (20, 20)}
    plain = TrainTransform(min_sizes=(20,), max_size=100, flip_prob=0)
    jitter = TrainTransform(min_sizes=(20,), max_size=100, flip_prob=0, **{part: 0.4})
    same = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(plain(image, target, np.random.default_rng(0))[0], same)
    one, two, other = (jitter(image, target, np.random.default_rng(s))[0] for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, same) and not torch.equal(one, other)


def test_test_transform_only_resizes():
    pixels, target = picture()
    out, moved = EvalTransform(30, 1000)(Image.fromarray(pixels), target)
    assert out.shape == (3, 30, 50)
    assert moved["boxes"].tolist() == [[5, 10, 15, 20]]
