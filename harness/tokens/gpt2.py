"""The GPT-2 encoding, built from the merges file in assets/, so tokenising never needs a network."""

import functools
import hashlib
import re
from collections.abc import Iterator

import numpy as np
import tiktoken
from numpy.typing import NDArray

from harness.run.errors import DataError
from harness.run.files import ASSETS

MERGES = ASSETS / "gpt2" / "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

# GPT-2 splits text by this pattern before merging: contractions, words, numbers, other characters, white space
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", released code).
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken's regular expression overflows its stack on a million white-space characters in a row before a word.
# GPT-2 takes all but the last of them as one word, so cutting the text before the last changes no token. (Python's
# \s also matches four control characters that GPT-2 does not count as white space.)
SPACE = r"[^\S\x1c-\x1f]"
LONGEST_SPACE = 100_000
LONG_SPACE = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONGEST_SPACE},}}+")


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return the GPT-2 encoding (50,257 ids); raises DataError if the merges file is missing or changed."""
    raw = MERGES.read_bytes() if MERGES.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != MERGES_SHA256:
        raise DataError(f"{MERGES}: found a missing or changed file, wanted GPT-2's merges (SHA-256 {MERGES_SHA256})")
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=dict(_ranked_tokens(raw.decode())),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
    )


def encode_ordinary(text: str) -> NDArray[np.uint32]:
    """Return a text's GPT-2 tokens, treating a written <|endoftext|> as ordinary text; releases the GIL."""
    encoding = gpt2_encoding()
    cuts = []
    if len(text) > LONGEST_SPACE:
        cuts = [match.end() - 1 for match in LONG_SPACE.finditer(text) if match.end() < len(text)]
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    tokens = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)


def _ranked_tokens(merges: str) -> Iterator[tuple[bytes, int]]:
    """Yield every token's bytes with its rank: the 256 single bytes first, then the merges in file order."""
    byte_of = {character: byte for byte, character in _byte_alphabet()}
    rank = 0
    for byte, _ in _byte_alphabet():
        yield bytes([byte]), rank
        rank += 1
    for line in merges.splitlines()[1:]:  # the first line is a version
        yield bytes(byte_of[character] for character in line.replace(" ", "")), rank
        rank += 1


def _byte_alphabet() -> list[tuple[int, str]]:
    """Return (byte, printable character that stands for it in the merges file) in rank order.

    Bytes that print as themselves in Latin-1 come first; the others are shifted to code points from 256 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in printable]
    return [(byte, chr(byte)) for byte in printable] + [(byte, chr(256 + n)) for n, byte in enumerate(others)]


def printable_bytes() -> dict[int, str]:
    """Return the printable character that stands for each byte in byte-level vocabularies."""
    return dict(_byte_alphabet())


def printable_vocabulary() -> dict[str, int]:
    """Return token -> id for all GPT-2 ids, with tokens spelled in the merges file's printable characters."""
    character_of = printable_bytes()
    encoding = gpt2_encoding()
    tokens = ("".join(character_of[b] for b in encoding.decode_single_token_bytes(n)) for n in range(END_OF_TEXT_ID))
    return {**{token: number for number, token in enumerate(tokens)}, END_OF_TEXT: END_OF_TEXT_ID}


@functools.cache
def bytes_per_token() -> tuple[int, ...]:
    """Return the length in UTF-8 bytes of every GPT-2 id; a document end counts 0."""
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(END_OF_TEXT_ID)]
    return (*lengths, 0)
