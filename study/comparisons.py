"""Estimate one difference from the runs of an arm and of the baseline, each side on its own noise.

Nothing is pooled over recipes: one that is noisier, or follows the baseline more closely, than others would make the
tests of all of them wrong. A prior (study/ledger.py) may lend strength, in the open.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from study.results import Group
from study.statistics import Estimate, Noise, NoisePrior, clustered_mean, moderated

NOISIEST = 5.0
"""A single run's own noise is unknown; a verdict on it must stand if that is as many times what was seen."""
FEW_PAIRS = 4
"""With fewer pairs than this a prior of single runs serves pairs too, which are no noisier when seeds are shared."""
WELCH_CAP = 1.5
FINEST_DECIMALS = 7
"""Digits beyond these say nothing: a test loss is computed from float32 numbers."""
RECORDED_DECIMALS = 6
"""Equal losses with more digits than people write down are not rounded alike: they are one run, recorded twice."""

PriorFinder = Callable[[Group, Group, bool], NoisePrior | None]
"""From baseline, arm, and whether runs are paired, to what is known of the noise of one run (of a pair: the standard
deviation of a difference over the square root of 2)."""


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
        """The variance of one run, never less than rounding allows."""
        return max(float(np.var(self.losses, ddof=1)), self.rounding_variance)

    @property
    def df(self) -> int:
        """Degrees of freedom of the variance."""
        return len(self.losses) - 1


@dataclass(frozen=True)
class Comparison:
    """A difference by training noise alone, and how it was reached."""

    method: str
    """pairs, unpaired, single run, given noise, or none; with "+ prior" where a prior lends strength."""
    estimate: Estimate | None
    guarded: Estimate | None
    """What must stand for HELPS, HURTS or NO DIFFERENCE: of a single run, with NOISIEST times the noise seen."""
    pairs: int = 0
    noise: Noise | None = None
    """Of one run; where there are pairs, what is left of it in a difference, over the square root of 2."""
    correlation: float = math.nan
    source: str = ""
    warnings: tuple[str, ...] = ()


def compare(
    baseline: Group, arm: Group, given: Noise | None = None, find_prior: PriorFinder = lambda *_: None
) -> Comparison:
    """Compare an arm with the baseline: in pairs where seeds are shared, else side by side.

    Runs that diverged have no loss and are left out, with the pairs they belong to. `given` is a noise by hand, which
    overrides all others.
    """
    warnings: list[str] = []
    sides = [side_of(group, warnings) for group in (baseline, arm)]
    if not all(side.losses for side in sides):
        return Comparison("none", None, None)
    theirs, mine = sides
    if given is not None:
        estimate = with_noise(mine, theirs, given)
        return Comparison("given noise", estimate, estimate, noise=given, source="given by hand")
    pairs = shared_pairs(baseline, arm)
    prior = find_prior(baseline, arm, True) if pairs else None
    if len(pairs) >= 2 and 2 * len(pairs) >= min(len(mine.losses), len(theirs.losses)):
        if prior is None and len(pairs) < FEW_PAIRS:
            prior = find_prior(baseline, arm, False)
        return in_pairs(pairs, (mine, theirs), prior, warnings)
    if len(pairs) == 1 and prior is not None and min(len(mine.losses), len(theirs.losses)) == 1:
        return in_pairs(pairs, (mine, theirs), prior, warnings)
    return side_by_side(mine, theirs, find_prior(baseline, arm, False), warnings)


def side_of(group: Group, warnings: list[str]) -> Side:
    """Give the losses of a recipe; replicates that are equal to the last bit are one run, and a warning says so."""
    losses = tuple(group.losses)
    digits = decimals(losses)
    if len(losses) > 1 and len(set(losses)) == 1 and digits > RECORDED_DECIMALS:
        warnings.append(f"{group.recipe}: its {len(losses)} runs have one loss to the last digit, so they count as one")
        losses = losses[:1]
    return Side(losses, 10.0 ** -min(digits, FINEST_DECIMALS))


def decimals(losses: Sequence[float]) -> int:
    """Give how many decimals losses were recorded with: the most that any of them shows."""
    return max((max(0, -int(Decimal(repr(loss)).as_tuple().exponent)) for loss in losses), default=0)


def shared_pairs(baseline: Group, arm: Group) -> list[tuple[float, float]]:
    """Give (arm, baseline) losses on the seeds that both were run on, each once, in the order of the baseline."""
    sides = []
    for group in (arm, baseline):
        counts = Counter(result.seeds for result in group.results)
        sides.append(
            {
                result.seeds: result.loss
                for result in group.results
                if result.loss is not None and "" not in result.seeds and counts[result.seeds] == 1
            }
        )
    mine, theirs = sides
    return [(mine[seeds], loss) for seeds, loss in theirs.items() if seeds in mine]


def in_pairs(
    pairs: Sequence[tuple[float, float]], sides: tuple[Side, Side], prior: NoisePrior | None, warnings: list[str]
) -> Comparison:
    """Compare by paired differences: the paired t test, on n - 1 degrees of freedom and those of the prior."""
    values = np.asarray(pairs)
    differences = values[:, 0] - values[:, 1]
    count = len(differences)
    floor = sum(side.rounding_variance for side in sides)
    own = max(float(np.var(differences, ddof=1)), floor) if count > 1 else 0.0
    variance, df = moderated(own, count - 1, prior, runs=2)
    unused = sum(len(side.losses) for side in sides) - 2 * count
    if unused:
        warnings.append(f"{unused} run{'s' * (unused > 1)} without a partner on the same seed left out")
    estimate = Estimate(float(differences.mean()), math.sqrt(variance / count), df)
    has_spread = count > 2 and bool(np.ptp(values, axis=0).all())
    return Comparison(
        method="pairs" if prior is None else "pairs + prior",
        estimate=estimate,
        guarded=estimate,
        pairs=count,
        noise=Noise(math.sqrt(variance / 2), df),
        correlation=float(np.corrcoef(values.T)[0, 1]) if has_spread else math.nan,
        source=_from(f"{count} pairs on shared seeds" if count > 1 else "", prior),
        warnings=tuple(warnings),
    )


def side_by_side(mine: Side, theirs: Side, prior: NoisePrior | None, warnings: list[str]) -> Comparison:
    """Compare two means: Welch's test, or a single run against the spread of the other side's runs."""
    if min(mine.df, theirs.df) == 0:
        return _single_run(mine, theirs, prior, warnings)
    parts = []
    for side in (mine, theirs):
        variance, df = moderated(side.variance, side.df, prior)
        parts.append(Estimate(0.0, math.sqrt(variance / len(side.losses)), df))
    estimate = welch(mine.mean - theirs.mean, *parts)
    runs = 1 / (1 / len(mine.losses) + 1 / len(theirs.losses))
    return Comparison(
        method="unpaired" if prior is None else "unpaired + prior",
        estimate=estimate,
        guarded=estimate,
        noise=Noise(estimate.se * math.sqrt(runs), estimate.df),
        source=_from(f"the spread of {len(mine.losses)} and of {len(theirs.losses)} runs", prior),
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
        return Comparison("none", None, None, warnings=tuple(warnings))
    variance, df = moderated(many.variance if many.df else 0.0, many.df, prior)
    variance = max(variance, many.rounding_variance)
    share = 1 / len(many.losses)
    difference = mine.mean - theirs.mean
    estimate = Estimate(difference, math.sqrt(variance * (1 + share)), df)
    guarded = estimate if prior else Estimate(difference, math.sqrt(variance * (NOISIEST**2 + share)), df)
    who = "this recipe" if many is theirs else "the baseline"
    if prior is None:
        warnings.append(
            f"one run of {who}, so its own noise is unknown; the interval takes it for that of the other side, and "
            f"HELPS or HURTS must stand {NOISIEST:g} times as much"
        )
    return Comparison(
        method="single run" if prior is None else "single run + prior",
        estimate=estimate,
        guarded=guarded,
        noise=Noise(math.sqrt(variance), df),
        source=_from(f"the spread of {len(many.losses)} runs of the other side" if many.df else "", prior),
        warnings=tuple(warnings),
    )


def welch(difference: float, mine: Estimate, theirs: Estimate) -> Estimate:
    """Give a difference of two means whose errors are known from few runs each.

    Degrees of freedom by Welch (1947) and Satterthwaite (1946), rounded down, and at most WELCH_CAP times those of the
    side with fewer. Without that bound a side of two or three runs that happen to agree makes the test far too sure:
    7 runs against 2, a family of five, is wrong in 13% of studies, and in 25% if the arms are twice as noisy.
    """
    variances = (mine.se**2, theirs.se**2)
    spread = variances[0] ** 2 / mine.df + variances[1] ** 2 / theirs.df
    df = math.floor(sum(variances) ** 2 / spread + 1e-9)
    fewest = min(mine.df, theirs.df)
    return Estimate(difference, math.sqrt(sum(variances)), max(1.0, min(df, WELCH_CAP * fewest)))


def with_noise(mine: Side, theirs: Side, noise: Noise) -> Estimate:
    """Give the difference of two means, each run with the same given noise: se = s sqrt(1/n + 1/m)."""
    se = noise.sd * math.sqrt(1 / len(mine.losses) + 1 / len(theirs.losses))
    return Estimate(mine.mean - theirs.mean, se, noise.df)


def evaluation_estimate(baseline: Group, arm: Group) -> Estimate | None:
    """Give the difference paired by test sequence, clustered by document; None without losses of every sequence."""
    mine, theirs = arm.mean_sequence_losses(), baseline.mean_sequence_losses()
    if mine is None or theirs is None:
        return None
    return clustered_mean(mine - theirs, arm.metadata[0].documents)


def _from(own: str, prior: NoisePrior | None) -> str:
    """Say where a noise comes from."""
    if prior is None:
        return own
    lent = f"{prior.source} ({prior.sd:.2g} on {prior.df:.3g} df)"
    return f"{own}, with {lent}" if own else lent
