"""Draws a run's charts and the HTML page that shows them, from the files in the run's folder.

Drawing runs in a separate process (`python -m harness.observers.charts RUN_FOLDER`), so that it neither slows
training nor stops it by an error. The page is one file with its charts inside, runs no script, and reloads itself
while the run is running; `run_page` writes it.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from harness.observers.run_page import column, run_page, window_of
from harness.report.curves import Floats, moving_average
from harness.run.errors import exit_status_of
from harness.run.files import ROOT, read_json, write_bytes, write_text
from harness.run.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = ROOT / "assets" / "chart.mplstyle"
SECONDS_BETWEEN_DRAWINGS = 60


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
    write_text(folder.page, run_page(folder, lines))


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
    steps, loss, window = column(lines, "step"), column(lines, "train/loss"), window_of(lines)
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
    axes.plot(steps, moving_average(values, window_of(lines)), color="C0")


def _target_step(link: Path) -> int | None:
    return int(link.resolve().name.removeprefix("step-")) if link.is_symlink() and link.exists() else None


if __name__ == "__main__":
    sys.exit(exit_status_of(lambda: draw(RunFolder(Path(sys.argv[1])))))
