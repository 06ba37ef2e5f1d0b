"""Files that a reader sees whole or not at all, and where the project's own files lie."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The checkout."""
ASSETS = ROOT / "assets"
RUNS = ROOT / "runs"


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably: a reader, or a power cut, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically; NaN and Infinity are refused."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Return a value as `write_json` writes it; NaN and Infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that the harness wrote; nothing where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_number(value: float) -> float | None:
    """Return a number as strict JSON can hold it: null where it is not finite."""
    return value if math.isfinite(value) else None


def replace_link(link: Path, target: str) -> None:
    """Point the relative symbolic link at `target` without a moment in which it is missing."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Make folder `target`, new or empty until now, so that it appears whole or not at all.

    Yields the folder beside it in which to write; what an interrupted attempt left there is deleted first.
    """
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.unfinished")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(target.parent)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def utc_now() -> str:
    """Return the time in UTC, for people; durations are measured with a monotonic clock elsewhere."""
    return datetime.now(UTC).isoformat(timespec="seconds")
