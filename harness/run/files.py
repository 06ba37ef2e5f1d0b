"""Atomic writes, so that a reader sees a file whole or not at all, readers that wait for nothing, and paths.

A run's folder may have been shared: where a link, a FIFO or a device lies in place of a file, it is neither written
through nor waited for.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The checkout."""
ASSETS = ROOT / "assets"
RUNS = ROOT / "runs"
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
"""Names of files that are being written, with the number of the process."""


def open_regular(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """Open a regular file, unbuffered; raises OSError for all else, without waiting as a FIFO would have one wait.

    `flags` are those of `os.open`. What is opened for writing may not be a link.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(descriptor, "ab" if flags & os.O_APPEND else "rb")


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a regular file, the first `most` where that is not negative; raises OSError."""
    with io.BufferedReader(open_regular(path)) as file, naming(path):
        return file.read(most)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of the block name the file: that of reading from a bad disk, for one, names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably: readers see the old bytes or the new, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        with temporary.open("xb") as file:  # refuses a link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def remove_abandoned(folder: Path, names: str = "*") -> None:
    """Delete what `write_bytes` left in a folder, of files with such names, in processes that were killed.

    What a process that still runs is writing is left alone; the caller itself may not be writing there.
    """
    for path in folder.glob(f".{names}.tmp"):
        if (match := TEMPORARY.fullmatch(path.name)) is not None and not _runs(int(match[1])):
            remove(path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()  # in a container, the killed one's number may be this one's


def write_text(path: Path, text: str) -> None:
    """Replace a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder, if there is one; raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically; NaN and Infinity are refused."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Return a value as `write_json` writes it; NaN and Infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that the harness wrote; returns {} if the file is missing or damaged."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_number(value: float) -> float | None:
    """Return a finite number as it is, and None, which strict JSON can hold, for any other."""
    return value if math.isfinite(value) else None


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link at `target`, a relative path, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    remove(temporary)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`, which must be missing or empty, if the block succeeds.

    It is beside `target`; leftovers of an interrupted attempt are deleted first.
    """
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.unfinished")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(target.parent)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a regular file; raises OSError, which names it."""
    with open_regular(path) as file, naming(path):
        return sha256_of(file)


def sha256_of(file: io.FileIO) -> str:
    """Return the SHA-256 (hex) of an open file, from where it is read next; raises OSError."""
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
