"""Draws a run's charts and the HTML page that shows them, from the files in the run's folder.

Drawing runs in a separate process (`python -m harness.observers.charts RUN_FOLDER`), so that it neither slows
training nor stops it by an error. The page is one file with its images inside, runs no script, and reloads itself
while the run is running.
"""

from __future__ import annotations

import base64
import html
import io
import json
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from harness.report.curves import Floats, moving_average
from harness.run.errors import exit_status_of
from harness.run.files import ROOT, read_json, write_bytes, write_text
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = ROOT / "assets" / "chart.mplstyle"
PAGE = ROOT / "assets" / "run-page.html"
SECONDS_BETWEEN_DRAWINGS = 60
LAST_LINES = 12


class ChartPainter:
    """Draws a run's charts in the background, at most once a minute, and again when its `with` block ends."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._last_start = time.monotonic()
        self._has_new_steps = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._has_new_steps:
            self._draw_last(waits=kind is None)

    def draw_if_due(self) -> None:
        """Start drawing if the last drawing began over a minute ago and has finished; never waits."""
        self._has_new_steps = True
        is_busy = self._process is not None and self._process.poll() is None
        if not is_busy and time.monotonic() - self._last_start >= SECONDS_BETWEEN_DRAWINGS:
            self._start()

    def _draw_last(self, waits: bool) -> None:
        if self._process is not None and waits:
            self._process.wait()
        self._start()
        # After an error the drawing finishes by itself, so that it does not delay the exit.
        if waits and self._process is not None and (status := self._process.wait()):
            print(f"warning: the charts could not be drawn (status {status})", file=sys.stderr)

    def _start(self) -> None:
        self._last_start = time.monotonic()
        command = [sys.executable, "-m", "harness.observers.charts", str(self._folder.path.resolve())]
        try:
            # In a new session, so that Ctrl-C, or torchrun ending all ranks, does not kill it.
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            print(f"warning: the charts could not be drawn ({error})", file=sys.stderr)


def draw(folder: RunFolder) -> None:
    """Draw the four PNGs and the page from the files on disk."""
    lines = folder.metrics.read()
    folder.charts.mkdir(exist_ok=True)
    if lines:
        _draw_charts(folder, lines)
    write_text(folder.page, _page(folder, lines))


def column(lines: list[dict[str, Any]], key: str) -> Floats:
    """Return one metric of all lines as float64, NaN where it is missing or null."""
    return np.array([np.nan if line.get(key) is None else line[key] for line in lines], dtype=np.float64)


def _draw_charts(folder: RunFolder, lines: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    best = _target_step(folder.checkpoints / "best")
    max_norm = read_json(folder.train_json).get("clipping_max_norm")
    painters: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _draw_loss(axes, lines, best),
        "learning-rate": lambda axes: _draw_learning_rate(axes, lines),
        "grad-norm": lambda axes: _draw_grad_norm(axes, lines, max_norm),
        "throughput": lambda axes: _draw_throughput(axes, lines),
    }
    for name, paint in painters.items():
        with plt.style.context(STYLE):
            figure, axes = plt.subplots()
            axes.margins(x=0.01)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("global step")
            paint(axes)
            png = io.BytesIO()
            figure.savefig(png, format="png")
            write_bytes(folder.charts / f"{name}.png", png.getvalue())
            plt.close(figure)


def _draw_loss(axes: Axes, lines: list[dict[str, Any]], best: int | None) -> None:
    axes.set(title="Loss", ylabel="nats per token")
    steps, loss, window = column(lines, "step"), column(lines, "train/loss"), _window(lines)
    low, high = column(lines, "train/loss_min"), column(lines, "train/loss_max")
    axes.fill_between(steps, low, high, alpha=0.18, linewidth=0, label="lowest to highest micro-batch")
    axes.plot(steps, moving_average(loss, window), label="average" + (f" of {window} steps" if window > 1 else ""))
    validation = column(lines, "val/loss")
    measured = np.isfinite(validation)
    if measured.any():
        axes.plot(steps[measured], validation[measured], "o-", markersize=3, label="validation")
    if best is not None:
        axes.axvline(best, color="C2", linestyle="--", linewidth=1.2, label=f"best checkpoint (step {best:,})")
    axes.legend()


def _draw_learning_rate(axes: Axes, lines: list[dict[str, Any]]) -> None:
    axes.set(title="Learning rate", ylabel="learning rate")
    axes.plot(column(lines, "step"), column(lines, "train/lr"))
    axes.set_ylim(bottom=0)


def _draw_grad_norm(axes: Axes, lines: list[dict[str, Any]], max_norm: float | None) -> None:
    axes.set(title="Gradient norm before clipping", ylabel="L2 norm")
    norm = column(lines, "train/grad_norm")
    _draw_raw_and_smooth(axes, lines, norm)
    if max_norm is not None:
        axes.axhline(max_norm, color="C3", linestyle="--", linewidth=1.2, label=f"clipped above {max_norm:g}")
        axes.legend()
    if (norm > 0).any():
        axes.set_yscale("log")
        for name in ("major", "minor"):
            getattr(axes.yaxis, f"set_{name}_formatter")("{x:g}")


def _draw_throughput(axes: Axes, lines: list[dict[str, Any]]) -> None:
    axes.set(title="Throughput", ylabel="tokens per second")
    _draw_raw_and_smooth(axes, lines, column(lines, "train/tok_per_sec"))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)


def _draw_raw_and_smooth(axes: Axes, lines: list[dict[str, Any]], values: Floats) -> None:
    steps = column(lines, "step")
    axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, moving_average(values, _window(lines)), color="C0")


def _latest_mean(lines: list[dict[str, Any]], key: str) -> float | None:
    value = moving_average(column(lines, key), _window(lines))[-1] if lines else np.nan
    return float(value) if np.isfinite(value) else None


def _window(lines: list[dict[str, Any]]) -> int:
    """Return the number of steps to average over: a fiftieth of the run so far."""
    return max(1, len(lines) // 50)


def _page(folder: RunFolder, lines: list[dict[str, Any]]) -> str:
    status, run = Status.read(folder.status_json), RunRecord.read(folder.run_json)
    facts = _facts(status, run.plan, lines, read_json(folder.train_json).get("currency") or "")
    return string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        refresh='<meta http-equiv="refresh" content="30">' if status.state == "running" else "",
        name=_escaped(folder.path.name),
        cards="".join(f"<div><dt>{_escaped(k)}</dt><dd>{_escaped(v)}</dd></div>" for k, v in facts.items()),
        images=_images(folder),
        samples=_sample_rows(lines),
        tail=_metric_rows(lines[-LAST_LINES:]),
        config=_escaped(json.dumps({"model": run.model, "train": run.train}, indent=2)),
    )


def _facts(status: Status, plan: dict[str, Any], lines: list[dict[str, Any]], currency: str) -> dict[str, str]:
    last = lines[-1] if lines else {}
    recent = f", last {_window(lines)} steps" if _window(lines) > 1 else ""
    return {
        "state": status.state + (f" ({status.reason})" if status.reason else ""),
        "global step": f"{last.get('step', 0) + bool(last):,} of {plan.get('global_steps', 0):,}",
        "tokens": f"{last.get('tokens', 0):,}",
        f"train loss{recent}": _shown(_latest_mean(lines, "train/loss"), "{:.3f}"),
        f"tokens/second{recent}": _shown(_latest_mean(lines, "train/tok_per_sec"), "{:,.0f}"),
        "time left": _time_left(last, plan) if status.state == "running" else "-",
        "cost": _shown(last.get("cost"), "{:,.2f}") + f" {currency}",
        "updated": status.time.replace("T", " ").removesuffix("+00:00") + " UTC",
    }


def _images(folder: RunFolder) -> str:
    return "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for name in ("loss", "learning-rate", "grad-norm", "throughput")
        if (path := folder.charts / f"{name}.png").is_file()
    )


def _sample_rows(lines: list[dict[str, Any]]) -> str:
    with_sample = [line for line in lines if line.get("sample")]
    return "".join(
        f"<tr><td>{line['step']:,}</td><td>{_escaped(line['sample'])}</td></tr>" for line in with_sample[-LAST_LINES:]
    )


def _metric_rows(lines: list[dict[str, Any]]) -> str:
    return "".join(
        f"<tr><td>{line['step']:,}</td><td>{line['tokens']:,}</td><td>{_shown(line['train/loss'], '{:.4f}')}</td>"
        f"<td>{_shown(line.get('train/lr'), '{:.3g}')}</td><td>{_shown(line.get('train/grad_norm'), '{:.3f}')}</td>"
        f"<td>{_shown(line.get('train/tok_per_sec'), '{:,.0f}')}</td>"
        f"<td>{'skipped' if line.get('train/skipped') else ''}</td></tr>"
        for line in lines
    )


def _time_left(last: dict[str, Any], plan: dict[str, Any]) -> str:
    speed = last.get("train/tok_per_sec")
    if not speed:
        return "-"
    seconds = (plan.get("train_tokens", 0) - last.get("tokens", 0)) / speed
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _escaped(text: object) -> str:
    return html.escape(str(text))


def _target_step(link: Path) -> int | None:
    return int(link.resolve().name.removeprefix("step-")) if link.is_symlink() and link.exists() else None


if __name__ == "__main__":
    sys.exit(exit_status_of(lambda: draw(RunFolder(Path(sys.argv[1])))))
