"""What `ddp_train.py` was asked to do: its flags, and the run's two files. No torch, so mistakes cost no time."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from harness import faults
from harness.config import ModelConfig, TrainConfig
from harness.run_folder import RunFolder, open_run

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Request:
    """The command line, with the run's folder and its two files read."""

    arguments: argparse.Namespace
    folder: RunFolder
    model: ModelConfig
    config: TrainConfig


def read_request(description: str | None) -> Request:
    """Read the command line and the run's two files; raises ConfigError with every error in them."""
    arguments = parse_arguments(description)
    faults.configured()
    folder = open_run(arguments.runs_dir, arguments.run)
    return Request(arguments, folder, *folder.read_configs())


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name of a folder in the runs directory")
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path, help="where datasets lie, or are put")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="resume from it: a name, latest or best")
    parser.add_argument("--fresh", action="store_true", help="start over; what there was is moved aside")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs", help="where runs live (default: runs)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    parser.add_argument("--max-steps", type=_positive, metavar="K", help="stop, saved, after global step K-1")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--world-size", type=_positive, metavar="W", help="with --dry-run: plan for W processes")
    parser.add_argument(
        "--dump-initial-weights", type=Path, metavar="FILE", help="write the untrained model and exit"
    )
    parser.add_argument(
        "-f", "--find-max-microbatch-size", action="store_true", help="find the largest micro-batch that trains here"
    )
    parser.add_argument("--try-microbatch-size", type=_positive, help=argparse.SUPPRESS)  # one trial of the above
    parser.add_argument(
        "--peer-timeout",
        type=_positive,
        default=120,
        metavar="SECONDS",
        help="give up on a rank that shows no sign of life for so long (default: 120)",
    )
    arguments = parser.parse_args()
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; when training, torchrun sets the number of processes")
    if arguments.fresh and arguments.checkpoint:
        parser.error("--fresh starts over, so it takes no CHECKPOINT")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number above 0")
    return int(text)
