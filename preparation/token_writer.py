"""A token file that grows: appended to, cut back to what is known to be whole, and at last given its header."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from harness.run.errors import DataError
from harness.tokens.tokenizer import END_OF_TEXT_ID, bytes_per_token

HEADER_BYTES = 4096  # of the safetensors file, padded with spaces because its content is known only at the end
CHUNK_TOKENS = 2**22
Tokens = NDArray[np.uint16]


@dataclass
class Counts:
    """What a split holds: `text_bytes` of UTF-8."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class TokenWriter:
    """One split in the making, `<u2` after a header's room; only what `counts` counts belongs to it."""

    def __init__(self, path: Path, counts: Counts) -> None:
        self.path = path
        self.counts = counts
        self._file = path.open("r+b" if path.exists() else "w+b")
        wanted = HEADER_BYTES + 2 * counts.tokens
        if counts.tokens and (size := path.stat().st_size) < wanted:
            raise DataError(f"{path}: found {size:,} bytes, wanted {wanted:,} or more; --fresh starts over")
        self.cut_back()

    def cut_back(self) -> None:
        """Forget what lies in the file beyond the counts."""
        self._file.truncate(HEADER_BYTES + 2 * self.counts.tokens)
        self._file.seek(0, os.SEEK_END)

    def append(self, tokens: Tokens, documents: int, text_bytes: int) -> None:
        """Add tokens that hold so many document ends, and stand for so many bytes."""
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self.counts.tokens += len(tokens)
        self.counts.documents += documents
        self.counts.text_bytes += text_bytes

    def sync(self) -> None:
        """Make what was added durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, start: int, end: int) -> Iterator[Tokens]:
        """Give tokens [start, end) in chunks."""
        self._file.flush()
        for first in range(start, end, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, end - first)
            yield np.fromfile(self.path, "<u2", count, offset=HEADER_BYTES + 2 * first)

    def start_of_last(self, documents: int) -> int:
        """Give the token at which the last so many documents begin."""
        end = self.counts.tokens
        missing = documents + 1  # the document end before them, unless they are all
        while end > 0:
            start = max(0, end - CHUNK_TOKENS)
            ends = np.flatnonzero(np.concatenate(list(self.read(start, end))) == END_OF_TEXT_ID)
            if len(ends) >= missing:
                return start + int(ends[-missing]) + 1
            missing -= len(ends)
            end = start
        return 0

    def copy_tail(self, start: int, documents: int, other: "TokenWriter") -> None:
        """Copy tokens from `start` on, which hold so many document ends, to the end of another split.

        They stay in this file too, but are no longer counted, until `cut_back`.
        """
        lengths = np.array(bytes_per_token())
        before = other.counts.text_bytes
        for tokens in self.read(start, self.counts.tokens):
            other.append(tokens, 0, int(lengths[tokens].sum()))
        other.counts.documents += documents
        self.counts.text_bytes -= other.counts.text_bytes - before
        self.counts.tokens = start
        self.counts.documents -= documents

    def finish(self, metadata: dict[str, str]) -> None:
        """Cut back, end with a document end, and write the header; the file is then whole and durable."""
        self.cut_back()
        self._file.seek(-2, os.SEEK_END)
        self._file.write(struct.pack("<H", END_OF_TEXT_ID))  # no change, unless a document was cut in two
        counts = self.counts
        own = {"documents": str(counts.documents), "bytes": str(counts.text_bytes), "sha256": self._sha256()}
        header = {
            "__metadata__": {"tokenizer": "gpt2", **metadata, **own},
            "tokens": {"dtype": "U16", "shape": [counts.tokens], "data_offsets": [0, 2 * counts.tokens]},
        }
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_BYTES - 8) + json.dumps(header).encode().ljust(HEADER_BYTES - 8))
        self.sync()
        with safe_open(self.path, framework="numpy"):
            pass  # the library itself agrees that the file is well formed

    def _sha256(self) -> str:
        return sha256_of(self.read(0, self.counts.tokens))


def sha256_of(chunks: Iterator[NDArray[np.generic]]) -> str:
    """Give the SHA-256 (hex) of tokens as they lie in the file: the tensor's bytes, little-endian."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.tobytes())
    return digest.hexdigest()
