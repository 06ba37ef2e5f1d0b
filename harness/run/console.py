"""The terminal: output that outlives whoever reads it, and progress bars."""

import os
import sys
from typing import IO, Any

from tqdm import tqdm


class LastingStream:
    """A text stream whose writes never fail: once its reader is gone, or its disk full, what is written is dropped.

    A closed terminal must not end a run that a night of training has gone into.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        self._stream = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends


def ignore_output_errors() -> None:
    """Let this process's output be dropped where it cannot be written."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)


def progress_bar(total: int | None, unit: str, **options: Any) -> "tqdm[Any]":
    """Return a progress bar on stderr: it moves twice a second, or in a log file every 30 seconds."""
    is_terminal = sys.stderr.isatty()
    return tqdm(total=total, unit=unit, dynamic_ncols=is_terminal, mininterval=0.5 if is_terminal else 30, **options)
