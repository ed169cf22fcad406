"""Statistics of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of `count` values."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles of values.

        Raises:
            ValueError: there are no values.
        """
        if not len(values):
            raise ValueError("no values to summarise")
        q1, median, q3 = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
        return cls(float(median), float(q1), float(q3), len(values))

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Quartiles:
        """The inverse of `to_json`.

        Raises:
            TypeError: other fields.
        """
        return cls(**value)

    def scaled(self, factor: float) -> Quartiles:
        """The quartiles of the values times a positive factor."""
        return Quartiles(self.median * factor, self.q1 * factor, self.q3 * factor, self.count)

    def inverse(self) -> Quartiles:
        """The quartiles of the reciprocals (for an even count, 1 / median approximates theirs)."""
        return Quartiles(1 / self.median, 1 / self.q3, 1 / self.q1, self.count)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of values measured in the same round.

    Values of a round are close in time, so a temporary slowdown of the machine affects both.
    """
    pairs = zip(numerators, denominators, strict=True)
    return Quartiles.of([numerator / denominator for numerator, denominator in pairs])


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of ``value ~ size**p``, fitted to the upper half of the sizes (in octaves).

    Fixed costs flatten the lower end of such a curve, so the upper end shows how it continues. nan
    for fewer than two positive values.
    """
    size, value = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    size, value = size[value > 0], value[value > 0]
    if len(size) < 2:
        return float("nan")
    upper = size >= np.sqrt(size.min() * size.max())
    if upper.sum() < 2:
        upper = np.argsort(size)[-2:]
    return float(np.polyfit(np.log(size[upper]), np.log(value[upper]), 1)[0])
