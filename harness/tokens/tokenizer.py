"""The GPT-2 encoding, built from the merges file in assets/, so tokenising never needs a network."""

import functools
import hashlib
from collections.abc import Iterator

import tiktoken

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


def printable_vocabulary() -> dict[str, int]:
    """Return token -> id for all GPT-2 ids, with tokens spelled in the merges file's printable characters."""
    character_of = dict(_byte_alphabet())
    encoding = gpt2_encoding()
    tokens = ("".join(character_of[b] for b in encoding.decode_single_token_bytes(n)) for n in range(END_OF_TEXT_ID))
    return {**{token: number for number, token in enumerate(tokens)}, END_OF_TEXT: END_OF_TEXT_ID}


@functools.cache
def bytes_per_token() -> tuple[int, ...]:
    """Return the length in UTF-8 bytes of every GPT-2 id; a document end counts 0."""
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(END_OF_TEXT_ID)]
    return (*lengths, 0)
