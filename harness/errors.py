"""One exception for each documented exit status.

An error is raised where it is found, with a message a user can act on, and turned into an exit status once,
by `exit_status_of` around a command's `main`. Nothing here imports anything but the standard library.
"""

import errno
import sys
from collections.abc import Callable

INTERRUPTED_STATUS = 130  # as a shell reports SIGINT: there was nothing to save


class HarnessError(Exception):
    """An error that a user can act on; `lines` are printed to stderr, one error a line."""

    exit_status = 1
    is_found_by_all = False
    """Whether every process of a machine finds it alike, so that one of them should say it."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(HarnessError):
    """A configuration file or the command line is wrong."""

    exit_status = 2
    is_found_by_all = True


class DataError(HarnessError):
    """A dataset is missing, malformed, too short, or does not fit the model."""

    exit_status = 3
    is_found_by_all = True


class CheckpointError(HarnessError):
    """A checkpoint is missing, damaged, or does not fit the run."""

    exit_status = 4


class RunLockedError(HarnessError):
    """Another trainer holds the run."""

    exit_status = 5


class StorageError(HarnessError):
    """The disk is full or a path cannot be written."""

    exit_status = 6


class NonFiniteError(HarnessError):
    """Too many global steps in a row had non-finite gradients."""

    exit_status = 7
    is_found_by_all = True


class PeerError(HarnessError):
    """Another rank was lost, hung, or disagrees with this one."""

    exit_status = 8


class StopRequestedError(HarnessError):
    """SIGTERM or SIGINT asked the run to stop, and its state is saved."""

    exit_status = 75


def as_harness_error(error: BaseException) -> HarnessError | None:
    """Give the documented error behind `error`, or None if it is a defect that deserves its traceback."""
    if isinstance(error, HarnessError):
        return error
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageError(f"{error.filename or 'output'}: the disk is full ({error.strerror})")
    if isinstance(error, OSError) and error.filename is not None:
        # A path that a user named or owns; a broken pipe or a lost connection has none.
        return StorageError(f"{error.filename}: cannot be used ({error.strerror})")
    return None


def exit_status_of(command: Callable[[], object], speaks: bool = True) -> int:
    """Run `command`; print a documented error to stderr and give its exit status, or 0.

    Without `speaks`, errors that another process of the machine finds alike are left for that one to print.
    """
    try:
        command()
    except (HarnessError, OSError) as error:
        known = as_harness_error(error)
        if known is None:
            raise
        if speaks or not known.is_found_by_all:
            for line in known.lines:
                print(line, file=sys.stderr)
        return known.exit_status
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0
