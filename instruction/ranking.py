"""What judges' scores come to: mean scores, strengths, position bias, agreement, with intervals and verdict words."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import get_args

import numpy as np

from harness.run.errors import DataError
from instruction.asking import PromptOutcome, State
from instruction.bradley_terry import Preferences, Strengths, alpha_of, bradley_terry
from instruction.compare import Cells, Metric, Row, compare
from study.statistics import Estimate, clustered_mean

STATES: tuple[State, ...] = get_args(State)
HEADINGS = (
    "model", "score", "Δ score", "95% interval", "strength Δ", "95% interval", "Holm p", "verdict", "preferred",
)  # fmt: skip
Cell = tuple[str, int]
SCORE_MARGIN = 1.0  # points of 100


@dataclass(frozen=True)
class Both:
    """One group of answers judged in both orders: scores by model, forward and reversed."""

    judge: str
    cell: Cell
    repeat: int
    shown: tuple[str, ...]
    scores: tuple[Mapping[str, float], Mapping[str, float]]


@dataclass(frozen=True)
class JudgeReport:
    """How one judge behaved."""

    judge: str
    states: Mapping[str, int]
    """Showings by what came of them."""
    half_read: int
    """Showings that were read and do not count, because their other order was not."""
    flips: int
    decided: int
    """Pairs of answers with a winner in both orders; of these `flips` have another winner in each."""
    first_preferred: Estimate | None
    """Share of pairs with a winner that the answer shown earlier won; 0.5 without position bias."""
    self_agreement: float | None

    @property
    def flip_rate(self) -> float | None:
        """Flips among the decided pairs."""
        return self.flips / self.decided if self.decided else None


@dataclass(frozen=True)
class Ranking:
    """All that was found; the baseline's row comes first in both tables, which have the same order."""

    baseline: str
    scores: list[Row]
    strengths: list[Row]
    judges: list[JudgeReport]
    agreement: float | None
    cells: int
    items: int
    seeds: int
    mean_scores: Mapping[tuple[Cell, str], float]
    """By cell and model, over judges, repeats and orders."""


def rank(outcomes: Sequence[PromptOutcome], baseline: str, margin: float) -> Ranking:
    """Return the models ranked by their judged answers; `margin` is the smallest strength that matters, in log-odds.

    A reply counts where both orders of a prompt could be read, so that a judge's preference for a position cancels
    out. Raises DataError where there are too few for any statement.
    """
    both = in_both_orders(outcomes)
    means = _mean_scores(both)
    names = sorted({name for outcome in outcomes for name in outcome.prompt.shown})
    complete = sorted({cell for cell, _ in means if all((cell, name) in means for name in names)})
    if len({item for item, _ in complete}) < 2:
        raise DataError(
            f"found {len(complete)} questions that were judged in both orders, wanted some of at least 2 items"
        )
    cells, usable = Cells.of(complete), set(complete)
    table = {name: np.array([means[cell, name] for cell in complete]) for name in names}
    fitted = _strengths([pair for pair in both if pair.cell in usable], names, complete)
    return Ranking(
        baseline=baseline,
        scores=compare(Metric("score", "higher", SCORE_MARGIN), table, cells, baseline),
        strengths=compare(
            Metric("strength", "higher", margin),
            {name: fitted.by_cell[:, place] for place, name in enumerate(names)},
            cells,
            baseline,
            fitted.prior_covariance,
        ),
        judges=[_report(judge, outcomes, both) for judge in sorted({outcome.prompt.judge for outcome in outcomes})],
        agreement=alpha_of([_ratings([pair for pair in both if pair.judge == judge])
                            for judge in sorted({pair.judge for pair in both})]),
        cells=len(complete),
        items=len({item for item, _ in complete}),
        seeds=len({seed for _, seed in complete}),
        mean_scores=means,
    )  # fmt: skip


def in_both_orders(outcomes: Iterable[PromptOutcome]) -> list[Both]:
    """Return the pairs of prompts that differ in order alone, where the replies to both could be read."""
    found: dict[tuple[object, ...], dict[bool, PromptOutcome]] = defaultdict(dict)
    for outcome in outcomes:
        if outcome.state == "read":
            prompt = outcome.prompt
            group = tuple(sorted(prompt.shown))
            found[prompt.judge, prompt.item, prompt.seed, prompt.repeat, group][prompt.is_reversed] = outcome
    return [
        Both(
            judge=pair[False].prompt.judge,
            cell=(pair[False].prompt.item, pair[False].prompt.seed),
            repeat=pair[False].prompt.repeat,
            shown=pair[False].prompt.shown,
            scores=(pair[False].scores, pair[True].scores),
        )
        for pair in found.values()
        if len(pair) == 2
    ]


def _ratings(both: Iterable[Both]) -> dict[tuple[object, ...], float]:
    """Return the mean score of every answer, by item, seed and model."""
    found: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for pair in both:
        for scores in pair.scores:
            for name, score in scores.items():
                found[(*pair.cell, name)].append(score)
    return {answer: fmean(scores) for answer, scores in found.items()}


def _mean_scores(both: Iterable[Both]) -> dict[tuple[Cell, str], float]:
    return {((str(item), int(str(seed))), str(name)): mean for (item, seed, name), mean in _ratings(both).items()}


def _outcome(scores: Mapping[str, float], a: str, b: str) -> float:
    return (float(np.sign(scores[a] - scores[b])) + 1) / 2


def _strengths(both: Sequence[Both], names: Sequence[str], complete: Sequence[Cell]) -> Strengths:
    """Fit strengths to all pairs of answers; a pair's outcome is the mean of its two orders', a tie counting half."""
    place = {name: number for number, name in enumerate(names)}
    cell_number = {cell: number for number, cell in enumerate(complete)}
    rows = [
        (place[a], place[b], fmean(_outcome(scores, a, b) for scores in pair.scores), cell_number[pair.cell])
        for pair in both
        for a, b in combinations(pair.shown, 2)
    ]
    first, second, outcome, cell = zip(*rows, strict=True)
    found = Preferences(np.array(first), np.array(second), np.array(outcome), np.array(cell))
    return bradley_terry(found, len(names), len(complete))


def _report(judge: str, outcomes: Sequence[PromptOutcome], both: Sequence[Both]) -> JudgeReport:
    mine = [outcome for outcome in outcomes if outcome.prompt.judge == judge]
    states = Counter(outcome.state for outcome in mine)
    pairs = [pair for pair in both if pair.judge == judge]
    flips, decided, early, items = 0, 0, [], []
    for pair in pairs:
        for a, b in combinations(pair.shown, 2):  # a is shown before b, and after it in the other order
            won = [_outcome(scores, a, b) for scores in pair.scores]
            if 0.5 not in won:
                decided += 1
                flips += won[0] != won[1]
            for value in (won[0], 1 - won[1]):
                if value != 0.5:
                    early.append(value)
                    items.append(pair.cell[0])
    first = clustered_mean(np.array(early), np.unique(items, return_inverse=True)[1]) if early else None
    raters: list[dict[tuple[object, ...], float]] = [
        {(*pair.cell, tuple(sorted(pair.shown)), name): score for pair in pairs if pair.repeat == repeat
         for name, score in pair.scores[order].items()}
        for repeat in sorted({pair.repeat for pair in pairs}) for order in (0, 1)
    ]  # fmt: skip
    return JudgeReport(
        judge=judge,
        states={state: states[state] for state in STATES},
        half_read=states["read"] - 2 * len(pairs),
        flips=flips,
        decided=decided,
        first_preferred=first,
        self_agreement=alpha_of(raters),
    )
