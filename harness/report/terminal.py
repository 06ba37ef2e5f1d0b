"""Say in a terminal what a run has learned: its loss as a small plot, its score, and what it was trained on.

python -m harness.report.terminal RUN
"""

import os
import platform
import re
import sys
from pathlib import Path

import numpy as np

from harness.report.curves import Floats, moving_average
from harness.run.arguments import add_runs_dir, parser_of
from harness.run.errors import ConfigError, exit_status_of
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder, open_run
from harness.run.score import Score

WIDTH, HEIGHT = 64, 10
EIGHTHS = " ▁▂▃▄▅▆▇█"


def main() -> None:
    """Print it; raises ConfigError where the run has not trained yet."""
    parser = parser_of(__doc__)
    parser.add_argument("run", metavar="RUN", help="name of a folder in the runs directory")
    add_runs_dir(parser)
    arguments = parser.parse_args()
    print("\n".join(summary(open_run(arguments.runs_dir, arguments.run))))


def summary(folder: RunFolder) -> list[str]:
    """Return the lines about a run; the score is that of its newest checkpoint, where it has one."""
    lines = folder.metrics.read()
    losses = np.array([line["train/loss"] for line in lines], dtype=np.float64)
    if not np.isfinite(losses).any():
        raise ConfigError(f"{folder.path}: found no loss to draw, wanted a run that has trained")
    speed, elapsed = folder.metrics.tokens_per_second() or 0.0, lines[-1]["elapsed"]
    text = ["", "Loss on what it was just learning from, in nats per token, from the first step to the last:"]
    text += [*area(moving_average(losses, max(1, len(losses) // WIDTH))), ""]
    for step in folder.checkpoint_steps()[-1:]:
        for score in Score.of_checkpoint(folder, step):
            if score.bits_per_byte is not None:
                text.append(
                    f"On text that it never saw: {score.bits_per_byte:.3f} bits per byte "
                    f"({score.tokens:,} tokens of {score.dataset}; text files have 8, lower is better)"
                )
    hardware = RunRecord.read(folder.run_json).hardware
    hardware = cpu_name() if hardware == "1x cpu" else hardware
    return [*text, f"Trained for {elapsed:,.0f} seconds on {hardware}, {speed:,.0f} tokens a second"]


def cpu_name() -> str:
    """Return the name of this machine's processor, as far as the system tells it, and how many cores it has."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    return f"CPU, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def area(values: Floats, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Return a series as an area of block characters, `height` lines, with its range at the left.

    Each column shows the last finite value of its part of the series, a missing one that of the column before.
    """
    parts = [part[np.isfinite(part)] for part in np.array_split(values, min(width, len(values)))]
    finite = np.concatenate(parts)
    low, high = float(finite.min()), float(finite.max())
    at, eighths = float(finite[0]), []
    for part in parts:
        at = float(part[-1]) if part.size else at
        eighths.append(1 + round((at - low) / ((high - low) or 1.0) * (8 * height - 1)))
    labels = {height - 1: f"{high:.2f}", 0: f"{low:.2f}"}
    gutter = max(map(len, labels.values()))
    return [
        f"{labels.get(row, ''):>{gutter}} │" + "".join(EIGHTHS[min(max(n - 8 * row, 0), 8)] for n in eighths)
        for row in reversed(range(height))
    ]


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
