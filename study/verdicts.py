"""Judge arms against a baseline: the estimate, its two uncertainties, and a verdict in fixed words.

Training noise (how runs differ by seeds) and evaluation noise (which test tokens were drawn) are kept apart, then
added. The words are chosen by p values adjusted for the number of arms, so that they are rarely wrong. What is said
about a verdict, and which runs to buy next, stands in study/wording.py and study/advice.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from harness.report.html import Tone
from harness.run.errors import ConfigError
from study.comparisons import Comparison, PriorFinder, compare, evaluation_estimate, no_prior
from study.results import Group, has_own_budget
from study.statistics import ALPHA, Estimate, Noise, holm

HELPS, HURTS = "HELPS", "HURTS"
LEANS_BETTER, LEANS_WORSE = "LEANS BETTER", "LEANS WORSE"
SLIGHTLY_BETTER, SLIGHTLY_WORSE = "BETTER BY LESS THAN", "WORSE BY LESS THAN"
CANNOT_TELL, NO_LARGER = "CANNOT TELL", "NO DIFFERENCE LARGER THAN"
DIVERGES = "DIVERGES"
MARGIN = 0.01
SAME_TEXT = 0.05
"""Runs of different tokenizers saw as much text if it differs by no more than this share."""


def tone_of(verdict: str) -> Tone:
    """Return the colour that a verdict has on a page."""
    if verdict.startswith((HELPS, LEANS_BETTER, SLIGHTLY_BETTER)):
        return "better"
    return "worse" if verdict.startswith((HURTS, LEANS_WORSE, SLIGHTLY_WORSE, DIVERGES)) else "open"


def is_sign_told(verdict: str) -> bool:
    """Say whether a verdict settles which of two recipes is better."""
    return verdict.startswith((HELPS, HURTS, SLIGHTLY_BETTER, SLIGHTLY_WORSE))


@dataclass(frozen=True)
class Rules:
    """How a table is judged."""

    margin: float = MARGIN
    """The smallest difference that matters, in the unit of the losses."""
    given: Noise | None = None
    """A training noise by hand, which overrides what the runs show."""
    find_prior: PriorFinder = no_prior
    budgets_planned: bool = False
    """Whether arms that set their own min_train_tokens do so as planned: then it is part of the change."""


@dataclass(frozen=True)
class Divergence:
    """How many runs of an arm and of the baseline diverged, and whether that differs (Fisher; Holm over the arms)."""

    diverged: int
    runs: int
    baseline_diverged: int
    baseline_runs: int
    p: float
    p_holm: float

    @property
    def is_told(self) -> bool:
        """Whether the arm is shown to diverge more often."""
        return self.p_holm < ALPHA and self.diverged * self.baseline_runs > self.baseline_diverged * self.runs


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
    p_same: float = math.nan
    """Of a difference of the margin or more, adjusted like p_holm."""
    divergence: Divergence | None = None
    level: float = 1 - ALPHA
    """Of the interval; higher where each look's must be wider for all of them to hold the truth in 95%."""
    warnings: tuple[str, ...] = ()

    @property
    def is_within(self) -> bool:
        """Whether the difference is shown to be smaller than the margin."""
        return self.p_same < ALPHA

    @property
    def is_open(self) -> bool:
        """Whether more runs could tell more that matters."""
        return not (is_sign_told(self.verdict) or self.is_within or self.verdict == DIVERGES)


@dataclass(frozen=True)
class Judgement:
    """A whole table, or the part of it that is shown."""

    baseline: Group
    arms: tuple[Judged, ...]
    family: int
    """How many differences were tested together, whichever of them are shown."""
    rules: Rules = field(default_factory=Rules)
    looks: int = 1
    """How many looks the p values count."""

    @property
    def unit(self) -> str:
        """The unit of all losses, differences and margins."""
        return self.baseline.unit


def judge(baseline: Group, arms: Sequence[Group], rules: Rules | None = None) -> Judgement:
    """Judge all arms against the baseline as one family; raises ConfigError where a comparison would be unfair.

    Words about a sign are adjusted together (Holm 1979), and so are, as a family of their own, the words that a
    difference is within the margin (two one-sided tests, Schuirmann 1987).
    """
    rules = rules or Rules()
    refuse_unfair(baseline, arms, rules)
    drafts = [_draft(baseline, arm, rules) for arm in arms]
    tested = [item.guarded for item in drafts if item.guarded]
    told = iter(holm([estimate.p for estimate in tested]))
    same = iter(holm([estimate.p_equivalent(rules.margin) for estimate in tested]))
    judged = []
    for item, divergence in zip(drafts, _divergences(baseline, arms), strict=True):
        if item.estimate:
            p, p_same = next(told), next(same)
            verdict = verdict_of(item.estimate, p, p_same, rules.margin)
            item = replace(item, p_holm=p, p_same=p_same, verdict=verdict)
        is_diverging = divergence is not None and divergence.is_told
        judged.append(replace(item, divergence=divergence, verdict=DIVERGES if is_diverging else item.verdict))
    return Judgement(baseline, tuple(judged), len(tested), rules)


def verdict_of(estimate: Estimate, p: float, p_same: float, margin: float) -> str:
    """Choose the word, from p values adjusted for the family: of no difference, and of one of the margin or more."""
    is_better, is_within = estimate.difference < 0, p_same < ALPHA
    if p < ALPHA and is_within:
        return f"{SLIGHTLY_BETTER if is_better else SLIGHTLY_WORSE} {margin:g}"
    if p < ALPHA:
        return HELPS if is_better else HURTS
    if estimate.p < ALPHA:
        return LEANS_BETTER if is_better else LEANS_WORSE
    return f"{NO_LARGER} {margin:g}" if is_within else CANNOT_TELL


def refuse_unfair(baseline: Group, arms: Sequence[Group], rules: Rules) -> None:
    """Raise ConfigError, with every reason, where arms did not see as much as the baseline, or other test sequences.

    That is as many tokens, or with another tokenizer as much text, unless a budget of its own was planned for an arm.
    """
    counts = {len(item.measured.parts) for group in (baseline, *arms) for item in group.metadata}
    if len(counts) > 1:
        raise ConfigError(f"found scores of {_listed(counts)} sequences, wanted the same test sequences for all runs")
    for group in (baseline, *arms):
        if len(seen := {item.tokens_seen for item in group.metadata}) > 1:
            raise ConfigError(f"{group.recipe}: its replicates saw {_listed(seen)} tokens, wanted the same for all")
    problems = [
        f"{arm.recipe}: saw {_seen_in_words(arm)} and {baseline.recipe} {_seen_in_words(baseline)}, so a difference "
        "would not be the change's (plan asks it of a change that sets min_train_tokens, --losses of numbers alone)"
        for arm in arms
        if arm.metadata and baseline.metadata and not _saw_as_much(arm, baseline)
        if not (rules.budgets_planned and has_own_budget(arm, baseline))
    ]
    if problems:
        raise ConfigError(*problems)


def _saw_as_much(arm: Group, baseline: Group) -> bool:
    theirs = baseline.metadata[0]
    if {item.tokens_seen for item in arm.metadata} == {theirs.tokens_seen}:
        return True
    text, their_text = arm.metadata[0].text_seen, theirs.text_seen
    return text is not None and their_text is not None and abs(text / their_text - 1) <= SAME_TEXT


def _seen_in_words(group: Group) -> str:
    text = group.metadata[0].text_seen
    about = "" if text is None else f" (about {float(f'{text:.3g}'):,.0f} bytes of text)"
    return f"{_listed({item.tokens_seen for item in group.metadata})} tokens{about}"


def _listed(counts: set[int]) -> str:
    return " and ".join(f"{count:,}" for count in sorted(counts))


def _draft(baseline: Group, arm: Group, rules: Rules) -> Judged:
    """Put the two uncertainties of one comparison together; the verdict is still to come."""
    comparison = compare(baseline, arm, rules.given, rules.find_prior)
    evaluation = evaluation_estimate([(arm, 1.0), (baseline, -1.0)])
    return Judged(
        group=arm,
        comparison=comparison,
        evaluation=evaluation,
        estimate=with_evaluation(comparison.estimate, evaluation),
        guarded=with_evaluation(comparison.guarded, evaluation),
        warnings=(*comparison.warnings, *_warnings(baseline, arm)),
    )


def with_evaluation(training: Estimate | None, evaluation: Estimate | None) -> Estimate | None:
    """Add the evaluation's uncertainty to training's, where both are known."""
    return training if training is None or evaluation is None else training.plus(evaluation)


def _warnings(baseline: Group, arm: Group) -> list[str]:
    found = []
    hardware = {item.hardware for item in (*baseline.metadata, *arm.metadata)}
    if len(hardware) > 1:
        found.append(f"other hardware: {', '.join(sorted(hardware))}")
    sizes = [group.metadata[0].parameters for group in (baseline, arm) if group.metadata]
    if len(set(sizes)) > 1:
        found.append(f"{sizes[1] - sizes[0]:+,} parameters")
    if arm.metadata and baseline.metadata and arm.metadata[0].tokenizer != baseline.metadata[0].tokenizer:
        found.append(f"another tokenizer: saw {_seen_in_words(arm)}, the baseline {_seen_in_words(baseline)}")
    return found


def _divergences(baseline: Group, arms: Sequence[Group]) -> list[Divergence | None]:
    """Compare how often runs diverged, for every arm where it or the baseline has a run that did.

    Where neither has one there is nothing to test, so such arms need no adjustment (Tarone 1990, Biometrics 46, 515).
    """
    theirs = len(baseline.diverged), len(baseline.results)
    mine = [(len(arm.diverged), len(arm.results)) for arm in arms]
    p_values = [_p_of_rates(counts, theirs) if counts[0] or theirs[0] else None for counts in mine]
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [
        None if p is None else Divergence(*counts, *theirs, p, next(adjusted))
        for counts, p in zip(mine, p_values, strict=True)
    ]


def _p_of_rates(mine: tuple[int, int], theirs: tuple[int, int]) -> float:
    """Return Fisher's exact p value that runs diverge as often, from (diverged, all) of either side."""
    from scipy.stats import fisher_exact  # takes a second to import, and is rarely needed

    table = [[hits, count - hits] for hits, count in (mine, theirs)]
    return float(fisher_exact(table).pvalue)
