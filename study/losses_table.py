"""Read a table of test losses, as strictly as a run's own files are read."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.run.errors import ConfigError
from study.results import Result

COLUMNS = ("run", "recipe", "init_seed", "train_seed", "test_loss")
SAME_IN_ALL = ("steps", "tokens", "test_set")
"""Columns that may be there too, and must then say the same in every row: else a difference is not the change's."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
DIVERGED = ("nan", "inf", "+inf", "-inf", "infinity")
MOST_SHOWN = 40


def read_losses(path: Path) -> list[Result]:
    """Read a CSV table of test losses; raises ConfigError with one line for every error, naming its line.

    A test loss of nan or inf is that of a run that diverged.
    """
    rows = _read_rows(path)
    problems: list[str] = []
    results: list[Result] = []
    for line, row in rows:
        found = _row_problems(row)
        problems += [f"{path}: line {line}: {problem}" for problem in found]
        if not found:
            loss = float(row["test_loss"])
            run, recipe, init_seed, train_seed = (row[key] for key in COLUMNS[:4])
            results.append(Result(run, recipe, init_seed, train_seed, loss if math.isfinite(loss) else None))
    problems += [f"{path}: {problem}" for problem in (*_repetitions(rows), *_differences(rows))]
    if problems:
        raise ConfigError(*problems)
    return results


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return every row with its line; raises ConfigError where the table as a whole cannot be one of test losses."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            reader = csv.reader(file, strict=True)
            header = [_printable(name) for name in next(reader, [])]
            lines = [(reader.line_num, [_printable(value) for value in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV table ({error})") from None
    wanted = ",".join(COLUMNS)
    if not header or not lines:
        raise ConfigError(f"{path}: found no rows, wanted a table of {wanted}")
    unknown = [name for name in header if name not in (*COLUMNS, *SAME_IN_ALL)]
    if unknown or not set(COLUMNS) <= set(header) or len(set(header)) < len(header):
        shown = ",".join(header)[:200]
        raise ConfigError(
            f"{path}: found columns {shown!r}, wanted {wanted} (and, if at all, {', '.join(SAME_IN_ALL)})"
        )
    uneven = [
        f"{path}: line {line}: found {len(row)} values, wanted {len(header)}" for line, row in lines
        if len(row) != len(header)
    ]  # fmt: skip
    if uneven:
        raise ConfigError(*uneven)
    return [(line, dict(zip(header, row, strict=True))) for line, row in lines]


def _printable(value: str) -> str:
    """Strip a value, without the control characters of a stranger's file that must not reach a terminal."""
    return "".join(c if c.isprintable() else "?" for c in value.strip())


def _row_problems(row: Mapping[str, str]) -> list[str]:
    problems = []
    if not row["run"] or not row["recipe"]:
        problems.append("found no run or no recipe, wanted a name for each")
    loss = row["test_loss"]
    if not NUMBER.fullmatch(loss) and loss.lower() not in DIVERGED:
        problems.append(f"test_loss: found {loss[:MOST_SHOWN]!r}, wanted a number (nan for a run that diverged)")
    return problems


def _repetitions(rows: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """Say which rows name a run, or a recipe with its seeds, that an earlier row has already."""
    problems = []
    runs: dict[str, int] = {}
    cells: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        first = runs.setdefault(row["run"], line)
        if first != line:
            problems.append(f"line {line}: run {row['run'][:MOST_SHOWN]!r} appears twice, first in line {first}")
            continue
        cell = (row["recipe"], row["init_seed"], row["train_seed"])
        if "" in cell[1:]:
            continue
        first = cells.setdefault(cell, line)
        if first != line:
            problems.append(
                f"line {line}: found recipe {cell[0][:MOST_SHOWN]!r} with seeds {cell[1]} and {cell[2]} again, first "
                f"in line {first}; wanted other seeds for a replicate"
            )
    return problems


def _differences(rows: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """Say which rows differ from the first in steps, tokens or test set."""
    (first_line, first), *others = rows
    return [
        f"line {line}: {key}: found {row[key][:MOST_SHOWN]!r}, wanted {first[key][:MOST_SHOWN]!r} as in line "
        f"{first_line}: losses after other training, or on other text, cannot be compared"
        for key in SAME_IN_ALL
        if key in first
        for line, row in others
        if row[key] != first[key]
    ]
