"""Arithmetic on series of metrics, one value for each global step; NaN stands for a missing value."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def moving_average(values: Floats, window: int) -> Floats:
    """Return at each index the mean of the finite ones of the last `window` values; NaN if there are none."""
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    start = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    with np.errstate(invalid="ignore"):
        mean: Floats = (total[1:] - total[start]) / (count[1:] - count[start])
    return mean


def fill_gaps(values: Floats) -> Floats:
    """Return the values with NaN interpolated linearly between neighbours; unchanged if all are NaN."""
    good = np.isfinite(values)
    if not good.any():
        return values
    filled: Floats = np.interp(np.arange(len(values)), np.flatnonzero(good), values[good])
    return filled
