"""What a designed experiment says beyond its table: additivity of a stack, and its best part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from study.designs import STACK
from study.results import Group
from study.statistics import Estimate, additivity, compare_means
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


def _finding(name: str, estimate: Estimate, p_holm: float, margin: float) -> Finding:
    word = verdict_of(estimate, p_holm, margin)
    return Finding(name, estimate, p_holm, word, f"{word}: {explain(estimate, word)}")


def stack_findings(
    baseline: Group, arms: Sequence[Group], factors: Sequence[str], training: Training | None, margin: float = MARGIN
) -> list[Finding]:
    """Return whether a stack's gains add up, and whether it beats its best part; nothing where an arm is missing."""
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
