"""Lock a folder for one process; the operating system releases the lock when the process dies.

The folder itself is locked, so that deleting or replacing a file in it lets nobody else in; `.lock` in it only says
who holds it.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.run.errors import RunLockedError
from harness.run.files import read_bytes, write_text

HOLDER = ".lock"
# What network filesystems say of a folder, because they emulate this lock by one that needs a file open for writing.
CANNOT_LOCK_FOLDERS = {errno.EBADF, errno.EINVAL, errno.ENOTSUP}


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder; raises RunLockedError, "FOLDER: `what` (HOST:PID)", if another process has it locked."""
    descriptor = _lock(folder)
    if descriptor is None:
        raise RunLockedError(f"{folder}: {what} ({_holder(folder)})")
    try:
        write_text(folder / HOLDER, f"{socket.gethostname()}:{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink()
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None where another process has it."""
    try:
        return _locked_descriptor(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in CANNOT_LOCK_FOLDERS:
            raise
    return _locked_descriptor(folder / ".locked", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)


def _locked_descriptor(path: Path, flags: int) -> int | None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _holder(folder: Path) -> str:
    """Return who holds the lock, which the holder writes a moment after it has it."""
    for _ in range(20):
        with suppress(OSError):
            if name := read_bytes(folder / HOLDER, 200).decode("utf-8", "replace").strip():
                return name
        time.sleep(0.05)
    return "an unknown process"
