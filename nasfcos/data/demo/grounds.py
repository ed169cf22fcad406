"""The textured backgrounds of the demo scenes.

A painter gets the random generator and the coordinates y and x of all pixels, [H, W] float32, and
returns a picture [H, W, 3] of about 0..1.
"""

from collections.abc import Callable

import numpy as np

from .painting import mix, noise, random_colour, step

Painter = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _sky(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    low = random_colour(rng, (0.5, 0.62), (0.1, 0.3))
    high = random_colour(rng, (0.55, 0.65), (0.4, 0.65))
    colour = mix(high, low, y / len(y))
    clouds = np.clip(noise(rng, *y.shape, 90, 5) * 1.6, 0, 1)
    return mix(colour, np.ones(3), 0.75 * clouds)


def _stone(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    stone = random_colour(rng, (0, 1), (0.02, 0.18), rng.uniform(0.45, 0.8))
    relief = noise(rng, *y.shape, 60, 5)
    slope = np.gradient(relief, axis=0) + np.gradient(relief, axis=1)
    return stone * (1 + 0.22 * relief - 1.6 * slope)[..., None]


def _planks(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    wood = random_colour(rng, (0.05, 0.1), (0.3, 0.55), rng.uniform(0.45, 0.75))
    pitch = rng.uniform(34, 60)
    row = (y / pitch).astype(int)
    tone = rng.uniform(0.82, 1.1, row.max() + 1)[row]
    shift = rng.uniform(0, 500, row.max() + 1)[row]
    warp = noise(rng, *y.shape, 50, 3)
    grain = np.sin((y + 5 * warp) * 1.3 + 0.02 * (x + shift))
    seam = step(np.minimum(y % pitch, pitch - y % pitch) - 1, 1.5)
    return wood * (tone * (1 + 0.07 * grain + 0.1 * warp) * (0.55 + 0.45 * seam))[..., None]


def _tiles(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    pitch = rng.uniform(30, 56)
    one = random_colour(rng, (0, 1), (0.05, 0.35))
    two = random_colour(rng, (0, 1), (0.1, 0.4), 0.7)
    turned = rng.uniform(-0.4, 0.4)
    s, t = x * np.cos(turned) + y * np.sin(turned), y * np.cos(turned) - x * np.sin(turned)
    odd = (np.floor(s / pitch) + np.floor(t / pitch)) % 2
    joint = np.minimum(
        np.minimum(s % pitch, pitch - s % pitch), np.minimum(t % pitch, pitch - t % pitch)
    )
    tone = (1 + 0.1 * noise(rng, *y.shape, 40)) * (0.72 + 0.28 * step(joint - 1.2, 1.5))
    return mix(one, two, odd) * tone[..., None]


def _cloth(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    one = random_colour(rng, (0, 1), (0.2, 0.5), 0.8)
    two = random_colour(rng, (0, 1), (0.1, 0.4), 0.9)
    pitch = rng.uniform(18, 40)
    bands = step(np.sin(x * 2 * np.pi / pitch), 0.3) * 0.5
    bands += step(np.sin(y * 2 * np.pi / pitch), 0.3) * 0.5
    weave = 0.05 * (np.sin(x * 2.1) + np.sin(y * 2.1))
    folds = 0.18 * noise(rng, *y.shape, 110, 2)
    return mix(one, two, bands) * (1 + weave + folds)[..., None]


def _grass(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    height, width = y.shape
    grass = random_colour(rng, (0.2, 0.3), (0.4, 0.65), 0.6)
    blades = noise(rng, height, width * 3, 9, 3)[:, ::3]
    patches = noise(rng, *y.shape, 80, 3)
    return grass * (1 + 0.35 * blades + 0.25 * patches)[..., None]


def _sand(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    sand = random_colour(rng, (0.09, 0.13), (0.2, 0.4), 0.9)
    ripples = np.sin((y + 14 * noise(rng, *y.shape, 90, 3)) * rng.uniform(0.25, 0.45))
    grains = rng.normal(0, 0.035, y.shape)
    return sand * (0.92 + 0.07 * ripples + grains)[..., None]


_GROUNDS: dict[str, Painter] = {
    "sky": _sky,
    "stone": _stone,
    "planks": _planks,
    "tiles": _tiles,
    "cloth": _cloth,
    "grass": _grass,
    "sand": _sand,
}


def draw_ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random textured background [H, W, 3] of about 0..1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return _GROUNDS[rng.choice(list(_GROUNDS))](rng, y, x)
