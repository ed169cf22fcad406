"""From repetitions to figures."""

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
        """
        Raises:
            ValueError: there are no values.
        """
        if not len(values):
            raise ValueError("no values to summarise")
        q1, median, q3 = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75))
        return cls(float(median), float(q1), float(q3), len(values))

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Quartiles:
        return cls(**value)

    def scaled(self, factor: float) -> Quartiles:
        """The summary of the values times a positive factor."""
        return Quartiles(self.median * factor, self.q1 * factor, self.q3 * factor, self.count)

    def inverse(self) -> Quartiles:
        """The reciprocals, lowest first; the median of an even count is that of the values."""
        return Quartiles(1 / self.median, 1 / self.q3, 1 / self.q1, self.count)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Quartiles:
    """Quotients of what was measured in the same round, summarised.

    Rounds are close in time, so that what slows the machine for a while slows both.
    """
    pairs = zip(numerators, denominators, strict=True)
    return Quartiles.of([numerator / denominator for numerator, denominator in pairs])


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of ``value ~ size**p`` over the upper half of the sizes (in octaves).

    Fixed costs flatten the lower end of such a curve; how it goes on is seen at the upper one. nan
    where fewer than two positive values are there.
    """
    size, value = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    size, value = size[value > 0], value[value > 0]
    if len(size) < 2:
        return float("nan")
    upper = size >= np.sqrt(size.min() * size.max())
    if upper.sum() < 2:
        upper = np.argsort(size)[-2:]
    return float(np.polyfit(np.log(size[upper]), np.log(value[upper]), 1)[0])
