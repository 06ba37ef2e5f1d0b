"""metrics.jsonl: one line of JSON for every global step, appended while the run trains."""

import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run.files import naming, open_regular, read_bytes, write_bytes
from harness.run.json_lines import APPEND, append_all, append_json_lines, parse_json_lines

Line = dict[str, Any]
NEEDED = {"step": int, "tokens": int, "elapsed": int | float, "train/loss": int | float | None}
TEXT = "sample"


@dataclass(frozen=True)
class MetricsFile:
    """A run's metrics.jsonl; only rank 0 writes it."""

    path: Path

    @property
    def damaged(self) -> Path:
        """The file beside it to which a start moves damaged lines."""
        return self.path.with_suffix(".damaged")

    def read(self) -> list[Line]:
        """Read all lines in the order of their steps but damaged ones, such as one cut off when the process died."""
        return [line for _, line in self._parsed() if line is not None]

    def append(self, lines: Iterable[dict[str, object]]) -> None:
        """Append all lines, or none if it raises OSError."""
        append_json_lines(self.path, lines)

    def flush(self) -> None:
        """Make the lines durable, as far as they could be written, before a checkpoint vouches for their steps."""
        try:
            with open_regular(self.path) as file:
                os.fsync(file.fileno())
        except OSError as error:
            print(f"warning: {self.path}: cannot be flushed to disk ({error.strerror})", file=sys.stderr)

    def drop_from(self, step: int) -> None:
        """Delete the lines of global steps from `step` on, which a resumed run trains again.

        Damaged lines are moved to a file beside it, with a warning.
        """
        lines = list(self._parsed())
        if lines and not lines[-1][0].endswith(b"\n"):  # cut off by a kill, past what any checkpoint vouches for
            lines.pop()
        broken = [text for text, line in lines if line is None]
        if broken:
            with open_regular(self.damaged, APPEND) as file, naming(self.damaged):
                append_all(file, b"".join(broken), is_durable=True)
            print(
                f"warning: {self.path}: {len(broken)} damaged line{'s' * (len(broken) > 1)} moved to "
                f"{self.damaged.name}",
                file=sys.stderr,
            )
        kept = b"".join(text for text, line in lines if line is not None and line["step"] < step)
        if self.path.exists() and kept != read_bytes(self.path):
            write_bytes(self.path, kept)

    def tokens_per_second(self) -> float | None:
        """Return the run's mean speed over all steps; None before the first."""
        lines = self.read()
        return lines[-1]["tokens"] / lines[-1]["elapsed"] if lines and lines[-1].get("elapsed") else None

    def _parsed(self) -> Iterator[tuple[bytes, Line | None]]:
        if not self.path.exists():
            return
        for text, line in parse_json_lines(read_bytes(self.path)):
            yield text, line if line is not None and is_metrics(line) else None


def is_metrics(line: Line) -> bool:
    """Say whether an object is a global step's line, which charts and reports can draw."""
    if any(isinstance(line.get(key), bool) or not isinstance(line.get(key), kind) for key, kind in NEEDED.items()):
        return False
    return all(
        isinstance(value, str) if key == TEXT else value is None or _is_number(value) for key, value in line.items()
    )


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, bool | int | float) and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
