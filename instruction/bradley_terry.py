"""Strengths from preferences (Bradley and Terry 1952), and the agreement between judges (Krippendorff's alpha)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from study.statistics import Floats

MOST_STEPS = 100
CLOSE = 1e-10


@dataclass(frozen=True)
class Preferences:
    """Comparisons of two models each, (P,): in which cell, and how far the first was preferred, from 0 to 1."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    outcome: Floats
    cell: NDArray[np.int64]


@dataclass(frozen=True)
class Strengths:
    """Log-odds of being preferred, (M,), summing to 0; A beats B with probability 1 / (1 + exp(B - A)).

    `by_cell` (N, M) linearises them: its mean over cells is `values`, its deviations are each cell's influence.
    `prior_covariance` (M, M) is what the pseudo-comparisons leave open.
    """

    values: Floats
    by_cell: Floats
    prior_covariance: Floats


def bradley_terry(preferences: Preferences, models: int, cells: int) -> Strengths:
    """Fit strengths by maximum likelihood, a tie counting half (Bradley and Terry 1952, Biometrika 39, 324).

    Each pair of models gets half a win each way besides what was seen, so that a model that never lost has a finite
    strength (Haldane's and Anscombe's half); these halves also count as observations of their own in the error, so
    that a clean sweep is not taken for certainty. Newton's method; the covariance is the sandwich's, cell by cell.
    """
    pairs = np.array([(a, b) for a in range(models) for b in range(a + 1, models)])
    first = np.concatenate([preferences.first, pairs[:, 0], pairs[:, 0]])
    second = np.concatenate([preferences.second, pairs[:, 1], pairs[:, 1]])
    outcome = np.concatenate([preferences.outcome, np.ones(len(pairs)), np.zeros(len(pairs))])
    weight = np.concatenate([np.ones(len(preferences.outcome)), np.full(2 * len(pairs), 0.5)])
    contrast = np.eye(models)[first] - np.eye(models)[second]  # (P, M)
    values = np.zeros(models)
    for _ in range(MOST_STEPS):
        chance = 1 / (1 + np.exp(-(contrast @ values)))
        score = contrast * (weight * (outcome - chance))[:, None]
        inverse = np.linalg.pinv(contrast.T @ (contrast * (weight * chance * (1 - chance))[:, None]))
        step = inverse @ score.sum(axis=0)
        values = values + step * min(1.0, 1.0 / max(1e-300, float(np.abs(step).max())))  # at most 1 at a time
        if float(np.abs(step).max()) < CLOSE:
            break
    seen = len(preferences.outcome)
    by_cell = np.zeros((cells, models))
    np.add.at(by_cell, preferences.cell, score[:seen] @ inverse)
    by_cell = values + cells * (by_cell - by_cell.mean(axis=0))
    prior = score[seen:] @ inverse
    return Strengths(values, by_cell, prior.T @ prior)


def krippendorff_alpha(ratings: Floats) -> float | None:
    """Return Krippendorff's alpha for interval data, raters in rows and things rated in columns; NaN where not rated.

    1 is perfect agreement, 0 what chance would give, below 0 worse than that. 1 - D_o/D_e, where D_o is the mean
    squared difference of two ratings of one thing and D_e that of any two (Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability"). None where nothing is rated twice, or all ratings are the same.
    """
    columns = [column[~np.isnan(column)] for column in ratings.T]
    columns = [column for column in columns if len(column) > 1]
    if not columns:
        return None
    values = np.concatenate(columns)
    # The sum of squared differences over ordered pairs of n values is 2 n^2 times their variance.
    observed = sum(2 * len(column) ** 2 * float(np.var(column)) / (len(column) - 1) for column in columns)
    expected = 2 * len(values) ** 2 * float(np.var(values)) / (len(values) - 1)
    return 1 - observed / expected if expected > 0 else None


def alpha_of(tables: Sequence[dict[tuple[object, ...], float]]) -> float | None:
    """Return Krippendorff's alpha of raters, each a table of ratings by what is rated; None below two raters."""
    things = sorted({thing for table in tables for thing in table}, key=repr)
    if not things or len(tables) < 2:
        return None
    return krippendorff_alpha(np.array([[table.get(thing, np.nan) for thing in things] for table in tables]))
