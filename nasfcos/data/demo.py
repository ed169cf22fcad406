"""A detection data set from nothing: drawn scenes with exact boxes, in COCO format.

Six kinds of shaded, textured objects (ball, crate, star, ring, leaf, bottle) lie on textured
grounds, from 16 to 200 pixels large and most of them in any direction. They overlap, hide parts of
each other and leave the picture; some pictures are empty. A box encloses the visible part of its
object.
Every picture has its own random generator, made from (seed, split, number).
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import read_json
from .records import DataError

logger = logging.getLogger(__name__)

_SETTINGS_FILE = "settings.json"
_VERSION = 2  # of the drawings; raise it whenever pictures change
_LIGHT = np.array([-0.5, -0.62, 0.6])  # towards the light: upper left, in front
_LIGHT /= np.linalg.norm(_LIGHT)


@dataclass(frozen=True)
class DemoSettings:
    """What determines the data set: numbers of pictures, long and short side, seed."""

    train: int = 400
    val: int = 100
    long_side: int = 320
    short_side: int = 256
    seed: int = 0


# ----------------------------------------------------------------------------------- small helpers
def _noise(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 4):
    """Smooth fractal noise [H, W], about -1..1; `cell`: size of the largest blotches in pixels."""
    total = np.zeros((height, width), np.float32)
    strength = 0.55
    for _ in range(octaves):
        rows, columns = int(height / cell) + 2, int(width / cell) + 2
        grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        shift = (1 + width / cell, 1 + height / cell)
        layer = grid.resize((width, height), Image.Resampling.BICUBIC, box=(0.5, 0.5, *shift))
        total += strength * np.asarray(layer)
        strength /= 2
        cell = max(cell / 2, 1.5)
    return total


def _step(edge: np.ndarray, softness: float) -> np.ndarray:
    """0 where `edge` is below zero, 1 above, with a ramp of the given width."""
    return np.clip(edge / softness + 0.5, 0, 1)


def _mix(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Colours a to b; amount [H, W]."""
    return a + (b - a) * amount[..., None]


def _colour(rng: np.random.Generator, hue: tuple[float, float], saturation=(0.6, 0.95), value=1.0):
    """An RGB colour in 0..1; hue in turns."""
    h, s = rng.uniform(*hue) % 1.0, rng.uniform(*saturation)
    v = value * rng.uniform(0.8, 1.0)
    wheel = np.clip(np.abs((h * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return v * (1 - s + s * wheel)


def _shade(colour: np.ndarray, normal: np.ndarray, ambient=0.42, gloss=0.0, power=24.0):
    """Light a surface: colour [H, W, 3] or [3], normal [H, W, 3] towards the viewer (z)."""
    light = np.clip(normal @ _LIGHT, 0, 1)
    half = _LIGHT + np.array([0, 0, 1.0])
    shine = gloss * np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** power
    return colour * (ambient + (1.15 - ambient) * light)[..., None] + shine[..., None]


def _normal(dx: np.ndarray, dy: np.ndarray, z=1.0) -> np.ndarray:
    n = np.stack((dx, dy, np.broadcast_to(z, dx.shape)), -1)
    return n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-6)


# ----------------------------------------------------------------------------------------- objects
# A painter gets coordinates u (right) and v (down) in the object's own frame, where the object
# fills about -1..1, the angle of that frame (so that the light stays where it is) and the size of
# a pixel. It answers with coverage [H, W] and colour [H, W, 3], both 0..1.
def _to_picture(dx, dy, angle):
    """A direction of the object's frame in that of the picture."""
    return np.cos(angle) * dx - np.sin(angle) * dy, np.sin(angle) * dx + np.cos(angle) * dy


def _ball(rng, u, v, angle, pixel):
    r = np.hypot(u, v)
    z = np.sqrt(np.clip(1 - r**2, 0, 1))
    base = _colour(rng, (0, 1))
    other = _colour(rng, (0, 1), (0.0, 0.25))
    kind = rng.integers(3)
    tilt = rng.uniform(-0.5, 0.5)
    longitude = np.arctan2(u, z * np.cos(tilt) + v * np.sin(tilt) + 1e-6)
    if kind == 0:  # beach ball
        pattern = _step(np.sin(longitude * 3 + rng.uniform(0, 6)), 0.25 + 4 * pixel)
    elif kind == 1:  # one band
        pattern = _step(0.28 - np.abs(v - tilt * z), 0.06 + 2 * pixel)
    else:
        pattern = np.zeros_like(r)
    colour = _mix(base, other, pattern)
    dx, dy = _to_picture(u, v, angle)
    return _step(1 - r, pixel), _shade(colour, _normal(dx, dy, z), gloss=0.75, power=40)


def _crate(rng, u, v, angle, pixel):
    half = 0.8
    edge = half - np.maximum(np.abs(u), np.abs(v))
    wood = _colour(rng, (0.06, 0.105), (0.45, 0.7), rng.uniform(0.72, 0.95))
    grain = 0.5 + 0.5 * np.sin(
        u * rng.uniform(9, 14) * 3 + 1.6 * np.sin(v * 2.3 + rng.uniform(0, 6)) + rng.uniform(0, 6)
    )
    colour = wood * (0.86 + 0.14 * grain)[..., None]
    planks = (u / half + 1) * 2.5
    seam = np.abs(planks - np.round(planks)) * 0.37
    colour = colour * (0.5 + 0.5 * _step(seam - 0.03, 0.04 + pixel))[..., None]
    frame = 0.24 - edge
    cross = 0.15 - np.abs(u - v if rng.random() < 0.5 else u + v) * 0.7071
    rail = np.maximum(frame, cross)
    shadow = _step(rail + 0.07, 0.06 + pixel) * 0.45
    colour = colour * (1 - shadow)[..., None]
    light = wood * (0.98 + 0.16 * grain)[..., None] * 1.16
    colour = _mix(colour, np.clip(light, 0, 1), _step(rail, 0.02 + pixel))
    bevel = np.clip(1 - edge / 0.09, 0, 1)
    sideways = np.abs(u) > np.abs(v)
    dx, dy = _to_picture(
        np.where(sideways, np.sign(u), 0) * bevel, np.where(sideways, 0, np.sign(v)) * bevel, angle
    )
    return _step(edge, pixel), _shade(colour, _normal(dx, dy, 1.2), ambient=0.5)


def _star(rng, u, v, angle, pixel):
    sector = 2 * np.pi / 5
    theta = np.arctan2(u, -v)
    folded = np.abs((theta + sector / 2) % sector - sector / 2)
    r = np.hypot(u, v)
    x, y = r * np.cos(folded), r * np.sin(folded)
    inner = rng.uniform(0.4, 0.46)
    ax, ay = 1.0, 0.0
    bx, by = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
    length = np.hypot(bx - ax, by - ay)
    nx, ny = (by - ay) / length, -(bx - ax) / length  # outward normal of the arm's side
    edge = -((x - ax) * nx + (y - ay) * ny)
    # Each arm is a roof of two faces; the ridge runs from the centre to the tip.
    turn = theta - ((theta + sector / 2) % sector - sector / 2)
    side = np.where((theta + sector / 2) % sector - sector / 2 >= 0, 1.0, -1.0)
    face = np.arctan2(ny * side, nx) + turn
    dx, dy = _to_picture(np.sin(face), -np.cos(face), angle)
    hue = (0.11, 0.16) if rng.random() < 0.6 else (0.9, 1.08)
    colour = _colour(rng, hue, (0.75, 0.95))
    rim = _step(0.05 - edge, 0.03 + pixel) * 0.25
    shaded = _shade(colour * (1 - rim)[..., None], _normal(dx, dy, 1.1), ambient=0.35, gloss=0.3)
    return _step(edge, pixel), shaded


def _ring(rng, u, v, angle, pixel):
    r = np.hypot(u, v)
    width = rng.uniform(0.2, 0.27)
    middle = 1 - width
    across = (r - middle) / width
    z = np.sqrt(np.clip(1 - across**2, 0, 1))
    around = np.arctan2(v, u)
    dx, dy = _to_picture(across * np.cos(around), across * np.sin(around), angle)
    if rng.random() < 0.5:  # gold or steel
        colour = _colour(rng, (0.1, 0.14), (0.5, 0.7)) if rng.random() < 0.5 else np.full(3, 0.75)
    else:  # lifebuoy
        band = _step(np.sin(around * 4 + rng.uniform(0, 6)), 0.1 + 3 * pixel)
        colour = _mix(np.full(3, 0.95), _colour(rng, (0, 1), (0.8, 0.95)), band)
    edge = width - np.abs(r - middle)
    return _step(edge, pixel), _shade(colour, _normal(dx, dy, z), gloss=0.8, power=18)


def _leaf(rng, u, v, angle, pixel):
    bend = rng.uniform(-0.16, 0.16)
    x = u - bend * (1 - v**2)
    t = np.clip((v + 0.98) / 1.72, 0, 1)  # 0 at the tip, 1 where the stem begins
    teeth = 0.025 * np.abs((t * 11) % 1 - 0.5)
    outline = rng.uniform(0.46, 0.58) * 1.54 * t**0.75 * (1 - t) ** 0.45 - teeth
    blade = np.where((v > -0.98) & (v < 0.74), outline - np.abs(x), -1.0)
    stem = np.where((v > 0.6) & (v < 0.98), 0.04 - np.abs(x), -1.0)
    edge = np.maximum(blade * 0.8, stem)
    hue = [(0.22, 0.36), (0.22, 0.36), (0.02, 0.13)][rng.integers(3)]  # summer, or autumn
    colour = _colour(rng, hue, (0.6, 0.85), 0.85)
    ribs = np.abs(((t + np.abs(x) * 0.75) * 7) % 1 - 0.5)
    veins = np.maximum(
        _step(0.028 - np.abs(x), 0.03 + pixel), 0.5 * _step(ribs - 0.42, 0.08 + 4 * pixel)
    )
    tone = 1 + 0.16 * np.sign(x) * _step(np.abs(x), 0.05) - 0.2 * _step(0.06 - edge, 0.1)
    colour = np.clip(_mix(colour * tone[..., None], np.array([0.93, 0.95, 0.6]), veins * 0.6), 0, 1)
    dx, dy = _to_picture(np.sin(ribs * 5) * 0.12 + 0.35 * x, 0.25 * v, angle)
    return _step(edge, pixel), _shade(colour, _normal(dx, dy), ambient=0.5, gloss=0.1)


def _bottle(rng, u, v, angle, pixel):
    body, neck = rng.uniform(0.32, 0.38), rng.uniform(0.11, 0.14)
    shoulder = np.clip((v + 0.42) / 0.34, 0, 1)
    half = neck + (body - neck) * shoulder**2 * (3 - 2 * shoulder)
    half = np.where(v < -0.8, neck + 0.045, half)  # the cap
    corner = np.clip((v - 0.86) / 0.12, 0, 1)
    half = half - 0.1 * corner**2
    edge = np.minimum(half - np.abs(u), np.minimum(v + 0.98, 0.98 - v))
    glass = _colour(
        rng, [(0.3, 0.42), (0.05, 0.09), (0.55, 0.62)][rng.integers(3)], (0.65, 0.9), 0.62
    )
    paper = _colour(rng, (0, 1), (0.05, 0.35))
    cap = _colour(rng, (0, 1), (0.3, 0.9))
    label = _step(np.minimum(v - 0.12, 0.66 - v), 0.03 + pixel)
    stripe = _step(0.05 - np.abs(v - 0.39), 0.03 + pixel)
    colour = _mix(glass, paper, label)
    colour = _mix(colour, cap * 0.8, label * stripe)
    colour = _mix(colour, cap, _step(-0.8 - v, 0.02 + pixel))
    across = np.clip(u / np.maximum(half, 1e-3), -1, 1)
    dx, dy = _to_picture(across, np.zeros_like(u), angle)
    shaded = _shade(colour, _normal(dx, dy, np.sqrt(1.02 - across**2)), ambient=0.45, gloss=0.25)
    gleam = np.exp(-(((across + 0.45) / 0.13) ** 2)) * (1 - 0.75 * label) * 0.5
    return _step(edge, pixel), shaded + gleam[..., None]


_PAINTERS: dict[str, Callable] = {
    "ball": _ball,
    "crate": _crate,
    "star": _star,
    "ring": _ring,
    "leaf": _leaf,
    "bottle": _bottle,
}
CLASSES = tuple(_PAINTERS)
# Area of each kind over the square of its size, about.
_FILL = {"ball": 0.78, "crate": 0.64, "star": 0.3, "ring": 0.56, "leaf": 0.23, "bottle": 0.26}
# Largest turn to either side, in radians, of the kinds that do not lie in any direction.
_TILT = {"leaf": 0.8, "bottle": 0.4}


# ----------------------------------------------------------------------------------------- grounds
def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A textured background [H, W, 3]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    kind = rng.choice(["sky", "stone", "planks", "tiles", "cloth", "grass", "sand"])
    if kind == "sky":
        low, high = _colour(rng, (0.5, 0.62), (0.1, 0.3)), _colour(rng, (0.55, 0.65), (0.4, 0.65))
        colour = _mix(high, low, y / height)
        clouds = np.clip(_noise(rng, height, width, 90, 5) * 1.6, 0, 1)
        return _mix(colour, np.ones(3), 0.75 * clouds)
    if kind == "stone":
        stone = _colour(rng, (0, 1), (0.02, 0.18), rng.uniform(0.45, 0.8))
        relief = _noise(rng, height, width, 60, 5)
        slope = np.gradient(relief, axis=0) + np.gradient(relief, axis=1)
        return stone * (1 + 0.22 * relief - 1.6 * slope)[..., None]
    if kind == "planks":
        wood = _colour(rng, (0.05, 0.1), (0.3, 0.55), rng.uniform(0.45, 0.75))
        pitch = rng.uniform(34, 60)
        row = (y / pitch).astype(int)
        tone = rng.uniform(0.82, 1.1, row.max() + 1)[row]
        shift = rng.uniform(0, 500, row.max() + 1)[row]
        warp = _noise(rng, height, width, 50, 3)
        grain = np.sin((y + 5 * warp) * 1.3 + 0.02 * (x + shift))
        seam = _step(np.minimum(y % pitch, pitch - y % pitch) - 1, 1.5)
        return wood * (tone * (1 + 0.07 * grain + 0.1 * warp) * (0.55 + 0.45 * seam))[..., None]
    if kind == "tiles":
        pitch = rng.uniform(30, 56)
        one, two = _colour(rng, (0, 1), (0.05, 0.35)), _colour(rng, (0, 1), (0.1, 0.4), 0.7)
        turned = rng.uniform(-0.4, 0.4)
        s, t = x * np.cos(turned) + y * np.sin(turned), y * np.cos(turned) - x * np.sin(turned)
        odd = (np.floor(s / pitch) + np.floor(t / pitch)) % 2
        joint = np.minimum(
            np.minimum(s % pitch, pitch - s % pitch), np.minimum(t % pitch, pitch - t % pitch)
        )
        tone = (1 + 0.1 * _noise(rng, height, width, 40)) * (0.72 + 0.28 * _step(joint - 1.2, 1.5))
        return _mix(one, two, odd) * tone[..., None]
    if kind == "cloth":
        one, two = _colour(rng, (0, 1), (0.2, 0.5), 0.8), _colour(rng, (0, 1), (0.1, 0.4), 0.9)
        pitch = rng.uniform(18, 40)
        bands = _step(np.sin(x * 2 * np.pi / pitch), 0.3) * 0.5
        bands += _step(np.sin(y * 2 * np.pi / pitch), 0.3) * 0.5
        weave = 0.05 * (np.sin(x * 2.1) + np.sin(y * 2.1))
        folds = 0.18 * _noise(rng, height, width, 110, 2)
        return _mix(one, two, bands) * (1 + weave + folds)[..., None]
    if kind == "grass":
        grass = _colour(rng, (0.2, 0.3), (0.4, 0.65), 0.6)
        blades = _noise(rng, height, width * 3, 9, 3)[:, ::3]
        patches = _noise(rng, height, width, 80, 3)
        return grass * (1 + 0.35 * blades + 0.25 * patches)[..., None]
    sand = _colour(rng, (0.09, 0.13), (0.2, 0.4), 0.9)
    ripples = np.sin((y + 14 * _noise(rng, height, width, 90, 3)) * rng.uniform(0.25, 0.45))
    grains = rng.normal(0, 0.035, (height, width))
    return sand * (0.92 + 0.07 * ripples + grains)[..., None]


# ------------------------------------------------------------------------------------------ scenes
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


def _visible_enough(owner: np.ndarray, number: int, area: float) -> bool:
    """Whether at least 55 % of an object is seen, in a box of at least 8 x 8 pixels."""
    seen = owner == number
    if seen.sum() < max(0.55 * area, 24):
        return False
    return all(np.ptp(np.flatnonzero(seen.any(axis))) >= 7 for axis in (0, 1))


def draw_scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int], int]]]:
    """One picture.

    Returns:
        The picture [H, W, 3] uint8, and for every object its label in 1..len(CLASSES), the box
        (x, y, w, h) of its visible part in whole pixels, and its visible area.
    """
    canvas = np.clip(_ground(rng, height, width), 0, 1)
    owner = np.zeros((height, width), np.int16)  # number of the object seen at each pixel
    labels: list[int] = []
    areas: list[float] = []
    count = 0 if rng.random() < 0.06 else int(rng.integers(3, 11))
    largest = min(200.0, 0.85 * min(height, width))
    sizes = np.exp(rng.triangular(np.log(16), np.log(0.3 * largest), np.log(largest), count))
    # Large ones first, so that small ones lie in front of them.
    for size in sorted(sizes, reverse=True):
        label = int(rng.integers(len(CLASSES)))
        angle = rng.uniform(-1, 1) * _TILT.get(CLASSES[label], np.pi)
        paint_seed = int(rng.integers(2**31))
        for _ in range(12):  # places to try
            centre = rng.uniform((0.0, 0.0), (width, height))
            reach = int(size * 0.72) + 2  # half the diagonal
            x0, x1 = max(0, int(centre[0]) - reach), min(width, int(centre[0]) + reach + 1)
            y0, y1 = max(0, int(centre[1]) - reach), min(height, int(centre[1]) + reach + 1)
            y, x = np.mgrid[y0:y1, x0:x1]
            x, y = (x - centre[0]) * 2 / size, (y - centre[1]) * 2 / size
            u = np.cos(angle) * x + np.sin(angle) * y
            v = np.cos(angle) * y - np.sin(angle) * x
            alpha, colour = _PAINTERS[CLASSES[label]](
                np.random.default_rng(paint_seed), u, v, angle, 2 / size
            )
            solid = alpha > 0.5
            # What lies outside of the picture is hidden too, so the area is that of the whole.
            whole = _FILL[CLASSES[label]] * size**2
            tried = owner.copy()
            tried[y0:y1, x0:x1][solid] = len(labels) + 1
            touched = [int(i) for i in np.unique(owner[y0:y1, x0:x1][solid]) if i]
            if _visible_enough(tried, len(labels) + 1, whole) and all(
                _visible_enough(tried, i, areas[i - 1]) for i in touched
            ):
                break
        else:
            continue
        owner = tried
        labels.append(label + 1)
        areas.append(max(whole, float(solid.sum())))
        _drop_shadow(canvas, alpha, (x0, y0), size)
        region = canvas[y0:y1, x0:x1]
        region += (np.clip(colour, 0, 1) - region) * alpha[..., None]
    objects = []
    for number, label in enumerate(labels, 1):
        rows, columns = np.nonzero(owner == number)
        left, top = int(columns.min()), int(rows.min())
        box = (left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1)
        objects.append((label, box, len(rows)))
    canvas *= rng.uniform(0.88, 1.06)
    canvas += rng.normal(0, rng.uniform(0.004, 0.018), canvas.shape)
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), objects


def _drop_shadow(
    canvas: np.ndarray, alpha: np.ndarray, origin: tuple[int, int], size: float
) -> None:
    """Darken the canvas to the lower right of an object whose patch lies at `origin`."""
    offset, radius = int(round(0.05 * size)) + 1, max(1, int(0.03 * size))
    margin = 2 * radius + 1
    soft = _blur(np.pad(alpha, margin), radius)
    x0, y0 = origin[0] + offset - margin, origin[1] + offset - margin
    left, top = max(0, -x0), max(0, -y0)
    right = min(soft.shape[1], canvas.shape[1] - x0)
    bottom = min(soft.shape[0], canvas.shape[0] - y0)
    if right > left and bottom > top:
        region = canvas[y0 + top : y0 + bottom, x0 + left : x0 + right]
        region *= 1 - 0.42 * soft[top:bottom, left:right, None]


# ------------------------------------------------------------------------------------------- files
def _write_split(folder: Path, split: str, count: int, settings: DemoSettings) -> None:
    images, annotations = [], []
    (folder / split).mkdir()
    for number in range(count):
        rng = np.random.default_rng([settings.seed, ("train", "val").index(split), number])
        height, width = settings.short_side, settings.long_side
        if rng.random() < 0.25:
            height, width = width, height
        picture, objects = draw_scene(rng, height, width)
        name = f"{number + 1:06d}.jpg"
        Image.fromarray(picture).save(folder / split / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, box, area in objects:
            annotation = {"id": len(annotations) + 1, "image_id": number + 1, "iscrowd": 0}
            annotation |= {"category_id": label, "bbox": list(box), "area": area}
            annotations.append(annotation)
    content = {
        "info": {"description": "Generated demo scenes of NAS-FCOS", **asdict(settings)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def make_demo_data(output: str | Path, settings: DemoSettings | None = None) -> bool:
    """Write the data set: `train/`, `val/`, `annotations/{train,val}.json`, `settings.json`.

    The folder appears complete or not at all. One that was made before with other settings is
    replaced; with the same settings nothing is done.

    Returns:
        Whether anything was written.

    Raises:
        DataError: settings that no picture can be made with.
        FileExistsError: `output` holds something else than a demo set.
    """
    settings = settings or DemoSettings()
    if min(settings.train, settings.val) < 1 or settings.seed < 0:
        raise DataError("the demo set needs at least one picture per split and a seed from 0")
    if not 64 <= settings.short_side <= settings.long_side:
        raise DataError("the sides of demo pictures must be at least 64 pixels, the long one last")
    output = Path(output)
    wanted = {"version": _VERSION, **asdict(settings)}
    if output.exists():
        found = read_json(output / _SETTINGS_FILE)
        if found == wanted:
            logger.info("%s is there already", output)
            return False
        if found is None and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(
                f"{output} exists and is no demo data set; name another folder or remove it"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        fresh = scratch / "new"
        (fresh / "annotations").mkdir(parents=True)
        _write_split(fresh, "train", settings.train, settings)
        _write_split(fresh, "val", settings.val, settings)
        (fresh / _SETTINGS_FILE).write_text(json.dumps(wanted, indent=1) + "\n")
        if output.exists():
            os.rename(output, scratch / "old")
        os.rename(fresh, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("wrote %d + %d pictures to %s", settings.train, settings.val, output)
    return True
