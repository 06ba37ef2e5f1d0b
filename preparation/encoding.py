"""Turns a batch of raw items into tokens. Worker threads call it, so nothing here keeps state."""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.run.errors import DataError
from harness.tokens.tokenizer import Tokenizer
from preparation.readers import Batch
from preparation.selection import PreparationSettings, content_digest


@dataclass(frozen=True)
class EncodedBatch:
    """The tokens of a batch's N documents, and what is known of each document."""

    batch: Batch
    tokens: NDArray[np.uint32]
    """Of all documents in order, each followed by its end-of-text token."""
    token_counts: NDArray[np.int64]  # (N,)
    text_bytes: NDArray[np.int64]  # (N,), of UTF-8
    split_keys: NDArray[np.uint64]  # (N,)
    content_digests: list[bytes]
    """One for each document; empty unless duplicates are dropped."""
    empty_documents: int


def encode_batch(batch: Batch, settings: PreparationSettings, tokenizer: Tokenizer) -> EncodedBatch:
    """Tokenise a batch; raises DataError naming the first line or row that is not a document."""
    texts = texts_of(batch, settings)
    empty = sum(1 for item in batch.items if not _is_blank(batch, item)) - len(texts)
    raw = [text.encode() for text in texts]
    encoded = tokenizer.encode_batch(texts)
    if batch.long:
        keys, digests = [batch.long.split_key], [batch.long.content_digest]
    else:
        keys = [settings.split_key([text]) for text in raw]
        digests = [content_digest([text]) for text in raw] if settings.drop_duplicates else []
    if not batch.long or batch.long.is_last:
        encoded = [np.append(tokens, np.uint32(tokenizer.end_of_text_id)) for tokens in encoded]
    return EncodedBatch(
        batch,
        np.concatenate([np.empty(0, dtype=np.uint32), *encoded]),
        np.array([len(tokens) for tokens in encoded], dtype=np.int64),
        np.array([len(text) for text in raw], dtype=np.int64),
        np.array(keys, dtype=np.uint64),
        digests,
        empty,
    )


def texts_of(batch: Batch, settings: PreparationSettings) -> list[str]:
    """Return the texts of a batch that are not empty; raises DataError as `encode_batch`."""
    return [text for number, item in enumerate(batch.items) if (text := _text_of(batch, number, item, settings))]


def without_surrogates(text: str) -> str:
    """Return the text with each unpaired surrogate, which JSON can hold but UTF-8 cannot, as U+FFFD (as tiktoken)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_blank(batch: Batch, item: bytes | str | None) -> bool:
    """Return whether an item is a blank line between the lines of a .jsonl, and so not a document."""
    return batch.file.kind == "jsonl" and isinstance(item, bytes) and not item.strip()


def _text_of(batch: Batch, number: int, item: bytes | str | None, settings: PreparationSettings) -> str:
    """Return an item's text, "" where it is empty or null; raises DataError."""
    if not isinstance(item, bytes):
        return item or ""
    if _is_blank(batch, item):
        return ""
    place = f"{batch.file.shown}:{batch.first_item + number + 1}"
    try:
        value = json.loads(item.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: found a byte that is not UTF-8 at {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: found no JSON ({error}), wanted an object in each line") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: found {type(value).__name__}, wanted an object with the key {settings.text_field}")
    if settings.text_field not in value:
        keys = ", ".join(map(str, value))[:200]
        raise DataError(f"{place}: found keys {keys}, wanted {settings.text_field} (--text-field)")
    text = value[settings.text_field]
    if not isinstance(text, str | None):
        raise DataError(f"{place}: found {settings.text_field} of type {type(text).__name__}, wanted a string")
    return without_surrogates(text or "")
