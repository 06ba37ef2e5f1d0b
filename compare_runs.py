"""Judge runs against a baseline: did the change really help, or was it the noise?

  python compare_runs.py --baseline 8xa100m40-baseline 8xa100m40-qkv-bias 8xa100m40-gradient-clipping

Runs that differ in seeds only are pooled as replicates, also those not named. Negative differences are better.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError, exit_status_of
from harness.run_folder import RunFolder, open_run, write_text
from study.designs import BASELINE, STACK
from study.effects import Finding, factorial_findings, stack_findings
from study.experiment import Experiment, load_experiment
from study.ledger import Scale, find_noise, load_ledger, record
from study.noise import learn_noise
from study.results import Group, Result, find_replicates, group_results, name_arms, read_losses, read_runs
from study.statistics import Noise
from study.tables import FORMATS, render
from study.verdicts import MARGIN, Judgement, common_noise, judge

ROOT = Path(__file__).parent


def main() -> None:
    """Gather results, judge them, print; or learn the noise."""
    arguments = parse_arguments()
    groups, experiment = gather(arguments)
    if arguments.learn_noise:
        learn(arguments, groups)
        return
    baseline, arms = choose(arguments, groups, experiment)
    given = None if arguments.noise_sd is None else Noise(arguments.noise_sd, arguments.noise_df)

    def borrow(group: Group) -> tuple[Noise, str] | None:
        return borrowed_noise(arguments.runs_dir / "noise-ledger.json", group)

    judgement = judge(baseline, arms, arguments.margin, given, borrow)
    text = render(judgement, findings_of(experiment, groups, judgement, arguments.margin), arguments.format)
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


def gather(arguments: argparse.Namespace) -> tuple[list[Group], Experiment | None]:
    """Read all results that are asked for, in groups of replicates."""
    if arguments.losses is not None:
        return group_results(read_losses(arguments.losses)), None
    if arguments.plan is not None:
        experiment = load_experiment(arguments.plan)
        folders = [open_run(arguments.runs_dir, run.run) for run in experiment.runs]
        return name_arms(read_runs(folders, arguments.checkpoint), experiment), experiment
    return group_results(read_named_runs(arguments)), None


def read_named_runs(arguments: argparse.Namespace) -> list[Result]:
    """Read the named runs, or all that are scored, and the replicates of the named ones."""
    named = [*([arguments.baseline] if arguments.baseline else []), *arguments.runs]
    folders: list[RunFolder] = [open_run(arguments.runs_dir, name) for name in dict.fromkeys(named)]
    if not arguments.only_named:
        folders += find_replicates(folders, arguments.runs_dir, arguments.checkpoint, everything=not arguments.runs)
    return read_runs(folders, arguments.checkpoint)


def choose(
    arguments: argparse.Namespace, groups: Sequence[Group], experiment: Experiment | None
) -> tuple[Group, list[Group]]:
    """Give the baseline and the arms to compare with it; raises ConfigError where one is not there."""
    wanted = arguments.baseline
    if wanted is None:
        assert experiment is not None
        names = [arm.name for arm in experiment.arms]
        # Leaving one out asks what the stack loses; a fraction may have no arm with everything off.
        is_from_stack = experiment.design == "leave-one-out" or BASELINE not in names
        wanted = STACK if is_from_stack and STACK in names else names[0]
    baseline = find_group(groups, wanted, "--baseline")
    if arguments.losses or experiment:
        arms = [find_group(groups, name, "RUN") for name in arguments.runs] or [g for g in groups if g != baseline]
    else:
        arms = [group for group in groups if group != baseline]
    if not arms or baseline in arms:
        raise ConfigError("RUN: found nothing to compare with the baseline, wanted at least one other recipe")
    return baseline, arms


def find_group(groups: Sequence[Group], name: str, argument: str) -> Group:
    """Find a recipe by its name, or by the name of one of its runs; raises ConfigError."""
    for group in groups:
        if group.recipe == name:
            return group
    for group in groups:
        if any(result.run == name for result in group.results):
            return group
    known = ", ".join(group.recipe for group in groups)
    raise ConfigError(f"{argument}: found no recipe or run {name[:80]!r}, wanted one of {known}")


def borrowed_noise(ledger: Path, group: Group) -> tuple[Noise, str] | None:
    """Look a baseline's noise up in the ledger."""
    if not group.evidence:
        return None
    first = group.evidence[0]
    found = find_noise(
        load_ledger(ledger), first.recipe_hash, Scale(first.parameters, first.tokens_seen, first.hardware)
    )
    if found is None:
        return None
    entry, borrowed = found
    return entry.noise, borrowed or f"the ledger, from {len(entry.runs)} runs of this recipe"


def findings_of(
    experiment: Experiment | None, groups: Sequence[Group], judgement: Judgement, margin: float
) -> list[Finding]:
    """Give what a plan's design says beyond the table."""
    if experiment is None:
        return []
    design = experiment.as_design()
    if design.is_factorial:
        found, source = factorial_findings(design, groups, common_noise(groups, None, lambda _: None), margin)
        print(f"Effects: {source}", file=sys.stderr)
        return found
    if design.name == "one-at-a-time":
        arms = [item.group for item in judgement.arms]
        return stack_findings(judgement.baseline, arms, design.factors, judgement.training, margin)
    return []


def learn(arguments: argparse.Namespace, groups: Sequence[Group]) -> None:
    """Write the noise of every recipe with replicates into the ledger."""
    learned = [entry for group in groups for entry in learn_noise(group)]
    if not learned:
        raise ConfigError("--learn-noise: found no replicates, wanted runs that differ in seeds only")
    path = arguments.runs_dir / "noise-ledger.json"
    record(path, learned)
    for entry in learned:
        print(f"{entry.recipe}: {entry.component} seeds: sd {entry.sd:.6f} on {entry.df} df, {len(entry.runs)} runs")
    print(f"Wrote {path}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
