"""Tokenise text into OUT_DIR/train.safetensors and OUT_DIR/validation.safetensors.

  python prepare_dataset.py "books/*.txt" datasets/books --tokenizer train:4096

SOURCE is a file, folder or glob of .txt, .md, .rst, source code, .html, .jsonl,
.json, .csv, .tsv and .parquet (also .gz, .xz, .zst), a Hub dataset
hf:OWNER/NAME[/sub/folder], or a text inside this Python installation, which needs
no network: python-reference (0.4 MB of prose) or python-docs (18 MB).
After an interruption the same command resumes and gives the same bytes.
"""

import argparse
import codecs
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.run.arguments import fraction, new_folder, parse_into, parser_of, whole_number
from harness.run.errors import exit_status_of
from harness.run.streams import ignore_output_errors
from preparation.prepare import PreparationResult, prepare, verify
from preparation.selection import PreparationSettings
from preparation.sources import describe_skipped

FEW_HELD_OUT = 5
"""Documents, on which a loss depends too much on their choice."""


@dataclass(frozen=True)
class PrepareArguments:
    """The command line of `prepare_dataset.py`; it names SOURCE and OUT_DIR, or a dataset to verify."""

    source: str
    out_dir: Path
    tokenizer: str
    text_field: str
    encoding: str
    skip_bad: bool
    revision: str | None
    validation: Literal["random", "last"]
    validation_fraction: float
    seed: int
    drop_duplicates: bool
    workers: int | None
    fresh: bool
    ignore_free_space: bool
    verify: Path | None


def main() -> None:
    """Prepare a dataset, or verify one."""
    arguments = parse_arguments()
    if arguments.verify is not None:
        for file in verify(arguments.verify):
            print(f"{file.path}: {file.length:,} tokens, SHA-256 agrees")
        return
    ignore_output_errors()
    settings = PreparationSettings(
        source=arguments.source,
        revision=arguments.revision,
        text_field=arguments.text_field,
        encoding=arguments.encoding,
        skip_bad=arguments.skip_bad,
        tokenizer=arguments.tokenizer,
        validation=arguments.validation,
        validation_fraction=arguments.validation_fraction,
        seed=arguments.seed,
        drop_duplicates=arguments.drop_duplicates,
    )
    # Without this the library warns of every process that is made after its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    workers = arguments.workers or os.cpu_count() or 1
    print_result(prepare(settings, arguments.out_dir, workers, arguments.fresh, not arguments.ignore_free_space))


def print_result(result: PreparationResult) -> None:
    """Print the size of both splits, and how many documents were left out."""
    if result.progress is None:
        print("Already prepared from this source with these options")
    documents = [int(file.metadata["documents"]) for file in result.splits]
    for file, count in zip(result.splits, documents, strict=True):
        print(f"{file.path}: {count:,} document{'s' * (count != 1)}, {file.length:,} tokens")
    progress = result.progress
    if progress is None:
        return
    if documents[1] < FEW_HELD_OUT and sum(documents) > FEW_HELD_OUT:
        wanted = min(0.5, 2 * FEW_HELD_OUT / sum(documents))
        print(
            f"Held out: {documents[1]} of {sum(documents):,} documents, so a loss on them says little about others; "
            f"--validation-fraction {wanted:.1g} --fresh holds out more"
        )
    if result.skipped:
        print(f"Files skipped: {describe_skipped(result.skipped)} (text among them is read once it is named .txt)")
    if progress.bad_documents:
        print(
            f"Documents skipped because they cannot be read: {progress.bad_documents:,}, first {progress.first_bad}"
        )
    if progress.empty_documents:
        print(f"Empty documents skipped: {progress.empty_documents:,}")
    if progress.duplicates:
        print(f"Duplicate documents dropped: {progress.duplicates:,}")


def text_encoding(name: str) -> str:
    """Return the codec's own name of an encoding; an argparse type."""
    try:
        "a".encode(name).decode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(
            f"found {name}, wanted a text encoding such as utf-8, cp1252 or utf-16"
        ) from None


def parse_arguments() -> PrepareArguments:
    """Read the command line; bad usage exits with status 2."""
    parser = parser_of(__doc__)
    parser.usage = "prepare_dataset.py SOURCE OUT_DIR [options]\n       prepare_dataset.py --verify DATASET"
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="files, hf:OWNER/NAME or python-docs")
    parser.add_argument("out_dir", metavar="OUT_DIR", nargs="?", type=new_folder, help="for example datasets/books")
    parser.add_argument("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 (default), bytes, train:N (learned "
                        "from SOURCE, N ids), a tokenizer.json or hf:OWNER/NAME")  # fmt: skip
    parser.add_argument("--text-field", default="text", metavar="NAME", help="column of tables (default text)")
    parser.add_argument("--encoding", type=text_encoding, default="utf-8", metavar="NAME", help="(default utf-8)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count what cannot be read")
    parser.add_argument("--revision", metavar="REF", help="Hub commit, tag or branch (default: the newest commit)")
    choices = ("random", "last")
    parser.add_argument("--validation", choices=choices, default="random", help="documents held out (default random)")
    parser.add_argument("--validation-fraction", type=fraction, default=0.01, metavar="F", help="(default 0.01)")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the choice (default 0)")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first of equal documents")
    parser.add_argument("--workers", type=whole_number(1, 1024), metavar="N", help="threads (default: all cores)")
    parser.add_argument("--fresh", action="store_true", help="start over; replaces a dataset in OUT_DIR at the end")
    parser.add_argument("--ignore-free-space", action="store_true", help="try even if the disk seems too small")
    parser.add_argument("--verify", type=Path, metavar="DATASET", help="compare a dataset with its SHA-256")
    arguments = parse_into(PrepareArguments, parser)
    if (arguments.verify is None) == (arguments.out_dir is None) or (arguments.verify and arguments.source):
        parser.error("wanted SOURCE and OUT_DIR, or --verify DATASET")
    if arguments.revision is not None and not arguments.source.startswith("hf:"):
        parser.error("--revision is of a Hub dataset (SOURCE: hf:OWNER/NAME)")
    return arguments


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
