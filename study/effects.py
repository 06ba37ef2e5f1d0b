"""What a stack of changes says beyond the table: whether its gains add up, and whether it beats its best part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.comparisons import NOISIEST, Side, compare, evaluation_estimate, losses_by_seed, sides_of
from study.designs import STACK
from study.prior import is_contradicted
from study.results import Group
from study.statistics import ALPHA, Estimate, Noise, moderated
from study.verdicts import CANNOT_TELL, HELPS, HURTS, LEANS_WORSE, Rules, with_evaluation

ADDS_UP, LESS, MORE = "ADDS UP", "LESS THAN THE SUM", "MORE THAN THE SUM"
Weights = Sequence[tuple[Group, float]]


@dataclass(frozen=True)
class Finding:
    """One effect or contrast, with the effects that it cannot be told apart from."""

    name: str
    estimate: Estimate
    p_holm: float
    verdict: str
    sentence: str
    aliases: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    """The 95% interval where it is not that of the estimate."""

    def interval(self) -> tuple[float, float]:
        """Return the 95% interval."""
        return self.bounds or self.estimate.interval()


def stack_findings(baseline: Group, arms: Sequence[Group], factors: Sequence[str], rules: Rules) -> list[Finding]:
    """Return whether a stack's gains add up, and whether it beats its best part; nothing where an arm is missing."""
    by_name = {arm.recipe: arm for arm in (baseline, *arms) if arm.losses}
    if not {baseline.recipe, STACK, *factors} <= by_name.keys():
        return []
    singles, stack = [by_name[name] for name in factors], by_name[STACK]
    weights = [(stack, 1.0), (baseline, len(singles) - 1.0), *((single, -1.0) for single in singles)]
    found = (_additivity(weights, rules), _best_part(stack, singles, rules))
    return [finding for finding in found if finding is not None]


def _additivity(weights: Weights, rules: Rules) -> Finding | None:
    """Say whether a stack's gain is the sum of its parts' gains; None where no noise is known.

    gap = (stack - b) - sum(single - b), negative where the stack gains more. ADDS UP needs proof: two one-sided tests
    that the gap lies within the margin. Not finding a gap is not that.
    """
    training = _contrast(weights, rules)
    if training is None:
        return None
    evaluation = evaluation_estimate(weights)
    estimate, guarded = (part if evaluation is None else part.plus(evaluation) for part in training)
    if guarded.p_equivalent(rules.margin) < ALPHA:
        word, more = ADDS_UP, f" To within {rules.margin:g}."
    elif guarded.p < ALPHA:
        word, more = (LESS if estimate.difference > 0 else MORE), ""
    else:
        word, more = CANNOT_TELL, f" Neither a gap nor that it is below {rules.margin:g} is shown."
    return Finding(f"{STACK} v sum of parts", estimate, guarded.p, word, f"{word}: gap {estimate.in_words()}{more}")


def _contrast(weights: Weights, rules: Rules) -> tuple[Estimate, Estimate] | None:
    """Estimate a weighted sum of recipes' means, and what firm words must stand on; None where no noise is known.

    Where all recipes were run on the same seeds, the sum is taken seed by seed and its own spread tells its error: a
    seed's luck falls out. Else the recipes' own errors add up (Satterthwaite 1946), a single run's taken for that of
    the recipe with the most runs, and for firm words for NOISIEST times that.
    """
    sides = sides_of([group for group, _ in weights], [])
    seeds = _shared_seeds(weights)
    if rules.given is None and len(seeds) > 1:
        estimate = _over_seeds(weights, seeds, sides[0].rounding_variance, rules)
        return estimate, estimate
    total = sum(weight * side.mean for (_, weight), side in zip(weights, sides, strict=True))
    most = max(sides, key=lambda side: side.df)
    found = []
    for times in (1.0, NOISIEST):
        parts = []
        for (group, weight), side in zip(weights, sides, strict=True):
            variance, df = _variance_of_a_run((weights[1][0], group), (side, most), times, rules)
            if df == 0:
                return None
            parts.append((weight**2 * variance / len(side.losses), df))
        variance = sum(part for part, _ in parts)
        df = variance**2 / sum(part**2 / df for part, df in parts)
        df = max(1.0, math.floor(df + 1e-9)) if rules.given is None else rules.given.df
        found.append(Estimate(total, math.sqrt(variance), df))
    return found[0], found[1]


def _shared_seeds(weights: Weights) -> list[tuple[str, str]]:
    """Return the seeds that all recipes were run on; none where they are less than half of the fewest runs."""
    tables = [losses_by_seed(group) for group, _ in weights]
    shared = [seeds for seeds in tables[0] if all(seeds in table for table in tables)]
    return shared if 2 * len(shared) >= min(len(group.losses) for group, _ in weights) else []


def _over_seeds(weights: Weights, seeds: Sequence[tuple[str, str]], rounding: float, rules: Rules) -> Estimate:
    values = np.zeros(len(seeds))
    for group, weight in weights:
        table = losses_by_seed(group)
        values += weight * np.array([table[pair] for pair in seeds])
    runs = sum(weight**2 for _, weight in weights)
    own, df = max(float(np.var(values, ddof=1)), runs * rounding), len(seeds) - 1
    prior = rules.find_prior(weights[1][0], weights[0][0], len(seeds))
    if prior is not None and is_contradicted(prior, Noise(math.sqrt(own / runs), df)):
        prior = None
    variance, total_df = moderated(own, df, prior, runs)
    return Estimate(float(values.mean()), math.sqrt(variance / len(seeds)), total_df)


def _variance_of_a_run(
    pair: tuple[Group, Group], sides: tuple[Side, Side], times: float, rules: Rules
) -> tuple[float, float]:
    """Return the variance of one run of the pair's second recipe; a single run's is the most replicated one's."""
    if rules.given is not None:
        return rules.given.sd**2, rules.given.df
    own, most = sides
    source = own if own.df else most
    prior = rules.find_prior(*pair, 0)
    if prior is not None and not is_contradicted(prior, Noise(math.sqrt(source.variance), source.df)):
        return moderated(source.variance, source.df if own.df else 0.0, prior)
    return source.variance * (1.0 if own.df else times**2), source.df


def _best_part(stack: Group, singles: Sequence[Group], rules: Rules) -> Finding | None:
    """Say whether a stack beats the best of its parts, whichever that truly is; None where no noise is known.

    To beat the best is to beat each, so no p value is adjusted: it is the largest of all (Berger 1982, Technometrics
    24, 295, intersection-union test). The interval of stack - best holds the truth in 95%: its upper end is the
    highest upper end of all parts, its lower end the highest lower end, at 2.5% divided by their number because the
    largest of several lower ends is lucky (Hsu 1984, Annals of Statistics 12, 1136).
    """
    differences = []
    for single in singles:
        evaluation = evaluation_estimate([(stack, 1.0), (single, -1.0)])
        found = with_evaluation(compare(single, stack, rules.given, rules.find_prior).guarded, evaluation)
        if found is None:
            return None
        differences.append(found)
    count = len(singles)
    high = max(item.interval()[1] for item in differences)
    low = max(item.interval(1 - ALPHA / count)[0] for item in differences)
    best = max(range(count), key=lambda index: differences[index].difference)
    p = max(item.p if item.difference < 0 else 1.0 for item in differences)
    word = HELPS if high < 0 else CANNOT_TELL
    if low > 0:
        word, p = HURTS, min(1.0, count * min(item.p for item in differences if item.difference > 0))
    elif max(item.interval()[0] for item in differences) > 0:
        word = LEANS_WORSE
    name, estimate = singles[best].recipe, differences[best]
    sentence = f"{word}: Δ {estimate.difference:+.4f} from {name}; from the best part, whichever it is, 95% CI "
    sentence += f"{low:+.4f}..{high:+.4f}."
    return Finding(f"{STACK} v best part {name}", estimate, p, word, sentence, bounds=(low, high))
