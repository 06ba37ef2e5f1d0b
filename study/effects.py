"""What a designed experiment says beyond its table: effects of a factorial, additivity of a stack, its best part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.run.errors import ConfigError
from study.designs import STACK, Design, Word
from study.results import Group
from study.statistics import Estimate, Floats, additivity, compare_means, factorial_effects, holm, lenth_noise
from study.verdicts import MARGIN, Training, explain, verdict_of


@dataclass(frozen=True)
class Finding:
    """One effect or contrast, with the effects that it cannot be told apart from."""

    name: str
    estimate: Estimate
    p_holm: float
    verdict: str
    sentence: str
    aliases: tuple[str, ...] = ()


def distinct_effects(design: Design) -> list[tuple[Word, tuple[Word, ...]]]:
    """Give main effects and two-way interactions, each once with those it is mixed up with."""
    found: list[tuple[Word, tuple[Word, ...]]] = []
    covered: set[Word] = set()
    for word, others in design.aliases():
        if word not in covered:
            found.append((word, tuple(others)))
            covered.update((word, *others))
    return found


def name_of(word: Word, factors: Sequence[str]) -> str:
    """Name an effect by its factors."""
    return " x ".join(factors[factor] for factor in sorted(word))


def factorial_findings(
    design: Design, groups: Sequence[Group], training: Training | None, margin: float = MARGIN
) -> tuple[list[Finding], str]:
    """Give all effects of a factorial, and in words where their noise comes from.

    With replicates or a ledger an effect has a standard error of 2 s / sqrt(N); without either Lenth's. Raises
    ConfigError where an arm has no loss.
    """
    missing = [group.recipe for group in groups if not group.losses or group.diverged]
    if missing:
        raise ConfigError(f"{missing[0]}: diverged or not scored; the effects of a factorial need every arm")
    counts = {len(group.losses) for group in groups}
    if len(counts) > 1:
        raise ConfigError(f"found arms with {min(counts)} to {max(counts)} runs, wanted as many of each")
    means = np.array([np.mean(group.losses) for group in groups])
    on = np.array([[factor in arm.on for factor in design.factors] for arm in design.arms])
    effects = distinct_effects(design)
    columns = np.array([_column(on, word) for word, _ in effects]).T
    values = factorial_effects(columns, means)
    if training is not None:
        se, df = 2 * training.noise.sd / np.sqrt(len(groups) * counts.pop()), training.noise.df
        source = training.source
    else:
        pseudo = lenth_noise(values.tolist())
        se, df, source = pseudo.sd, pseudo.df, "Lenth's pseudo standard error, because nothing is replicated"
    estimates = [Estimate(float(value), float(se), df) for value in values]
    findings = [
        _finding(
            name_of(word, design.factors),
            estimate,
            p_holm,
            margin,
            tuple(name_of(other, design.factors) for other in others),
        )
        for (word, others), estimate, p_holm in zip(
            effects, estimates, holm([estimate.p for estimate in estimates]), strict=True
        )
    ]
    return findings, source


def _column(on: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], word: Word) -> Floats:
    signs = np.where(on, 1.0, -1.0)
    column: Floats = signs[:, sorted(word)].prod(axis=1)
    return column


def _finding(name: str, estimate: Estimate, p_holm: float, margin: float, aliases: tuple[str, ...] = ()) -> Finding:
    word = verdict_of(estimate, p_holm, margin)
    return Finding(name, estimate, p_holm, word, f"{word}: {explain(estimate, word)}", aliases)


def stack_findings(
    baseline: Group, arms: Sequence[Group], factors: Sequence[str], training: Training | None, margin: float = MARGIN
) -> list[Finding]:
    """Give whether a stack's gains add up, and whether it beats its best part; nothing where an arm is missing."""
    by_name = {arm.recipe: arm for arm in arms}
    needed = [*factors, STACK]
    known = [baseline, *(by_name[name] for name in needed if name in by_name)]
    is_whole = len(known) == len(needed) + 1 and all(group.losses and not group.diverged for group in known)
    if training is None or not is_whole:
        return []
    singles, stack = [by_name[name] for name in factors], by_name[STACK]
    gap = additivity(stack.losses, baseline.losses, [single.losses for single in singles], training.noise)
    best = min(singles, key=lambda single: float(np.mean(single.losses)))
    beats = compare_means(stack.losses, best.losses, training.noise)
    return [
        _additivity_finding(gap),
        # Picking the best of several parts favours a lucky one, so the p value is multiplied by their number.
        _finding(f"{STACK} v best part {best.recipe}", beats, min(1.0, len(singles) * beats.p), margin),
    ]


def _additivity_finding(gap: Estimate) -> Finding:
    low, high = gap.interval()
    word = "ADDS UP" if gap.p >= 0.05 else "LESS THAN THE SUM" if gap.difference > 0 else "MORE THAN THE SUM"
    shown = f"gap {gap.difference:+.4f} (95% CI {low:+.4f}..{high:+.4f}), t {gap.t:+.2f} on {gap.df:.3g} df."
    if word == "ADDS UP":
        shown += " Not shown to differ from the sum of its parts."
    return Finding(f"{STACK} v sum of parts", gap, gap.p, word, f"{word}: {shown}")
