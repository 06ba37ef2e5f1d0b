"""Design an experiment: what it costs, what it can see, and then its run folders.

  python plan_runs.py quickstart interventions.json --design one-at-a-time --seeds 1,2,3 --name my-study
  python plan_runs.py --execute runs/my-study/plan.json datasets

INTERVENTIONS_JSON names changes: {"clipping": {"train": {"clipping_max_norm": 3.5}}, ...}. With --execute the runs
are trained and scored in order: what is complete is skipped, what was interrupted goes on, what another process has
begun is left to it.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config import ModelConfig, TrainConfig, config_from, recipe_hash
from harness.errors import DataError, HarnessError, NonFiniteError, RunLockedError, exit_status_of
from harness.run_folder import RunFolder, open_run
from harness.token_files import open_split, split_files
from study.designs import (
    DESIGNS,
    LETTERS,
    RESOLUTIONS,
    ROMAN,
    Design,
    Intervention,
    alternatives,
    load_interventions,
    make_design,
    spell,
    with_stack,
)
from study.experiment import (
    Budget,
    Experiment,
    PlannedRun,
    TestSet,
    budget_of,
    documents_of,
    load_experiment,
    make_experiment,
    write_runs,
)
from study.ledger import Scale, find_noise, load_ledger
from study.results import is_diverged, is_scored
from study.statistics import Noise, detectable

ROOT = Path(__file__).parent


def main() -> None:
    """Plan and write, or execute a plan."""
    arguments = parse_arguments()
    if arguments.execute is not None:
        execute(arguments)
        return
    base = open_run(arguments.runs_dir, arguments.base_run)
    model, train = base.read_configs()
    interventions = load_interventions(arguments.interventions) if arguments.interventions else []
    design = make_design(
        arguments.design, [item.name for item in interventions], arguments.resolution, arguments.generators
    )
    if arguments.with_stack:
        design = with_stack(design)
    start = train.start_val_token if arguments.test_start_token is None else arguments.test_start_token
    experiment = make_experiment(
        arguments.name or f"{arguments.base_run}-{arguments.design}",
        arguments.base_run,
        design,
        interventions,
        arguments.seeds,
        TestSet(start, arguments.test_batches),
    )
    budget = budget_of(base, model, train, arguments.world_size)
    noise, source = known_noise(arguments.runs_dir, model, train, budget)
    describe(experiment, design, budget, noise, source)
    warn_of_memory(experiment, arguments.runs_dir, base, budget, arguments.world_size)
    describe_alternatives(design, interventions, len(arguments.seeds), budget, noise)
    if arguments.dry_run:
        return
    path = write_runs(experiment, arguments.runs_dir)
    print(f"\nWrote {len(experiment.runs)} run folders and {path}")
    print(f"Train and score them: python plan_runs.py --execute {path} datasets")
    print(f"Then judge them:      python compare_runs.py --plan {path}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_run", metavar="BASE_RUN", nargs="?", help="the run that the changes are made to")
    parser.add_argument(
        "interventions", metavar="INTERVENTIONS_JSON", nargs="?", type=Path, help="not for replicates"
    )
    parser.add_argument("--design", choices=DESIGNS, default="one-at-a-time")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="V", help="of a fraction (default V)")
    parser.add_argument("--generators", nargs="+", default=[], metavar="E=ABCD", help="choose the fraction yourself")
    parser.add_argument("--with-stack", action="store_true", help="one-at-a-time: add an arm with all changes")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3], help="shared by all arms (default 1,2,3)")
    parser.add_argument("--name", help="of the experiment; its runs begin with it")
    parser.add_argument("--runs-dir", type=Path, help="(default: runs, or where the executed plan lies)")
    parser.add_argument("--world-size", type=_positive, default=1, metavar="W", help="processes (default 1)")
    parser.add_argument("--test-start-token", type=int, metavar="N", help="default: the base's start_val_token")
    parser.add_argument("--test-batches", type=_positive, default=3200, metavar="N", help="of 6 sequences")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--execute", nargs=2, type=Path, metavar=("PLAN", "DATASETS_DIR"))
    arguments = parser.parse_args()
    if arguments.runs_dir is None:
        arguments.runs_dir = arguments.execute[0].resolve().parent.parent if arguments.execute else ROOT / "runs"
    if arguments.execute and arguments.dry_run:
        parser.error("--execute and --dry-run: found both, wanted one of them")
    if arguments.test_start_token is not None and arguments.test_start_token < 0:
        parser.error(f"--test-start-token: found {arguments.test_start_token}, wanted 0 or more")
    if arguments.generators and arguments.design != "fraction":
        parser.error("--generators goes with --design fraction")
    is_complete = arguments.interventions is not None or (arguments.base_run and arguments.design == "replicates")
    if bool(arguments.execute) == bool(is_complete):
        parser.error(
            "wanted BASE_RUN and INTERVENTIONS_JSON (or --design replicates), or --execute PLAN DATASETS_DIR alone"
        )
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number above 0")
    return int(text)


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted different whole numbers such as 1,2,3")
    return [int(part) for part in parts]


def known_noise(runs_dir: Path, model: ModelConfig, train: TrainConfig, budget: Budget) -> tuple[Noise | None, str]:
    """Give the ledger's noise for the base recipe, and where it comes from."""
    scale = Scale(budget.parameters, budget.plan.train_tokens, None)
    found = find_noise(load_ledger(runs_dir / "noise-ledger.json"), recipe_hash(model, train), scale)
    if found is None:
        return None, "no noise in the ledger for this recipe or scale: effects in units of its sigma"
    entry, borrowed = found
    origin = borrowed or "this recipe's own"
    return entry.noise, f"sigma {entry.sd:.4f} on {entry.df} degrees of freedom from the ledger, {origin}"


def describe(experiment: Experiment, design: Design, budget: Budget, noise: Noise | None, source: str) -> None:
    """Print what the experiment costs and what it can see."""
    seeds, runs = len(experiment.seeds), len(experiment.runs)
    hours, cost = budget.hours(runs), budget.cost(runs)
    rows = [
        ("Design", f"{design.name}, {len(design.arms)} arms x {seeds} seeds = {runs} runs"),
        ("Tokens", f"{runs * budget.plan.train_tokens:,} ({budget.plan.train_tokens:,} a run)"),
        ("Hours", "unknown: no speed measured or expected" if hours is None else f"{hours:,.2f}"),
        ("Cost", "unknown: no price_per_hour" if cost is None else f"{cost:,.2f} {budget.currency}".rstrip()),
        ("Noise", source),
        ("Standard error", in_nats(design.effect_se(seeds), noise)),
        ("Sees four in five", in_nats(smallest_effect(design, seeds, noise), noise)),
    ]
    if design.generators:
        resolution = design.resolution() or 0
        rows.append(("Generators", f"{' '.join(design.generators_in_letters())} (resolution {ROMAN[resolution]})"))
    if design.is_factorial:
        rows.append(("Letters", ", ".join(f"{a} {name}" for a, name in zip(LETTERS, design.factors, strict=False))))
    width = max(len(label) for label, _ in rows) + 1
    for label, value in rows:
        print(f"{label + ':':<{width}} {value}")
    if design.generators:
        print("Aliases (effects of one or two factors that this fraction cannot tell apart):")
        for effect, others in design.aliases():
            print(f"  {' = '.join(map(spell, [effect, *others])) if others else spell(effect) + ' alone'}")


def smallest_effect(design: Design, seeds: int, noise: Noise | None) -> float | None:
    """Give the effect found four times in five, in units of sigma; None where no noise could be estimated."""
    df = design.degrees_of_freedom(seeds) or (noise.df if noise else 0)
    return detectable(design.effect_se(seeds), df) if df else None


def in_nats(sigmas: float | None, noise: Noise | None) -> str:
    """Write a number of sigmas in nats per token where sigma is known."""
    if sigmas is None:
        return "unknown: one run of each arm, and no noise in the ledger"
    return f"{sigmas:.2f} sigma" + ("" if noise is None else f" = {sigmas * noise.sd:.4f} nats per token")


def warn_of_memory(experiment: Experiment, runs_dir: Path, base: RunFolder, budget: Budget, world_size: int) -> None:
    """Say which arm needs the most memory, where that is more than the base's."""
    needs = {}
    for run in experiment.runs[: len(experiment.arms)]:
        model, train = documents_of(experiment, runs_dir, run)
        path = runs_dir / run.run
        configs = (
            config_from(ModelConfig, model, path / "model.json"),
            config_from(TrainConfig, train, path / "train.json"),
        )
        needs[run.arm] = budget_of(base, *configs, world_size).peak_gib
    arm, peak = max(needs.items(), key=lambda item: item[1])
    if peak > 1.1 * budget.peak_gib:
        print(f"Memory: {arm} needs about {peak:.1f} GiB per GPU, the base {budget.peak_gib:.1f}")


def describe_alternatives(
    chosen: Design, interventions: Sequence[Intervention], seeds: int, budget: Budget, noise: Noise | None
) -> None:
    """Print every design for these interventions, so that a cheaper one can be chosen."""
    if chosen.name == "replicates":
        return
    print(f"\nDesigns for these interventions, with {seeds} seeds:")
    print(f"  {'design':<24}{'runs':>6}{'hours':>9}{'cost':>10}  {'standard error':<34}sees")
    designs = alternatives([item.name for item in interventions])
    for design in designs if chosen in designs else [*designs, chosen]:
        runs = len(design.arms) * seeds
        hours, cost = budget.hours(runs), budget.cost(runs)
        label = f"{design.name} {ROMAN[design.resolution() or 0]}" if design.generators else design.name
        print(
            f"{'*' if design == chosen else ' '} {label:<24}{runs:>6}"
            f"{'-' if hours is None else f'{hours:,.1f}':>9}{'-' if cost is None else f'{cost:,.0f}':>10}"
            f"  {in_nats(design.effect_se(seeds), noise):<34}{design.sees()}"
        )


def execute(arguments: argparse.Namespace) -> None:
    """Train and score a plan's runs in order; a diverged run is noted and the next one follows."""
    path, datasets_dir = arguments.execute
    experiment = load_experiment(path)
    check_test_set(experiment, open_run(arguments.runs_dir, experiment.runs[0].run), datasets_dir)
    for number, run in enumerate(experiment.runs, start=1):
        folder = open_run(arguments.runs_dir, run.run)
        title = f"[{number}/{len(experiment.runs)}] {run.run}"
        if is_scored(folder, "last"):
            how = "diverged, and counts as such" if is_diverged(folder) else "already complete"
            print(f"{title}: {how}", flush=True)
            continue
        try:
            with folder.locked():
                print(f"{title}: training", flush=True)
        except RunLockedError:
            print(f"{title}: another process is at it", flush=True)
            continue
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.world_size}"]
        script = [str(ROOT / "ddp_train.py"), run.run, str(datasets_dir), "--runs-dir", str(arguments.runs_dir)]
        done = subprocess.run([sys.executable, *(launcher if arguments.world_size > 1 else []), *script])
        status = folder.read_status()
        if done.returncode and status.get("exit_code") == NonFiniteError.exit_status:
            print(f"{title}: diverged, and counts as such", flush=True)
            continue
        if done.returncode:
            raise ExecutionError(f"{run.run}: training ended with status {done.returncode}; the same command goes on")
        score(experiment, run, folder, datasets_dir)


def check_test_set(experiment: Experiment, folder: RunFolder, datasets_dir: Path) -> None:
    """Raise DataError where the validation split is too short for the test set: before training, not after it.

    A dataset that is still to be downloaded cannot be checked yet.
    """
    model, train = folder.read_configs()
    if not split_files(datasets_dir / train.dataset, "validation"):
        return
    file = open_split(datasets_dir, train.dataset, "validation")
    test_set = experiment.test_set
    wanted = test_set.start_token + test_set.sequences * model.context_length + 1
    if file.length < wanted:
        raise DataError(
            f"{file.path}: found {file.length:,} tokens, wanted {wanted:,} "
            f"(--test-start-token {test_set.start_token:,} + --test-batches {test_set.batches} x 6 sequences "
            f"x {model.context_length} tokens + 1); "
            "plan anew with fewer, under another --name"
        )


class ExecutionError(HarnessError):
    """A run of a plan did not end well."""


def score(experiment: Experiment, run: PlannedRun, folder: RunFolder, datasets_dir: Path) -> None:
    """Score a run's last checkpoint on the experiment's test set."""
    _, train = folder.read_configs()
    test_set = experiment.test_set
    script = [str(ROOT / "test_loss.py"), str(datasets_dir), str(folder.model_json)]
    script += [str(folder.checkpoints / "latest" / "model.safetensors"), "--dataset", train.dataset]
    script += ["--start-token", str(test_set.start_token), "--batches", str(test_set.batches)]
    done = subprocess.run([sys.executable, *script])
    if done.returncode:
        raise ExecutionError(f"{run.run}: scoring ended with status {done.returncode}; the same command goes on")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
