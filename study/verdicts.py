"""Judge arms against a baseline: the estimate, its two uncertainties, and a verdict in fixed words.

Training noise (how runs differ by seeds) and evaluation noise (which test tokens were drawn) are kept apart, then
added. The words are chosen by p values adjusted for the number of arms, so that they are rarely wrong. What is said
about a verdict, and which runs to buy next, stands in study/wording.py and study/advice.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.run.errors import ConfigError
from study.comparisons import Comparison, PriorFinder, compare, evaluation_estimate
from study.results import Group
from study.statistics import ALPHA, Estimate, Noise, fisher_exact, holm, loss_slope

HELPS, HURTS = "HELPS", "HURTS"
LEANS_BETTER, LEANS_WORSE = "LEANS BETTER", "LEANS WORSE"
SLIGHTLY_BETTER, SLIGHTLY_WORSE = "BETTER BY LESS THAN", "WORSE BY LESS THAN"
CANNOT_TELL, NO_LARGER = "CANNOT TELL", "NO DIFFERENCE LARGER THAN"
DIVERGES = "DIVERGES"
MARGIN = 0.01

PValue = Callable[[Group, Estimate], float]
"""From an arm and its estimate to the p value that its family is adjusted from; that of several looks may be larger."""


def no_prior(_baseline: Group, _arm: Group, _is_paired: bool) -> None:
    """Find no prior: each comparison stands on its own runs."""


def own_p(_arm: Group, estimate: Estimate) -> float:
    """Give an estimate's own p value: it was looked at once."""
    return estimate.p


@dataclass(frozen=True)
class Rules:
    """How a table is judged."""

    margin: float = MARGIN
    """The smallest difference that matters, in nats per token."""
    alpha: float = ALPHA
    given: Noise | None = None
    """A training noise by hand, which overrides what the runs show."""
    find_prior: PriorFinder = no_prior
    p_of: PValue = own_p


@dataclass(frozen=True)
class Word:
    """A verdict, and the p values of its family: of no difference, and of a difference of the margin or more."""

    verdict: str
    p_holm: float
    p_equivalent: float


@dataclass(frozen=True)
class Divergence:
    """How many runs of an arm and of the baseline diverged, and whether that differs (Fisher; Holm over the arms)."""

    diverged: int
    runs: int
    baseline_diverged: int
    baseline_runs: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Judged:
    """One arm against the baseline; `estimate` has both uncertainties in it, and is None where nothing is known."""

    group: Group
    comparison: Comparison
    evaluation: Estimate | None
    estimate: Estimate | None
    guarded: Estimate | None
    """What the words of the family rest on; it differs from `estimate` for a single run (study/comparisons.py)."""
    verdict: str = CANNOT_TELL
    p_holm: float = math.nan
    p_equivalent: float = math.nan
    divergence: Divergence | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_told(self) -> bool:
        """Say whether the sign of the difference is settled in its family."""
        return self.verdict.startswith((HELPS, HURTS, SLIGHTLY_BETTER, SLIGHTLY_WORSE))


@dataclass(frozen=True)
class Judgement:
    """A whole table."""

    baseline: Group
    arms: tuple[Judged, ...]
    rules: Rules = field(default_factory=Rules)

    @property
    def family(self) -> int:
        """How many differences were tested together."""
        return sum(item.estimate is not None for item in self.arms)


def judge(baseline: Group, arms: Sequence[Group], rules: Rules | None = None) -> Judgement:
    """Judge all arms against the baseline as one family; raises ConfigError where a comparison would be unfair."""
    rules = rules or Rules()
    refuse_unfair(baseline, arms)
    drafts = [_draft(baseline, arm, rules) for arm in arms]
    tested = [item for item in drafts if item.estimate and item.guarded]
    words = words_of(
        [(item.estimate, item.guarded) for item in tested if item.estimate and item.guarded],
        rules,
        [item.group for item in tested],
    )
    by_arm = {id(item): word for item, word in zip(tested, words, strict=True)}
    diverging = _divergences(baseline, arms)
    judged = [
        _concluded(item, by_arm.get(id(item)), divergence, rules)
        for item, divergence in zip(drafts, diverging, strict=True)
    ]
    return Judgement(baseline, tuple(judged), rules)


def refuse_unfair(baseline: Group, arms: Sequence[Group]) -> None:
    """Raise ConfigError, with every reason, where arms did not see as many tokens, or other test sequences."""
    counts = {len(item.sequence_losses) for group in (baseline, *arms) for item in group.metadata}
    if len(counts) > 1:
        raise ConfigError(f"found scores of {_listed(counts)} sequences, wanted the same test sequences for all runs")
    seen = {item.tokens_seen for item in baseline.metadata}
    if len(seen) > 1:
        raise ConfigError(f"{baseline.recipe}: its replicates saw {_listed(seen)} tokens, wanted the same for all")
    problems = [
        f"{arm.recipe}: saw {_listed({item.tokens_seen for item in arm.metadata})} tokens and {baseline.recipe} "
        f"{_listed(seen)}, so a difference would not be the change's"
        for arm in arms
        if arm.metadata and seen and {item.tokens_seen for item in arm.metadata} != seen
    ]
    if problems:
        raise ConfigError(*problems)


def _listed(counts: set[int]) -> str:
    return " and ".join(f"{count:,}" for count in sorted(counts))


def _draft(baseline: Group, arm: Group, rules: Rules) -> Judged:
    """Put the two uncertainties of one comparison together; the verdict is still to come."""
    comparison = compare(baseline, arm, rules.given, rules.find_prior)
    evaluation = evaluation_estimate(baseline, arm)
    return Judged(
        group=arm,
        comparison=comparison,
        evaluation=evaluation,
        estimate=_with_evaluation(comparison.estimate, evaluation),
        guarded=_with_evaluation(comparison.guarded, evaluation),
        warnings=(*comparison.warnings, *_warnings(baseline, arm)),
    )


def _with_evaluation(training: Estimate | None, evaluation: Estimate | None) -> Estimate | None:
    return training if training is None or evaluation is None else training.plus(evaluation)


def _warnings(baseline: Group, arm: Group) -> list[str]:
    found = []
    hardware = {item.hardware for item in (*baseline.metadata, *arm.metadata)}
    if len(hardware) > 1:
        found.append(f"other hardware: {', '.join(sorted(hardware))}")
    sizes = [group.metadata[0].parameters for group in (baseline, arm) if group.metadata]
    if len(set(sizes)) > 1:
        found.append(f"{sizes[1] - sizes[0]:+,} parameters")
    return found


def words_of(
    estimates: Sequence[tuple[Estimate, Estimate]], rules: Rules, arms: Sequence[Group] | None = None
) -> list[Word]:
    """Choose the words of a family, from every member's estimate and the one that its firm words must stand on.

    Firm words about a sign are adjusted together (Holm 1979), and so are, as a family of their own, the words that a
    difference is within the margin (two one-sided tests, Schuirmann 1987).
    """
    guarded = [estimate for _, estimate in estimates]
    firm = [rules.p_of(arm, estimate) for arm, estimate in zip(arms, guarded, strict=True)] if arms else None
    adjusted = holm(firm if firm is not None else [estimate.p for estimate in guarded])
    equivalent = holm([estimate.p_equivalent(rules.margin) for estimate in guarded])
    return [
        Word(verdict_of(estimate, p_holm, p_equivalent, rules), p_holm, p_equivalent)
        for (estimate, _), p_holm, p_equivalent in zip(estimates, adjusted, equivalent, strict=True)
    ]


def verdict_of(estimate: Estimate, p_holm: float, p_equivalent: float, rules: Rules) -> str:
    """Choose the word: told in the family, within the margin, leaning alone, or unknown."""
    is_better, is_within = estimate.difference < 0, p_equivalent < rules.alpha
    if p_holm < rules.alpha:
        if is_within:
            return f"{SLIGHTLY_BETTER if is_better else SLIGHTLY_WORSE} {rules.margin:g}"
        return HELPS if is_better else HURTS
    if is_within:
        return f"{NO_LARGER} {rules.margin:g}"
    if estimate.p < ALPHA:
        return LEANS_BETTER if is_better else LEANS_WORSE
    return CANNOT_TELL


def _divergences(baseline: Group, arms: Sequence[Group]) -> list[Divergence | None]:
    """Compare how often runs diverged, for every arm where it or the baseline has a run that did.

    Where neither has one there is nothing to test, so such arms need no adjustment (Tarone 1990, Biometrics 46, 515).
    """
    theirs = len(baseline.diverged), len(baseline.results)
    tested = [arm for arm in arms if arm.diverged or baseline.diverged]
    p_values = [fisher_exact(len(arm.diverged), len(arm.results), *theirs) for arm in tested]
    found = {
        id(arm): Divergence(len(arm.diverged), len(arm.results), *theirs, p, p_holm)
        for arm, p, p_holm in zip(tested, p_values, holm(p_values), strict=True)
    }
    return [found.get(id(arm)) for arm in arms]


def _concluded(item: Judged, word: Word | None, divergence: Divergence | None, rules: Rules) -> Judged:
    verdict = word.verdict if word else CANNOT_TELL
    if divergence is not None and divergence.p_holm < rules.alpha and _is_worse(divergence):
        verdict = DIVERGES
    return Judged(
        group=item.group,
        comparison=item.comparison,
        evaluation=item.evaluation,
        estimate=item.estimate,
        guarded=item.guarded,
        verdict=verdict,
        p_holm=word.p_holm if word else math.nan,
        p_equivalent=word.p_equivalent if word else math.nan,
        divergence=divergence,
        warnings=item.warnings,
    )


def _is_worse(rate: Divergence) -> bool:
    return rate.diverged * rate.baseline_runs > rate.baseline_diverged * rate.runs


def curve_slope(baseline: Group) -> float | None:
    """Give the mean slope of the baseline's training curves, dL/d ln(tokens); None where it is not known."""
    slopes = [loss_slope(*item.curve) for item in baseline.metadata]
    known = [slope for slope in slopes if slope is not None]
    return float(np.mean(known)) if known else None
