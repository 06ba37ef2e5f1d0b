"""What is printed: escaped, so that no text from elsewhere moves a cursor, and dropped where nobody reads it."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

# Control characters and Unicode's directional ones can move a terminal's cursor or reverse its text.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]"
)
# Access tokens of the Hugging Face Hub and keys of OpenAI-compatible services.
SECRET = re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{8,}")

MOST_CHARACTERS = 2000
"""Of one line of an error."""


def fit_to_print(text: str) -> str:
    """Return text from elsewhere with secrets masked and control characters escaped, to print or to write."""
    return escaped(SECRET.sub(r"\1...", text))


def escaped(text: str) -> str:
    """Return text with control characters, but for tabs and line ends, as escapes such as \\x1b."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def fit_on_a_line(text: str) -> str:
    """Return text as `fit_to_print` does, on one line of at most MOST_CHARACTERS, cut in its middle."""
    line = fit_to_print(text).replace("\n", "\\n")
    left_out = len(line) - MOST_CHARACTERS
    if left_out <= 0:
        return line
    half = (MOST_CHARACTERS - 60) // 2
    return f"{line[:half]} ...({len(line) - 2 * half:,} characters left out)... {line[-half:]}"


class EscapingStream:
    """A text stream that escapes control characters, whoever prints them: names, samples, messages of libraries."""

    def __init__(self, stream: IO[str]) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        self.unescaped.write(escaped(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


class LastingStream:
    """A text stream that drops output once it cannot be written, because its reader is gone or its disk full.

    Neither a closed terminal nor `... | head` may end work that is kept in files.
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
        lost, self._stream = self._stream, open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
        with suppress(OSError, ValueError):  # or Python would complain of what is left in its buffer at the end
            os.dup2(self._stream.fileno(), lost.fileno())


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what the block prints to stdout and stderr."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(EscapingStream, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def ignore_output_errors() -> None:
    """Drop this process's output from now on where it cannot be written."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
