"""Intervals and quantiles, against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from tqai.measure.statistics import interval_of_mean, quantile


def test_an_interval_by_hand() -> None:
    low, high = interval_of_mean([1.0, 2.0, 3.0, 4.0])
    # 3.182 · √(5/3) / √4
    assert (low, high) == pytest.approx((2.5 - 2.054, 2.5 + 2.054), abs=1e-3)
    assert interval_of_mean([1.0]) is None


@pytest.mark.parametrize("count", [2, 5, 31, 60])
def test_intervals_hold_the_mean_as_often_as_they_say(count: int) -> None:
    random = np.random.default_rng(1)
    held = 0
    for row in random.normal(3, 2, (2000, count)):
        low, high = interval_of_mean(row)
        held += low < 3 < high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_quantiles_are_values() -> None:
    values = np.arange(1.0, 1025.0)
    assert quantile(values, 0.5) == 512
    assert quantile(values, 0.999) == 1023
    assert quantile(values[:256], 0.999) == 256
