"""Writes a token file: tokens are appended or truncated after room for a header, which is written last."""

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
from harness.tokens.tokenizer import Tokenizer

HEADER_BYTES = 4096  # padded with spaces, because the header's content is known only at the end
CHUNK_TOKENS = 2**22
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass
class SplitCounts:
    """How much a split holds."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Of UTF-8."""


class TokenWriter:
    """One unfinished split: little-endian tokens after HEADER_BYTES; what `counts` does not count is void."""

    def __init__(self, path: Path, counts: SplitCounts, tokenizer: Tokenizer) -> None:
        self.path = path
        self.counts = counts
        self.tokenizer = tokenizer
        self._dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
        self._file = path.open("r+b" if path.exists() else "w+b")
        wanted = HEADER_BYTES + self.token_bytes * counts.tokens
        if counts.tokens and (size := path.stat().st_size) < wanted:
            raise DataError(f"{path}: found {size:,} bytes, wanted {wanted:,} or more; --fresh starts over")
        self.truncate()

    @property
    def token_bytes(self) -> int:
        """Bytes of a token on disk."""
        return self._dtype.itemsize

    def truncate(self) -> None:
        """Cut off what the file holds beyond the counts."""
        self._file.truncate(HEADER_BYTES + self.token_bytes * self.counts.tokens)
        self._file.seek(0, os.SEEK_END)

    def append(self, tokens: Tokens, documents: int, text_bytes: int) -> None:
        """Append tokens, which contain `documents` document ends and encode `text_bytes` bytes of UTF-8."""
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.counts.tokens += len(tokens)
        self.counts.documents += documents
        self.counts.text_bytes += text_bytes

    def sync(self) -> None:
        """Write what was appended to disk durably."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, start: int, end: int) -> Iterator[Tokens]:
        """Yield tokens [start, end) in chunks."""
        self._file.flush()
        for first in range(start, end, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, end - first)
            yield np.fromfile(self.path, self._dtype, count, offset=HEADER_BYTES + self.token_bytes * first)

    def start_of_last(self, documents: int) -> int:
        """Return the index of the token at which the last `documents` documents begin."""
        end = self.counts.tokens
        missing = documents + 1  # also the end of the document before them, unless they are all
        while end > 0:
            start = max(0, end - CHUNK_TOKENS)
            ends = np.flatnonzero(np.concatenate(list(self.read(start, end))) == self.tokenizer.end_of_text_id)
            if len(ends) >= missing:
                return start + int(ends[-missing]) + 1
            missing -= len(ends)
            end = start
        return 0

    def copy_tail(self, start: int, documents: int, other: "TokenWriter") -> None:
        """Append the tokens from `start` on, which contain `documents` document ends, to another split.

        This split no longer counts them, but they stay in its file until `truncate`.
        """
        lengths = self.tokenizer.byte_lengths()
        before = other.counts.text_bytes
        for tokens in self.read(start, self.counts.tokens):
            other.append(tokens, 0, int(lengths[tokens].sum()))
        other.counts.documents += documents
        self.counts.text_bytes -= other.counts.text_bytes - before
        self.counts.tokens = start
        self.counts.documents -= documents

    def finish(self, metadata: dict[str, str]) -> None:
        """Truncate, end with a document end, and write the header; the file is then complete and durable."""
        self.truncate()
        self._file.seek(-self.token_bytes, os.SEEK_END)
        last = np.array([self.tokenizer.end_of_text_id], dtype=self._dtype)
        self._file.write(last.tobytes())  # changes something only if a document was cut in two
        counts = self.counts
        own = {"documents": str(counts.documents), "bytes": str(counts.text_bytes), "sha256": self._sha256()}
        if self.tokenizer.sha256 is not None:
            own["tokenizer_sha256"] = self.tokenizer.sha256
        header = {
            "__metadata__": {"tokenizer": self.tokenizer.name, **metadata, **own},
            "tokens": {
                "dtype": f"U{8 * self.token_bytes}",
                "shape": [counts.tokens],
                "data_offsets": [0, self.token_bytes * counts.tokens],
            },
        }
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_BYTES - 8) + json.dumps(header).encode().ljust(HEADER_BYTES - 8))
        self.sync()
        with safe_open(self.path, framework="numpy"):
            pass  # raises if the header is malformed

    def _sha256(self) -> str:
        return sha256_of(self.read(0, self.counts.tokens))


def sha256_of(chunks: Iterator[NDArray[np.generic]]) -> str:
    """Return the SHA-256 (hex) of the tensor's bytes as stored: tokens, little-endian."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.tobytes())
    return digest.hexdigest()
