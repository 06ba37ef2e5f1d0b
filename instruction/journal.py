"""An append-only file of JSON lines: each is on disk before it is used, and half a line left by a kill is dropped."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.run.errors import DataError
from harness.run.locks import locked


class Journal:
    """An append-only file of JSON objects; appending is safe from several threads of one process."""

    def __init__(self, path: Path) -> None:
        """Open or begin a file; what a kill left of a last line is cut off. Raises DataError for a damaged line."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._file = path.open("ab+")
        self._file.seek(0)
        raw = self._file.read()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            self._file.truncate(whole)
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise DataError(f"{path}: line {number}: found something else than a JSON object")
            self.lines.append(value)

    def append(self, line: Mapping[str, object]) -> None:
        """Write one object and flush it to disk."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            try:
                left = memoryview(text.encode())
                while left:  # a disk that is nearly full takes a part, and only then says so
                    left = left[os.write(self._file.fileno(), left) :]
                os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), end)  # a full disk leaves no half line for the next one to join
                raise
            self.lines.append(dict(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make an output folder and lock it for this process; raises RunLockedError where another has it locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another process writes into this folder"):
        yield
