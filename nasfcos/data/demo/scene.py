"""Composing a demo scene: a ground, overlapping objects on it, and boxes of what is visible."""

from dataclasses import dataclass

import numpy as np

from .grounds import draw_ground
from .objects import CLASSES, KINDS

_MAX_POSITIONS = 12
"""Random positions that are tried before an object is given up."""


@dataclass(frozen=True)
class _Object:
    """An object without a position.

    `size` is that of its frame in pixels, `angle` its rotation in radians, and `seed` determines
    its pattern, which is the same wherever it is tried.
    """

    name: str
    size: float
    angle: float
    seed: int


@dataclass(frozen=True)
class _Patch:
    """An object painted at a position: coverage [h, w] and colour [h, w, 3] from (x0, y0) on."""

    x0: int
    y0: int
    alpha: np.ndarray
    colour: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the picture that the patch lies on."""
        height, width = self.alpha.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)

    @property
    def solid(self) -> np.ndarray:
        """[h, w] bool: the pixels that belong to the object."""
        return self.alpha > 0.5


def draw_scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int], int]]]:
    """One picture.

    Returns:
        The picture [H, W, 3] uint8, and for every object its label in 1..len(CLASSES), the box
        (x, y, w, h) of its visible part in whole pixels, and its visible area.
    """
    canvas = np.clip(draw_ground(rng, height, width), 0, 1)
    owner = np.zeros((height, width), np.int16)  # number of the visible object; 0 is the ground
    labels: list[int] = []
    areas: list[float] = []
    # Large ones first, so that small ones lie in front of them.
    for size in sorted(_random_sizes(rng, height, width), reverse=True):
        label = int(rng.integers(len(CLASSES)))
        angle = rng.uniform(-1, 1) * KINDS[CLASSES[label]].tilt
        thing = _Object(CLASSES[label], size, angle, seed=int(rng.integers(2**31)))
        # What lies outside of the picture counts as hidden, so the area is that of the whole.
        area = KINDS[thing.name].fill * size**2
        patch = _place(rng, thing, owner, [*areas, area])
        if patch is None:
            continue
        labels.append(label + 1)
        areas.append(max(area, float(patch.solid.sum())))
        owner[patch.window][patch.solid] = len(labels)
        _drop_shadow(canvas, patch, size)
        region = canvas[patch.window]
        region += (np.clip(patch.colour, 0, 1) - region) * patch.alpha[..., None]
    objects = [(label, *_visible_part(owner == i)) for i, label in enumerate(labels, 1)]
    canvas *= rng.uniform(0.88, 1.06)
    canvas += rng.normal(0, rng.uniform(0.004, 0.018), canvas.shape)
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), objects


def _random_sizes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The sizes of the objects of a picture in pixels; none for a few pictures."""
    count = 0 if rng.random() < 0.06 else int(rng.integers(3, 11))
    largest = min(200.0, 0.85 * min(height, width))
    return np.exp(rng.triangular(np.log(16), np.log(0.3 * largest), np.log(largest), count))


def _place(
    rng: np.random.Generator, thing: _Object, owner: np.ndarray, areas: list[float]
) -> _Patch | None:
    """Paint an object where enough of it, and of all that it covers, is visible.

    Args:
        rng: source of positions.
        thing: the object.
        owner: [H, W] int, the number of the object visible at each pixel.
        areas: areas of objects 1, 2, ... by number; the last one is that of `thing`.

    Returns:
        The patch, or None if no position was found.
    """
    height, width = owner.shape
    number = len(areas)
    for _ in range(_MAX_POSITIONS):
        patch = _paint(thing, rng.uniform((0.0, 0.0), (width, height)), height, width)
        after = owner.copy()
        after[patch.window][patch.solid] = number
        covered = [int(i) for i in np.unique(owner[patch.window][patch.solid]) if i]
        if all(_visible_enough(after == i, areas[i - 1]) for i in (number, *covered)):
            return patch
    return None


def _paint(thing: _Object, centre: np.ndarray, height: int, width: int) -> _Patch:
    """Paint an object around `centre` (x, y), cut off at the borders of the picture."""
    size, angle = thing.size, thing.angle
    reach = int(size * 0.72) + 2  # half the diagonal
    x0, x1 = max(0, int(centre[0]) - reach), min(width, int(centre[0]) + reach + 1)
    y0, y1 = max(0, int(centre[1]) - reach), min(height, int(centre[1]) + reach + 1)
    y, x = np.mgrid[y0:y1, x0:x1]
    x, y = (x - centre[0]) * 2 / size, (y - centre[1]) * 2 / size
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    rng = np.random.default_rng(thing.seed)
    return _Patch(x0, y0, *KINDS[thing.name].paint(rng, u, v, angle, 2 / size))


def _visible_enough(visible: np.ndarray, area: float) -> bool:
    """Whether 55 % of an object of this area is visible, in a box of at least 8 x 8 pixels."""
    if visible.sum() < max(0.55 * area, 24):
        return False
    return all(np.ptp(np.flatnonzero(visible.any(axis))) >= 7 for axis in (0, 1))


def _visible_part(visible: np.ndarray) -> tuple[tuple[int, int, int, int], int]:
    """The box (x, y, w, h) and the number of the pixels that are set in a mask [H, W]."""
    rows, columns = np.nonzero(visible)
    left, top = int(columns.min()), int(rows.min())
    box = (left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1)
    return box, len(rows)


def _blur(mask: np.ndarray, radius: int) -> np.ndarray:
    """Box blur, twice: soft enough for a shadow."""
    for _ in range(2):
        for axis in (0, 1):
            padded = np.pad(mask, [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)])
            total = np.cumsum(padded, axis=axis)
            high = np.take(total, np.arange(2 * radius + 1, total.shape[axis]), axis=axis)
            low = np.take(total, np.arange(0, total.shape[axis] - 2 * radius - 1), axis=axis)
            mask = (high - low) / (2 * radius + 1)
    return mask


def _drop_shadow(canvas: np.ndarray, patch: _Patch, size: float) -> None:
    """Darken the canvas to the lower right of an object of this size."""
    offset, radius = int(round(0.05 * size)) + 1, max(1, int(0.03 * size))
    margin = 2 * radius + 1
    soft = _blur(np.pad(patch.alpha, margin), radius)
    x0, y0 = patch.x0 + offset - margin, patch.y0 + offset - margin
    left, top = max(0, -x0), max(0, -y0)
    right = min(soft.shape[1], canvas.shape[1] - x0)
    bottom = min(soft.shape[0], canvas.shape[0] - y0)
    if right > left and bottom > top:
        region = canvas[y0 + top : y0 + bottom, x0 + left : x0 + right]
        region *= 1 - 0.42 * soft[top:bottom, left:right, None]
