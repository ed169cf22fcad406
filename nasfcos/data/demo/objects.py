"""The kinds of objects in the demo scenes.

A painter gets coordinates u (right) and v (down) [H, W] in the object's own frame, where the object
fills about -1..1, the angle of that frame in the picture (the light does not turn with the object),
and the size of a pixel in the units of u and v. It returns coverage [H, W] and colour [H, W, 3];
coverage is 0..1, and colour is clipped to 0..1 by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .painting import mix, random_colour, shade, step, unit_normal

Painted = tuple[np.ndarray, np.ndarray]
Painter = Callable[[np.random.Generator, np.ndarray, np.ndarray, float, float], Painted]


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    Attributes:
        paint: see the module.
        fill: approximate area of an object over the square of its size.
        tilt: largest rotation to either side, in radians.
    """

    paint: Painter
    fill: float
    tilt: float = np.pi


def _to_picture(dx: np.ndarray, dy: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate directions from the object's frame to the picture's."""
    return np.cos(angle) * dx - np.sin(angle) * dy, np.sin(angle) * dx + np.cos(angle) * dy


def _ball(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
    r = np.hypot(u, v)
    z = np.sqrt(np.clip(1 - r**2, 0, 1))
    base = random_colour(rng, (0, 1))
    other = random_colour(rng, (0, 1), (0.0, 0.25))
    kind = rng.integers(3)
    tilt = rng.uniform(-0.5, 0.5)
    longitude = np.arctan2(u, z * np.cos(tilt) + v * np.sin(tilt) + 1e-6)
    if kind == 0:  # beach ball
        pattern = step(np.sin(longitude * 3 + rng.uniform(0, 6)), 0.25 + 4 * pixel)
    elif kind == 1:  # one band
        pattern = step(0.28 - np.abs(v - tilt * z), 0.06 + 2 * pixel)
    else:
        pattern = np.zeros_like(r)
    colour = mix(base, other, pattern)
    dx, dy = _to_picture(u, v, angle)
    return step(1 - r, pixel), shade(colour, unit_normal(dx, dy, z), gloss=0.75, power=40)


def _crate(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
    half = 0.8
    edge = half - np.maximum(np.abs(u), np.abs(v))
    wood = random_colour(rng, (0.06, 0.105), (0.45, 0.7), rng.uniform(0.72, 0.95))
    grain = 0.5 + 0.5 * np.sin(
        u * rng.uniform(9, 14) * 3 + 1.6 * np.sin(v * 2.3 + rng.uniform(0, 6)) + rng.uniform(0, 6)
    )
    colour = wood * (0.86 + 0.14 * grain)[..., None]
    planks = (u / half + 1) * 2.5
    seam = np.abs(planks - np.round(planks)) * 0.37
    colour = colour * (0.5 + 0.5 * step(seam - 0.03, 0.04 + pixel))[..., None]
    frame = 0.24 - edge
    cross = 0.15 - np.abs(u - v if rng.random() < 0.5 else u + v) * 0.7071
    rail = np.maximum(frame, cross)
    shadow = step(rail + 0.07, 0.06 + pixel) * 0.45
    colour = colour * (1 - shadow)[..., None]
    light = wood * (0.98 + 0.16 * grain)[..., None] * 1.16
    colour = mix(colour, np.clip(light, 0, 1), step(rail, 0.02 + pixel))
    bevel = np.clip(1 - edge / 0.09, 0, 1)
    sideways = np.abs(u) > np.abs(v)
    dx, dy = _to_picture(
        np.where(sideways, np.sign(u), 0) * bevel, np.where(sideways, 0, np.sign(v)) * bevel, angle
    )
    return step(edge, pixel), shade(colour, unit_normal(dx, dy, 1.2), ambient=0.5)


def _star(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
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
    colour = random_colour(rng, hue, (0.75, 0.95))
    rim = step(0.05 - edge, 0.03 + pixel) * 0.25
    shaded = shade(colour * (1 - rim)[..., None], unit_normal(dx, dy, 1.1), ambient=0.35, gloss=0.3)
    return step(edge, pixel), shaded


def _ring(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
    r = np.hypot(u, v)
    width = rng.uniform(0.2, 0.27)
    middle = 1 - width
    across = (r - middle) / width
    z = np.sqrt(np.clip(1 - across**2, 0, 1))
    around = np.arctan2(v, u)
    dx, dy = _to_picture(across * np.cos(around), across * np.sin(around), angle)
    if rng.random() < 0.5:
        golden = rng.random() < 0.5  # else of steel
        colour = random_colour(rng, (0.1, 0.14), (0.5, 0.7)) if golden else np.full(3, 0.75)
    else:  # lifebuoy
        band = step(np.sin(around * 4 + rng.uniform(0, 6)), 0.1 + 3 * pixel)
        colour = mix(np.full(3, 0.95), random_colour(rng, (0, 1), (0.8, 0.95)), band)
    edge = width - np.abs(r - middle)
    return step(edge, pixel), shade(colour, unit_normal(dx, dy, z), gloss=0.8, power=18)


def _leaf(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
    bend = rng.uniform(-0.16, 0.16)
    x = u - bend * (1 - v**2)
    t = np.clip((v + 0.98) / 1.72, 0, 1)  # 0 at the tip, 1 where the stem begins
    teeth = 0.025 * np.abs((t * 11) % 1 - 0.5)
    outline = rng.uniform(0.46, 0.58) * 1.54 * t**0.75 * (1 - t) ** 0.45 - teeth
    blade = np.where((v > -0.98) & (v < 0.74), outline - np.abs(x), -1.0)
    stem = np.where((v > 0.6) & (v < 0.98), 0.04 - np.abs(x), -1.0)
    edge = np.maximum(blade * 0.8, stem)
    hue = [(0.22, 0.36), (0.22, 0.36), (0.02, 0.13)][rng.integers(3)]  # summer, or autumn
    colour = random_colour(rng, hue, (0.6, 0.85), 0.85)
    ribs = np.abs(((t + np.abs(x) * 0.75) * 7) % 1 - 0.5)
    veins = np.maximum(
        step(0.028 - np.abs(x), 0.03 + pixel), 0.5 * step(ribs - 0.42, 0.08 + 4 * pixel)
    )
    tone = 1 + 0.16 * np.sign(x) * step(np.abs(x), 0.05) - 0.2 * step(0.06 - edge, 0.1)
    colour = np.clip(mix(colour * tone[..., None], np.array([0.93, 0.95, 0.6]), veins * 0.6), 0, 1)
    dx, dy = _to_picture(np.sin(ribs * 5) * 0.12 + 0.35 * x, 0.25 * v, angle)
    return step(edge, pixel), shade(colour, unit_normal(dx, dy), ambient=0.5, gloss=0.1)


def _bottle(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, angle: float, pixel: float
) -> Painted:
    body, neck = rng.uniform(0.32, 0.38), rng.uniform(0.11, 0.14)
    shoulder = np.clip((v + 0.42) / 0.34, 0, 1)
    half = neck + (body - neck) * shoulder**2 * (3 - 2 * shoulder)
    half = np.where(v < -0.8, neck + 0.045, half)  # the cap
    corner = np.clip((v - 0.86) / 0.12, 0, 1)
    half = half - 0.1 * corner**2
    edge = np.minimum(half - np.abs(u), np.minimum(v + 0.98, 0.98 - v))
    glass = random_colour(
        rng, [(0.3, 0.42), (0.05, 0.09), (0.55, 0.62)][rng.integers(3)], (0.65, 0.9), 0.62
    )
    paper = random_colour(rng, (0, 1), (0.05, 0.35))
    cap = random_colour(rng, (0, 1), (0.3, 0.9))
    label = step(np.minimum(v - 0.12, 0.66 - v), 0.03 + pixel)
    stripe = step(0.05 - np.abs(v - 0.39), 0.03 + pixel)
    colour = mix(glass, paper, label)
    colour = mix(colour, cap * 0.8, label * stripe)
    colour = mix(colour, cap, step(-0.8 - v, 0.02 + pixel))
    across = np.clip(u / np.maximum(half, 1e-3), -1, 1)
    dx, dy = _to_picture(across, np.zeros_like(u), angle)
    shaded = shade(colour, unit_normal(dx, dy, np.sqrt(1.02 - across**2)), ambient=0.45, gloss=0.25)
    gleam = np.exp(-(((across + 0.45) / 0.13) ** 2)) * (1 - 0.75 * label) * 0.5
    return step(edge, pixel), shaded + gleam[..., None]


KINDS = {
    "ball": Kind(_ball, fill=0.78),
    "crate": Kind(_crate, fill=0.64),
    "star": Kind(_star, fill=0.3),
    "ring": Kind(_ring, fill=0.56),
    "leaf": Kind(_leaf, fill=0.23, tilt=0.8),
    "bottle": Kind(_bottle, fill=0.26, tilt=0.4),
}
CLASSES = tuple(KINDS)
