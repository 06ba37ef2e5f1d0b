"""One exception for each documented exit status.

Errors are raised where they are found, with a message that a user can act on. `exit_status_of`, around a command's
`main`, is the only place that turns them into an exit status.
"""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from harness.run.streams import escaped_output, fit_on_a_line, fit_to_print

INTERRUPTED_STATUS = 130  # as a shell reports SIGINT; nothing needed saving
BROKEN_PIPE_STATUS = 141  # as a shell reports SIGPIPE
DEFECT_STATUS = 1
LIKENESS = 0.6  # of difflib's ratio: below it a suggestion would be no likelier than another name
REQUEST_ID = re.compile(r"\(Request ID: [^)]*\)\.?")


class HarnessError(Exception):
    """An error that a user can act on; `lines` are printed to stderr, one error a line."""

    exit_status = 1
    is_found_by_all = False
    """Whether every process of a machine finds the same error, so that only one of them should print it."""

    def __init__(self, *lines: str, details: str = "") -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.details = details
        """The traceback behind it, for status.json; it was printed where it was caught."""


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


class DoesNotFitError(HarnessError):
    """A trial of --find-max-microbatch-size ran out of memory; never the status of the command itself."""

    exit_status = errno.ENOMEM


class StopRequestedError(HarnessError):
    """SIGTERM or SIGINT asked the run to stop, and its state is saved."""

    exit_status = 75


def error_of_status(status: int) -> type[HarnessError] | None:
    """Return the class of errors with a documented exit status; None for success, a defect or a signal."""
    kinds = {kind.exit_status: kind for kind in HarnessError.__subclasses__()}
    return None if status == DEFECT_STATUS else kinds.get(status)


def as_harness_error(error: BaseException) -> HarnessError | None:
    """Return the documented error behind `error`, or None if it is a defect, whose traceback should be printed."""
    if isinstance(error, HarnessError):
        return error
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageError(f"{error.filename or 'output'}: the disk is full ({error.strerror})")
    if isinstance(error, OSError) and error.filename is not None:
        # A path is something that the user can act on; a broken pipe or a lost connection has none.
        return StorageError(f"{error.filename}: cannot be used ({error.strerror})")
    return None


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Return "; the nearest is ...", for the end of an error about a mistyped name; empty where none is like it."""

    def likeness(other: str) -> float:
        initials = "".join(word[:1] for word in other.split("_"))
        return 1.0 if name == initials else difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    nearest = max(known, key=likeness, default="")
    return f"; the nearest is {nearest}" if nearest and likeness(nearest) >= LIKENESS else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hub_reason(error: BaseException) -> str:
    """Return in one line why the Hub refused, without the request id that its client adds."""
    text = " ".join(REQUEST_ID.sub("", str(error)).split())
    return text[:400] or type(error).__name__


@contextmanager
def hub_errors(
    what: str, error_class: type[HarnessError], after: str = "", secret: str | None = None
) -> Iterator[None]:
    """Turn all errors of the Hub client and its HTTP library into one `error_class` with a line that begins `what`.

    Errors with a documented exit status, such as a full disk, stay as they are. `secret` is masked in the message.
    """
    try:
        yield
    except Exception as error:
        if (known := as_harness_error(error)) is not None:
            raise known from None
        reason = _hub_reason(error).replace(secret or "\0", "***")
        raise error_class(f"{what} ({reason}){after}") from None


def exit_status_of(command: Callable[[], object], speaks: bool = True) -> int:
    """Run `command` and return its exit status; prints a documented error in one line.

    Any other error is a defect: its traceback is printed, and the status is 1. Without `speaks`, errors that every
    process of the machine finds are left to another process to print. Control characters are escaped in all output.
    """
    with escaped_output():
        return _status_of(command, speaks)


def _status_of(command: Callable[[], object], speaks: bool) -> int:
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `... | head`: the reader is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_STATUS
    except Exception as error:
        known = as_harness_error(error)
        lines = map(fit_on_a_line, known.lines) if known else [fit_to_print(_traceback_of(error))]
        if speaks or known is None or not known.is_found_by_all:
            for line in lines:
                print(line, file=sys.stderr)
        return known.exit_status if known else DEFECT_STATUS
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
