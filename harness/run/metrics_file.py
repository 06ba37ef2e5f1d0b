"""metrics.jsonl: one line of JSON for every global step, appended while the run trains."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run.files import write_text


@dataclass(frozen=True)
class MetricsFile:
    """A run's metrics.jsonl; only rank 0 writes it."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Read all lines, up to one that was cut off when the process died."""
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def append(self, lines: Iterable[dict[str, object]]) -> None:
        """Append all lines, or none if it raises OSError."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            os.truncate(self.path, size)
            raise

    def drop_from(self, step: int) -> None:
        """Delete the lines of global steps from `step` on, which a resumed run trains again."""
        kept = "".join(json.dumps(line) + "\n" for line in self.read() if line["step"] < step)
        if self.path.is_file() and kept != self.path.read_text(encoding="utf-8"):
            write_text(self.path, kept)

    def tokens_per_second(self) -> float | None:
        """Return the run's mean speed over all steps; None before the first."""
        lines = self.read()
        return lines[-1]["tokens"] / lines[-1]["elapsed"] if lines and lines[-1].get("elapsed") else None
