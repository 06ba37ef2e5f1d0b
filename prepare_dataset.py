"""Tokenise text into OUT_DIR/train.safetensors and OUT_DIR/validation.safetensors.

SOURCE is a folder or glob of .txt, .md, .jsonl and .parquet files (also .gz, .xz, .zst), a Hub dataset
hf:OWNER/NAME[/sub/folder], or python-docs: the documentation inside this Python installation, which needs no network.
Interrupted, the same command goes on where it stopped and gives the same bytes.

  python prepare_dataset.py "books/*.txt" datasets/books
"""

import argparse
import os
import sys
from pathlib import Path

from harness.run.errors import exit_status_of
from preparation.prepare import Outcome, prepare, verify
from preparation.settings import Settings


def main() -> None:
    """Prepare a dataset, or verify one."""
    arguments = parse_arguments()
    if arguments.verify is not None:
        for file in verify(arguments.verify):
            print(f"{file.path}: {file.length:,} tokens, SHA-256 agrees")
        return
    is_last = arguments.validation == "last"
    settings = Settings(
        arguments.source,
        arguments.revision,
        arguments.text_field,
        "last" if is_last else "random",
        arguments.validation_fraction,
        arguments.seed,
        arguments.drop_duplicates,
    )
    workers = arguments.workers or os.cpu_count() or 1
    report(prepare(settings, arguments.out_dir, workers, arguments.fresh, not arguments.ignore_free_space))


def report(outcome: Outcome) -> None:
    """Print what became of the documents."""
    if outcome.progress is None:
        print("Already prepared from this source with these options")
    for file in outcome.splits:
        print(f"{file.path}: {int(file.metadata['documents']):,} documents, {file.length:,} tokens")
    if outcome.progress is not None and outcome.progress.empty_documents:
        print(f"Empty documents skipped: {outcome.progress.empty_documents:,}")
    if outcome.progress is not None and outcome.progress.duplicates:
        print(f"Duplicate documents dropped: {outcome.progress.duplicates:,}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "prepare_dataset.py SOURCE OUT_DIR [options]\n       prepare_dataset.py --verify DATASET"
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="folder, glob, hf:OWNER/NAME or python-docs")
    parser.add_argument("out_dir", metavar="OUT_DIR", nargs="?", type=Path, help="for example datasets/books")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of .jsonl and .parquet (default text)")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub dataset (default: the newest commit)")
    choices = ("random", "last")
    parser.add_argument("--validation", choices=choices, default="random", help="documents held out (default random)")
    parser.add_argument("--validation-fraction", type=_fraction, default=0.01, metavar="F", help="(default 0.01)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random choice (default 0)")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first of equal documents")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads that tokenise (default: all cores)")
    parser.add_argument("--fresh", action="store_true", help="start over; replaces a dataset in OUT_DIR at the end")
    parser.add_argument("--ignore-free-space", action="store_true", help="try even if the disk seems too small")
    parser.add_argument("--verify", type=Path, metavar="DATASET", help="compare a dataset with its SHA-256")
    arguments = parser.parse_args()
    if (arguments.verify is None) == (arguments.out_dir is None) or (arguments.verify and arguments.source):
        parser.error("wanted SOURCE and OUT_DIR, or --verify DATASET")
    if arguments.revision is not None and not arguments.source.startswith("hf:"):
        parser.error("--revision is of a Hub dataset (SOURCE: hf:OWNER/NAME)")
    return arguments


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number between 0 and 1")
    return value


def _seed(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 19:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number of at most 18 digits")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number from 1 to 1024")
    return int(text)


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
