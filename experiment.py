"""Plan an experiment, run it, and judge what helped; or lay out a new run.

  python experiment.py plan quickstart interventions.json --name my-study
  python experiment.py run my-study datasets
  python experiment.py compare --experiment my-study

`python experiment.py VERB --help` tells more of each verb.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from harness.run.arguments import (
    add_device,
    add_runs_dir,
    dispatch,
    new_file,
    parse_into,
    parser_of,
    positive,
    whole_number,
)
from harness.run.errors import ConfigError, exit_status_of
from harness.run.files import write_text
from harness.run.streams import ignore_output_errors
from study.assemble import PRIORS, ComparisonRequest, PriorChoice, assemble
from study.designs import DESIGNS, RESOLUTIONS
from study.experiment import find_experiment, load_experiment
from study.following import follow
from study.looking import note_unplanned
from study.looks import RULES
from study.new_run import NewRunRequest, new_run
from study.noise import learn, learn_pairs, show_ledger
from study.page import SECONDS_TO_RELOAD, page
from study.planning import PlanRequest, plan
from study.results import CheckpointRule
from study.running import AskedLooks, run
from study.statistics import Noise
from study.tables import FORMATS, Format, render
from study.verdicts import MARGIN


def main() -> None:
    """Do what the verb asks for; raises HarnessError."""
    dispatch(
        __doc__,
        {
            "new": new_verb,
            "plan": plan_verb,
            "run": run_verb,
            "compare": compare_verb,
            "report": report_verb,
            "noise": noise_verb,
        },
    )


def new_verb(words: list[str]) -> None:
    """Write a run folder whose size, batch, steps, precision and learning rate follow from the data and this machine.

      python experiment.py new my-run --data books --dry-run

    DATASET is a folder that prepare_dataset.py wrote. Every choice is printed and noted with its reason.
    """
    parser = parser_of(new_verb.__doc__, "experiment.py new")
    parser.add_argument("name", metavar="NAME", help="of the run")
    parser.add_argument("--data", metavar="DATASET", required=True, help="a folder in --datasets-dir")
    _add_datasets_dir(parser)
    parser.add_argument(
        "--tokens-per-parameter", type=positive, metavar="X", help="(default: 20, less of a short text)"
    )
    parser.add_argument("--epochs", type=whole_number(), metavar="N", help="(default: 4 of a short text, else 1)")
    parser.add_argument("--hours", type=positive, default=12.0, metavar="H", help="at most (default: 12)")
    parser.add_argument("--dry-run", action="store_true", help="print and write nothing")
    add_device(parser)
    add_runs_dir(parser)
    request = parse_into(NewRunRequest, parser, words)
    if not request.dry_run:
        ignore_output_errors()
    from harness.engine.hardware import find_hardware  # imports torch, which no other verb needs

    new_run(request, find_hardware(parser.parse_args(words).device))


def plan_verb(words: list[str]) -> None:
    """Design an experiment, say what it costs and what it can see, and write its run folders.

      python experiment.py plan quickstart interventions.json --seeds 1,2,3 --name my-study

    INTERVENTIONS_JSON names changes: {"clipping": {"train": {"clipping_max_norm": 3.5}}, ...}.
    """
    parser = parser_of(plan_verb.__doc__, "experiment.py plan")
    parser.add_argument("base_run", metavar="BASE_RUN", help="the run that the changes are made to")
    parser.add_argument(
        "interventions", metavar="INTERVENTIONS_JSON", nargs="?", type=Path, help="not for replicates"
    )
    parser.add_argument("--name", help="of the experiment; its runs begin with it (default: from base and design)")
    parser.add_argument("--design", choices=DESIGNS, default="one-at-a-time")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="V", help="of a fraction (default V)")
    parser.add_argument("--generators", nargs="+", default=[], metavar="E=ABCD", help="choose the fraction yourself")
    parser.add_argument("--with-stack", action="store_true", help="one-at-a-time: add an arm with all changes")
    parser.add_argument("--seeds", type=_seeds, default=(1, 2, 3), help="shared by all arms (default 1,2,3)")
    parser.add_argument("--world-size", type=whole_number(), default=1, metavar="W", help="processes (default 1)")
    parser.add_argument(
        "--test-start-token", type=whole_number(0), metavar="N", help="default: the base's validation"
    )
    parser.add_argument("--test-batches", type=whole_number(), default=3200, metavar="N", help="of 6 sequences")
    _add_datasets_dir(parser)
    parser.add_argument("--dry-run", action="store_true", help="print and write nothing")
    add_runs_dir(parser)
    request = parse_into(PlanRequest, parser, words)
    if request.generators and request.design != "fraction":
        parser.error("--generators goes with --design fraction")
    if request.interventions is None and request.design != "replicates":
        parser.error("INTERVENTIONS_JSON: missing, wanted one (or --design replicates)")
    if not request.dry_run:
        ignore_output_errors()
    plan(request)


def run_verb(words: list[str]) -> None:
    """Train and score an experiment's runs in order.

      python experiment.py run my-study datasets

    What is complete is skipped, what was interrupted goes on, what another process has begun is left to it. With
    looks, arms that are decided or hopeless stop early and their seeds go to the others, at the promised error rate.
    """
    parser = parser_of(run_verb.__doc__, "experiment.py run")
    parser.add_argument("experiment", metavar="EXPERIMENT", help="its name, or its experiment.json")
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path)
    parser.add_argument("--world-size", type=whole_number(), default=1, metavar="W", help="processes (default 1)")
    parser.add_argument("--looks", type=whole_number(2), metavar="K", help="judge K times while it grows, fixed now")
    parser.add_argument("--look-rule", choices=RULES, default="pocock", help="levels of the looks (default pocock)")
    add_runs_dir(parser)
    arguments = parser.parse_args(words)
    ignore_output_errors()
    looks = None if arguments.looks is None else AskedLooks(arguments.looks, arguments.look_rule)
    run(arguments.experiment, arguments.datasets_dir, arguments.runs_dir, arguments.world_size, looks)


@dataclass(frozen=True)
class Sources:
    """What `compare` and `report` judge."""

    runs: list[str]
    baseline: str | None
    experiment: str | None
    losses: Path | None
    checkpoint: CheckpointRule
    margin: float
    prior: PriorChoice
    runs_dir: Path

    def request(self, noise: Noise | None = None, only_named: bool = False) -> ComparisonRequest:
        """Return the request for a judgement of them."""
        return ComparisonRequest(
            runs_dir=self.runs_dir,
            names=tuple(self.runs),
            baseline=self.baseline,
            losses=self.losses,
            experiment=self.experiment,
            checkpoint=self.checkpoint,
            only_named=only_named,
            margin=self.margin,
            prior=self.prior,
            given_noise=noise,
        )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="runs, or recipes or arms (default: all scored)")
    parser.add_argument("--baseline", metavar="RUN", help="a run, or a recipe of --losses, to compare with")
    parser.add_argument("--experiment", metavar="EXPERIMENT", help="its name, or its experiment.json")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="a CSV table of test losses instead of folders")
    parser.add_argument("--margin", type=positive, default=MARGIN, help="smallest difference that matters (0.01)")
    parser.add_argument(
        "--prior", choices=PRIORS, default="auto",
        help="noise known beforehand: the ledger's, and public runs' where these are like them (auto) or always",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", choices=get_args(CheckpointRule), default="last", help="of all runs (default last)"
    )
    add_runs_dir(parser)


def _sources(parser: argparse.ArgumentParser, words: list[str]) -> tuple[Sources, argparse.Namespace]:
    sources, parsed = parse_into(Sources, parser, words), parser.parse_args(words)
    if sources.losses and sources.experiment:
        parser.error("--losses and --experiment: found both, wanted one of them")
    return sources, parsed


def compare_verb(words: list[str]) -> None:
    """Judge runs against a baseline: did the change really help, or was it the noise?

      python experiment.py compare --baseline 8xa100m40-baseline 8xa100m40-qkv-bias

    Runs that differ in seeds only are replicates, also those not named. Negative differences are better.
    """
    parser = parser_of(compare_verb.__doc__, "experiment.py compare")
    _add_sources(parser)
    parser.add_argument("--noise-sd", type=positive, metavar="S", help="training noise by hand, with --noise-df")
    parser.add_argument("--noise-df", type=positive, metavar="D")
    parser.add_argument("--only-named", action="store_true", help="do not look for replicates of the named runs")
    parser.add_argument(
        "--higher-orders-as-error", action="store_true", help="factorial: effects of 3 and more changes are noise"
    )
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument("--output", type=new_file, metavar="FILE", help="write there instead of printing")
    sources, parsed = _sources(parser, words)
    if (parsed.noise_sd is None) != (parsed.noise_df is None):
        parser.error("--noise-sd and --noise-df go together")
    if parsed.noise_df is not None and parsed.noise_df < 1:
        parser.error(f"--noise-df: found {parsed.noise_df}, wanted at least 1")
    if sources.baseline is None and not sources.experiment:
        parser.error("--baseline: missing, wanted a run or a recipe to compare with")
    noise = None if parsed.noise_sd is None else Noise(parsed.noise_sd, parsed.noise_df)
    request = replace(sources.request(noise, parsed.only_named), higher_orders_as_error=parsed.higher_orders_as_error)
    study = assemble(request)
    if parsed.higher_orders_as_error and not (study.experiment and study.experiment.as_design().is_factorial):
        raise ConfigError("--higher-orders-as-error: found no factorial, wanted an experiment of that design")
    if not study.judgement.arms:
        raise ConfigError("RUN: found nothing to compare with the baseline, wanted at least one other recipe")
    if study.experiment is not None:
        seeds = len(study.experiment.seeds) - len(study.incomplete)
        note = note_unplanned(study.experiment, request.folder_of_experiment(), seeds, study.judgement.family)
        study = replace(study, notes=(*study.notes, *([note] if note else [])))
    output_format: Format = parsed.format
    _write(render(study, output_format), parsed.output)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        print(text)
    else:
        write_text(output, text + "\n")


def report_verb(words: list[str]) -> None:
    """Write one self-contained HTML page: leaderboard, verdicts, curves, samples, configurations.

      python experiment.py report 8xa100m40-baseline 8xa100m40-qkv-bias

    The first run, or --baseline, is what the others are compared with. Without a run: all that are scored.
    """
    parser = parser_of(report_verb.__doc__, "experiment.py report")
    _add_sources(parser)
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--output", type=new_file, default=Path("report.html"), help="(default: report.html)")
    parser.add_argument("--follow", action="store_true", help="write it anew while runs train, with their curves")
    sources, parsed = _sources(parser, words)
    experiment = find_experiment(sources.runs_dir, sources.experiment) if sources.experiment else None
    ignore_output_errors()
    title = parsed.title or (f"Experiment {load_experiment(experiment).name}" if experiment else "Runs compared")
    if parsed.follow:
        print(f"Writing {parsed.output} every {SECONDS_TO_RELOAD} seconds until its runs are done", flush=True)
        follow(sources.request(), title, parsed.output)
    else:
        write_text(parsed.output, page(assemble(sources.request()), title))
    print(f"Wrote {parsed.output}")


def noise_verb(words: list[str]) -> None:
    """Learn the training noise from replicates and write it into the noise ledger, or show the ledger.

      python experiment.py noise --baseline 8xa100m40-baseline

    Without --baseline or --experiment the ledger is shown as it is.
    """
    parser = parser_of(noise_verb.__doc__, "experiment.py noise")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--baseline", metavar="RUN", help="whose replicates, runs of other seeds, to learn from")
    source.add_argument("--experiment", metavar="EXPERIMENT", help="whose arms on shared seeds to learn from")
    parser.add_argument(
        "--checkpoint", choices=get_args(CheckpointRule), default="last", help="of all runs (default last)"
    )
    add_runs_dir(parser)
    arguments = parser.parse_args(words)
    if arguments.experiment is not None:
        learn_pairs(arguments.runs_dir, arguments.experiment, arguments.checkpoint)
    elif arguments.baseline is None:
        show_ledger(arguments.runs_dir)
    else:
        learn(arguments.runs_dir, arguments.baseline, arguments.checkpoint)


def _add_datasets_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--datasets-dir", type=Path, default=Path("datasets"), metavar="DIR", help="(default: datasets)"
    )


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted different whole numbers such as 1,2,3")
    return tuple(map(int, parts))


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
