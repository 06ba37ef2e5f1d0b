"""Check the tokens that a command will use, once, and later read none but those that were checked.

One pass over the tokens finds ids outside the vocabulary and hashes every stretch of 2^16 tokens. What is read later
is compared with the hash of its stretch when that is first reached, so a file that was replaced, cut, or damaged
after the pass (size and times may be those of before) is noticed before a wrong token is used.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.run.errors import DataError
from harness.run.files import read_bytes, write_text
from harness.tokens.token_files import TokenFile

CHECK_CHUNK_TOKENS = 2**24
STRETCH_TOKENS = 2**16
DIGEST_BYTES = 8  # of a SHA-256: an accident passes once in 2^64 stretches


@dataclass(frozen=True)
class TokenCheck:
    """What one pass over tokens [start, start + count) of a split found."""

    start: int
    count: int
    highest_id: int
    sha256: str
    """Over the file's type, and the tokens as little-endian uint32."""
    stretches: str
    """The first bytes of the SHA-256 of every stretch's tokens as little-endian uint32, in hex, one after another."""

    def describe(self) -> dict[str, object]:
        """Return the check as run.json holds it, without the stretches, which are many."""
        return {key: value for key, value in asdict(self).items() if key != "stretches"}


def check_tokens(file: TokenFile, start: int, count: int, vocab_size: int) -> TokenCheck:
    """Check that every id in [start, start + count) is in [0, vocab_size), and hash those tokens.

    The result is kept beside the file and believed while the file's size and times stay, so that resuming does not
    read gigabytes again: what it says is compared with the tokens when they are used. Raises DataError with the index
    of the first id that is out of range.
    """
    size, mtime_ns, ctime_ns = file.size_and_times()
    key = {"size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns, "stretch_tokens": STRETCH_TOKENS}
    path = _kept(file, start, count)
    result = _read_kept(path, key)
    if result is None or result.highest_id >= vocab_size:
        result = _read_and_check(file, start, count, vocab_size)
        with suppress(OSError):  # a read-only dataset folder costs another pass at the next start, nothing else
            document = {**key, **asdict(result)}
            write_text(path, json.dumps({**document, "seal": _seal(document)}))
    return result


def _kept(file: TokenFile, start: int, count: int) -> Path:
    return file.path.with_name(f".{file.path.stem}-{start}-{count}.check.json")


def _seal(document: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read_kept(path: Path, key: dict[str, int]) -> TokenCheck | None:
    try:
        kept = json.loads(read_bytes(path))
        if kept.pop("seal") == _seal(kept) and key == {name: kept.pop(name) for name in key}:
            return TokenCheck(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _read_and_check(file: TokenFile, start: int, count: int, vocab_size: int) -> TokenCheck:
    digest = hashlib.sha256(file.dtype.encode())
    stretches: list[str] = []
    highest = 0
    for chunk_start in range(start, start + count, CHECK_CHUNK_TOKENS):
        tokens = file.read(chunk_start, min(CHECK_CHUNK_TOKENS, start + count - chunk_start))
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if wrong.size:
            raise DataError(
                f"{file.path}: found id {tokens[wrong[0]]} at token {chunk_start + int(wrong[0]):,}, "
                f"wanted ids from 0 to {vocab_size - 1} (model.json: vocab_size)"
            )
        highest = max(highest, int(tokens.max()))
        digest.update(tokens.astype("<u4").tobytes())
        stretches += [_digest(tokens[at : at + STRETCH_TOKENS]) for at in range(0, len(tokens), STRETCH_TOKENS)]
    return TokenCheck(start, count, highest, digest.hexdigest(), "".join(stretches))


def _digest(tokens: NDArray[np.int64]) -> str:
    return hashlib.sha256(tokens.astype("<u4").tobytes()).digest()[:DIGEST_BYTES].hex()


class CheckedTokens:
    """The tokens of a split that were checked; to read others than those raises DataError."""

    def __init__(self, file: TokenFile, check: TokenCheck) -> None:
        self.file, self.check = file, check
        self._is_known = np.zeros(-(-check.count // STRETCH_TOKENS), dtype=bool)
        self._known_by: object = None
        """Which file on disk the known stretches were read from."""
        self._last = (-1, np.empty(0, dtype=np.int64))
        """The stretch that was compared last, by its number: whoever reads in order wants more of it."""

    @property
    def path(self) -> Path:
        """The split's file."""
        return self.file.path

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself; nothing vouches for it."""
        return self.file.metadata

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Read tokens [start, start + count) as int64, (count,), of the span that was checked."""
        if not self.check.start <= start <= start + count <= self.check.start + self.check.count:
            raise ValueError(f"tokens {start} to {start + count} were not checked")
        first = start - self.check.start
        try:
            self._forget_if_replaced()
            parts = [self._part(number, first, first + count) for number in _stretches(first, first + count)]
        except OSError as error:
            raise DataError(f"{self.file.path}: cannot be read ({error.strerror or error})") from None
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _forget_if_replaced(self) -> None:
        found = self.file.on_disk()
        if found != self._known_by:
            self._known_by = found
            self._is_known[:] = False
            self._last = (-1, self._last[1])

    def _part(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return what tokens [first, last), counted from the checked ones' first, have in common with a stretch."""
        begin = number * STRETCH_TOKENS
        end = min(begin + STRETCH_TOKENS, self.check.count)
        low, high = max(first, begin), min(last, end)
        if self._is_known[number] and self._last[0] != number:
            return self.file.read(self.check.start + low, high - low)
        if self._last[0] != number:
            self._last = (number, self._compared(number, self.check.start + begin, end - begin))
        return self._last[1][low - begin : high - begin]

    def _compared(self, number: int, start: int, count: int) -> NDArray[np.int64]:
        tokens = self.file.read(start, count)
        place = 2 * DIGEST_BYTES * number
        if _digest(tokens) != self.check.stretches[place : place + 2 * DIGEST_BYTES]:
            with suppress(OSError):  # so that the next start reads the file through and says what it is
                os.unlink(_kept(self.file, self.check.start, self.check.count))
            raise DataError(
                f"{self.file.path}: tokens {start:,} to {start + count:,} are not those that were checked: the file "
                "was replaced, or its disk is damaged"
            )
        self._is_known[number] = True
        return tokens


def _stretches(first: int, last: int) -> range:
    return range(first // STRETCH_TOKENS, -(-last // STRETCH_TOKENS))
