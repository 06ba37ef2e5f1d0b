"""What a factorial experiment says beyond its table: main effects and interactions."""

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
    bounds: tuple[float, float] | None = None
    """The 95% interval where it is not that of the estimate."""

    def interval(self) -> tuple[float, float]:
        """Give the 95% interval."""
        return self.bounds or self.estimate.interval()


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
