"""Argument types and options that the commands share; arguments are parsed into frozen dataclasses."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import NoReturn, TypeVar

from harness.run.files import RUNS
from harness.run.streams import fit_on_a_line

DEVICES = ("auto", "cuda", "cpu", "mps")
ArgumentsT = TypeVar("ArgumentsT")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, however long and strange what was typed."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and one line, and exit with status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {fit_on_a_line(message)}\n")


def parser_of(description: str | None, program: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help shows `description` unwrapped; bad usage exits with status 2."""
    return _Parser(
        prog=program, description=cleandoc(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def dispatch(description: str | None, verbs: Mapping[str, Callable[[list[str]], None]]) -> None:
    """Call the verb that the command line begins with, with the words that follow it."""
    parser = parser_of(description)
    parser.add_argument("verb", metavar="VERB", choices=verbs, help=" | ".join(verbs))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="what the verb takes")
    arguments = parser.parse_args()
    verbs[arguments.verb](arguments.rest)


def parse_into(
    arguments_class: type[ArgumentsT], parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> ArgumentsT:
    """Parse the command line into a frozen dataclass, whose fields have the names of arguments."""
    parsed = vars(parser.parse_args(words))
    return arguments_class(**{item.name: parsed[item.name] for item in fields(arguments_class)})  # type: ignore[arg-type]


def add_runs_dir(parser: argparse.ArgumentParser, help_text: str = "folder of runs (default: runs)") -> None:
    """Add --runs-dir, which defaults to the checkout's own runs."""
    parser.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help=help_text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=DEVICES, default="auto")


def whole_number(lowest: int = 1, highest: int = 2**63 - 1) -> Callable[[str], int]:
    """Return the argument type of whole numbers from `lowest` to `highest`."""
    wanted = f"of at least {lowest}" if highest == 2**63 - 1 else f"from {lowest} to {highest}"

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20) or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number {wanted}")
        return int(text)

    return number


def new_file(text: str) -> Path:
    """Read the path of a file to write, which is no folder."""
    path = Path(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted the name of a file")
    return path


def new_folder(text: str) -> Path:
    """Read the path of a folder to write into."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, wanted the name of a folder")
    return Path(text)


def _number(is_wanted: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Return the argument type of those numbers."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_wanted(value):
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number {wanted}")
        return value

    return number


positive = _number(lambda value: 0 < value < math.inf, "above 0")
positive_or_zero = _number(lambda value: 0 <= value < math.inf, "of at least 0")
fraction = _number(lambda value: 0 < value < 1, "between 0 and 1")
