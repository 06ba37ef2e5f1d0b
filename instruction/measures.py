"""What answers are worth without a judge: the loss of the references, and the answers against them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from instruction.answers import Answer, ModelAnswers
from instruction.compare import Cells, Metric, Row, compare, ratio_cells
from study.statistics import Floats

# Numbers whole, with their sign and point, so that -5 is not 5; else runs of letters and digits.
WORD = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)*|\w+")
LOSS = "response_loss"
# Length and ending have no better side by themselves.
OTHERS = (
    Metric("token_f1", "higher", 0.01),
    Metric("exact_match", "higher", 0.01),
    Metric("answer_tokens", None),
    Metric("ended", None),
)
HEADINGS = (
    "model", "response loss", "Δ", "95% interval", "Holm p", "verdict", "token F1", "exact", "tokens", "ended",
)  # fmt: skip


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; its signs where it has no word."""
    return WORD.findall(text.lower()) or text.split()


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, counted with repeats (Rajpurkar et al. 2016).

    arXiv:1606.05250, section 6.1; articles are kept here, because some tasks are about them.
    """
    mine, theirs = Counter(words(answer)), Counter(words(reference))
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (mine & theirs).total()
    return 2 * shared / (mine.total() + theirs.total())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the words are the same in the same order, else 0."""
    return float(words(answer) == words(reference))


def measure(models: Sequence[ModelAnswers], baseline: str, margin: float) -> dict[str, list[Row]]:
    """Compare models in every measure, the baseline first; `margin` is that of the loss, in nats per token."""
    ordered = {model.model: sorted(model.answers, key=lambda answer: answer.cell) for model in models}
    cells = Cells.of([answer.cell for answer in ordered[baseline]])
    return {
        metric.name: compare(
            metric, {name: _values(metric.name, answers) for name, answers in ordered.items()}, cells, baseline
        )
        for metric in (Metric(LOSS, "lower", margin), *OTHERS)
    }


def _values(name: str, answers: Sequence[Answer]) -> Floats:
    if name == LOSS:
        nats = np.array([answer.reference_nats for answer in answers])
        return ratio_cells(nats, np.array([answer.reference_tokens for answer in answers], dtype=np.float64))
    return np.array([getattr(answer, name) for answer in answers], dtype=np.float64)


def measures_as_json(tables: Mapping[str, Sequence[Row]]) -> list[dict[str, object]]:
    """Return one object for each model with all its measures."""
    return [
        {"model": row.model, **{name: rows[place].as_json() for name, rows in tables.items()}}
        for place, row in enumerate(tables[LOSS])
    ]


def measures_as_rows(tables: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """Return one row of text for each model, under `HEADINGS`."""
    rows = []
    for loss, f1, exact, length, ended in zip(*tables.values(), strict=True):
        scores = [f1.mean_in_words(3), exact.mean_in_words(3)]
        habits = [f"{length.mean.difference:.1f}", f"{ended.mean.difference:.0%}"]
        rows.append([loss.model, f"{loss.mean.difference:.4f}", *loss.in_words(4), *scores, *habits])
    return rows
