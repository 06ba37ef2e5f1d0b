"""Which documents a dataset gets, and in which split: the user's settings, and the documents seen so far."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import IO, Literal

import numpy as np

from preparation.sources import GLOB

DIGEST_BYTES = 16
RECENT = 2**18


@dataclass(frozen=True)
class PreparationSettings:
    """The settings that decide the tokens; stored in the files' metadata, and compared before work is resumed."""

    source: str
    revision: str | None = None
    text_field: str = "text"
    encoding: str = "utf-8"
    """Of text files; the codec's own name."""
    skip_bad: bool = False
    validation: Literal["random", "last"] = "random"
    validation_fraction: float = 0.01
    seed: int = 0
    drop_duplicates: bool = False
    tokenizer: str = "gpt2"
    """"gpt2", "bytes", "train:N", or the SHA-256 of a tokenizer.json."""

    def stored(self) -> dict[str, object]:
        """Return the settings as they are stored: nothing in them says where on this machine the source was."""
        return {**asdict(self), "source": without_place(self.source)}

    def difference(self, other: dict[str, object]) -> str | None:
        """Name the first setting in which stored ones differ, as `seed 1 there, 0 now`; None if there is none."""
        defaults = asdict(PreparationSettings(""))
        for name, value in self.stored().items():
            found = other.get(name, defaults[name])  # the setting may be younger than what was stored
            if name == "source":
                found = without_place(str(found))
            if found != value:
                return f"{name} {found} there, {value} now"
        return None

    def is_held_out(self, split_key: int) -> bool:
        """Return whether a document with this key is for validation, where a hash decides."""
        return float(split_key) < self.validation_fraction * 2.0**64

    def split_key(self, pieces: Iterable[bytes]) -> int:
        """Return a keyed hash in [0, 2^64) of the UTF-8 text, which does not depend on how the text is cut.

        A document is held out if its key is below fraction x 2^64. The choice therefore depends neither on order nor
        on workers, and equal documents are never in both splits.
        """
        digest = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        for piece in pieces:
            digest.update(piece)
        return int.from_bytes(digest.digest(), "little")


def without_place(source: str) -> str:
    """Return a source without the folders above it if its path is absolute: its last part, or those of its glob."""
    path = PurePath(source)
    if not path.is_absolute():
        return source
    first = next((number for number, part in enumerate(path.parts) if GLOB.search(part)), len(path.parts))
    return str(PurePath(*path.parts[max(1, first - 1) :]))


def content_digest(pieces: Iterable[bytes]) -> bytes:
    """Return a 16-byte digest of a UTF-8 text, which does not depend on how the text is cut."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


class SeenDocuments:
    """A set of content digests that only grows, in about 32 bytes of memory a document.

    Most digests are in a sorted array, recent ones in a Python set. Every new digest is also appended to a file, from
    which the set is rebuilt after an interruption.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._file: IO[bytes] = path.open("ab")
        self._file.truncate(DIGEST_BYTES * count)
        self.count = count
        self._recent: set[bytes] = set()
        # NumPy pads byte strings with zeros; all digests have the same length, so a trailing zero is harmless.
        self._sorted = np.sort(np.fromfile(path, f"S{DIGEST_BYTES}", count))

    def is_new(self, digest: bytes) -> bool:
        """Add a digest; return whether it was not in the set before."""
        if digest in self._recent:
            return False
        wanted = np.array(digest, dtype=self._sorted.dtype)
        index = int(np.searchsorted(self._sorted, wanted))
        if index < len(self._sorted) and self._sorted[index] == wanted:
            return False
        self._recent.add(digest)
        self._file.write(digest)
        self.count += 1
        if len(self._recent) >= RECENT:
            recent = np.sort(np.array(list(self._recent), dtype=self._sorted.dtype))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, recent), recent)
            self._recent.clear()
        return True

    def sync(self) -> None:
        """Write what was added to disk durably."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
