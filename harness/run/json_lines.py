"""Files of JSON lines: appended whole or not at all, and read in spite of lines that a bad disk or a kill damaged."""

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.run.files import naming, open_regular

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def append_json_lines(path: Path, lines: Iterable[dict[str, object]]) -> None:
    """Append all lines, or none if it raises OSError; a link or what is no file is not written to."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with open_regular(path, APPEND) as file, naming(path):
        append_all(file, text.encode())


def append_all(file: io.FileIO, data: bytes, is_durable: bool = False) -> None:
    """Append all bytes, or none if it raises OSError; `is_durable` waits until they are on disk."""
    end, left = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        while left:  # a disk that is nearly full takes a part, and only then says so
            left = left[file.write(left) :]
        if is_durable:
            os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), end)  # a full disk leaves no half line for the next one to join
        raise


def parse_json_lines(raw: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield every line with the object in it; None where the line is damaged, cut off or no strict JSON object."""
    for line in raw.splitlines(keepends=True):
        try:
            value = json.loads(line, parse_constant=_refuse) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            value = None
        yield line, value if isinstance(value, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(name)
