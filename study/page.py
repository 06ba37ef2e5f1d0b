"""One self-contained HTML page for a judged study: nothing is loaded from anywhere, and everything is escaped."""

import base64
import hashlib
import json
import math
import string
from collections.abc import Sequence
from html import escape

from harness.report.html import style, table, verdict_mark
from harness.report.svg import COLOURS, Curve, Interval, curve_of, curves, forest
from harness.run.errors import ConfigError
from harness.run.files import ASSETS, utc_now
from harness.run.units import in_hours
from study.assemble import Study
from study.effects import Finding
from study.measures import BITS, NATS
from study.results import Group
from study.statistics import Estimate
from study.tables import LOSS, for_people, notes_of, rows_of
from study.verdicts import tone_of

SECONDS_TO_RELOAD = 20
LEFT_TO_WORDS = {"se train", "se eval", "t", "df", "p", "changes"}
NUMBER_HEADINGS = {"n", LOSS, BITS, "Δ", "Holm p", "P(better)", "tok/s", "cost", "worth"}


def page(
    study: Study | None,
    title: str,
    live: Sequence[Curve] = (),
    reloads: bool = False,
    problem: ConfigError | None = None,
) -> str:
    """Return the page as HTML; None is a study that cannot be judged yet, perhaps for the reason `problem`.

    `live` are the curves of runs that train.
    """
    groups = _in_order(study) if study else ()
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    # Only this script may run, whatever a run's notes or samples say.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    notes = notes_of(study) if study else problem.lines if problem else ()
    waiting = "These runs cannot be judged" if problem else "No run is scored yet"
    unit = study.judgement.unit if study else NATS
    finished = [curve for group in groups if (curve := _curve(group)) is not None]
    # How many bytes a token of a run stands for is known once it is scored.
    drawn = [*finished, *(live if unit == NATS else ())]
    template = string.Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=style(),
        script_hash=f"sha256-{digest}",
        script=script,
        refresh=f'<meta http-equiv="refresh" content="{SECONDS_TO_RELOAD}">' if reloads else "",
        title=escape(title),
        subtitle=escape(_subtitle(study) if study else f"{waiting} · written {utc_now()}"),
        leaderboard=_leaderboard(study) if study else "<p>Nothing to rank yet.</p>",
        forest=_forest(study),
        findings=_findings(study.findings if study else (), unit),
        legend=_legend(drawn),
        curves=curves(drawn, unit) if drawn else "<p>No run has metrics.</p>",
        differences=_differences(groups),
        samples=_samples(groups),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
    )


def _forest(study: Study | None) -> str:
    intervals = _intervals(study) if study else []
    if study is None or not intervals:
        return "<p>Nothing to compare yet.</p>"
    return forest(intervals, f"{study.judgement.unit}, negative is better")


def _in_order(study: Study) -> list[Group]:
    """Return the groups that are shown, the baseline first."""
    return [study.judgement.baseline, *(item.group for item in study.judgement.arms)]


def _subtitle(study: Study) -> str:
    groups = study.groups
    runs = sum(len(group.results) for group in groups)
    metadata = [item for group in groups for item in group.metadata]
    known = [item.tokens_seen / item.tokens_per_second / 3600 for item in metadata if item.tokens_per_second]
    costs = [item.cost for item in metadata if item.cost is not None]
    currency = next((item.currency for item in metadata), "")
    parts = [
        f"{runs} run{'s' * (runs != 1)} of {len(groups)} recipe{'s' * (len(groups) != 1)}",
        f"baseline {study.judgement.baseline.recipe}",
    ]
    if known and len(known) == len(metadata):
        parts.append(f"{in_hours(sum(known))} of training")
    if costs:
        parts.append(f"cost {sum(costs):,.2f} {currency}".rstrip())
    return " · ".join([*parts, f"written {utc_now()}"])


def _leaderboard(study: Study) -> str:
    """Order recipes by their mean test loss; diverged ones come last."""
    headings, rows = rows_of(study)
    place = headings.index(BITS if study.judgement.unit == BITS else LOSS)
    rows.sort(key=lambda row: float(row[place]) if row[place] else math.inf)
    headings, rows = for_people(headings, rows)
    shown = [column for column, name in enumerate(headings) if name not in LEFT_TO_WORDS]
    if "verdict" in headings:  # beside the name, where it is in view on a phone
        shown.remove(headings.index("verdict"))
        shown.insert(1, headings.index("verdict"))
    headings, rows = [headings[column] for column in shown], [[row[column] for column in shown] for row in rows]
    verdict = headings.index("verdict") if "verdict" in headings else None
    cells = [
        [
            verdict_mark(cell, tone_of(cell)) if column == verdict and cell else escape(cell)
            for column, cell in enumerate(row)
        ]
        for row in rows
    ]
    kinds = ["number" if name in NUMBER_HEADINGS else "" for name in headings]
    return table([escape(name) for name in headings], cells, kinds)


def _intervals(study: Study) -> list[Interval]:
    found = []
    for item in study.judgement.arms:
        if item.estimate is not None and item.comparison.estimate is not None:
            ends = (*item.estimate.interval(item.level), *item.comparison.estimate.interval(item.level))
            found.append(_interval(item.group.recipe, item.estimate, ends, item.verdict))
    return sorted(found, key=lambda item: item.value)


def _interval(label: str, estimate: Estimate, ends: tuple[float, float, float, float], verdict: str) -> Interval:
    return Interval(label, estimate.difference, *ends, verdict, tone_of(verdict))


def _findings(findings: Sequence[Finding], unit: str) -> str:
    if not findings:
        return ""
    rows = [
        _interval(
            " = ".join([item.name, *item.aliases]), item.estimate, (*item.interval(), *item.interval()), item.verdict
        )
        for item in findings
    ]
    cells = [
        [
            escape(row.label),
            verdict_mark(row.verdict, row.tone),
            f"{row.value:+.4f}",
            f"{row.low:+.4f}..{row.high:+.4f}",
            f"{item.p_holm:.2g}",
        ]
        for row, item in zip(rows, findings, strict=True)
    ]
    words = table(["effect", "verdict", "Δ", "95% interval", "Holm p"], cells, ["", "", "number", "", "number"])
    chart = forest(rows, f"{unit}, negative is better")
    return f'<h2>Effects of the design</h2><div class="scroll">{words}</div><div class="scroll">{chart}</div>'


def _curve(group: Group) -> Curve | None:
    of_runs = [(item.curve, item.measured.per_nat) for item in group.metadata]
    return curve_of(group.recipe, [(tokens, losses * per_nat) for (tokens, losses), per_nat in of_runs])


def _legend(drawn: Sequence[Curve]) -> str:
    return "".join(
        f'<label class="c{number % COLOURS}"><input type="checkbox" checked value="{number}">'
        f'<span class="swatch"></span>{escape(curve.label)}</label>'
        for number, curve in enumerate(drawn)
    )


def _differences(groups: Sequence[Group]) -> str:
    """Write the keys that are not the same in all recipes; what equals the baseline is grey."""
    recipes = {group.recipe: group.metadata[0].recipe for group in groups if group.metadata}
    if not recipes:
        return "<p>Known for runs in folders only.</p>"
    first = next(iter(recipes.values()))
    keys = [key for key in first if any(recipe.get(key) != first[key] for recipe in recipes.values())]
    if not keys:
        return "<p>None.</p>"
    rows = [
        [escape(name), *(_setting(recipe.get(key), recipe.get(key) == first[key]) for key in keys)]
        for name, recipe in recipes.items()
    ]
    return table(["recipe", *map(escape, keys)], rows)


def _setting(value: object, is_same: bool) -> str:
    return f'<span class="{"soft" if is_same else ""}">{escape(json.dumps(value))}</span>'


def _samples(groups: Sequence[Group]) -> str:
    """Write the samples of each recipe's first run, side by side, with a slider over steps."""
    texts = {
        group.recipe: group.metadata[0].samples for group in groups if group.metadata and group.metadata[0].samples
    }
    steps = sorted({step for samples in texts.values() for step, _ in samples})
    if not steps:
        return ""
    articles = "".join(
        f'<article data-texts="{escape(json.dumps(samples))}"><h3>{escape(name)}</h3>'
        f"<pre>{escape(samples[-1][1])}</pre></article>"
        for name, samples in texts.items()
    )
    return (
        '<h2>Samples</h2><p>After global step <output id="step-shown"></output></p>'
        f'<input type="range" id="step" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        f'aria-label="global step" data-steps="{escape(json.dumps(steps))}"><div class="samples">{articles}</div>'
    )
