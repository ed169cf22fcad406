"""Procedural painting: noise, colours and shading on arrays [H, W] and [H, W, 3] of values 0..1."""

import numpy as np
from PIL import Image

_LIGHT = np.array([-0.5, -0.62, 0.6])  # direction to the light: upper left, in front
_LIGHT /= np.linalg.norm(_LIGHT)


def noise(
    rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 4
) -> np.ndarray:
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


def step(edge: np.ndarray, softness: float) -> np.ndarray:
    """0 where `edge` is negative, 1 where it is positive, with a ramp `softness` wide between."""
    return np.clip(edge / softness + 0.5, 0, 1)


def mix(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Blend from colour `a` (amount 0) to colour `b` (amount 1); `amount` is [H, W]."""
    return a + (b - a) * amount[..., None]


def random_colour(
    rng: np.random.Generator,
    hue: tuple[float, float],
    saturation: tuple[float, float] = (0.6, 0.95),
    value: float = 1.0,
) -> np.ndarray:
    """A random RGB colour [3] in 0..1.

    Args:
        rng: source of randomness.
        hue, saturation: ranges to draw from; hue in turns of the colour circle.
        value: brightness; the colour gets 80 to 100 % of it.
    """
    h, s = rng.uniform(*hue) % 1.0, rng.uniform(*saturation)
    v = value * rng.uniform(0.8, 1.0)
    wheel = np.clip(np.abs((h * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return v * (1 - s + s * wheel)


def shade(
    colour: np.ndarray,
    normal: np.ndarray,
    ambient: float = 0.42,
    gloss: float = 0.0,
    power: float = 24.0,
) -> np.ndarray:
    """Light a surface (Blinn-Phong).

    Args:
        colour: [H, W, 3] or [3].
        normal: unit normals [H, W, 3]; z points to the viewer.
        ambient: brightness of parts that the light does not reach.
        gloss, power: strength and sharpness of the highlight.
    """
    light = np.clip(normal @ _LIGHT, 0, 1)
    half = _LIGHT + np.array([0, 0, 1.0])
    shine = gloss * np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** power
    return colour * (ambient + (1.15 - ambient) * light)[..., None] + shine[..., None]


def unit_normal(dx: np.ndarray, dy: np.ndarray, z: np.ndarray | float = 1.0) -> np.ndarray:
    """Unit vectors [H, W, 3] in the direction of (dx, dy, z)."""
    n = np.stack((dx, dy, np.broadcast_to(z, dx.shape)), -1)
    return n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-6)
