"""What a two-level factorial says: the effect of every change, and where two changes meet.

With replicates on shared seeds every effect is judged by how it varies from seed to seed, on its own. Without them
Lenth's method judges all contrasts of the design at once, or, where the user says so, those of three and more factors
are taken for error. Main effects are one family and interactions another, each adjusted for its own number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from harness.run.errors import ConfigError
from study.comparisons import evaluation_estimate
from study.designs import Design, Word, defining_relation
from study.effects import Finding
from study.lenth import LenthEstimate, adjusted, lenth_estimates
from study.results import Group
from study.statistics import ALPHA, Estimate, Floats, Noise, factorial_effects, holm
from study.verdicts import CANNOT_TELL, verdict_of, with_evaluation

INTERACTS, MAY_INTERACT = "INTERACTS", "MAY INTERACT"
NO_INTERACTION = "NO INTERACTION LARGER THAN"


@dataclass(frozen=True)
class Reading:
    """How a factorial is to be read: the smallest effect that matters, and where the noise comes from."""

    margin: float
    given_noise: Noise | None = None
    """The standard deviation of one run, by hand."""
    higher_orders_as_error: bool = False


@dataclass(frozen=True)
class Contrast:
    """A column of signs, as the set of effects that share it; the first is the one of fewest factors."""

    words: tuple[Word, ...]

    @property
    def order(self) -> int:
        """Factors of the simplest effect in it."""
        return len(self.words[0])

    @property
    def is_main(self) -> bool:
        """Whether it holds the effect of a single change."""
        return self.order == 1


def contrasts_of(design: Design) -> list[Contrast]:
    """Return all contrasts of a factorial, one less than it has arms, each with the effects it mixes up."""
    count = len(design.factors)
    relation = defining_relation(design.generators)
    found, covered = [], set(relation)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            word = frozenset(chosen)
            if word in covered:
                continue
            words = sorted((word, *(word ^ other for other in relation)), key=lambda one: (len(one), sorted(one)))
            covered.update(words)
            found.append(Contrast(tuple(words)))
    return found


def factorial_findings(design: Design, groups: Sequence[Group], reading: Reading) -> tuple[list[Finding], str]:
    """Return the effects of one and two factors, of more where they are told, and in words where their noise is from.

    Raises ConfigError where no seed has a loss of every arm.
    """
    contrasts = contrasts_of(design)
    values = np.array([_signed(design, contrast) for contrast in contrasts]).T
    losses = losses_by_complete_seed(groups)
    by_seed = np.array([factorial_effects(values, row) for row in losses])
    estimates, source = _estimates(contrasts, by_seed, reading)
    estimates = [_with_evaluation(one, column, groups) for one, column in zip(estimates, values.T, strict=True)]
    findings: list[Finding] = []
    for is_main in (True, False):
        known = zip(contrasts, estimates, strict=True)
        family = {contrast: one for contrast, one in known if contrast.is_main == is_main and one is not None}
        told = _adjusted(list(family.values()))
        same = holm([estimate.p_equivalent(reading.margin) for estimate in family.values()])
        for (contrast, estimate), *p_values in zip(family.items(), told, same, strict=True):
            finding = _finding(design, contrast, estimate, p_values, reading.margin)
            if contrast.order <= 2 or finding.verdict == INTERACTS:
                findings.append(finding)
    return findings, source


def losses_by_complete_seed(groups: Sequence[Group]) -> Floats:
    """Return the losses of those seeds on which every arm has one, a row for each; raises ConfigError without any.

    A seed on which an arm diverged or is missing has no contrast: it costs that seed alone.
    """
    tables = [{result.seeds: result.loss for result in group.results} for group in groups]
    seeds = [seed for seed in tables[0] if all(table.get(seed) is not None for table in tables)]
    if not seeds:
        lacking = [group.recipe for group in groups if not group.losses] or [groups[0].recipe]
        raise ConfigError(f"{lacking[0]}: no seed has a loss of every arm; the effects of a factorial need one")
    return np.array([[table[seed] for table in tables] for seed in seeds], dtype=np.float64)


def _signed(design: Design, contrast: Contrast) -> Floats:
    on = np.array([[factor in arm.on for factor in design.factors] for arm in design.arms])
    column: Floats = np.where(on, 1.0, -1.0)[:, sorted(contrast.words[0])].prod(axis=1)
    return column


def _estimates(
    contrasts: Sequence[Contrast], by_seed: Floats, reading: Reading
) -> tuple[Sequence[Estimate | None], str]:
    """Return the estimate of every contrast, None of those that were taken for error, and the source of the noise."""
    seeds, means, arms = len(by_seed), by_seed.mean(axis=0), len(contrasts) + 1
    if reading.given_noise is not None:
        se = 2 * reading.given_noise.sd / math.sqrt(arms * seeds)
        return [Estimate(float(value), se, reading.given_noise.df) for value in means], "given by hand"
    if seeds > 1:
        # Effects that differ between seeds vary more than runs of one arm do, each effect by its own amount.
        errors = by_seed.std(axis=0, ddof=1) / math.sqrt(seeds)
        found = [Estimate(float(value), float(se), seeds - 1) for value, se in zip(means, errors, strict=True)]
        return found, f"each effect's own, over {seeds} shared seeds"
    if reading.higher_orders_as_error:
        return _from_higher_orders(contrasts, means)
    return lenth_estimates(means.tolist()), (
        f"Lenth's pseudo standard error of {len(contrasts)} contrasts, with exact critical values, because nothing "
        "is replicated"
    )


def _with_evaluation(estimate: Estimate | None, signs: Floats, groups: Sequence[Group]) -> Estimate | None:
    """Add what other test text would change, but to Lenth's error, whose critical values are simulated without it."""
    if estimate is None or isinstance(estimate, LenthEstimate):
        return estimate
    weights = (2 * signs / len(signs)).tolist()
    return with_evaluation(estimate, evaluation_estimate(list(zip(groups, weights, strict=True))))


def _from_higher_orders(contrasts: Sequence[Contrast], means: Floats) -> tuple[Sequence[Estimate | None], str]:
    """Take contrasts of three and more factors for error: their mean square (Box, Hunter and Hunter 2005, 5.8)."""
    error = np.array([value for contrast, value in zip(contrasts, means, strict=True) if contrast.order > 2])
    if not len(error):
        raise ConfigError(
            "--higher-orders-as-error: found a design whose contrasts all hold effects of one or two factors, "
            "wanted one with more runs"
        )
    se = float(np.sqrt(np.mean(error**2)))
    estimates = [
        Estimate(float(value), se, len(error)) if contrast.order <= 2 else None
        for contrast, value in zip(contrasts, means, strict=True)
    ]
    return estimates, f"the {len(error)} contrasts of three and more factors, taken for error as you said"


def _adjusted(family: Sequence[Estimate]) -> list[float]:
    lenth = [estimate for estimate in family if isinstance(estimate, LenthEstimate)]
    return adjusted(lenth) if len(lenth) == len(family) else holm([estimate.p for estimate in family])


def _finding(
    design: Design, contrast: Contrast, estimate: Estimate, p_values: Sequence[float], margin: float
) -> Finding:
    """Put an effect into words; an interaction is no gain, so it neither helps nor hurts."""
    names = [_name(word, design.factors) for word in contrast.words if len(word) <= max(2, contrast.order)]
    p, p_same = p_values
    word = verdict_of(estimate, p, p_same, margin) if contrast.is_main else _pair_word(estimate, p, p_same, margin)
    sentence = f"{word}: Δ {estimate.in_words()}"
    if not contrast.is_main and word == INTERACTS:
        sentence += (
            f" Together {'worse' if estimate.difference > 0 else 'better'} than their separate effects add to."
        )
    return Finding(names[0], estimate, p, word, sentence, tuple(names[1:]))


def _pair_word(estimate: Estimate, p: float, p_same: float, margin: float) -> str:
    if p < ALPHA:
        return INTERACTS
    if estimate.p < ALPHA:
        return MAY_INTERACT
    return f"{NO_INTERACTION} {margin:g}" if p_same < ALPHA else CANNOT_TELL


def _name(word: Word, factors: Sequence[str]) -> str:
    return " x ".join(factors[factor] for factor in sorted(word))
