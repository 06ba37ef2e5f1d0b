"""What the command lines of all commands share: argument types, options, and arguments as frozen dataclasses."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import TypeVar

from harness.run.files import RUNS

DEVICES = ("auto", "cuda", "cpu", "mps")
ArgumentsT = TypeVar("ArgumentsT")


def parser_of(description: str | None, program: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring as it stands; bad usage exits with status 2."""
    return argparse.ArgumentParser(
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
    """Parse the command line into a frozen dataclass, whose fields are the parser's destinations."""
    parsed = vars(parser.parse_args(words))
    return arguments_class(**{item.name: parsed[item.name] for item in fields(arguments_class)})  # type: ignore[arg-type]


def add_runs_dir(parser: argparse.ArgumentParser, help_text: str = "where runs live (default: runs)") -> None:
    """Add --runs-dir, which defaults to the checkout's own runs."""
    parser.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help=help_text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=DEVICES, default="auto")


def whole_number(lowest: int = 1) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number of at least `lowest`, and below 2^63."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20) or not lowest <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number of at least {lowest}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Read a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number above 0")
    return value


def positive_or_zero(text: str) -> float:
    """Read a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number of at least 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
