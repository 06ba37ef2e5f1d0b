"""A judgement as a terminal table, Markdown, CSV or JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from harness.report.text import aligned, markdown_table
from harness.run.files import json_number
from study.advice import advice_on, best_buy
from study.assemble import Study
from study.measures import BITS
from study.results import Group, difference_in_words
from study.statistics import ALPHA, Estimate, sample_sd
from study.verdicts import Judged, Judgement
from study.wording import chance, curve_slope, sentence_of, tokens_worth_of

Format = Literal["table", "markdown", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
LOSS = "test loss"
HEADINGS = (
    "recipe", "n", LOSS, "Δ", "95% interval", "se train", "se eval", "t", "df", "p", "Holm p", "P(better)",
    "verdict",
)  # fmt: skip
MORE_HEADINGS = ("tok/s", "cost", "worth")
IN_SENTENCES = ("se train", "se eval", "t", "df", "p")
"""What a terminal has no room for beside the sentences below its table."""


def as_json(study: Study) -> dict[str, Any]:
    """Return a judged study as JSON; numbers that are not known are null."""
    judgement = study.judgement
    baseline = judgement.baseline
    document: dict[str, Any] = {
        "baseline": {
            "recipe": baseline.recipe,
            "n": len(baseline.results),
            "mean": _mean(baseline),
            "sd": json_number(sample_sd(baseline.losses)),
            "runs": [result.run for result in baseline.results],
        },
        "arms": [_arm_as_json(item, judgement) for item in judgement.arms],
        "family": judgement.family,
        "unit": judgement.unit,
        "margin": judgement.rules.margin,
    }
    if study.findings:
        document["findings"] = [
            {
                "name": item.name,
                "aliases": list(item.aliases),
                **_numbers(item.estimate),
                **dict(zip(("low", "high"), map(json_number, item.interval()), strict=True)),
                "p_holm": json_number(item.p_holm),
                "verdict": item.verdict,
                "sentence": item.sentence,
            }
            for item in study.findings
        ]
    if notes := table_notes(study):
        document["notes"] = notes
    return document


def _arm_as_json(item: Judged, judgement: Judgement) -> dict[str, Any]:
    worth = tokens_worth_of(item, curve_slope(judgement.baseline))
    comparison, noise = item.comparison, item.comparison.noise
    return {
        "recipe": item.group.recipe,
        "n": len(item.group.results),
        "method": comparison.method,
        "mean": _mean(item.group),
        **_numbers(item.estimate, item.level),
        "difference": _difference(item, judgement.baseline),
        "p_holm": json_number(item.p_holm),
        "p_better": None if item.estimate is None else item.estimate.p_better,
        "expected_loss": None if item.estimate is None else json_number(item.estimate.expected_loss()),
        "verdict": item.verdict,
        "diverged": len(item.group.diverged),
        "se_training": None if comparison.estimate is None else json_number(comparison.estimate.se),
        "se_evaluation": None if item.evaluation is None else json_number(item.evaluation.se),
        "noise": None if noise is None else {"sd": noise.sd, "df": noise.df, "source": comparison.source},
        "seed_correlation": json_number(comparison.correlation),
        "tokens_factor": None if worth is None else {"factor": worth[0], "low": worth[1], "high": worth[2]},
        "tokens_per_second": _average([metadata.tokens_per_second for metadata in item.group.metadata]),
        "cost": _average([metadata.cost for metadata in item.group.metadata]),
        "changes": difference_in_words(item.group, judgement.baseline),
        "runs": [result.run for result in item.group.results],
        "sentence": sentence_of(item, judgement),
        "advice": advice_on(item, judgement),
        "warnings": list(item.warnings),
    }


def _numbers(estimate: Estimate | None, level: float = 1 - ALPHA) -> dict[str, float | None]:
    names = ("difference", "se", "df", "t", "p", "low", "high")
    if estimate is None:
        return dict.fromkeys(names)
    values = (*(getattr(estimate, name) for name in names[:5]), *estimate.interval(level))
    return dict(zip(names, map(json_number, values), strict=True))


def _difference(item: Judged, baseline: Group) -> float | None:
    """Return the difference of the means, which needs no noise; None where a side has no loss."""
    if item.estimate is not None:
        return item.estimate.difference
    mine, theirs = _mean(item.group), _mean(baseline)
    return None if mine is None or theirs is None else mine - theirs


def _mean(group: Group) -> float | None:
    return float(np.mean(group.losses)) if group.losses else None


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def rows_of(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return headings and one row of text for the baseline and each arm."""
    document, judgement = as_json(study), study.judgement
    baseline = document["baseline"]
    currency = next((item.currency for item in judgement.baseline.metadata), "")
    rows = [[baseline["recipe"], str(baseline["n"]), _text(baseline["mean"], "{:.6f}")]]
    rows[0] += [""] * (len(HEADINGS) - 3) + _extras(
        {
            "tokens_per_second": _average([item.tokens_per_second for item in judgement.baseline.metadata]),
            "cost": _average([item.cost for item in judgement.baseline.metadata]),
            "tokens_factor": None,
            "changes": "",
        },
        currency,
    )
    for arm in document["arms"]:
        interval = "" if arm["low"] is None else f"{arm['low']:+.4f}..{arm['high']:+.4f}"
        rows.append(
            [
                arm["recipe"],
                str(arm["n"]),
                _text(arm["mean"], "{:.6f}"),
                _text(arm["difference"], "{:+.6f}"),
                interval,
                _text(arm["se_training"], "{:.4f}"),
                _text(arm["se_evaluation"], "{:.4f}"),
                _text(arm["t"], "{:+.2f}"),
                _text(arm["df"], "{:.3g}"),
                _text(arm["p"], "{:.2g}"),
                _text(arm["p_holm"], "{:.2g}"),
                "" if arm["p_better"] is None else chance(arm["p_better"]),
                arm["verdict"],
                *_extras(arm, currency),
            ]
        )
    headings = [*HEADINGS, *MORE_HEADINGS, "changes"]
    if judgement.unit == BITS:
        headings[headings.index(LOSS)] = BITS
    return headings, rows


def for_people(
    headings: list[str], rows: list[list[str]], hidden: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Leave out the `hidden` columns and those in which no row says anything."""
    kept = [
        column
        for column, heading in enumerate(headings)
        if heading not in hidden and any(row[column] for row in rows)
    ]
    return [headings[column] for column in kept], [[row[column] for column in kept] for row in rows]


def _extras(arm: dict[str, Any], currency: str) -> list[str]:
    factor = arm["tokens_factor"]
    worth = (
        ""
        if factor is None
        else "{factor} ({low} to {high}) tokens".format_map(
            {name: f"{100 * (value - 1):+.0f}%" if value < 10 else f"{value:.0f}x" for name, value in factor.items()}
        )
    )
    cost = "" if arm["cost"] is None else f"{arm['cost']:,.2f} {currency}".rstrip()
    return [_text(arm["tokens_per_second"], "{:,.0f}"), cost, worth, arm["changes"]]


def _text(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def notes_of(study: Study) -> list[str]:
    """Return the sentences below a table: every verdict, what would settle it, every finding, and the table's own."""
    judgement = study.judgement
    notes = [f"{item.group.recipe}: {sentence_of(item, judgement)}" for item in judgement.arms]
    shared: dict[str, list[str]] = {}
    for item in judgement.arms:
        for note in (*item.warnings, advice_on(item, judgement)):
            shared.setdefault(note, []).append(item.group.recipe)
    notes += [f"{', '.join(recipes)}: {note}" for note, recipes in shared.items() if note]
    for finding in study.findings:
        aliases = "".join(f" = {alias}" for alias in finding.aliases)
        notes.append(f"{finding.name}{aliases}: {finding.sentence}")
    return [*notes, *table_notes(study)]


def table_notes(study: Study) -> list[str]:
    """Return what is to be said of a table as a whole."""
    baseline = study.judgement.baseline
    notes = []
    if study.judgement.unit == BITS:
        measured = baseline.metadata[0].measured
        assert measured.weights is not None
        notes.append(
            f"Different tokenizers: losses, differences and the margin of {study.judgement.rules.margin:g} are in "
            f"{BITS}, on the {len(measured.parts):,} test documents ({int(measured.weights.sum()):,} bytes) that "
            "every run was scored on from their first byte to their end. No noise known beforehand is lent to them."
        )
    if baseline.diverged:
        counts = f"{len(baseline.diverged)} of {len(baseline.results)} runs"
        notes.append(f"{baseline.recipe}: {counts} diverged and have no loss: {', '.join(baseline.diverged)}.")
    if study.incomplete:
        seeds = ", ".join(map(str, study.incomplete))
        notes.append(f"Not every arm is scored yet on seeds {seeds}: of each arm what is there counts.")
    if study.effects_noise:
        notes.append(f"Noise of the effects: {study.effects_noise}.")
    if buy := best_buy(study.judgement):
        notes.append(buy)
    if not any(item.evaluation for item in study.judgement.arms):
        notes.append("No losses of single test sequences: how much other test text would change is not counted.")
    return [*notes, *study.notes]


def render(study: Study, format_name: Format) -> str:
    """Write a judged study in one of the formats."""
    if format_name == "json":
        return json.dumps(as_json(study), indent=2, allow_nan=False, ensure_ascii=False)
    headings, rows = rows_of(study)
    if format_name == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(
            [headings, *([_not_a_formula(x) for x in row] for row in rows)]
        )
        return file.getvalue().rstrip("\n")
    if format_name == "markdown":
        return "\n".join(
            [*markdown_table(*for_people(headings, rows)), "", *(f"- {note}" for note in notes_of(study))]
        )
    return "\n".join([*aligned(*for_people(headings, rows, IN_SENTENCES)), "", *notes_of(study)])


def _not_a_formula(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula: what begins like one, and is no number, gets a quote."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")) or re.fullmatch(r"[-+\d.,e]+%?", text):
        return text
    return f"'{text}"
