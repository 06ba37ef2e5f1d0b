"""Judge the effects of a factorial whose runs are not replicated, by the method of Lenth (1989).

Most effects are taken to be null, and the small ones tell the noise. Significance and intervals come from the exact
null distribution of Lenth's ratio for the design's own number of contrasts, simulated with a fixed seed: the t
distribution that Lenth proposed as an approximation is far too strict in the tails that a family needs (Ye and Hamada
2000, Journal of Quality Technology 32, 57).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from study.statistics import ALPHA, Estimate, Floats

MOST_DRAWS, FEWEST_DRAWS, MOST_NUMBERS = 100_000, 20_000, 3_000_000


@dataclass(frozen=True)
class LenthEstimate(Estimate):
    """An effect whose standard error is Lenth's; `df`, a third of the contrasts, is nominal and decides nothing."""

    contrasts: int

    @property
    def p(self) -> float:
        """Two-sided p value of no effect, by simulation."""
        return tail(self.contrasts, 1, abs(self.t))

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Return the confidence interval: the effect plus and minus Lenth's margin of error, exact at any level."""
        half = self.se * critical(self.contrasts, 1, 1 - level)
        return self.difference - half, self.difference + half

    def _ratio_in_words(self) -> str:
        return f"{abs(self.t):.2f} times Lenth's error."

    def p_equivalent(self, margin: float) -> float:
        """Return the p value of two one-sided tests that the effect lies within +-margin (Schuirmann 1987)."""
        inside = margin - abs(self.difference)
        if self.se == 0:
            return 0.0 if inside > 0 else 1.0
        one_sided = tail(self.contrasts, 1, abs(inside) / self.se) / 2
        return one_sided if inside > 0 else 1 - one_sided


def pseudo_standard_error(effects: Floats) -> Floats:
    """Return Lenth's pseudo standard error of every row of effects (rows, contrasts).

    1.5 times the median of those absolute effects below 2.5 s0, where s0 is 1.5 times the median of all (Lenth 1989,
    Technometrics 31, 469, equations 1 and 2).
    """
    sizes = np.sort(np.abs(effects), axis=-1)
    first = 1.5 * np.median(sizes, axis=-1)
    kept = np.maximum((sizes < 2.5 * first[:, None]).sum(axis=-1), 1)
    rows = np.arange(len(sizes))
    error: Floats = 1.5 * (sizes[rows, (kept - 1) // 2] + sizes[rows, kept // 2]) / 2
    return error


def lenth_estimates(effects: Sequence[float]) -> list[LenthEstimate]:
    """Return every contrast of an unreplicated design with Lenth's error; all contrasts are needed, not a few."""
    values = np.asarray(effects, dtype=np.float64)
    error = float(pseudo_standard_error(values[None, :])[0])
    return [LenthEstimate(float(value), error, len(values) / 3, len(values)) for value in values]


def critical(contrasts: int, family: int, alpha: float = ALPHA) -> float:
    """Return the value that the largest of `family` null ratios exceeds with probability alpha.

    A family of one gives the margin of error, a family of all contrasts the simultaneous margin of error, both in
    units of the pseudo standard error.
    """
    return float(np.quantile(_largest(contrasts, family), 1 - alpha))


def tail(contrasts: int, family: int, ratio: float) -> float:
    """Return the chance that the largest of `family` absolute null ratios, of so many contrasts, reaches `ratio`."""
    drawn = _largest(contrasts, family)
    above = len(drawn) - int(np.searchsorted(drawn, ratio, side="left"))
    return (above + 1) / (len(drawn) + 1)


def adjusted(estimates: Sequence[LenthEstimate]) -> list[float]:
    """Adjust the p values of a family: step-down by the largest of what is left (Westfall and Young 1993, 2.8).

    Effects that are real make the pseudo standard error larger, so the null distribution errs on the safe side.
    """
    found, highest = [0.0] * len(estimates), 0.0
    order = sorted(range(len(estimates)), key=lambda index: -abs(estimates[index].t))
    for place, index in enumerate(order):
        left = len(order) - place
        highest = max(highest, tail(estimates[index].contrasts, left, abs(estimates[index].t)))
        found[index] = highest
    return found


@lru_cache(maxsize=64)
def _largest(contrasts: int, family: int) -> Floats:
    """Draw the largest of `family` absolute ratios when all contrasts are null, in order."""
    ratios = _ratios(contrasts)
    if family == 1:  # all contrasts are alike, so each of them is a draw
        return np.sort(ratios[:, : max(1, MOST_NUMBERS // (3 * len(ratios)))], axis=None)
    return np.sort(ratios[:, :family].max(axis=1))


@lru_cache(maxsize=2)
def _ratios(contrasts: int) -> Floats:
    draws = max(FEWEST_DRAWS, min(MOST_DRAWS, MOST_NUMBERS // contrasts))
    effects = np.random.default_rng(contrasts).standard_normal((draws, contrasts))
    ratios: Floats = np.abs(effects) / pseudo_standard_error(effects)[:, None]
    return ratios
