"""Averages of metric series with missing values."""

import numpy as np
import pytest

from harness.report.curves import fill_gaps, moving_average
from harness.report.svg import curve_of

NAN = np.nan


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([1.0, 2.0, 4.0], 1, [1.0, 2.0, 4.0]),
        ([1.0, 3.0, 5.0], 2, [1.0, 2.0, 4.0]),
        ([1.0, NAN, 3.0, 5.0], 2, [1.0, 1.0, 3.0, 4.0]),
        ([NAN, NAN, 2.0], 1, [NAN, NAN, 2.0]),
        ([1.0, np.inf, 3.0], 3, [1.0, 1.0, 2.0]),
        ([1.0, 3.0], 9, [1.0, 2.0]),
        ([], 3, []),
    ],
)
def test_moving_average_leaves_out_what_is_missing(values: list[float], window: int, expected: list[float]) -> None:
    np.testing.assert_allclose(moving_average(np.array(values), window), expected)


def test_gaps_are_filled_between_neighbours() -> None:
    np.testing.assert_allclose(fill_gaps(np.array([NAN, 1.0, NAN, 3.0, NAN])), [1.0, 1.0, 2.0, 3.0, 3.0])
    assert np.isnan(fill_gaps(np.array([NAN, NAN]))).all()


def test_a_curve_has_no_hole_where_a_step_was_skipped() -> None:
    tokens = np.arange(1.0, 91.0)
    losses = 5.0 - tokens / 100
    whole = curve_of("baseline", [(tokens, losses)])
    losses = losses.copy()
    losses[40] = NAN
    curve = curve_of("baseline", [(tokens, losses)])
    assert curve is not None
    assert whole is not None
    np.testing.assert_allclose(curve.mean, whole.mean)
