"""Kill, copy and race everything that writes, many times, and count what was lost.

  python -m benchmarks.soak --seed 1
  python -m benchmarks.soak --command-kills 0 --copies 0 --steps 0     # the trainer's kills and races alone

Parts, each with its number of repeats as an option; 0 leaves it out:

- `--command-kills` of each of scoring, export, preparation and `experiment.py run`, at moments drawn from the time
  that the command needs. Whatever lies in place after a kill must be what an untouched command leaves, to the bit,
  and the same command again must complete it.
- `--copies` of a run's folder, made file by file while it trains; training goes on from the copy, and must end with
  the bits of the untouched run or be refused in one line.
- `--steps` global steps of one process, whose memory, descriptors and threads must not grow.
- `--kills` of forked workers, `--launcher-kills` of runs under torchrun, `--races` of two trainers for one run.
"""

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.soak_commands import JOBS, kill_commands
from benchmarks.soak_live import copy_live_runs, train_long
from benchmarks.soak_training import kill_runs, race_pairs


def main() -> None:
    """Soak, print the tally, and exit with status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command-kills", type=int, default=40, metavar="N", help="of each kind of command")
    parser.add_argument("--copies", type=int, default=40, metavar="N", help="of folders of runs that train")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="of the run that is watched")
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="of forked workers")
    parser.add_argument("--launcher-kills", type=int, default=20, metavar="N", help="of runs under torchrun")
    parser.add_argument("--races", type=int, default=50, metavar="N", help="pairs of trainers started on one run")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the printed result here too")
    arguments = parser.parse_args()
    began = time.monotonic()
    lines: list[str] = []
    problems: list[str] = []
    parts = [
        *((kill_commands(job), arguments.command_kills) for job in JOBS),
        (copy_live_runs, arguments.copies),
        (train_long, arguments.steps),
        (kill_runs(arguments.launcher_kills), arguments.kills),
        (race_pairs, arguments.races),
    ]
    for part, repeats in parts:
        if repeats:
            # Each part draws its own moments, so that leaving one out changes no other.
            draw = random.Random(f"{arguments.seed} {len(lines)}")
            with tempfile.TemporaryDirectory(prefix="soak-") as place:
                found = part(Path(place), draw, repeats, problems)
            print(found, flush=True)
            lines.append(found)
    minutes = (time.monotonic() - began) / 60
    counts = {name: value for name, value in vars(arguments).items() if name != "output"}
    head = [
        "python -m benchmarks.soak " + " ".join(f"--{name.replace('_', '-')} {n}" for name, n in counts.items()),
        f"Soak of {datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} CPUs",
    ]
    text = "\n".join([*head, *lines, f"Lost: {len(problems)}", *(f"  {problem}" for problem in problems)])
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
