"""Turns a batch of raw items into tokens. Worker threads call it, so nothing here keeps state."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.tokens.tokenizer import Tokenizer
from preparation.opening import BadDocumentError
from preparation.readers import Batch
from preparation.records import Item, document_in
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
    bad_documents: list[str]
    """Why each document that was skipped could not be read."""


def encode_batch(batch: Batch, settings: PreparationSettings, tokenizer: Tokenizer) -> EncodedBatch:
    """Tokenise a batch; raises BadDocumentError for the first item that is no document, unless they are skipped."""
    texts, bad = texts_of(batch, settings)
    empty = texts.count("") - sum(_is_blank(batch, item) for item in batch.items)
    texts = [text for text in texts if text]
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
        bad,
    )


def texts_of(batch: Batch, settings: PreparationSettings) -> tuple[list[str], list[str]]:
    """Return the texts of a batch, "" for what is empty, and why others could not be read, where they are skipped.

    Raises BadDocumentError where they are not.
    """
    texts, bad = [], []
    for number, item in enumerate(batch.items):
        try:
            texts.append(_text_of(batch, number, item, settings.text_field))
        except BadDocumentError as error:
            if not settings.skip_bad:
                raise
            bad.append(error.lines[0])
    return texts, bad


def _is_blank(batch: Batch, item: Item) -> bool:
    """Return whether an item is a blank line between the lines of a .jsonl, and so not a document."""
    return batch.file.kind == "jsonl" and isinstance(item, bytes) and not item.strip()


def _text_of(batch: Batch, number: int, item: Item, text_field: str) -> str:
    """Return an item's text, "" where it is empty or null; raises BadDocumentError."""
    if isinstance(item, BadDocumentError):
        raise item
    if _is_blank(batch, item):
        return ""
    if isinstance(item, bytes):
        return document_in(item, f"{batch.file.shown}:{batch.first_item + number + 1}", text_field)
    return item or ""
