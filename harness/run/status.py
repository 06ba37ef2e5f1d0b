"""status.json: what a run is doing, or how it ended."""

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.run.errors import (
    DEFECT_STATUS,
    INTERRUPTED_STATUS,
    NonFiniteError,
    StopRequestedError,
    as_harness_error,
)
from harness.run.files import read_json, utc_now, write_json
from harness.run.streams import fit_to_print

State = Literal["unknown", "running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: State = "unknown"
    step: int | None = None
    """The last completed global step; None before the first."""
    exit_code: int | None = None
    """Exit status of the last start; None while it runs."""
    reason: str = ""
    traceback: str = ""
    """Of a rank's error; empty if there is none."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=utc_now)

    @classmethod
    def read(cls, path: Path) -> "Status":
        """Read the file; the state is "unknown" if it is missing or damaged."""
        document = read_json(path)
        found: dict[str, Any] = {key: document[key] for key in cls.__dataclass_fields__ if key in document}
        if not isinstance(found.get("step", 0), int | None):
            found["step"] = None
        return cls(**{"host": "", "pid": 0, "time": "", **found})

    @classmethod
    def of_failure(cls, error: BaseException, step: int | None) -> "Status":
        """Return the status of a start that `error` ended after global step `step`."""
        known = as_harness_error(error)
        state: State = "failed"
        exit_code = known.exit_status if known else DEFECT_STATUS
        if isinstance(known, StopRequestedError):
            state = "stopped"
        elif isinstance(error, KeyboardInterrupt):
            state, exit_code = "stopped", INTERRUPTED_STATUS
        details = known.details if known else "".join(traceback.format_exception(error))
        reason = fit_to_print(str(known or repr(error)))
        return cls(state, step, exit_code, reason, fit_to_print(details))

    @property
    def has_diverged(self) -> bool:
        """Whether the run ended after too many global steps with non-finite gradients."""
        return self.exit_code == NonFiniteError.exit_status

    def write(self, path: Path) -> None:
        """Replace the file; an empty traceback is left out."""
        write_json(path, {key: value for key, value in asdict(self).items() if key != "traceback" or value})


@contextmanager
def failure_recorded(path: Path) -> Iterator[None]:
    """Write an error of the block into status.json and raise it again."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # on a full disk, say, the original error matters more
            record_failure(path, error)
        raise


def record_failure(path: Path, error: BaseException) -> None:
    """Replace status.json with the status of an error, keeping its step."""
    Status.of_failure(error, Status.read(path).step).write(path)
