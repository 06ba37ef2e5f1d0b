"""Estimates with their uncertainty, families of tests, and power: numbers in, numbers out.

A loss is in nats per token; a difference is arm minus baseline, so negative is better. Standard deviations divide by
n - 1. Everything rests on the t distribution, because noise is always estimated from a few runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, nctdtr, stdtr, stdtridf, stdtrit

Floats = NDArray[np.float64]
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 10_000
STRICT = 0.995
"""The quantile at which two uncertainties are added: two-sided 1%, the first step of a family of five."""


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

    @property
    def p_better(self) -> float:
        """The probability that the true difference is below 0, if nothing was known of it before (a flat prior)."""
        return float(stdtr(self.df, -self.t))

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Return the confidence interval of the difference."""
        half = self.se * float(stdtrit(self.df, (1 + level) / 2))
        return self.difference - half, self.difference + half

    def in_words(self, level: float = 1 - ALPHA) -> str:
        """Return the difference with its interval and its test."""
        low, high = self.interval(level)
        return f"{self.difference:+.4f} (95% CI {low:+.4f}..{high:+.4f}), {self._ratio_in_words()}"

    def _ratio_in_words(self) -> str:
        return f"t {self.t:+.2f} on {self.df:.3g} df."

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

    def expected_loss(self) -> float:
        """Return the loss to expect, in nats per token, from acting now: adopting what looks better, else keeping.

        E[max(D, 0)] of a t distribution around the difference, which is infinite up to one degree of freedom
        (Raiffa and Schlaifer 1961, Applied Statistical Decision Theory, 11.4: the linear loss integral).
        """
        if self.df <= 1 or self.se == 0:
            return math.inf if self.se > 0 else 0.0
        z = abs(self.t)
        log_density = (
            gammaln((self.df + 1) / 2)
            - gammaln(self.df / 2)
            - 0.5 * math.log(self.df * math.pi)
            - (self.df + 1) / 2 * math.log1p(z * z / self.df)
        )
        density_term = math.exp(log_density) * (self.df + z * z) / (self.df - 1)
        return max(0.0, self.se * (density_term - z * float(stdtr(self.df, -z))))

    def plus(self, other: "Estimate") -> "Estimate":
        """Add an independent uncertainty of the same difference, from other data.

        The t quantiles of the two are averaged with their variances as weights (Cochran and Cox 1950, Experimental
        Designs, 4.14) at two-sided 1%, and the degrees of freedom are those of the result. Satterthwaite's formula
        lets a part that is known from two or three runs pass for known whenever it happens to come out small.
        """
        variances = (self.se**2, other.se**2)
        total = sum(variances)
        if math.isinf(total):
            return Estimate(self.difference, math.inf, min(self.df, other.df))
        if total == 0 or min(variances) == 0:
            return self if other.se == 0 else replace(other, difference=self.difference)
        quantiles = (float(stdtrit(self.df, STRICT)), float(stdtrit(other.df, STRICT)))
        quantile = sum(v * q for v, q in zip(variances, quantiles, strict=True)) / total
        fewest, most = sorted((self.df, other.df))
        df = min(most, max(fewest, float(stdtridf(STRICT, quantile))))
        return Estimate(self.difference, math.sqrt(total), df)


def sample_sd(values: Sequence[float]) -> float:
    """Return the sample standard deviation, dividing by n - 1; NaN below two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def pooled_noise(groups: Sequence[Sequence[float]]) -> Noise | None:
    """Return the standard deviation within groups, pooled over those with replicates; None where there are none.

    For runs of one recipe that share some of their seeds; recipes are never pooled.
    """
    found = [np.asarray(group) for group in groups if len(group)]
    df = sum(len(group) - 1 for group in found)
    if df < 1:
        return None
    squares = sum(float(np.sum((group - group.mean()) ** 2)) for group in found)
    return Noise(math.sqrt(squares / df), df)


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


def clustered_mean(values: Floats, clusters: NDArray[np.int64], weights: Floats | None = None) -> Estimate:
    """Return the mean of values with a standard error robust to clusters of dependent values, few or unequal.

    With `weights` (all 1 if left out) a value counts as so many equal values of its cluster. Of ratios such as bits
    per byte, weighted by their denominators, that mean is the ratio of the sums.

    The variance is CR2 (Bell and McCaffrey 2002, Survey Methodology 28, 169): the sum over clusters of
    (sum of deviations)^2 / (1 - share of the cluster) / n^2. The degrees of freedom are Bell and McCaffrey's, under
    the working model of Imbens and Kolesar (2016, Review of Economics and Statistics 98, 701, section 4): values of
    one cluster share a random effect, whose variance is estimated (ANOVA). With equal clusters this is Miller (2024,
    arXiv:2411.00640, section 2.2) on G - 1 degrees of freedom. With one cluster nothing is known: the error is
    infinite.
    """
    weights = np.ones(len(values)) if weights is None else weights
    count = float(weights.sum())
    mean = float(np.average(values, weights=weights))
    _, index = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(index, weights=weights).astype(np.float64)
    if len(sizes) < 2:
        return Estimate(mean, math.inf, 1)
    sums = np.bincount(index, weights=weights * (values - mean)).astype(np.float64)
    variance = float((sums**2 / (1 - sizes / count)).sum()) / count**2
    within = float((weights * (values - mean) ** 2).sum() - (sums**2 / sizes).sum()) / max(1, count - len(sizes))
    return Estimate(mean, math.sqrt(variance), _degrees_of_freedom(sizes, within, sums))


def _degrees_of_freedom(sizes: Floats, within: float, sums: Floats) -> float:
    """Return trace(M)^2 / trace(M M) of the quadratic form M that the variance is, in time linear in the clusters.

    M = D + c (p p') + e (p q' + q p') with D diagonal, p = a n, q = a n^2, where a^2 = 1 / (1 - n/N).
    """
    count, groups = float(sizes.sum()), len(sizes)
    squares = float((sizes**2).sum())
    between = float((sums**2 / sizes).sum()) / (groups - 1)
    shared = max(0.0, (between - within) / ((count - squares / count) / (groups - 1)))
    within = max(within, 0.0)
    if within + shared == 0:  # no deviation at all
        within = 1.0
    scale = 1 / (1 - sizes / count)
    diagonal = scale * (within * sizes + shared * sizes**2)
    p, q = np.sqrt(scale) * sizes, np.sqrt(scale) * sizes**2
    c, e = shared * squares / count**2 - within / count, -shared / count
    low_rank = c * p**2 + 2 * e * p * q
    pp, pq, qq = float(p @ p), float(p @ q), float(q @ q)
    trace = float((diagonal + low_rank).sum())
    square = float((diagonal**2).sum() + 2 * (diagonal * low_rank).sum())
    square += c**2 * pp**2 + 2 * e**2 * (pp * qq + pq**2) + 4 * c * e * pp * pq
    return trace**2 / square


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


def fewest(finds: Callable[[int], bool], least: int = 2) -> int | None:
    """Return the smallest count from `least` on that is enough; None where over 10,000. More must never be worse."""
    low, high = least, least
    while not finds(high):
        if high >= MOST_SEEDS:
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
