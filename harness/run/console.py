"""Terminal output: streams whose write errors are ignored, and progress bars."""

import os
import sys
from typing import IO, Any

from tqdm import tqdm


class LastingStream:
    """A text stream that drops output once it cannot be written, because its reader is gone or its disk full.

    A closed terminal must not end a long run.
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
        """Flush what was written, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        self._stream = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends


def ignore_output_errors() -> None:
    """Drop this process's output from now on where it cannot be written."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)


def progress_bar(total: int | None, unit: str, **options: Any) -> "tqdm[Any]":
    """Return a progress bar on stderr, updated twice a second, or every 30 seconds in a log file."""
    is_terminal = sys.stderr.isatty()
    return tqdm(total=total, unit=unit, dynamic_ncols=is_terminal, mininterval=0.5 if is_terminal else 30, **options)
