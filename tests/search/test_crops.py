"""Crops: where their boxes are, and what they depend on."""

import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.search.crops import Crops, crop_boxes


def boxes_of(rows, labels=None):
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(rows)),
    }


class Pictures:
    """Pictures and targets in place of a data set."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def noise(height, width, seed=0):
    """A picture that is smooth, so that a pixel more or less shows as a small difference."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.BICUBIC)


def test_boxes_at_the_border_of_a_crop():
    boxes = torch.tensor(
        [
            [10.0, 10, 19, 19],  # inside
            [-10, 0, 9, 19],  # a half: 10 of 20 columns
            [-15, 0, 4, 19],  # a quarter
            [-16, 0, 3, 19],  # a fifth
            [-10, 90, 9, 109],  # a quarter, of both directions
            [-6, 20, -1, 29],  # ends before the first column
            [-3, 20, -2, 29],  # narrow, and outside: a clipped corner is no area
            [100, 20, 101, 29],  # begins behind the last one
            [99, 0, 99, 0],  # the last pixel
            [-50, -50, 149, 149],  # all of the crop and more: a quarter of it
        ]
    )
    clipped, keep = crop_boxes(boxes, 100)
    assert keep.tolist() == [1, 1, 1, 0, 1, 0, 0, 0, 1, 1]
    expected = [
        [10, 10, 19, 19],
        [0, 0, 9, 19],
        [0, 0, 4, 19],
        [0, 90, 9, 99],
        [99, 0, 99, 0],
        [0, 0, 99, 99],
    ]
    assert clipped.tolist() == expected
    clipped, keep = crop_boxes(torch.zeros(0, 4), 100)
    assert clipped.shape == (0, 4) and keep.shape == (0,)


@pytest.mark.parametrize(("height", "width"), [(120, 200), (201, 120), (96, 96), (32, 333)])
def test_the_centre_crop_is_a_part_of_the_resized_image(height, width):
    picture = noise(height, width)
    target = boxes_of([[width // 2 - 12, height // 2 - 8, width // 2 + 9, height // 2 + 12]])
    ((crop, found),) = Crops([Pictures((picture, target))], 96)[0]
    short = min(height, width)
    size = (96 * width // short, 96 * height // short)
    left, top = (size[0] - 96 + 1) // 2, (size[1] - 96 + 1) // 2
    whole = np.asarray(picture.resize(size, Image.BILINEAR)).transpose(2, 0, 1).astype(int)
    expected = whole[:, top : top + 96, left : left + 96]
    assert crop.shape == (3, 96, 96) and crop.dtype == torch.uint8
    assert np.abs(crop.numpy() - expected).max() <= 1
    ratio = torch.tensor([size[0] / width, size[1] / height] * 2)
    moved = target["boxes"] * ratio - torch.tensor([left, top, left, top])
    torch.testing.assert_close(found["boxes"], moved)


def test_an_extremely_long_image():
    """Only its crop is resized: the whole would take 70 GB."""
    ((crop, found),) = Crops([Pictures((Image.new("RGB", (60000, 1)), boxes_of([])))], 640)[0]
    assert crop.shape == (3, 640, 640) and found["boxes"].shape == (0, 4)


def square_picture(x, side=30, height=60, width=240):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[12 : 12 + side, x : x + side] = 255
    pixels[12 : 12 + side, x : x + side // 2] = 180  # so that a mirrored one is another
    return Image.fromarray(pixels), boxes_of([[x, 12, x + side - 1, 11 + side]])


def test_boxes_stay_on_their_objects():
    """Over random places and mirrored crops."""
    items = [square_picture(x) for x in range(0, 210, 15)]
    crops = Crops([Pictures(*items)], 60, crops=6, seed=3)
    seen = mirrored = 0
    for index, (picture, _) in enumerate(items):
        for crop, target in crops[index]:
            bright = crop.amax(0) > 128
            if len(target["boxes"]):
                ys, xs = np.nonzero(bright.numpy())
                found = torch.tensor([xs.min(), ys.min(), xs.max(), ys.max()])
                assert (target["boxes"][0] - found).abs().max() <= 1
                seen += 1
            else:
                assert bright.sum() < 0.25 * 900 + 30
                assert target["dropped"] == 1
        whole = np.asarray(picture).transpose(2, 0, 1)
        places = [whole[:, :, x : x + 60] for x in range(181)]
        first, *others = [crop.numpy() for crop, _ in crops[index]]
        assert any((first == place).all() for place in places)
        mirrored += sum(not any((o == place).all() for place in places) for o in others)
    assert seen > 20 and 5 < mirrored < 5 * len(items)


def test_crops_depend_on_seed_image_and_number_alone():
    pictures = Pictures(*((noise(80, 200, seed), boxes_of([])) for seed in range(3)))

    def shown(index, **settings):
        return [crop for crop, _ in Crops([pictures], 64, **settings)[index]]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=False))

    assert same(shown(1, crops=3, seed=1), shown(1, crops=3, seed=1))
    assert same(shown(1, crops=3, seed=1), shown(1, crops=2, seed=1))
    assert not same(shown(1, crops=3, seed=1), shown(1, crops=3, seed=2))
    assert same(shown(1, seed=1), shown(1, seed=2))
    split = Crops([Pictures(pictures[0]), Pictures(*pictures.items[1:])], 64, crops=1, seed=1)
    assert len(split) == 3
    assert same([split[2][0][0]], shown(2, crops=1, seed=1))
