"""Say in sentences what a judgement found."""

import math

import numpy as np

from study.comparisons import NOISIEST
from study.power import Analysis
from study.results import Group, has_own_budget
from study.statistics import ALPHA, Estimate, loss_slope, tokens_worth
from study.verdicts import CANNOT_TELL, LEANS_BETTER, LEANS_WORSE, Judged, Judgement, is_sign_told

SHARES = {"25%": "a quarter of", "50%": "half", "200%": "twice"}


def sentence_of(item: Judged, judgement: Judgement) -> str:
    """Return the verdict on an arm with the numbers behind it."""
    if item.estimate is None:
        return f"{item.verdict}: {_why_unknown(item.group, judgement.baseline)}.{_divergence(item)}"
    runs = f"n {len(item.group.losses)} v {len(judgement.baseline.losses)}"
    family = f"Holm p {item.p_holm:.2g} of {judgement.family}"
    if judgement.looks > 1:
        family += f" and over {judgement.looks} looks"
    if item.guarded != item.estimate:
        family += f" at {NOISIEST:g} times the noise of the single run"
    is_small = item.is_within and item.verdict in (LEANS_BETTER, LEANS_WORSE)
    within = f" It is within {judgement.rules.margin:g}." if is_small else ""
    return (
        f"{item.verdict}{_budget(item.group, judgement.baseline)}: "
        f"{explain(item.estimate, item.verdict, item.level)}{within} {family}, {runs}. {_noise(item)}"
        f"{_acting_now(item.estimate, item.verdict)}{_divergence(item)}"
    )


def _budget(group: Group, baseline: Group) -> str:
    """Name the share of the baseline's tokens that a recipe was planned to train on; empty where that is all."""
    if not has_own_budget(group, baseline):
        return ""
    share = f"{group.metadata[0].tokens_seen / baseline.metadata[0].tokens_seen:.0%}"
    return f" with {SHARES.get(share, f'{share} of')} the tokens"


def explain(estimate: Estimate, verdict: str, level: float = 1 - ALPHA) -> str:
    """Return the numbers behind a verdict."""
    if math.isinf(estimate.se):
        return f"Δ {estimate.difference:+.4f}; the test set lies in one document, so other text may be any different."
    shown = f"Δ {estimate.in_words(level)}"
    if verdict == CANNOT_TELL:
        seen = Analysis(estimate.se, estimate.df, family=1).detectable()
        shown += f" Effects under {seen:.3g} would be missed one time in five."
    return shown


def _why_unknown(group: Group, baseline: Group) -> str:
    for recipe in (group, baseline):
        if not recipe.losses and recipe.diverged:
            return f"every run of {recipe.recipe} diverged"
        if not recipe.losses:
            return f"no run of {recipe.recipe} is scored yet"
    return "noise unknown: no replicates that differ, and no prior that applies"


def _noise(item: Judged) -> str:
    noise = item.comparison.noise
    assert noise is not None
    shown = f"Noise of a run {noise.sd:.4f} on {noise.df:.3g} df: {item.comparison.source}"
    if not math.isnan(item.comparison.correlation):
        shown += f" (correlation {item.comparison.correlation:+.2f})"
    return f"{shown}."


def _acting_now(estimate: Estimate, verdict: str) -> str:
    """Say what it risks to act on an open verdict now: to adopt what looks better, or keep the baseline."""
    if is_sign_told(verdict) or math.isinf(estimate.se):
        return ""
    act = "adopting it" if estimate.difference < 0 else "leaving it"
    risk = estimate.expected_loss()
    risked = "" if math.isinf(risk) else f"; {act} now loses {risk:.2g} on average by being wrong"
    return f" P(better) {chance(estimate.p_better)}{risked}."


def chance(p: float) -> str:
    """Write a probability, never as certainty."""
    return ">0.99" if p > 0.995 else "<0.01" if p < 0.005 else f"{p:.2f}"


def _divergence(item: Judged) -> str:
    rate = item.divergence
    if rate is None:
        return ""
    return (
        f" Diverged: {rate.diverged} of {rate.runs} runs, of the baseline {rate.baseline_diverged} of "
        f"{rate.baseline_runs} (Fisher p {rate.p:.2g}, Holm p {rate.p_holm:.2g})."
    )


def curve_slope(baseline: Group) -> float | None:
    """Return the mean slope of the baseline's training curves, dL/d ln(tokens), in the unit of its test losses.

    None where it is not known.
    """
    slopes = [(loss_slope(*item.curve), item.measured.per_nat) for item in baseline.metadata]
    known = [slope * per_nat for slope, per_nat in slopes if slope is not None]
    return float(np.mean(known)) if known else None


def tokens_worth_of(item: Judged, slope: float | None) -> tuple[float, float, float] | None:
    """Return the factor of training tokens that an arm's difference is worth, and its interval's ends.

    None where the difference is not told, or the baseline's curve has no slope.
    """
    if item.estimate is None or slope is None or not is_sign_told(item.verdict):
        return None
    low, high = item.estimate.interval(item.level)
    return (
        tokens_worth(item.estimate.difference, slope),
        tokens_worth(high, slope),
        tokens_worth(low, slope),
    )
