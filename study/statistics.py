"""Estimators for differences between runs: numbers in, numbers out.

A loss is in nats per token; a difference is arm minus baseline, so negative is better. Standard deviations divide by
n - 1. Everything rests on the t distribution, because noise is always estimated from a few runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import nctdtr, stdtr, stdtrit

Floats = NDArray[np.float64]
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 10_000
ROUNDING = 1e-12  # of a loss: less than this is not a difference


@dataclass(frozen=True)
class Noise:
    """A standard deviation and the degrees of freedom it was estimated with."""

    sd: float
    df: float


@dataclass(frozen=True)
class NoisePrior:
    """What is known of the noise of one run before it is run: its standard deviation, how sure, and from where.

    The degrees of freedom say how much recipes differ: infinitely many if all were equally noisy.
    """

    sd: float
    df: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """An estimated difference, its standard error, and the degrees of freedom of that."""

    difference: float
    se: float
    df: float

    @property
    def t(self) -> float:
        """The t statistic; infinite where there is no noise but a difference, 0 where there is neither."""
        if self.se > 0:
            return self.difference / self.se
        return math.copysign(math.inf, self.difference) if self.difference else 0.0

    @property
    def p(self) -> float:
        """Two-sided p value of no difference."""
        return float(2 * stdtr(self.df, -abs(self.t)))

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Return the confidence interval of the difference."""
        half = self.se * float(stdtrit(self.df, (1 + level) / 2))
        return self.difference - half, self.difference + half

    def half_width(self) -> float:
        """Return half the width of the 95% interval."""
        low, high = self.interval()
        return (high - low) / 2

    def p_equivalent(self, margin: float) -> float:
        """Return the p value of two one-sided tests that the difference lies within +-margin (Schuirmann 1987)."""
        if self.se == 0:
            return 0.0 if abs(self.difference) < margin else 1.0
        lower = stdtr(self.df, -(self.difference + margin) / self.se)
        upper = stdtr(self.df, (self.difference - margin) / self.se)
        return float(max(lower, upper))

    def plus(self, other: "Estimate") -> "Estimate":
        """Add an independent uncertainty of the same difference; degrees of freedom by Satterthwaite (1946)."""
        variances = (self.se**2, other.se**2)
        total = sum(variances)
        if math.isinf(total):
            return Estimate(self.difference, math.inf, min(self.df, other.df))
        spread = sum(v**2 / df for v, df in zip(variances, (self.df, other.df), strict=True))
        return Estimate(self.difference, math.sqrt(total), total**2 / spread if spread else self.df)


def sample_sd(values: Sequence[float]) -> float:
    """Return the sample standard deviation, dividing by n - 1; NaN below two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def pooled_noise(groups: Sequence[Sequence[float]]) -> Noise | None:
    """Return the standard deviation within groups, pooled over those with replicates; None where there are none."""
    found = [np.asarray(group) for group in groups if len(group)]
    df = sum(len(group) - 1 for group in found)
    if df < 1:
        return None
    squares = sum(float(np.sum((group - group.mean()) ** 2)) for group in found)
    return Noise(without_rounding(math.sqrt(squares / df), float(found[0].mean())), df)


def moderated(variance: float, df: float, prior: NoisePrior | None, runs: float = 1.0) -> tuple[float, float]:
    """Return a variance and its degrees of freedom, after a prior has lent it strength.

    (d0 s0^2 + d s^2) / (d0 + d) on d0 + d degrees of freedom (Smyth 2004, Statistical Applications in Genetics and
    Molecular Biology 3(1), article 3, section 3). The prior is of one run; `runs` is how many runs' variances are in
    `variance`: 2 for a paired difference.
    """
    if prior is None:
        return variance, df
    total = prior.df + df
    own = df * variance if df else 0.0
    return (prior.df * runs * prior.sd**2 + own) / total, total


def without_rounding(value: float, loss: float) -> float:
    """Return a value, or 0 where it is no more than the rounding of a loss."""
    return 0.0 if abs(value) <= ROUNDING * abs(loss) else value


def compare_means(arm: Sequence[float], baseline: Sequence[float], noise: Noise) -> Estimate:
    """Return the difference of two means, each run with the same noise: se = s sqrt(1/n + 1/m).

    With one run in the arm and the noise of the n baseline runs this is the single-case t of Crawford and Howell
    (1998), The Clinical Neuropsychologist 12, 482: s sqrt(1 + 1/n) on n - 1 degrees of freedom.
    """
    se = noise.sd * math.sqrt(1 / len(arm) + 1 / len(baseline))
    mean = float(np.mean(baseline))
    return Estimate(without_rounding(float(np.mean(arm)) - mean, mean), se, noise.df)


def welch(arm: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the difference of two means with noises of their own (Welch 1947); each needs two runs."""
    parts = [Estimate(0.0, sample_sd(x) / math.sqrt(len(x)), len(x) - 1) for x in (arm, baseline)]
    both = parts[0].plus(parts[1])
    return Estimate(float(np.mean(arm) - np.mean(baseline)), both.se, both.df)


def block_noise(losses: Floats) -> Noise:
    """Return the noise left when every arm (row) was run on the same seeds (columns), at least 2 x 2.

    The residual of loss ~ arm + seed, on (m-1)(k-1) degrees of freedom: a randomised block design (Box, Hunter and
    Hunter 2005, chapter 4). With two arms a difference is the paired t test.
    """
    arms, seeds = losses.shape
    residual = losses - losses.mean(axis=1, keepdims=True) - losses.mean(axis=0, keepdims=True) + losses.mean()
    df = (arms - 1) * (seeds - 1)
    return Noise(without_rounding(math.sqrt(float((residual**2).sum()) / df), float(losses.mean())), df)


def seed_correlation(arm: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the correlation of two arms over shared seeds; NaN below three seeds or without any spread."""
    if len(arm) < 3 or np.ptp(arm) == 0 or np.ptp(baseline) == 0:
        return math.nan
    return float(np.corrcoef(arm, baseline)[0, 1])


def clustered_mean(values: Floats, clusters: NDArray[np.int64]) -> Estimate:
    """Return the mean of paired differences with a standard error robust to clusters of dependent values.

    se^2 = G/(G-1) sum over clusters of (sum of deviations)^2 / n^2, on G - 1 degrees of freedom (Miller 2024,
    arXiv:2411.00640, section 2.2). With one cluster nothing is known, and the error is infinite.
    """
    mean = float(values.mean())
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=values - mean)
    count = len(sums)
    if count < 2:
        return Estimate(mean, math.inf, 1)
    return Estimate(mean, math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(values), count - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values so that no true null of the family is rejected but in 5% of studies (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def power(effect: float, se: float, df: float, alpha: float = ALPHA) -> float:
    """Return the chance that a two-sided t test finds a true effect of this size (noncentral t)."""
    critical = float(stdtrit(df, 1 - alpha / 2))
    shift = abs(effect) / se
    # NaN where too close to 0 to compute.
    missed, wrong_side = np.nan_to_num([nctdtr(df, shift, critical), nctdtr(df, shift, -critical)])
    return float(1 - missed + wrong_side)


def detectable(se: float, df: float) -> float:
    """Return the effect that a test would find four times in five."""
    from scipy.optimize import brentq  # takes a second to import, and --help should not wait for it

    if se == 0:
        return 0.0
    high = 1.0
    while power(high, 1.0, df) < POWER:
        high *= 2
    return se * float(brentq(lambda ratio: power(ratio, 1.0, df) - POWER, 0.0, high))


def seeds_to_see(effect: float, sd: float, alpha: float = ALPHA, are_shared: bool = False) -> int | None:
    """Return the runs per arm with which a comparison of two arms finds an effect four times in five; at least 2.

    `sd` is the noise of one run; where seeds `are_shared` it is the residual noise, and n pairs have n - 1 degrees of
    freedom instead of 2n - 2. None where over 10,000.
    """

    def finds(runs: int) -> bool:
        df = runs - 1 if are_shared else 2 * runs - 2
        return power(effect, sd * math.sqrt(2 / runs), df, alpha) >= POWER

    low, high = 2, 2
    while not finds(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while low < high:
        middle = (low + high) // 2
        if finds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def factorial_effects(signs: Floats, losses: Floats) -> Floats:
    """Return effects of orthogonal +-1 columns (N, E) on losses (N,): mean where on minus mean where off."""
    effects: Floats = 2 * signs.T @ losses / len(losses)
    return effects


def additivity(
    stack: Sequence[float], baseline: Sequence[float], singles: Sequence[Sequence[float]], noise: Noise
) -> Estimate:
    """Return by how much a stack's gain differs from the sum of its parts' gains; negative: more than the sum.

    gap = (stack - b) - sum(single - b). The baseline enters m - 1 times, so a lucky one fakes an interaction:
    se = s sqrt((m-1)^2/n_b + sum 1/n_i + 1/n_stack).
    """
    base = float(np.mean(baseline))
    gap = float(np.mean(stack)) - base - sum(float(np.mean(single)) - base for single in singles)
    variance = (len(singles) - 1) ** 2 / len(baseline) + 1 / len(stack) + sum(1 / len(single) for single in singles)
    return Estimate(gap, noise.sd * math.sqrt(variance), noise.df)


def loss_slope(tokens: Floats, losses: Floats) -> float | None:
    """Return dL/d ln(tokens) by least squares over the last half of a training curve; None where it does not fall."""
    half = len(tokens) // 2
    usable = np.isfinite(losses) & (tokens > 0)
    usable[:half] = False
    if usable.sum() < 10:
        return None
    slope = float(np.polyfit(np.log(tokens[usable]), losses[usable], 1)[0])
    return slope if slope < 0 else None


def tokens_worth(difference: float, slope: float) -> float:
    """Return the factor of training tokens that changes the loss as much as `difference`, at a slope < 0."""
    return math.exp(min(difference / slope, 50.0))
