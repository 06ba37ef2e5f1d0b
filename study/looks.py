"""Look at an experiment while it grows without being wrong more often than was promised.

An arm that is tested after some of its seeds, and again after more, has several chances to be lucky. Looks that are
fixed beforehand share one error rate: at every look a p value is held against a level below 5%. Equal levels are
Pocock's (1977, Biometrika 64, 191), levels that grow with the information O'Brien and Fleming's (1979, Biometrics 35,
549). With few seeds the t statistics of successive looks are not those of the textbooks' normal tables, so the levels
are found by simulation, with a fixed seed.

What is shown is the other way round: one p value for all looks so far, which Holm's procedure can adjust like any
other (a sequential p value: the smallest error rate at which some look so far would have rejected; Jennison and
Turnbull 2000, Group Sequential Methods, chapter 9).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from scipy.special import ndtr, ndtri, stdtr

from study.statistics import ALPHA, Floats

Rule = Literal["pocock", "obrien-fleming"]
RULES: tuple[Rule, ...] = get_args(Rule)
DRAWS = 100_000
FAMILY_DRAWS = 20_000
SMALLEST = 1e-300


@dataclass(frozen=True)
class Schedule:
    """The looks of an experiment: by which rule, and after how many seeds of every arm."""

    rule: Rule
    seeds: tuple[int, ...]

    def weights(self) -> Floats:
        """Give what each look's normal score is multiplied with, so that one critical value serves all looks."""
        counts = np.asarray(self.seeds, dtype=np.float64)
        return np.ones(len(counts)) if self.rule == "pocock" else np.sqrt(counts / counts[-1])

    def scores(self, p_values: Sequence[float]) -> Floats:
        """Give the weighted normal scores of the p values of the looks so far."""
        p = np.clip(np.asarray(p_values, dtype=np.float64), SMALLEST, 1.0)
        scores: Floats = -ndtri(p / 2) * self.weights()[: len(p)]
        return scores

    def levels(self, alpha: float = ALPHA) -> tuple[float, ...]:
        """Give the p value that each look's test must stay below, for a chance alpha of ever being wrong."""
        score = float(np.quantile(_null_scores(self), 1 - alpha))
        return tuple(float(2 * ndtr(-score / weight)) for weight in self.weights())

    def sequential_p(self, p_values: Sequence[float]) -> float:
        """Give one p value for all looks so far, from the two-sided p value of each.

        Beyond what was drawn, the sum over looks bounds it (Bonferroni).
        """
        score = float(self.scores(p_values).max())
        drawn = _null_scores(self)
        above = len(drawn) - int(np.searchsorted(drawn, score, side="left"))
        bound = float(sum(2 * ndtr(-score / weight) for weight in self.weights()))
        return min(1.0, bound, (above + 1) / (len(drawn) + 1))


def equally_spaced(rule: Rule, looks: int, seeds: int) -> Schedule | None:
    """Lay out so many looks over so many seeds, the first after at least two; None where seeds are too few."""
    counts = [max(2, round(seeds * place / looks)) for place in range(1, looks + 1)]
    return Schedule(rule, tuple(counts)) if len(set(counts)) == looks and counts[-1] == seeds else None


@lru_cache(maxsize=64)
def _null_scores(schedule: Schedule) -> Floats:
    """Draw the largest weighted score over all looks of an arm without effect, in order.

    Differences between arm and baseline on shared seeds are normal; each look is a paired t test of all so far. Where
    a prior lends degrees of freedom the true levels lie between these and the textbooks', so these err on the safe
    side.
    """
    differences = np.random.default_rng(0).standard_normal((DRAWS, schedule.seeds[-1]))
    largest = np.full(DRAWS, -np.inf)
    for count, weight in zip(schedule.seeds, schedule.weights(), strict=True):
        p = paired_p(differences, count)
        largest = np.maximum(largest, -ndtri(np.maximum(p, SMALLEST) / 2) * weight)
    return np.sort(largest)


@lru_cache(maxsize=64)
def error_of_repeated_looks(counts: tuple[int, ...], arms: int) -> float:
    """Give the chance of a false verdict in a table of null arms that was judged anew at each of these seed counts.

    Every look is a paired t test at 5% with the Bonferroni step of Holm's procedure; differences share the baseline's
    runs, so two arms' are correlated by one half.
    """
    generator = np.random.default_rng(0)
    shared = generator.standard_normal((FAMILY_DRAWS, counts[-1]))
    is_wrong = np.zeros(FAMILY_DRAWS, dtype=bool)
    for _ in range(arms):
        differences = generator.standard_normal((FAMILY_DRAWS, counts[-1])) - shared
        for count in counts:
            is_wrong |= paired_p(differences, count) < ALPHA / arms
    return float(is_wrong.mean())


def paired_p(differences: Floats, count: int) -> Floats:
    """Give the two-sided p values of paired t tests over the first `count` columns, one for each row."""
    used = differences[:, :count]
    error = used.std(axis=1, ddof=1) / np.sqrt(count)
    p: Floats = 2 * stdtr(count - 1, -np.abs(used.mean(axis=1) / error))
    return p
