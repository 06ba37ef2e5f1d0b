"""Write one self-contained HTML page about a set of runs: leaderboard, verdicts, curves, samples, configurations.

  python report.py 8xa100m40-baseline 8xa100m40-qkv-bias 8xa100m40-remove-dropout

The first run, or --baseline, is what the others are compared with. Without a run: all that are scored.
"""

import argparse
import sys
from pathlib import Path

from harness.errors import exit_status_of
from harness.run_folder import write_text
from study.assemble import Request, assemble
from study.page import page
from study.verdicts import MARGIN

ROOT = Path(__file__).parent


def main() -> None:
    """Judge the runs and write the page."""
    arguments = parse_arguments()
    study = assemble(
        Request(
            runs_dir=arguments.runs_dir,
            names=tuple(arguments.runs),
            baseline=arguments.baseline,
            plan=arguments.plan,
            losses=arguments.losses,
            checkpoint=arguments.checkpoint,
            margin=arguments.margin,
        )
    )
    title = arguments.title or (f"Experiment {study.experiment.name}" if study.experiment else "Runs compared")
    write_text(arguments.output, page(study, title))
    print(f"Wrote {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="and their replicates (default: all scored runs)")
    parser.add_argument("--baseline", metavar="RUN_OR_RECIPE")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="the runs of a plan.json")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="a CSV table instead of run folders")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last", help="of all runs (default last)")
    parser.add_argument("--margin", type=float, default=MARGIN, help="smallest difference that matters (0.01)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="(default: report.html)")
    parser.add_argument("--runs-dir", type=Path, help="(default: runs, or where the plan lies)")
    arguments = parser.parse_args()
    if arguments.runs_dir is None:
        arguments.runs_dir = arguments.plan.resolve().parent.parent if arguments.plan else ROOT / "runs"
    if not 0 < arguments.margin < 100:
        parser.error(f"--margin: found {arguments.margin}, wanted a number above 0")
    if arguments.plan and arguments.losses:
        parser.error("--plan and --losses: found both, wanted one of them")
    return arguments


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
