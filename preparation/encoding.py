"""From a batch of raw items to tokens; called in worker threads, so nothing here has a state."""

import json
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.run.errors import DataError
from harness.tokens.tokenizer import END_OF_TEXT_ID, gpt2_encoding
from preparation.readers import Batch
from preparation.settings import Settings, content_digest

# The encoding's regular expression overflows its stack on a million white-space characters in a row before a word.
# All but the last of them are one word to GPT-2, so a text can be cut before the last. (Python's \s has four control
# characters that are no white space to GPT-2.)
SPACE = r"[^\S\x1c-\x1f]"
LONGEST_SPACE = 100_000
LONG_SPACE = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONGEST_SPACE},}}+")


@dataclass(frozen=True)
class EncodedBatch:
    """A batch's documents: `tokens` of all, document ends included, and for each the count of tokens and UTF-8 bytes.

    `split_keys` and `contents` (digests; empty unless duplicates are dropped) have an entry for each document too.
    """

    batch: Batch
    tokens: NDArray[np.uint16]
    counts: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    split_keys: NDArray[np.uint64]
    contents: list[bytes]
    empty_documents: int


def encode_batch(batch: Batch, settings: Settings) -> EncodedBatch:
    """Tokenise a batch; raises DataError naming the first line or row that is no document."""
    texts = [text for number, item in enumerate(batch.items) if (text := _text_of(batch, number, item, settings))]
    empty = sum(1 for item in batch.items if not _is_blank(batch, item)) - len(texts)
    raw = [text.encode() for text in texts]
    encoded = [encode(text) for text in texts]
    if batch.long:
        keys, contents = [batch.long.split_key], [batch.long.content]
    else:
        keys = [settings.split_key([text]) for text in raw]
        contents = [content_digest([text]) for text in raw] if settings.drop_duplicates else []
    if not batch.long or batch.long.is_last:
        encoded = [np.append(tokens, np.uint16(END_OF_TEXT_ID)) for tokens in encoded]
    return EncodedBatch(
        batch,
        np.concatenate([np.empty(0, dtype=np.uint16), *encoded]),
        np.array([len(tokens) for tokens in encoded], dtype=np.int64),
        np.array([len(text) for text in raw], dtype=np.int64),
        np.array(keys, dtype=np.uint64),
        contents,
        empty,
    )


def encode(text: str) -> NDArray[np.uint16]:
    """Give a text's GPT-2 tokens; a written <|endoftext|> is text like any other. No lock is held meanwhile."""
    encoding = gpt2_encoding()
    cuts = []
    if len(text) > LONGEST_SPACE:
        cuts = [match.end() - 1 for match in LONG_SPACE.finditer(text) if match.end() < len(text)]
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    tokens = [encoding.encode_to_numpy(part, disallowed_special=()).astype(np.uint16) for part in parts]
    return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)


def without_surrogates(text: str) -> str:
    """Give a text that UTF-8 can hold: half a pair of surrogates, which JSON can, becomes U+FFFD as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_blank(batch: Batch, item: bytes | str | None) -> bool:
    """Whether an item is no document at all: a line of white space between the lines of a .jsonl."""
    return batch.file.kind == "jsonl" and isinstance(item, bytes) and not item.strip()


def _text_of(batch: Batch, number: int, item: bytes | str | None, settings: Settings) -> str:
    """Give an item's text, "" where it is empty or null; raises DataError."""
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
