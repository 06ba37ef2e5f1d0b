"""Estimate one difference from the runs of an arm and of the baseline, each side on its own noise.

Nothing is pooled over recipes: one that is noisier, or follows the baseline more closely, than others would make the
tests of all of them wrong. A prior (study/prior.py) may lend strength, in the open.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from study.prior import is_contradicted
from study.results import Group
from study.statistics import Estimate, Noise, NoisePrior, clustered_mean, moderated

NOISIEST = 5.0
"""A single run's own noise is unknown; a verdict on it must stand if that is as many times what was seen."""
WELCH_CAP = 1.5
FINEST_DECIMALS = 7
"""Digits beyond these say nothing: a test loss is computed from float32 numbers."""
RECORDED_DECIMALS = 6
"""Equal losses with more digits than people write down are not rounded alike: they are one run, recorded twice."""

PriorFinder = Callable[[Group, Group, int], NoisePrior | None]
"""From baseline, arm, and in how many pairs they are compared (0: in none), to what is known of the noise of one run;
of a pair that is the standard deviation of a difference over the square root of 2."""


@dataclass(frozen=True)
class Side:
    """The losses of one recipe, and the size of a step in their last recorded digit."""

    losses: tuple[float, ...]
    step: float

    @property
    def mean(self) -> float:
        """The mean loss."""
        return float(np.mean(self.losses))

    @property
    def rounding_variance(self) -> float:
        """The variance of one loss that rounding alone gives: step^2 / 12 (Sheppard 1898)."""
        return self.step**2 / 12

    @property
    def variance(self) -> float:
        """The variance of one run, never less than rounding allows; 0 of a single run."""
        return max(float(np.var(self.losses, ddof=1)), self.rounding_variance) if self.df else 0.0

    @property
    def df(self) -> int:
        """Degrees of freedom of the variance."""
        return len(self.losses) - 1


@dataclass(frozen=True)
class Comparison:
    """A difference by training noise alone, and how it was reached."""

    method: str
    """pairs, unpaired, single run, given noise, or none; with "+ prior" where a prior lends strength."""
    estimate: Estimate | None = None
    guarded: Estimate | None = None
    """What must stand for HELPS, HURTS or NO DIFFERENCE: of a single run, with NOISIEST times the noise seen."""
    noise: Noise | None = None
    """Of one run; where there are pairs, what is left of it in a difference, over the square root of 2."""
    source: str = ""
    """Where the noise comes from, in words."""
    pairs: tuple[tuple[float, float], ...] = ()
    """(arm, baseline) losses on the seeds that were compared."""
    prior: NoisePrior | None = None
    warnings: tuple[str, ...] = ()

    @property
    def correlation(self) -> float:
        """The correlation of arm and baseline over shared seeds; NaN below three pairs or without any spread."""
        values = np.asarray(self.pairs)
        if len(values) < 3 or not np.ptp(values, axis=0).all():
            return math.nan
        return float(np.corrcoef(values.T)[0, 1])


def no_prior(_baseline: Group, _arm: Group, _pairs: int) -> None:
    """Find no prior: each comparison stands on its own runs."""


def compare(
    baseline: Group, arm: Group, given: Noise | None = None, find_prior: PriorFinder = no_prior
) -> Comparison:
    """Compare an arm with the baseline: in pairs where seeds are shared, else side by side.

    Runs that diverged have no loss and are left out, with the pairs they belong to. `given` is a noise by hand, which
    overrides all others.
    """
    warnings: list[str] = []
    theirs, mine = sides_of((baseline, arm), warnings)
    if not mine.losses or not theirs.losses:
        return Comparison("none")
    if given is not None:
        estimate = with_noise(mine, theirs, given)
        return Comparison("given noise", estimate, estimate, given, "given by hand")
    pairs = shared_pairs(baseline, arm)
    if len(pairs) > 1 and mine.df == theirs.df == 0:  # both recorded over and over
        pairs = pairs[:1]
    fewest, most = sorted((len(mine.losses), len(theirs.losses)))
    if (len(pairs) > 1 and 2 * len(pairs) >= fewest) or len(pairs) == most == 1:
        return in_pairs(pairs, (mine, theirs), find_prior(baseline, arm, len(pairs)), warnings)
    return side_by_side(mine, theirs, find_prior(baseline, arm, 0), warnings)


def sides_of(groups: Sequence[Group], warnings: list[str]) -> list[Side]:
    """Return the losses of recipes; replicates that are equal to the last bit are one run, and a warning says so.

    They were recorded alike, with as many decimals as any of them shows.
    """
    digits = decimals([loss for group in groups for loss in group.losses])
    sides = []
    for group in groups:
        losses = tuple(group.losses)
        if len(losses) > 1 and len(set(losses)) == 1 and digits > RECORDED_DECIMALS:
            warnings.append(f"{group.recipe}: its {len(losses)} runs are equal to the last digit and count as one")
            losses = losses[:1]
        sides.append(Side(losses, 10.0 ** -min(digits, FINEST_DECIMALS)))
    return sides


def decimals(losses: Sequence[float]) -> int:
    """Return how many decimals losses were recorded with: the most that any of them shows."""
    return max((len(f"{Decimal(repr(float(loss))):f}".partition(".")[2]) for loss in losses), default=0)


def shared_pairs(baseline: Group, arm: Group) -> tuple[tuple[float, float], ...]:
    """Return (arm, baseline) losses on the seeds that both were run on, each once, in the order of the baseline."""
    mine, theirs = losses_by_seed(arm), losses_by_seed(baseline)
    return tuple((mine[seeds], loss) for seeds, loss in theirs.items() if seeds in mine)


def losses_by_seed(group: Group) -> dict[tuple[str, str], float]:
    """Return the losses of a recipe by their seeds, of those seeds that are known and were run once."""
    counts = Counter(result.seeds for result in group.results)
    return {
        result.seeds: result.loss
        for result in group.results
        if result.loss is not None and "" not in result.seeds and counts[result.seeds] == 1
    }


def in_pairs(
    pairs: tuple[tuple[float, float], ...], sides: tuple[Side, Side], prior: NoisePrior | None, warnings: list[str]
) -> Comparison:
    """Compare by paired differences: the paired t test, on n - 1 degrees of freedom and those of the prior."""
    differences = np.subtract(*np.asarray(pairs).T)
    count = len(differences)
    floor = sum(side.rounding_variance for side in sides)
    own = max(float(np.var(differences, ddof=1)), floor) if count > 1 else 0.0
    prior = _believed(prior, [Noise(math.sqrt(own / 2), count - 1)], warnings)
    if prior is None and count == 1:
        return Comparison("none", pairs=pairs, warnings=tuple(warnings))
    variance, df = moderated(own, count - 1, prior, runs=2)
    variance = max(variance, floor)
    unused = sum(len(side.losses) for side in sides) - 2 * count
    if unused > 0:
        warnings.append(f"{unused} run{'s' * (unused > 1)} without a partner on the same seed left out")
    estimate = Estimate(float(differences.mean()), math.sqrt(variance / count), df)
    return Comparison(
        method=_method("pairs", prior),
        estimate=estimate,
        guarded=estimate,
        noise=Noise(math.sqrt(variance / 2), df),
        source=_from(f"{count} pairs on shared seeds" if count > 1 else "", prior),
        pairs=pairs,
        prior=prior,
        warnings=tuple(warnings),
    )


def side_by_side(mine: Side, theirs: Side, prior: NoisePrior | None, warnings: list[str]) -> Comparison:
    """Compare two means: Welch's test, or a single run against the spread of the other side's runs."""
    sides = (mine, theirs)
    prior = _believed(prior, [Noise(math.sqrt(side.variance), side.df) for side in sides], warnings)
    if min(mine.df, theirs.df) == 0:
        return _single_run(mine, theirs, prior, warnings)
    parts = []
    for side in sides:
        variance, df = moderated(side.variance, side.df, prior)
        parts.append(Estimate(0.0, math.sqrt(variance / len(side.losses)), df))
    estimate = welch(mine.mean - theirs.mean, *parts)
    runs = 1 / (1 / len(mine.losses) + 1 / len(theirs.losses))
    return Comparison(
        method=_method("unpaired", prior),
        estimate=estimate,
        guarded=estimate,
        noise=Noise(estimate.se * math.sqrt(runs), estimate.df),
        source=_from(f"the spread of {len(mine.losses)} and of {len(theirs.losses)} runs", prior),
        prior=prior,
        warnings=tuple(warnings),
    )


def _single_run(mine: Side, theirs: Side, prior: NoisePrior | None, warnings: list[str]) -> Comparison:
    """Compare where one side has one run: against the noise of the other side, which need not be its own.

    s sqrt(1 + 1/n) on n - 1 degrees of freedom is the single-case t of Crawford and Howell (1998), The Clinical
    Neuropsychologist 12, 482. It is wrong as often as stated if both sides are equally noisy, which one run cannot
    show; without a prior, which speaks of all recipes like these, a verdict must stand NOISIEST times that noise.
    """
    many = max((mine, theirs), key=lambda side: side.df)
    if many.df == 0 and prior is None:
        return Comparison("none", warnings=tuple(warnings))
    variance, df = moderated(many.variance, many.df, prior)
    variance = max(variance, many.rounding_variance)
    share = 1 / len(many.losses)
    difference = mine.mean - theirs.mean
    estimate = Estimate(difference, math.sqrt(variance * (1 + share)), df)
    guarded = estimate if prior else Estimate(difference, math.sqrt(variance * (NOISIEST**2 + share)), df)
    if prior is None:
        who = "this recipe" if many is theirs else "the baseline"
        warnings.append(
            f"one run of {who}, so its own noise is unknown: the interval takes the other side's for it, and HELPS, "
            f"HURTS or NO DIFFERENCE must stand {NOISIEST:g} times as much"
        )
    return Comparison(
        method=_method("single run", prior),
        estimate=estimate,
        guarded=guarded,
        noise=Noise(math.sqrt(variance), df),
        source=_from(f"the spread of {len(many.losses)} runs of the other side" if many.df else "", prior),
        prior=prior,
        warnings=tuple(warnings),
    )


def welch(difference: float, mine: Estimate, theirs: Estimate) -> Estimate:
    """Return a difference of two means whose errors are known from few runs each.

    Degrees of freedom by Welch (1947) and Satterthwaite (1946), rounded down, and at most WELCH_CAP times those of
    the side with fewer. Without that bound two or three runs that happen to agree make the test far too sure: 7 runs
    against 2, a family of five, is wrong in 13% of studies, and in 25% if the arms are twice as noisy.
    """
    variances = (mine.se**2, theirs.se**2)
    spread = variances[0] ** 2 / mine.df + variances[1] ** 2 / theirs.df
    df = math.floor(sum(variances) ** 2 / spread + 1e-9)
    fewest = min(mine.df, theirs.df)
    return Estimate(difference, math.sqrt(sum(variances)), max(1.0, min(df, WELCH_CAP * fewest)))


def with_noise(mine: Side, theirs: Side, noise: Noise) -> Estimate:
    """Return the difference of two means, each run with the same given noise: se = s sqrt(1/n + 1/m)."""
    se = noise.sd * math.sqrt(1 / len(mine.losses) + 1 / len(theirs.losses))
    return Estimate(mine.mean - theirs.mean, se, noise.df)


def evaluation_estimate(weights: Sequence[tuple[Group, float]]) -> Estimate | None:
    """Return a weighted sum of recipes, paired by parts of the test set and clustered by document.

    A difference has the weights 1 and -1. None without losses of every part.
    """
    losses = [group.mean_parts() for group, _ in weights]
    total = np.zeros(1)
    for (_, weight), values in zip(weights, losses, strict=True):
        if values is None:
            return None
        total = total + weight * values
    measured = weights[0][0].metadata[0].measured
    return clustered_mean(total, measured.clusters, measured.weights)


def _believed(prior: NoisePrior | None, own: Sequence[Noise], warnings: list[str]) -> NoisePrior | None:
    """Return a prior, or None and a warning where the comparison's own noise would be very unlikely under it."""
    odd = [noise for noise in own if prior is not None and is_contradicted(prior, noise)]
    if prior is None or not odd:
        return prior
    warnings.append(f"its noise, {odd[0].sd:.2g}, is larger than expected, so this is set aside: {_lent(prior)}")
    return None


def _method(name: str, prior: NoisePrior | None) -> str:
    return name if prior is None else f"{name} + prior"


def _from(own: str, prior: NoisePrior | None) -> str:
    """Say where a noise comes from."""
    if prior is None:
        return own
    return f"{own}, with {_lent(prior)}" if own else _lent(prior)


def _lent(prior: NoisePrior) -> str:
    return f"{prior.source} ({prior.sd:.2g} on {prior.df:.3g} df)"
