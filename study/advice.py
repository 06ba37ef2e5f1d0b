"""What to buy next: for each open arm the seeds that would settle it, and the one run that is worth most.

Seeds are counted by the word in the table: the test is that of the comparison, at the level of the whole family, and
the evaluation's uncertainty, which no seed removes, stays as it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import ndtr

from harness.run.units import in_hours
from study.comparisons import shared_pairs, welch
from study.results import Group, RunMetadata
from study.statistics import ALPHA, POWER, Estimate, fewest, power
from study.verdicts import Judged, Judgement

LEAST_WORTH = 1e-6
"""Of a run, in the unit of the losses; less would change no table."""


@dataclass(frozen=True)
class Purchase:
    """Runs to add to an arm and to the baseline, and what they take; None where a price or a speed is unknown."""

    arm: Group
    baseline: Group
    arm_runs: int
    baseline_runs: int

    @property
    def money(self) -> float | None:
        """Price of the runs, in the currency of the first."""
        return self._sum(lambda item: item.cost)

    @property
    def hours(self) -> float | None:
        """Hours of training, one run after another."""
        return self._sum(
            lambda item: item.tokens_seen / item.tokens_per_second / 3600 if item.tokens_per_second else None
        )

    def _sum(self, of_run: Callable[[RunMetadata], float | None]) -> float | None:
        total = 0.0
        for group, runs in ((self.arm, self.arm_runs), (self.baseline, self.baseline_runs)):
            known = [value for item in group.metadata if (value := of_run(item)) is not None]
            if runs and not known:
                return None
            total += runs * sum(known) / len(known) if runs else 0.0
        return total

    def in_words(self) -> str:
        """Return the purchase as text, with its seeds where runs are named by numbers."""
        runs = self.arm_runs + self.baseline_runs
        shown = f"{runs:,} more run{'s' * (runs > 1)} {self._which()}"
        currency = next((item.currency for item in self.arm.metadata), "")
        if self.money is not None:
            shown += f", {self.money:,.2f} {currency}".rstrip()
        if self.hours is not None:
            shown += f", {in_hours(self.hours)}"
        return shown

    def _which(self) -> str:
        sides = (
            (self.arm, self.baseline, self.arm_runs, "of this arm"),
            (self.baseline, self.arm, self.baseline_runs, "of the baseline"),
        )
        parts = [(_seeds_in_words(_new_seeds(*side[:3])), *side[2:]) for side in sides if side[2]]
        if len(parts) == 1:
            ((seeds, _, whose),) = parts
            return f"{whose} ({seeds})" if seeds else whose
        if parts[0][0] and parts[0][0] == parts[1][0]:
            return f"({parts[0][0]} of this arm and of the baseline)"
        return f"({', '.join(f'{seeds or count} {whose}' for seeds, count, whose in parts)})"


def _new_seeds(group: Group, other: Group, count: int) -> list[int]:
    """Return the seeds to run next, those that only the other has and then new ones; none where seeds are unknown."""
    names = {result.init_seed for one in (group, other) for result in one.results}
    if not names or not all(name.isdecimal() for name in names):
        return []
    mine = {int(result.init_seed) for result in group.results}
    theirs = sorted({int(result.init_seed) for result in other.results} - mine)
    unused = [seed for seed in range(1, count + len(names) + 1) if str(seed) not in names]
    return sorted((theirs + unused)[:count])


def _seeds_in_words(seeds: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1].append(seed)
        else:
            ranges.append([seed])
    parts = [f"{one[0]} to {one[-1]}" if len(one) > 2 else ", ".join(map(str, one)) for one in ranges]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(parts)}" if seeds else ""


def advice_on(item: Judged, judgement: Judgement) -> str:
    """Say what would settle an open arm; empty where it is settled or nothing is known of its noise.

    Effects that look large are rarely as large in truth, so the runs for the margin come first.
    """
    if item.estimate is None or not item.is_open or item.comparison.noise is None:
        return ""
    margin, seen = judgement.rules.margin, abs(item.estimate.difference)
    found = f"To settle an effect of {margin:g} four times in five: {_bought(item, judgement, margin)}."
    if seen > margin:
        found += f" If it is as large as it looks, {seen:.2g}: {_bought(item, judgement, seen)}."
    return found


def _bought(item: Judged, judgement: Judgement, effect: float) -> str:
    """Return in words the fewest runs with which an effect of this size gets its word four times in five."""
    level = ALPHA / judgement.family
    has = _pairs(item, judgement) or len(item.group.losses)

    def finds(count: int) -> bool:
        planned = _after(item, judgement, count)
        return power(effect, planned.se, planned.df, level) >= POWER

    evaluation = item.evaluation
    if evaluation is not None and evaluation.se > 0 and power(effect, evaluation.se, evaluation.df, level) < POWER:
        why = f"own uncertainty is {evaluation.se:.2g}" if math.isfinite(evaluation.se) else "text is one document"
        return f"no number of seeds; the test set's {why}, so score on more documents"
    count = fewest(finds, max(2, has))
    if count is None:
        return "over 10,000 seeds"
    if count == has:
        return "as many runs as there are"
    return purchase(item, judgement, count).in_words()


def _pairs(item: Judged, judgement: Judgement) -> int:
    """Return the pairs that a comparison has, or that more runs of a single one would add to; 0 where none count."""
    if item.comparison.method.startswith("single run"):
        return len(shared_pairs(judgement.baseline, item.group))
    return len(item.comparison.pairs)


def purchase(item: Judged, judgement: Judgement, count: int) -> Purchase:
    """Return what an arm needs to have `count` runs, with partners on the same seeds where it is judged by pairs."""
    pairs, baseline = _pairs(item, judgement), judgement.baseline
    mine, theirs = len(item.group.losses), len(baseline.losses)
    if not pairs:
        return Purchase(item.group, baseline, count - mine, max(0, count - theirs))
    new = count - pairs
    arm_alone = min(new, theirs - pairs)
    baseline_alone = min(new - arm_alone, mine - pairs)
    both = new - arm_alone - baseline_alone
    return Purchase(item.group, baseline, arm_alone + both, baseline_alone + both)


def _after(item: Judged, judgement: Judgement, count: int) -> Estimate:
    """Return the uncertainty to expect once an arm has `count` runs, and the baseline no fewer."""
    comparison, baseline = item.comparison, judgement.baseline
    noise = comparison.noise
    assert noise is not None
    pairs = count if _pairs(item, judgement) else 0
    prior = comparison.prior and judgement.rules.find_prior(baseline, item.group, pairs)
    lent = prior.df if prior else 0.0
    others = pairs or max(len(baseline.losses), count)
    parts = [Estimate(0.0, noise.sd / math.sqrt(runs), runs - 1 + lent) for runs in (count, others)]
    se = math.hypot(*(part.se for part in parts))
    if comparison.method == "given noise":
        training = Estimate(0.0, se, noise.df)
    elif pairs:
        training = Estimate(0.0, se, pairs - 1 + lent)
    else:
        training = welch(0.0, *parts)
    return training if item.evaluation is None else training.plus(item.evaluation)


def best_buy(judgement: Judgement) -> str:
    """Say which single purchase is worth most for what it costs; empty where nothing is open.

    One more seed of an arm moves its estimate by a normal amount of variance tau^2, what the seed takes off the
    variance of the estimate; to be able to change one's mind then is worth tau psi(|d| / tau), with psi(u) = phi(u) -
    u (1 - Phi(u)) (Raiffa and Schlaifer 1961, Applied Statistical Decision Theory, 5.5: two actions, linear loss).
    """
    options: list[tuple[float, Purchase, str]] = []
    for item in judgement.arms:
        if item.estimate is None or not item.is_open or math.isinf(item.estimate.se):
            continue
        has = _pairs(item, judgement) or len(item.group.losses)
        bought = purchase(item, judgement, has + 1)
        later = _after(item, judgement, has + 1).se
        value = _value(abs(item.estimate.difference), item.estimate.se**2 - later**2)
        options.append((value, bought, item.group.recipe))
    costs: tuple[tuple[str, Callable[[Purchase], float | None]], ...] = (
        ("its price", lambda one: one.money),
        ("its hours", lambda one: one.hours),
        ("a run", lambda one: one.arm_runs + one.baseline_runs),
    )
    what, cost_of = next(one for one in costs if all(one[1](bought) for _, bought, _ in options))
    options.sort(key=lambda one: one[0] / (cost_of(one[1]) or 1.0))
    if not options or options[-1][0] < LEAST_WORTH:
        return ""
    value, bought, recipe = options[-1]
    return (
        f"Worth most for {what}: {recipe}, {bought.in_words()}: it saves {value:.2g} {judgement.unit} on average "
        "of what acting now loses."
    )


def _value(size: float, variance: float) -> float:
    if variance <= 0:
        return 0.0
    tau = math.sqrt(variance)
    u = size / tau
    return tau * (math.exp(-u * u / 2) / math.sqrt(2 * math.pi) - u * float(ndtr(-u)))
