"""What a stack of changes says beyond the table: whether its gains add up, and whether it beats its best part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.comparisons import NOISIEST, Side, compare, evaluation_estimate, side_of
from study.designs import STACK
from study.effects import Finding
from study.results import Group
from study.statistics import ALPHA, Estimate, clustered_mean, moderated
from study.verdicts import CANNOT_TELL, HELPS, HURTS, LEANS_WORSE, Rules

ADDS_UP, LESS, MORE = "ADDS UP", "LESS THAN THE SUM", "MORE THAN THE SUM"


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of recipes' means, and what firm words about it must stand on."""

    estimate: Estimate
    guarded: Estimate


def stack_findings(
    baseline: Group, arms: Sequence[Group], factors: Sequence[str], rules: Rules | None = None
) -> list[Finding]:
    """Give whether a stack's gains add up, and whether it beats its best part; nothing where an arm is missing."""
    rules = rules or Rules()
    by_name = {arm.recipe: arm for arm in arms}
    needed = [*factors, STACK]
    if not all(name in by_name and by_name[name].losses for name in needed) or not baseline.losses:
        return []
    singles, stack = [by_name[name] for name in factors], by_name[STACK]
    weights = [(stack, 1.0), (baseline, len(singles) - 1.0), *((single, -1.0) for single in singles)]
    gap = contrast(weights, baseline, rules)
    found = [] if gap is None else [additivity_finding(gap, rules.margin)]
    best = best_part_finding(stack, singles, rules)
    return [*found, best] if best else found


def contrast(weights: Sequence[tuple[Group, float]], baseline: Group, rules: Rules) -> Contrast | None:
    """Estimate a weighted sum of recipes' means; None where no noise is known.

    Where all recipes were run on the same seeds, the sum is taken seed by seed and its own spread tells its error: a
    seed's luck falls out. Else the recipes' own errors add up (Satterthwaite 1946), a single run's taken for that of
    the recipe with the most runs. The evaluation's error is that of the same sum of sequence losses.
    """
    by_seed = _by_seed(weights)
    found = _over_seeds(by_seed, weights, baseline, rules) if by_seed else _over_means(weights, baseline, rules)
    evaluation = _evaluation(weights)
    if found is None or evaluation is None:
        return found
    return Contrast(found.estimate.plus(evaluation), found.guarded.plus(evaluation))


def _by_seed(weights: Sequence[tuple[Group, float]]) -> list[float]:
    """Give the weighted sum on each seed that all recipes were run on; nothing where those are few."""
    tables = [
        {result.seeds: result.loss for result in group.results if result.loss is not None and "" not in result.seeds}
        for group, _ in weights
    ]
    shared = [seeds for seeds in tables[0] if all(seeds in table for table in tables)]
    if len(shared) < 2 or 2 * len(shared) < min(len(group.losses) for group, _ in weights):
        return []
    return [sum(w * table[seeds] for (_, w), table in zip(weights, tables, strict=True)) for seeds in shared]


def _over_seeds(
    values: Sequence[float], weights: Sequence[tuple[Group, float]], baseline: Group, rules: Rules
) -> Contrast:
    floor = sum(weight**2 * side_of(group, []).rounding_variance for group, weight in weights)
    prior = rules.find_prior(baseline, weights[0][0], True)
    own = max(float(np.var(values, ddof=1)), floor)
    variance, df = moderated(own, len(values) - 1, prior, runs=sum(weight**2 for _, weight in weights))
    estimate = Estimate(float(np.mean(values)), math.sqrt(variance / len(values)), df)
    return Contrast(estimate, estimate)


def _over_means(weights: Sequence[tuple[Group, float]], baseline: Group, rules: Rules) -> Contrast | None:
    sides = [side_of(group, []) for group, _ in weights]
    most = max(sides, key=lambda side: side.df)
    estimates = []
    for times in (1.0, NOISIEST):
        parts = []
        for (group, weight), side in zip(weights, sides, strict=True):
            prior = rules.find_prior(baseline, group, False)
            variance, df = _variance(side, most)
            is_guessed = side.df == 0 and prior is None
            if prior is not None:
                variance, df = moderated(variance if side.df else 0.0, side.df, prior)
            if df == 0:
                return None
            variance *= times**2 if is_guessed else 1.0
            parts.append((weight**2 * variance / len(side.losses), df))
        estimates.append(_sum(weights, sides, parts))
    return Contrast(*estimates)


def _variance(side: Side, most: Side) -> tuple[float, float]:
    """Give the variance of a recipe's runs, or where it has one run only that of the recipe with the most."""
    source = side if side.df else most
    return (source.variance, source.df) if source.df else (0.0, 0.0)


def _sum(
    weights: Sequence[tuple[Group, float]], sides: Sequence[Side], parts: Sequence[tuple[float, float]]
) -> Estimate:
    total = sum(variance for variance, _ in parts)
    df = total**2 / sum(variance**2 / df for variance, df in parts)
    difference = sum(weight * side.mean for (_, weight), side in zip(weights, sides, strict=True))
    return Estimate(difference, math.sqrt(total), max(1.0, math.floor(df + 1e-9)))


def _evaluation(weights: Sequence[tuple[Group, float]]) -> Estimate | None:
    losses = [group.mean_sequence_losses() for group, _ in weights]
    if any(item is None for item in losses):
        return None
    combined = sum(
        (weight * item for (_, weight), item in zip(weights, losses, strict=True) if item is not None),
        np.zeros(1),
    )
    return clustered_mean(combined, weights[0][0].metadata[0].documents)


def additivity_finding(gap: Contrast, margin: float) -> Finding:
    """Say whether a stack's gain is the sum of its parts' gains.

    gap = (stack - b) - sum(single - b), negative where the stack gains more. ADDS UP needs proof: two one-sided tests
    that the gap lies within the margin. Not finding a gap is not that.
    """
    estimate, is_shown = gap.estimate, gap.guarded.p < ALPHA
    low, high = estimate.interval()
    shown = f"gap {estimate.difference:+.4f} (95% CI {low:+.4f}..{high:+.4f}), "
    shown += f"t {estimate.t:+.2f} on {estimate.df:.3g} df."
    if gap.guarded.p_equivalent(margin) < ALPHA:
        word, more = ADDS_UP, f" To within {margin:g}."
    elif is_shown:
        word, more = (LESS if estimate.difference > 0 else MORE), ""
    else:
        word, more = CANNOT_TELL, f" Neither a gap nor that it is below {margin:g} is shown."
    return Finding(f"{STACK} v sum of parts", estimate, estimate.p, word, f"{word}: {shown}{more}")


def best_part_finding(stack: Group, singles: Sequence[Group], rules: Rules) -> Finding | None:
    """Say whether a stack beats the best of its parts, whichever that truly is; None where no noise is known.

    To beat the best is to beat each, so no p value is adjusted: it is the largest of all (Berger 1982, Technometrics
    24, 295, intersection-union test). The interval of stack - best holds the truth in 95%: its upper end is the
    highest upper end of all parts, its lower end the highest lower end, at 2.5% divided by their number because the
    largest of several lower ends is lucky (Hsu 1984, Annals of Statistics 12, 1136).
    """
    differences = []
    for single in singles:
        found = compare(single, stack, rules.given, rules.find_prior)
        evaluation = evaluation_estimate(single, stack)
        if found.guarded is None:
            return None
        differences.append(found.guarded if evaluation is None else found.guarded.plus(evaluation))
    count = len(singles)
    high = max(item.interval()[1] for item in differences)
    low = max(item.interval(1 - ALPHA / count)[0] for item in differences)
    best = max(range(count), key=lambda index: differences[index].difference)
    estimate = differences[best]
    p = max(item.p if item.difference < 0 else 1.0 for item in differences)
    if high < 0:
        word = HELPS
    elif low > 0:
        word, p = HURTS, min(1.0, count * min(item.p for item in differences if item.difference > 0))
    else:
        word = LEANS_WORSE if max(item.interval()[0] for item in differences) > 0 else CANNOT_TELL
    name = singles[best].recipe
    sentence = f"{word}: Δ {estimate.difference:+.4f} from {name}; from the best part, whichever it is, 95% CI "
    sentence += f"{low:+.4f}..{high:+.4f}."
    return Finding(f"{STACK} v best part {name}", estimate, p, word, sentence, bounds=(low, high))
