"""Models against a baseline over items and fine-tuning seeds: means, intervals and the verdict words.

A cell is one item asked after one fine-tuning. Every statistic here is a mean of one value a cell (or is linearised
to be one), and its uncertainty has two parts: other items, and other seeds. Each is the cluster-robust standard error
over one of the two; they are added. Cameron, Gelbach and Miller (2011), Journal of Business & Economic Statistics 29,
238, take the cells' own variance off again, which the sum holds twice; it is left in. And no interval is narrower
than the seeds' alone: a few seeds say little (benchmarks/simulate_crossed.py measures what that comes to).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.run.files import json_number
from study.statistics import Estimate, Floats, clustered_mean, holm
from study.verdicts import CANNOT_TELL, verdict_of
from study.wording import explain


@dataclass(frozen=True)
class Cells:
    """Which item and which seed each cell belongs to, as numbers from 0 on, (N,)."""

    items: NDArray[np.int64]
    seeds: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]]) -> "Cells":
        """Return cells from (item, seed) pairs, items and seeds numbered in their order."""
        _, items = np.unique([item for item, _ in pairs], return_inverse=True)
        _, seeds = np.unique([seed for _, seed in pairs], return_inverse=True)
        return cls(items.astype(np.int64), seeds.astype(np.int64))

    def mean(self, values: Floats, extra_variance: float = 0.0) -> tuple[Estimate, Estimate | None]:
        """Return the mean of a value a cell with both uncertainties, and with the seeds' alone; None with one seed.

        `extra_variance` is added to the items' part.
        """
        by_items = clustered_mean(values, self.items)
        by_items = replace(by_items, se=math.hypot(by_items.se, math.sqrt(extra_variance)))
        if len(np.unique(self.seeds)) < 2:
            return by_items, None
        by_seeds = clustered_mean(values, self.seeds)
        both = by_seeds.plus(by_items)
        if both.half_width() < by_seeds.half_width():
            both = replace(both, df=by_seeds.df)
        return both, by_seeds


@dataclass(frozen=True)
class Metric:
    """What is compared: its name, which way is better if any, the smallest difference that matters."""

    name: str
    better: Literal["lower", "higher"] | None
    margin: float = math.nan


@dataclass(frozen=True)
class Row:
    """One model in one metric; the baseline has no difference."""

    model: str
    mean: Estimate
    difference: Estimate | None = None
    by_seeds: Estimate | None = None
    p_holm: float = math.nan
    verdict: str = ""
    sentence: str = ""

    def in_words(self, digits: int) -> list[str]:
        """Return difference, interval, adjusted p and verdict as text; four empty ones for the baseline."""
        if self.difference is None:
            return [""] * 4
        low, high = self.difference.interval()
        p = "" if math.isnan(self.p_holm) else f"{self.p_holm:.2g}"
        interval = f"{low:+.{digits}f}..{high:+.{digits}f}"
        return [f"{self.difference.difference:+.{digits}f}", interval, p, self.verdict]

    def mean_in_words(self, digits: int) -> str:
        """Return the mean and half the width of its interval as text."""
        return f"{self.mean.difference:.{digits}f} ±{self.mean.half_width():.{digits}f}"

    def as_json(self) -> dict[str, object]:
        """Return the row as JSON; what is not known is null."""
        document: dict[str, object] = {"mean": self.mean.difference, **_ends(self.mean, "mean_low", "mean_high")}
        if self.difference is None:
            return document
        return {
            **document,
            "difference": self.difference.difference,
            **_ends(self.difference, "low", "high"),
            "se": json_number(self.difference.se),
            "se_seeds": None if self.by_seeds is None else json_number(self.by_seeds.se),
            "df": self.difference.df,
            "p": self.difference.p,
            "p_holm": json_number(self.p_holm),
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def _ends(estimate: Estimate, low: str, high: str) -> dict[str, object]:
    return {name: json_number(end) for name, end in zip((low, high), estimate.interval(), strict=True)}


def compare(
    metric: Metric, values: Mapping[str, Floats], cells: Cells, baseline: str, extra: Floats | None = None
) -> list[Row]:
    """Judge every model against the baseline in one metric, as one family; the baseline's row comes first.

    `values` gives each model's value in every cell, (N,); `extra` a covariance (M, M) of the models' means, in the
    order of `values`, that the cells do not show. With one seed the intervals cover items alone and no verdict is
    given: how much another fine-tuning would change is not known.
    """
    names = list(values)
    covariance = np.zeros((len(names), len(names))) if extra is None else extra

    def estimate(weights: Mapping[str, float]) -> tuple[Estimate, Estimate | None]:
        vector = np.array([weights.get(name, 0.0) for name in names])
        total: Floats = sum((weight * values[name] for name, weight in weights.items()), np.zeros(len(cells.items)))
        return cells.mean(total, float(vector @ covariance @ vector))

    rows = [Row(name, estimate({name: 1.0})[0]) for name in [baseline, *(n for n in names if n != baseline)]]
    found = [estimate({row.model: 1.0, baseline: -1.0}) for row in rows[1:]]
    adjusted = holm([total.p for total, _ in found])
    same = holm([total.p_equivalent(metric.margin) for total, _ in found])
    judged = [
        _concluded(row, metric, pair, p_values)
        for row, pair, *p_values in zip(rows[1:], found, adjusted, same, strict=True)
    ]
    return [rows[0], *judged]


def _concluded(row: Row, metric: Metric, found: tuple[Estimate, Estimate | None], p_values: Sequence[float]) -> Row:
    (total, by_seeds), (p_holm, p_same) = found, p_values
    row = replace(row, difference=total, by_seeds=by_seeds)
    if metric.better is None:
        return row
    if by_seeds is None:
        sentence = f"{CANNOT_TELL}: one fine-tuning seed, so how much another would change is unknown."
        return replace(row, verdict=CANNOT_TELL, sentence=sentence)
    if total.se == 0:  # as where every model scores 0 on every item
        sentence = f"{CANNOT_TELL}: Δ {total.difference:+.4f} in every cell, so how much it varies is unknown."
        return replace(row, verdict=CANNOT_TELL, sentence=sentence)
    # A verdict takes lower values for better ones, as for a loss.
    sign = 1 if metric.better == "lower" else -1
    word = verdict_of(replace(total, difference=sign * total.difference), p_holm, p_same, metric.margin)
    return replace(row, p_holm=p_holm, verdict=word, sentence=f"{word}: {explain(total, word)} Holm p {p_holm:.2g}.")


def ratio_cells(sums: Floats, counts: Floats) -> Floats:
    """Linearise sum(sums) / sum(counts): values (N,) whose mean is the ratio and whose deviations are its influence.

    Cochran (1977), Sampling Techniques, section 2.11: the residuals of the ratio over the mean count.
    """
    ratio = sums.sum() / counts.sum()
    values: Floats = ratio + (sums - ratio * counts) / counts.mean()
    return values
