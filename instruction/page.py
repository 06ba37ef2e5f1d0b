"""A judging as a printed table, as JSON, and as one self-contained HTML page without any script."""

import math
import string
from collections.abc import Sequence
from html import escape

from harness.report.html import style, table, verdict_mark
from harness.report.svg import Interval, forest
from harness.report.text import aligned
from harness.run.files import ASSETS, json_number, utc_now
from instruction.answers import Answer, ModelAnswers
from instruction.compare import Row
from instruction.ranking import HEADINGS, JudgeReport, Ranking
from study.verdicts import tone_of

ITEMS_SHOWN = 30
JUDGE_HEADINGS = ("judge", "read", "unparsable", "refused", "no reply", "other order missing", "flips",
                  "first preferred", "self-agreement")  # fmt: skip


def rows_of(ranking: Ranking) -> list[list[str]]:
    """Return one row of text for each model, under `HEADINGS`."""
    rows = []
    for score, strength in zip(ranking.scores, ranking.strengths, strict=True):
        preferred = ""
        if strength.difference is not None:
            preferred = f"{1 / (1 + math.exp(-strength.difference.difference)):.0%}"
        rows.append([score.model, score.mean_in_words(1), *score.in_words(1)[:2], *strength.in_words(2), preferred])
    return rows


def judge_rows(ranking: Ranking) -> list[list[str]]:
    """Return one row of text for each judge, under `JUDGE_HEADINGS`."""
    rows = []
    for judge in ranking.judges:
        flips = "" if judge.flip_rate is None else f"{judge.flip_rate:.1%} of {judge.decided:,}"
        first = ""
        if judge.first_preferred is not None:
            low, high = judge.first_preferred.interval()
            first = f"{judge.first_preferred.difference:.1%} ({low:.1%}..{high:.1%})"
        own = "" if judge.self_agreement is None else f"{judge.self_agreement:.2f}"
        rows.append([judge.judge, *(f"{judge.states[state]:,}" for state in judge.states), f"{judge.half_read:,}",
                     flips, first, own])  # fmt: skip
    return rows


def notes_of(ranking: Ranking) -> list[str]:
    """Return the sentences below the tables."""
    notes = [f"{row.model}: {row.sentence}" for row in ranking.strengths[1:]]
    for judge in ranking.judges:
        if judge.first_preferred is not None:
            low, high = judge.first_preferred.interval()
            if not low <= 0.5 <= high:
                place = "first" if low > 0.5 else "last"
                notes.append(f"{judge.judge} likes what is shown {place}; with both orders this favours nobody.")
    if ranking.agreement is not None:
        notes.append(f"Agreement between judges: Krippendorff's alpha {ranking.agreement:.2f} over scores.")
    notes.append(
        f"Strength is the log-odds of being preferred to {ranking.baseline}; verdicts are by strength. Over "
        f"{ranking.items:,} items and {ranking.seeds} fine-tunings of each model. Intervals cover other items and "
        "other fine-tunings, not other pre-trainings and not other judges."
    )
    return notes


def as_text(ranking: Ranking) -> str:
    """Return tables and notes as text for a terminal."""
    return "\n".join(
        [
            *aligned(HEADINGS, rows_of(ranking)),
            "",
            *aligned(JUDGE_HEADINGS, judge_rows(ranking)),
            "",
            *notes_of(ranking),
        ]
    )


def as_json(ranking: Ranking) -> dict[str, object]:
    """Return the ranking as JSON; unknown numbers are null."""
    return {
        "baseline": ranking.baseline,
        "items": ranking.items,
        "seeds": ranking.seeds,
        "cells": ranking.cells,
        "models": [
            {"model": score.model, "score": score.as_json(), "strength": strength.as_json()}
            for score, strength in zip(ranking.scores, ranking.strengths, strict=True)
        ],
        "judges": [_judge_as_json(judge) for judge in ranking.judges],
        "agreement_alpha": ranking.agreement,
    }


def _judge_as_json(judge: JudgeReport) -> dict[str, object]:
    first: dict[str, object] | None = None
    if judge.first_preferred is not None:
        low, high = judge.first_preferred.interval()
        first = {"share": judge.first_preferred.difference, "low": json_number(low), "high": json_number(high)}
    return {
        "judge": judge.judge,
        "showings": dict(judge.states),
        "other_order_missing": judge.half_read,
        "flips": judge.flips,
        "decided_pairs": judge.decided,
        "flip_rate": judge.flip_rate,
        "first_preferred": first,
        "self_agreement_alpha": judge.self_agreement,
    }


def page(ranking: Ranking, models: Sequence[ModelAnswers], title: str) -> str:
    """Return the page as HTML; everything that models and judges wrote is escaped."""
    template = string.Template((ASSETS / "judging.html").read_text(encoding="utf-8"))
    verdict = HEADINGS.index("verdict")
    leaderboard = [
        [
            verdict_mark(cell, tone_of(cell)) if place == verdict and cell else escape(cell)
            for place, cell in enumerate(row)
        ]
        for row in rows_of(ranking)
    ]
    judges = [[escape(cell) for cell in row] for row in judge_rows(ranking)]
    return template.substitute(
        style=style(),
        title=escape(title),
        subtitle=escape(f"{len(models)} models · baseline {ranking.baseline} · written {utc_now()}"),
        leaderboard=table(HEADINGS, leaderboard),
        strengths=forest(_intervals(ranking.strengths), "log-odds of being preferred, positive is better"),
        scores=forest(_intervals(ranking.scores), "points, positive is better"),
        judges=table(JUDGE_HEADINGS, judges),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes_of(ranking)),
        shown=f"{min(ITEMS_SHOWN, ranking.cells)} of {ranking.cells:,} judged questions, with mean scores.",
        answers=_shown(ranking, models),
    )


def _intervals(rows: Sequence[Row]) -> list[Interval]:
    found = []
    for row in rows:
        if row.difference is not None:
            inner = row.difference if row.by_seeds is None else row.by_seeds
            ends = (*row.difference.interval(), *inner.interval())
            found.append(Interval(row.model, row.difference.difference, *ends, row.verdict, tone_of(row.verdict)))
    return found


def _shown(ranking: Ranking, models: Sequence[ModelAnswers]) -> str:
    """Return the answers of all models to the first judged items, side by side, as HTML."""
    answers = {(answer.cell, model.model): answer for model in models for answer in model.answers}
    judged = list(dict.fromkeys(cell for cell, _ in ranking.mean_scores))[:ITEMS_SHOWN]
    parts = []
    for cell in judged:
        first = answers[cell, models[0].model]
        parts.append(f"<h3>{escape(first.instruction)}</h3>{_pre(first.input)}")
        parts.append(f'<div class="samples"><article><h3>reference</h3>{_pre(first.reference)}</article>')
        parts += [_article(model.model, answers[cell, model.model], ranking) for model in models]
        parts.append("</div>")
    return "".join(parts)


def _article(name: str, answer: Answer, ranking: Ranking) -> str:
    score = ranking.mean_scores.get((answer.cell, name))
    said = "not judged" if score is None else f"{score:.1f}"
    return f"<article><h3>{escape(name)} seed {answer.seed}: {said}</h3>{_pre(answer.answer)}</article>"


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""
