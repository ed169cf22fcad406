import math

import numpy as np
import pytest

from nasfcos.benchmark.statistics import Quartiles, growth_exponent, paired_ratio


def test_summary_is_median_and_quartiles():
    assert Quartiles.of([5, 1, 3, 2, 4]) == Quartiles(median=3, q1=2, q3=4, count=5)
    assert Quartiles.of([7.5]) == Quartiles(7.5, 7.5, 7.5, 1)
    with pytest.raises(ValueError, match="no values"):
        Quartiles.of([])


def test_summary_survives_json():
    summary = Quartiles.of([0.1, 0.7, 0.3])
    assert Quartiles.from_json(summary.to_json()) == summary


def test_inverse_and_scaled_are_of_the_values():
    values = np.array([0.5, 1, 2, 4, 8])
    assert Quartiles.of(values).inverse() == Quartiles.of(1 / values)
    assert Quartiles.of(values).scaled(3) == Quartiles.of(3 * values)


def test_ratios_are_of_the_same_round():
    # The machine slows down tenfold: the ratio of the medians would be anything but 2.
    ratio = paired_ratio([2, 4, 20, 24, 26], [1, 2, 10, 12, 13])
    assert ratio == Quartiles(2, 2, 2, 5)
    with pytest.raises(ValueError):
        paired_ratio([1, 2], [1])


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponent_of_a_power(power):
    sizes = np.array([1, 3, 10, 30, 100])
    assert growth_exponent(sizes, 7e-3 * sizes**power) == pytest.approx(power, abs=1e-9)


def test_exponent_is_of_the_upper_half():
    sizes = np.array([1, 10, 100, 1000, 10000])
    values = np.maximum(100, sizes)  # a fixed cost of 100
    assert growth_exponent(sizes, values) == pytest.approx(1)


def test_exponent_needs_two_points():
    assert math.isnan(growth_exponent([1, 2], [0, 3]))
    assert growth_exponent([1, 1000], [1, 1000]) == pytest.approx(1)
