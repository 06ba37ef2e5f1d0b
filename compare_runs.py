"""Judge runs against a baseline: did the change really help, or was it the noise?

  python compare_runs.py --baseline 8xa100m40-baseline 8xa100m40-qkv-bias 8xa100m40-gradient-clipping

Runs that differ in seeds only are pooled as replicates, also those not named. Negative differences are better.
"""

import argparse
import math
import sys
from pathlib import Path

from harness.errors import ConfigError, exit_status_of
from harness.run_folder import write_text
from study.assemble import LEDGER, Request, assemble, gather
from study.ledger import record
from study.noise import learn_noise
from study.statistics import Noise
from study.tables import FORMATS, render
from study.verdicts import MARGIN

ROOT = Path(__file__).parent


def main() -> None:
    """Judge and print; or learn the noise."""
    arguments = parse_arguments()
    request = Request(
        runs_dir=arguments.runs_dir,
        names=tuple(arguments.runs),
        baseline=arguments.baseline,
        losses=arguments.losses,
        plan=arguments.plan,
        checkpoint=arguments.checkpoint,
        only_named=arguments.only_named,
        margin=arguments.margin,
        given_noise=None if arguments.noise_sd is None else Noise(arguments.noise_sd, arguments.noise_df),
    )
    if arguments.learn_noise:
        learn(request)
        return
    study = assemble(request)
    if not study.judgement.arms:
        raise ConfigError("RUN: found nothing to compare with the baseline, wanted at least one other recipe")
    text = render(study, arguments.format)
    if arguments.output is None:
        print(text)
    else:
        write_text(arguments.output, text + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="runs, or recipes of --losses (default: all scored)")
    parser.add_argument("--baseline", metavar="RUN_OR_RECIPE", help="what the others are compared with")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="judge a CSV table instead of run folders")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="judge the experiment of a plan.json")
    parser.add_argument("--margin", type=_positive, default=MARGIN, help="smallest difference that matters (0.01)")
    parser.add_argument("--noise-sd", type=_positive, metavar="S", help="training noise by hand, with --noise-df")
    parser.add_argument("--noise-df", type=_positive, metavar="D")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last", help="of all runs (default last)")
    parser.add_argument("--only-named", action="store_true", help="do not look for replicates of the named runs")
    parser.add_argument("--learn-noise", action="store_true", help="write noise-ledger.json from the replicates")
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--runs-dir", type=Path, help="(default: runs, or where the plan lies)")
    arguments = parser.parse_args()
    if arguments.runs_dir is None:
        arguments.runs_dir = arguments.plan.resolve().parent.parent if arguments.plan else ROOT / "runs"
    if (arguments.noise_sd is None) != (arguments.noise_df is None):
        parser.error("--noise-sd and --noise-df go together")
    if arguments.noise_df is not None and arguments.noise_df < 1:
        parser.error(f"--noise-df: found {arguments.noise_df}, wanted at least 1")
    if arguments.losses and (arguments.plan or arguments.learn_noise):
        parser.error("--losses goes with neither --plan nor --learn-noise")
    if arguments.baseline is None and not arguments.plan and not arguments.learn_noise:
        parser.error("--baseline: missing, wanted a run or a recipe to compare with")
    return arguments


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number above 0")
    return value


def learn(request: Request) -> None:
    """Write the noise of every recipe with replicates into the ledger."""
    groups, _ = gather(request)
    learned = [entry for group in groups for entry in learn_noise(group)]
    if not learned:
        raise ConfigError("--learn-noise: found no replicates, wanted runs that differ in seeds only")
    path = request.runs_dir / LEDGER
    record(path, learned)
    for entry in learned:
        print(f"{entry.recipe}: {entry.component} seeds: sd {entry.sd:.6f} on {entry.df} df, {len(entry.runs)} runs")
    print(f"Wrote {path}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
