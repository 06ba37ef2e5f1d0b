"""The documents in a stretch of tokens: where they end, their bytes, and by what another tokenizer knows them."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.tokens.checked_tokens import CHECK_CHUNK_TOKENS, CheckedTokens
from harness.tokens.tokenizer import Tokenizer

KEY_BYTES = 8  # of a SHA-256: two of a million documents are taken for one another once in ten million such sets


@dataclass(frozen=True)
class Documents:
    """What lies in checked tokens: between D + 1 document ends there are D whole documents."""

    ends: NDArray[np.int64]
    """Where documents end, counted from the first token of the stretch, (D + 1,)."""
    keys: NDArray[np.uint64]
    """The first bytes of the SHA-256 of each whole document's UTF-8 text, (D,)."""
    num_bytes: NDArray[np.int64]
    """Bytes of each whole document, (D,)."""
    target_bytes: int
    """Of all tokens but the first, which no model is asked to predict."""


def read_documents(tokens: CheckedTokens, tokenizer: Tokenizer) -> Documents | None:
    """Read the documents of all checked tokens, one after another; None where there is an id that is no token.

    No more is held than one chunk of tokens and the document that it breaks off in.
    """
    lengths = tokenizer.byte_lengths()
    start, count = tokens.check.start, tokens.check.count
    ends: list[int] = []
    keys: list[bytes] = []
    num_bytes: list[int] = []
    total, rest = 0, np.empty(0, dtype=np.int64)
    for first in range(0, count, CHECK_CHUNK_TOKENS):
        chunk = tokens.read(start + first, min(CHECK_CHUNK_TOKENS, count - first))
        if chunk.max() >= len(lengths):
            return None
        total += int(lengths[chunk].sum())
        if first == 0:
            total -= int(lengths[chunk[0]])
        begin = 0
        for end in np.flatnonzero(chunk == tokenizer.end_of_text_id).tolist():
            if ends:  # else the document may have begun before the stretch
                document = np.concatenate([rest, chunk[begin:end]])
                keys.append(hashlib.sha256(tokenizer.decode(document.tolist()).encode()).digest()[:KEY_BYTES])
                num_bytes.append(int(lengths[document].sum()))
            ends.append(first + end)
            rest, begin = rest[:0], end + 1
        rest = np.concatenate([rest, chunk[begin:]]) if ends else rest
    return Documents(
        np.array(ends, dtype=np.int64),
        np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64),
        np.array(num_bytes, dtype=np.int64),
        total,
    )
