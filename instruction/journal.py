"""An append-only file of JSON lines: each is on disk before it is used, and half a line left by a kill is dropped."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from harness.run.files import open_regular, read_bytes
from harness.run.json_lines import APPEND, append_all, parse_json_lines
from harness.run.locks import locked


class Journal:
    """An append-only file of JSON objects; appending is safe from several threads of one process."""

    def __init__(self, path: Path) -> None:
        """Open or begin a file; what a kill left of a last line is cut off. Warns of damaged lines."""
        self.path = path
        self._lock = threading.Lock()
        self._file = open_regular(path, APPEND)
        raw = read_bytes(path)
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            self._file.truncate(whole)
        parsed = [line for _, line in parse_json_lines(raw[:whole])]
        self.lines = [line for line in parsed if line is not None]
        if damaged := len(parsed) - len(self.lines):
            print(f"warning: {path}: passing over {damaged} damaged line{'s' * (damaged > 1)}", file=sys.stderr)

    def append(self, line: Mapping[str, object]) -> None:
        """Write one object and flush it to disk."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with self._lock:
            append_all(self._file, text.encode(), is_durable=True)
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
