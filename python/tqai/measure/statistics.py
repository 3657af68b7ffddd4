"""Few numbers that stand for many, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Student's t at 97.5 %, of 1 degree of freedom and up.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Within which the mean lies with 95 % of what `values` are independent samples of, by
    Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    free = len(values) - 1
    # Beyond the table the first terms of Cornish and Fisher's expansion are as exact as it.
    t = _T[free - 1] if free <= len(_T) else 1.960 + 2.372 / free
    mean, half = float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def quantile(values: np.ndarray, share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))
