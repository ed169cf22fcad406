"""The square crops that a search works on (paper, section 4: images are resized and cropped)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..boxes import clip_boxes, legacy_areas
from ..data import DetectionDataset, resized_shape
from ..data.records import UnreadableImage
from ..data.transforms import flip_boxes, scale_boxes, to_uint8_tensor

MIN_VISIBLE = 0.25
"""Least share of a box's area that must lie in the crop, or else the box is dropped."""


class Crops(Dataset):
    """Square crops of the images of some data sets; the same at every access.

    An image is resized (bilinear, antialiased) so that its short side is `size`, however long the
    other becomes. Then a square of that side is cut out, at a random position along the long side
    or in the centre. Of several random crops, all but the first are mirrored with probability 1/2.
    Boxes are clipped to the crop, and dropped if less than `MIN_VISIBLE` of their area is left.

    `crops[i]` is the list of image i's crops, `(uint8 tensor [3, size, size], target)` each. It is
    empty if the image cannot be read.
    """

    def __init__(
        self, datasets: Sequence[DetectionDataset], size: int, crops: int = 0, seed: int = 0
    ) -> None:
        """
        Args:
            datasets: the data sets; all of their images are used.
            size: side of the crops, in pixels.
            crops: number of random crops of each image; 0: only the one in the centre.
            seed: seed of the random crops, which depend on it, on the image's position in the data
                sets and on the crop's number.
        """
        self.datasets = datasets
        self.size = size
        self.crops = crops
        self.seed = seed
        self._indices = [(d, i) for d, dataset in enumerate(datasets) for i in range(len(dataset))]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    @property
    def per_image(self) -> int:
        """Number of crops of each image."""
        return max(1, self.crops)

    @property
    def settings(self) -> dict[str, int]:
        """The settings that determine the crops, besides the data."""
        random = {"crops": self.crops, "seed": self.seed} if self.crops else {"crops": 0}
        return {"size": self.size, **random}

    def __getitem__(self, index: int) -> list[tuple[Tensor, dict]]:
        dataset, record = self._indices[index]
        try:
            image, target = self.datasets[dataset][record]
        except UnreadableImage:
            return []
        if not self.crops:
            return [self._crop(image, target, 0.5, False)]
        samples = []
        for number in range(self.crops):
            rng = np.random.default_rng([self.seed, 2, index, number])
            samples.append(
                self._crop(image, target, rng.random(), number > 0 and rng.random() < 0.5)
            )
        return samples

    def _crop(
        self, image: Image.Image, target: dict, position: float, flip: bool
    ) -> tuple[Tensor, dict]:
        """The crop at `position` along the long side: 0 is its start, 1 its end."""
        size, old = self.size, (image.height, image.width)
        new = resized_shape(*old, size, max_size=size * max(old))
        top, left = (int(position * (side - size + 1)) for side in new)
        y, x = old[0] / new[0], old[1] / new[1]
        # Crop and resize in one step, because a whole resized panorama would be huge.
        right, bottom = min((left + size) * x, old[1]), min((top + size) * y, old[0])
        window = (left * x, top * y, right, bottom)
        picture = image.resize((size, size), Image.Resampling.BILINEAR, box=window)
        offset = torch.tensor([left, top, left, top])
        boxes, keep = crop_boxes(scale_boxes(target["boxes"], old, new) - offset, size)
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = flip_boxes(boxes, size)
        cropped = {"boxes": boxes, "labels": target["labels"][keep], "dropped": int((~keep).sum())}
        return to_uint8_tensor(picture), cropped


def crop_boxes(boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Clip boxes [N, 4], legacy xyxy in pixels of a crop of side `size`, to the crop.

    Returns:
        The boxes [M, 4] that keep at least `MIN_VISIBLE` of their legacy area, and their mask [N].
    """
    corners = torch.cat((boxes[:, :2].clamp(min=0), boxes[:, 2:].clamp(max=size - 1)), dim=1)
    inside = (corners[:, 2:] - corners[:, :2] + 1 > 0).all(1)
    keep = inside & (legacy_areas(corners) >= MIN_VISIBLE * legacy_areas(boxes))
    return clip_boxes(boxes[keep], size, size), keep
