"""Judge arms against a baseline: the estimate, its two uncertainties, and a verdict in fixed words.

Training noise (how runs differ by seeds) and evaluation noise (which test tokens were drawn) are kept apart, then
added. The words are chosen by p values adjusted for the number of arms, so that they are rarely wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.report.html import Tone
from harness.run.errors import ConfigError
from study.results import Group
from study.statistics import (
    ALPHA,
    Estimate,
    Floats,
    Noise,
    block_noise,
    clustered_mean,
    compare_means,
    detectable,
    holm,
    loss_slope,
    pooled_noise,
    sample_sd,
    seed_correlation,
    seeds_to_see,
    tokens_worth,
    welch,
)

HELPS, HURTS = "HELPS", "HURTS"
LEANS_BETTER, LEANS_WORSE = "LEANS BETTER", "LEANS WORSE"
CANNOT_TELL, NO_LARGER = "CANNOT TELL", "NO DIFFERENCE LARGER THAN"
MARGIN = 0.01
WELCH_RUNS, WELCH_RATIO = 4, 3.0


def tone_of(verdict: str) -> Tone:
    """Return the colour that a verdict has on a page."""
    if verdict in (HELPS, LEANS_BETTER):
        return "better"
    return "worse" if verdict in (HURTS, LEANS_WORSE) else "open"


@dataclass(frozen=True)
class Training:
    """Where the training noise of a comparison comes from."""

    method: str
    noise: Noise
    source: str
    unpaired: Noise | None = None
    """What the noise would be if shared seeds were not used."""


@dataclass(frozen=True)
class Judged:
    """One arm against the baseline; `estimate` has both uncertainties in it, and is None where nothing is known."""

    group: Group
    method: str
    estimate: Estimate | None
    training: Estimate | None
    evaluation: Estimate | None
    baseline_runs: int
    p_holm: float
    verdict: str
    sentence: str
    warnings: tuple[str, ...] = ()
    correlation: float = math.nan
    tokens_factor: float | None = None


@dataclass(frozen=True)
class Judgement:
    """A whole table."""

    baseline: Group
    method: str
    training: Training | None
    """The noise of the study; None where it is unknown."""
    arms: tuple[Judged, ...]


NoiseFinder = Callable[[Group], tuple[Noise, str] | None]


def judge(
    baseline: Group, arms: Sequence[Group], margin: float = MARGIN, given: Noise | None = None,
    borrow: NoiseFinder = lambda _: None,
) -> Judgement:  # fmt: skip
    """Judge all arms against the baseline as one family.

    `given` overrides the noise that the runs show; `borrow` gives it from the ledger where they show none. Raises
    ConfigError where a comparison would be unfair.
    """
    refuse_unfair(baseline, arms)
    common = common_noise([baseline, *arms], given, borrow)
    drafts = [_estimate(baseline, arm, _noise_for(baseline, arm, common)) for arm in arms]
    adjusted = iter(holm([draft.estimate.p for draft in drafts if draft.estimate]))
    family, slope = sum(draft.estimate is not None for draft in drafts), _slope(baseline)
    judged = []
    for draft in drafts:
        p_holm = next(adjusted) if draft.estimate else math.nan
        judged.append(_conclude(draft, baseline, p_holm, family, margin, slope))
    methods = {item.method for item in judged}
    return Judgement(baseline, methods.pop() if len(methods) == 1 else "pooled", common, tuple(judged))


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


def shared_seeds(groups: Sequence[Group]) -> list[tuple[str, str]] | None:
    """Return the seeds that every recipe was run on, two or more and each once; None where they are not the same."""
    seeds = [sorted(result.seeds for result in group.results) for group in groups]
    first = seeds[0]
    is_complete = all("" not in pair for pair in first) and len(set(first)) == len(first) >= 2
    return first if len(groups) > 1 and is_complete and all(other == first for other in seeds) else None


def losses_by_seed(groups: Sequence[Group], seeds: Sequence[tuple[str, str]]) -> Floats:
    """Return the losses as a table, a row for each group and a column for each of the shared seeds."""
    tables = [{result.seeds: result.loss for result in group.results} for group in groups]
    return np.array([[table[pair] for pair in seeds] for table in tables], dtype=np.float64)


def common_noise(groups: Sequence[Group], given: Noise | None, borrow: NoiseFinder) -> Training | None:
    """Choose the training noise of a study; the first group is the one whose noise may be borrowed."""
    if given is not None:
        return Training("given noise", given, "given by hand")
    shared, pooled = shared_seeds(groups), pooled_noise([group.losses for group in groups])
    whole = [group for group in groups if not group.diverged]
    if shared is not None and len(whole) > 1:
        noise = block_noise(losses_by_seed(whole, shared))
        return Training("blocks", noise, f"{len(shared)} shared seeds, as blocks", pooled)
    if pooled is not None and pooled.sd > 0:  # replicates to the bit the same are one run, seen twice
        return Training("pooled", pooled, "replicates of all arms, pooled")
    found = borrow(groups[0])
    return None if found is None else Training("ledger", *found)


def _noise_for(baseline: Group, arm: Group, common: Training | None) -> Training | None:
    """Return the noise for one comparison: a single run is held against the spread of the baseline's own runs."""
    if common is not None and common.method == "pooled" and len(arm.losses) == 1 and len(baseline.losses) > 1:
        noise = Noise(sample_sd(baseline.losses), len(baseline.losses) - 1)
        if noise.sd > 0:
            return Training("single-case", noise, f"{len(baseline.losses)} baseline runs")
    return common


def _estimate(baseline: Group, arm: Group, training: Training | None) -> Judged:
    """Put the two uncertainties of one comparison together; the verdict is still to come."""
    warnings = list(_warnings(baseline, arm, training))
    evaluation = evaluation_estimate(baseline, arm)
    draft = Judged(
        group=arm,
        method=training.method if training else "none",
        estimate=None,
        training=None,
        evaluation=evaluation,
        baseline_runs=len(baseline.losses),
        p_holm=math.nan,
        verdict=CANNOT_TELL,
        sentence="",
    )
    if arm.diverged or baseline.diverged or not arm.losses or not baseline.losses or training is None:
        return replace(draft, warnings=tuple(warnings))
    trained = compare_means(arm.losses, baseline.losses, training.noise)
    if training.method == "pooled" and min(len(arm.losses), len(baseline.losses)) >= WELCH_RUNS:
        sds = sample_sd(arm.losses), sample_sd(baseline.losses)
        if max(sds) > WELCH_RATIO * min(sds):
            other = welch(arm.losses, baseline.losses)
            warnings.append(f"the noises differ: {sds[0]:.4f} and {sds[1]:.4f}; Welch gives p {other.p:.3g}")
    correlation = math.nan
    if training.method == "blocks":
        seeds = [result.seeds for result in baseline.results]
        rows = losses_by_seed([arm, baseline], seeds)
        correlation = seed_correlation(rows[0].tolist(), rows[1].tolist())
    combined = add_evaluation(trained, evaluation)
    return replace(draft, estimate=combined, training=trained, warnings=tuple(warnings), correlation=correlation)


def add_evaluation(training: Estimate, evaluation: Estimate | None) -> Estimate:
    """Add the evaluation's uncertainty to training's, which keeps its degrees of freedom while it is the larger.

    Satterthwaite's approximation would let a little more uncertainty narrow an interval that rests on two or three
    runs; where evaluation is the larger, its degrees of freedom hold, rounded down.
    """
    if evaluation is None:
        return training
    both = training.plus(evaluation)
    return replace(both, df=training.df if training.se >= evaluation.se else max(1, math.floor(both.df + 1e-9)))


def evaluation_estimate(baseline: Group, arm: Group) -> Estimate | None:
    """Return the difference paired by test sequence, clustered by document; None without losses of every sequence."""
    mine, theirs = arm.mean_sequence_losses(), baseline.mean_sequence_losses()
    if mine is None or theirs is None:
        return None
    return clustered_mean(mine - theirs, arm.metadata[0].documents)


def _warnings(baseline: Group, arm: Group, training: Training | None) -> list[str]:
    found = []
    if training is not None and "borrowed" in training.source:
        found.append(f"noise {training.source}")
    hardware = {item.hardware for item in (*baseline.metadata, *arm.metadata)}
    if len(hardware) > 1:
        found.append(f"other hardware: {', '.join(sorted(hardware))}")
    sizes = [group.metadata[0].parameters for group in (baseline, arm) if group.metadata]
    if len(set(sizes)) > 1:
        found.append(f"{sizes[1] - sizes[0]:+,} parameters")
    return found


def _slope(baseline: Group) -> float | None:
    """Return the mean slope of the baseline's curves, by ln(tokens)."""
    slopes = [loss_slope(*item.curve) for item in baseline.metadata]
    known = [slope for slope in slopes if slope is not None]
    return float(np.mean(known)) if known else None


def _conclude(
    draft: Judged, baseline: Group, p_holm: float, family: int, margin: float, slope: float | None
) -> Judged:
    estimate = draft.estimate
    if estimate is None:
        diverged = draft.group.diverged or baseline.diverged
        unknown = "noise unknown: no replicates that differ, none in the ledger"
        reason = f"diverged: {', '.join(diverged)}" if diverged else unknown
        return replace(draft, sentence=f"{CANNOT_TELL}: {reason}")
    word = verdict_of(estimate, p_holm, margin)
    n = f"n {len(draft.group.losses)} v {len(baseline.losses)}"
    advice = advise(draft, word, family, margin)
    sentence = f"{word}: {explain(estimate, word)}{advice} Holm p {p_holm:.2g} of {family}, {n}."
    factor = None if slope is None else tokens_worth(estimate.difference, slope)
    return replace(draft, p_holm=p_holm, verdict=word, sentence=sentence, tokens_factor=factor)


def verdict_of(estimate: Estimate, p_adjusted: float, margin: float) -> str:
    """Choose the word: significant in the family, significant alone, equivalent within the margin, or unknown."""
    is_better = estimate.difference < 0
    if p_adjusted < ALPHA:
        return HELPS if is_better else HURTS
    if estimate.p < ALPHA:
        return LEANS_BETTER if is_better else LEANS_WORSE
    if estimate.p_equivalent(margin) < ALPHA:
        return f"{NO_LARGER} {margin:g}"
    return CANNOT_TELL


def explain(estimate: Estimate, word: str) -> str:
    """Return the numbers behind a verdict."""
    if math.isinf(estimate.se):
        return f"Δ {estimate.difference:+.4f}; the test set lies in one document, so other text may be any different."
    low, high = estimate.interval()
    shown = f"Δ {estimate.difference:+.4f} (95% CI {low:+.4f}..{high:+.4f}), "
    shown += f"t {estimate.t:+.2f} on {estimate.df:.3g} df."
    if word == CANNOT_TELL:
        seen = detectable(estimate.se, estimate.df)
        shown += f" Effects under {seen:.3g} would be missed one time in five."
    return shown


def advise(item: Judged, word: str, family: int, margin: float) -> str:
    """Say how many seeds would settle an open verdict; empty where it is settled or seeds are not what is missing."""
    assert item.estimate is not None
    assert item.training is not None
    if word not in (LEANS_BETTER, LEANS_WORSE, CANNOT_TELL) or item.training.se == 0:
        return ""
    leans = word != CANNOT_TELL
    effect, alpha = (abs(item.estimate.difference), ALPHA / family) if leans else (margin, ALPHA)
    are_shared = item.method == "blocks"
    runs = len(item.group.losses)
    sd = item.training.se / math.sqrt(1 / runs + 1 / item.baseline_runs)
    count = seeds_to_see(effect, sd, alpha, are_shared)
    if count is not None and count <= min(runs, item.baseline_runs):
        return ""
    seeds = "over 10,000" if count is None else str(count)
    seeds += " shared seeds per arm" if are_shared else " seeds per arm"
    return f" {seeds} would settle it four times in five." if leans else f" To see {margin:g}: {seeds}."
