"""What `ddp_train.py` was asked to do: its flags, and the run's two files. No torch, so mistakes cost no time."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.run.arguments import add_device, add_runs_dir, parse_into, parser_of, whole_number
from harness.run.config import ModelConfig, TrainConfig
from harness.run.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class TrainArguments:
    """The command line of `ddp_train.py`."""

    run: str
    datasets_dir: Path
    checkpoint: str | None
    fresh: bool
    runs_dir: Path
    device: str
    max_steps: int | None
    dry_run: bool
    world_size: int | None
    dump_initial_weights: Path | None
    find_max_microbatch_size: bool
    try_microbatch_size: int | None
    peer_timeout: int
    """Seconds."""


@dataclass(frozen=True)
class RunRequest:
    """The command line, with the run's folder and its two files read."""

    arguments: TrainArguments
    folder: RunFolder
    model_config: ModelConfig
    config: TrainConfig


def read_request(description: str | None) -> RunRequest:
    """Read the command line and the run's two files; raises ConfigError with every error in them."""
    arguments = parse_arguments(description)
    folder = open_run(arguments.runs_dir, arguments.run)
    return RunRequest(arguments, folder, *folder.read_configs())


def parse_arguments(description: str | None, words: Sequence[str] | None = None) -> TrainArguments:
    """Read the command line; bad usage exits with status 2."""
    parser = parser_of(description)
    parser.add_argument("run", metavar="RUN", help="name of a folder in the runs directory")
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path, help="where datasets lie, or are put")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="resume from it: a name, latest or best")
    parser.add_argument("--fresh", action="store_true", help="start over; what there was is moved aside")
    add_runs_dir(parser)
    add_device(parser)
    parser.add_argument("--max-steps", type=whole_number(), metavar="K", help="stop, saved, after global step K-1")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--world-size", type=whole_number(), metavar="W", help="with --dry-run: plan for W processes")
    instead.add_argument(
        "--dump-initial-weights", type=Path, metavar="FILE", help="write the untrained model and exit"
    )
    instead.add_argument(
        "-f", "--find-max-microbatch-size", action="store_true", help="find the largest micro-batch that trains here"
    )
    parser.add_argument(
        "--try-microbatch-size", type=whole_number(1, 2**20), help=argparse.SUPPRESS
    )  # one trial of it
    parser.add_argument(
        "--peer-timeout",
        type=whole_number(),
        default=120,
        metavar="SECONDS",
        help="give up on a rank that shows no sign of life for so long (default: 120)",
    )
    arguments = parse_into(TrainArguments, parser, words)
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; when training, torchrun sets the number of processes")
    if arguments.fresh and arguments.checkpoint:
        parser.error("--fresh starts over, so it takes no CHECKPOINT")
    return arguments
