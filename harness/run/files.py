"""Atomic writes, so that a reader sees a file whole or not at all, and the paths of the checkout."""

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
    """Replace a file atomically and durably: readers see the old text or the new, also after a power cut."""
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
    """Read a JSON object that the harness wrote; returns {} if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_number(value: float) -> float | None:
    """Return a finite number as it is, and None, which strict JSON can hold, for any other."""
    return value if math.isfinite(value) else None


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link at `target`, a relative path, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`, which must be missing or empty, if the block succeeds.

    It is beside `target`; leftovers of an interrupted attempt are deleted first.
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
    """Return the time in UTC, for people to read; durations are measured with a monotonic clock."""
    return datetime.now(UTC).isoformat(timespec="seconds")
