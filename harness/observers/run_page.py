"""The run's HTML page: what it is doing, its charts, its last sample, its last steps and its configuration."""

import json
import string
from html import escape
from typing import Any

import numpy as np

from harness.report.curves import Floats, moving_average
from harness.report.html import style, table
from harness.report.svg import Line, plot
from harness.run.files import ASSETS, read_json, utc_now
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from harness.run.units import in_hours

LAST_LINES = 12
MOST_POINTS = 1000  # a chart is at most so many pixels wide
UNKNOWN = "-"


def run_page(folder: RunFolder, lines: list[dict[str, Any]]) -> str:
    """Return the page as HTML; what a run does not have has no place on it."""
    status, run = Status.read(folder.status_json), RunRecord.read(folder.run_json)
    train = read_json(folder.train_json)
    facts = _facts(status, run.plan, lines, train.get("currency") or "")
    return string.Template((ASSETS / "run-page.html").read_text(encoding="utf-8")).substitute(
        refresh='<meta http-equiv="refresh" content="30">' if status.state == "running" else "",
        style=style(),
        name=escape(folder.path.name),
        cards="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in facts.items()
            if value != UNKNOWN
        ),
        charts="".join(_charts(lines, train.get("clipping_max_norm"))),
        samples=_samples(lines),
        tail=_tail(lines[-LAST_LINES:]),
        config=escape(json.dumps({"model": run.model, "train": run.train}, indent=2)),
    )


def column(lines: list[dict[str, Any]], key: str) -> Floats:
    """Return one metric of all lines as float64, NaN where it is missing or null."""
    return np.array([np.nan if line.get(key) is None else line[key] for line in lines], dtype=np.float64)


def window_of(lines: list[dict[str, Any]]) -> int:
    """Return the number of steps to average over: a fiftieth of the run so far."""
    return max(1, len(lines) // 50)


def _facts(status: Status, plan: dict[str, Any], lines: list[dict[str, Any]], currency: str) -> dict[str, str]:
    last = lines[-1] if lines else {}
    recent = f", last {window_of(lines)} steps" if window_of(lines) > 1 else ""
    validation = column(lines, "val/loss")
    measured = validation[np.isfinite(validation)]
    seen = utc_now() if status.state == "running" else status.time  # between checkpoints status.json stands still
    return {
        "state": status.state + (f" ({status.reason})" if status.reason else ""),
        "global step": f"{last.get('step', 0) + bool(last):,} of {plan.get('global_steps', 0):,}",
        "tokens": f"{last.get('tokens', 0):,}",
        f"train loss{recent}": _shown(_latest_mean(lines, "train/loss"), "{:.3f}"),
        "validation loss": _shown(float(measured[-1]) if measured.size else None, "{:.3f}"),
        f"tokens/second{recent}": _shown(_latest_mean(lines, "train/tok_per_sec"), "{:,.0f}"),
        "time left": _time_left(last, plan) if status.state == "running" else UNKNOWN,
        "cost": _shown(last.get("cost"), f"{{:,.2f}} {currency}".rstrip()),
        "updated": f"{seen.replace('T', ' ').removesuffix('+00:00')} UTC" if seen else UNKNOWN,
    }


def _charts(lines: list[dict[str, Any]], max_norm: float | None) -> list[str]:
    """Draw a chart of each metric that the run has."""
    steps, window = column(lines, "step"), window_of(lines)
    thin = slice(None, None, max(1, len(lines) // MOST_POINTS))

    def smooth(key: str, label: str) -> Line:
        average = f"{label}, mean of {window} steps" if window > 1 else label
        return Line(average, steps[thin], moving_average(column(lines, key), window)[thin])

    def raw(key: str) -> Line:
        return Line("single steps", steps[thin], column(lines, key)[thin], "raw")

    validation = column(lines, "val/loss")
    measured = np.isfinite(validation)
    loss = [smooth("train/loss", "train")]
    if measured.any():
        loss.append(Line("validation", steps[measured], validation[measured], "dots"))
    band = column(lines, "train/loss_min")[thin], column(lines, "train/loss_max")[thin]
    gradient = [smooth("train/grad_norm", "before clipping"), raw("train/grad_norm")]
    if max_norm is not None and lines:
        gradient.append(Line("clipped above", steps[[0, -1]], np.full(2, float(max_norm)), "level"))
    charts = {
        "Loss, nats per token": (loss, band),
        "Learning rate": ([Line("learning rate", steps[thin], column(lines, "train/lr")[thin])], None),
        "Gradient norm": (gradient, None),
        "Tokens of an expert, 1 is its even share": (
            [smooth("moe/busiest_expert", "busiest of all blocks"), smooth("moe/idlest_expert", "idlest")],
            None,
        ),
        "Tokens per second": ([smooth("train/tok_per_sec", "speed"), raw("train/tok_per_sec")], None),
    }
    return [
        plot(title, shown, around, from_zero=title in ("Learning rate", "Tokens per second"))
        for title, (shown, around) in charts.items()
        if any(np.isfinite(line.values).any() for line in shown[:2])
    ]


def _samples(lines: list[dict[str, Any]]) -> str:
    """Write the last sample at length, and those before it to unfold."""
    found = [(line["step"], line["sample"]) for line in lines if line.get("sample")][-LAST_LINES:]
    if not found:
        return ""
    *earlier, (step, last) = found
    folded = "".join(
        f'<h3>After global step {before:,}</h3><pre class="text">{escape(text)}</pre>'
        for before, text in reversed(earlier)
    )
    more = f"<details><summary>Earlier samples</summary>{folded}</details>" if earlier else ""
    return f'<h2>Sample after global step {step:,}</h2><pre class="text">{escape(last)}</pre>{more}'


def _tail(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    columns = {
        "step": ("step", "{:,}"),
        "tokens": ("tokens", "{:,}"),
        "loss": ("train/loss", "{:.4f}"),
        "learning rate": ("train/lr", "{:.3g}"),
        "gradient norm": ("train/grad_norm", "{:.3f}"),
        "tokens/second": ("train/tok_per_sec", "{:,.0f}"),
    }
    rows = [
        [
            *(_shown(line.get(key), form) for key, form in columns.values()),
            "skipped" * bool(line.get("train/skipped")),
        ]
        for line in lines
    ]
    numbers = table([*columns, ""], rows, [*["number"] * len(columns), ""])
    return f'<h2>Last steps</h2><div class="scroll">{numbers}</div>'


def _latest_mean(lines: list[dict[str, Any]], key: str) -> float | None:
    value = moving_average(column(lines, key), window_of(lines))[-1] if lines else np.nan
    return float(value) if np.isfinite(value) else None


def _time_left(last: dict[str, Any], plan: dict[str, Any]) -> str:
    speed = last.get("train/tok_per_sec")
    if not speed:
        return UNKNOWN
    seconds = (plan.get("train_tokens", 0) - last.get("tokens", 0)) / speed
    return in_hours(seconds / 3600)


def _shown(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)
