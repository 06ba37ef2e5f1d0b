"""How fast a CPU trains beside other work, by how long its threads spin before they sleep while they wait.

  python -m benchmarks.spinning --output benchmarks/results/spinning.md

Trains the quickstart's first steps (its dataset must be there: `make quickstart`) beside so many processes that only
compute, in rounds, so that a noisy machine touches every setting alike. A run that is not done in time is counted as
if it were done then, so what it is compared with is faster by at least the ratio.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from harness.report.text import markdown_table
from harness.run.files import ROOT, write_text

SPINS = {"libgomp's own, 300,000": 300_000, "20,000": 20_000, "5,000": 5_000, "0": 0}
STEPS, STEP_TOKENS, LIMIT_SECONDS = 40, 1024, 60.0


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes computing."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def tokens_per_second(spin: int, datasets_dir: Path) -> float:
    """Train STEPS global steps and return their speed, at most that of a run that ends at the limit."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "quickstart"
        run.mkdir()
        for name in ("model.json", "train.json"):
            shutil.copyfile(ROOT / "runs" / "quickstart" / name, run / name)
        command = [sys.executable, "ddp_train.py", "quickstart", str(datasets_dir), "--runs-dir", place]
        command += ["--device", "cpu", "--max-steps", str(STEPS)]
        environment = {**os.environ, "GOMP_SPINCOUNT": str(spin)}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return STEPS * STEP_TOKENS / LIMIT_SECONDS
    (speed,) = re.findall(r"Throughput: ([\d,]+) tokens", done.stdout)
    return float(speed.replace(",", ""))


def main() -> None:
    """Measure every setting beside every amount of other work, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=Path, default=ROOT / "datasets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for others in (0, cores // 2, 2 * cores):
            with busy(others):
                for name, spin in SPINS.items():
                    found[others, name].append(tokens_per_second(spin, arguments.datasets.resolve()))
                    print(f"beside {others}, {name}: {found[others, name][-1]:,.0f} tokens/s", flush=True)
    rows = []
    for (others, name), speeds in found.items():
        first = found[others, next(iter(SPINS))]
        ratio = median(mine / theirs for mine, theirs in zip(speeds, first, strict=True))
        shown = ", ".join(f"{speed:,.0f}" for speed in speeds)
        rows.append([str(others), name, shown, f"{ratio:.2f}"])
    headings = [
        "processes beside",
        "spins before sleeping",
        "tokens/s in each round",
        "median ratio to libgomp's own",
    ]
    floor = STEPS * STEP_TOKENS / LIMIT_SECONDS
    text = [
        f"# Threads that wait, on {cores} cores of {platform.processor() or platform.machine()}",
        "",
        f"{time.strftime('%Y-%m-%d')}: {STEPS} steps of `runs/quickstart` with {cores} threads; "
        f"{floor:,.0f} tokens/s stands for {floor:,.0f} or fewer.",
        "",
        *markdown_table(headings, rows),
    ]
    print("\n".join(text))
    if arguments.output:
        write_text(arguments.output, "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
