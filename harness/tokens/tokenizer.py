"""The tokenizers that a dataset can have: GPT-2's, plain bytes, or any byte-level one with a tokenizer.json.

A dataset's folder holds its tokenizer.json (GPT-2's ships with the project and needs none), its token files name the
SHA-256 of that file, and a run keeps a copy. All of them give every text back as it was, so a token stands for a
known number of bytes, and losses per byte compare between tokenizers.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from harness.run.errors import ConfigError, DataError, HarnessError
from harness.tokens.gpt2 import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    bytes_per_token,
    encode_ordinary,
    gpt2_encoding,
    printable_bytes,
)
from harness.tokens.lossless import what_loses_text
from harness.tokens.token_files import TokenFile

GPT2 = "gpt2"
BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
MAX_FILE_BYTES = 2**26
# What tokenizers of the field call the token that ends a document, in the order in which they are looked for.
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>")
PUBLISHED_IN_GPT2 = ("fineweb-gpt2-tokens", "fineweb-edu-gpt2-tokens")
"""Hub datasets whose files have no metadata, and are documented to hold GPT-2's tokens."""


class Tokenizer(ABC):
    """Turns text into ids and back."""

    name: str
    """"gpt2", "bytes", or "bpe" for any other."""
    vocab_size: int
    """One more than the highest id."""
    end_of_text_id: int
    """The id that ends a document; no text is encoded as it."""
    end_of_text: str = END_OF_TEXT
    """How that token is written."""
    document: str | None = None
    """The content of its tokenizer.json; None for GPT-2's."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each text's ids, (T,); a control token written in a text is ordinary text. Releases the GIL."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """Return how many bytes of UTF-8 every id stands for, (vocab_size,); 0 for a control token."""

    def encode(self, text: str) -> list[int]:
        """Return one text's ids; what is no Unicode in it, as bytes of a command line may be, counts as U+FFFD."""
        unicode = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [int(number) for number in self.encode_batch([unicode])[0]]

    @property
    def sha256(self) -> str | None:
        """SHA-256 (hex) of its tokenizer.json; None for GPT-2's."""
        return None if self.document is None else hashlib.sha256(self.document.encode()).hexdigest()

    @property
    def identity(self) -> str:
        """ "gpt2", "bytes", or the SHA-256 of any other: equal for two that encode every text alike."""
        return self.name if self.name in (GPT2, BYTES) else str(self.sha256)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type of a token file that holds all ids."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def __str__(self) -> str:
        return self.identity if self.name in (GPT2, BYTES) else f"{self.name} {self.identity[:12]}"


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's, by tiktoken, which is twice as fast as the general library."""

    name, vocab_size, end_of_text_id = GPT2, VOCAB_SIZE, END_OF_TEXT_ID

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each text's ids."""
        return [encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return gpt2_encoding().decode(list(ids))

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return how many bytes every id stands for."""
        return np.array(bytes_per_token(), dtype=np.int64)


class ByteTokenizer(Tokenizer):
    """A byte of UTF-8 is a token, its value the id; 256 ends a document."""

    name, vocab_size, end_of_text_id = BYTES, 257, 256

    def __init__(self) -> None:
        library = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in printable_bytes().items()}, []))
        self.document = _byte_level(library, use_regex=False).to_str(pretty=True)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each text's bytes."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some bytes."""
        text = b"".join(bytes([number]) if number < 256 else END_OF_TEXT.encode() for number in ids)
        return text.decode("utf-8", "replace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return 1 for every byte."""
        return np.array([1] * 256 + [0])


class LibraryTokenizer(Tokenizer):
    """Any byte-level tokenizer of the `tokenizers` library."""

    name = "bpe"

    def __init__(self, document: str, place: object) -> None:
        """Read the content of a tokenizer.json; raises DataError, naming `place`, where it cannot be used."""
        self.document, self._place = document, place
        try:
            lossy = what_loses_text(json.loads(document), set(printable_bytes().values()))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{place}: cannot be used as a tokenizer ({error!r:.200})") from None
        if lossy is not None:
            raise DataError(f"{place}: found {lossy}, wanted a byte-level tokenizer that gives every text back")
        with _library_errors(place):
            self._library = tokenizers.Tokenizer.from_str(document)
            splits = _splits_at_spaces(self._library.pre_tokenizer)
        if not splits:
            raise DataError(f"{place}: found words that go on over a space or a line, wanted some that end there")
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        self._added = self._library.get_added_tokens_decoder()
        self.end_of_text, self.end_of_text_id = self._find_document_end(place)
        self.vocab_size = 1 + max(self._library.get_vocab().values())

    def _find_document_end(self, place: object) -> tuple[str, int]:
        ids = {token.content: number for number, token in self._added.items() if token.special}
        for name in DOCUMENT_ENDS:
            if name in ids:
                return name, ids[name]
        raise DataError(f"{place}: found no token that ends a document, wanted one of {', '.join(DOCUMENT_ENDS)}")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each text's ids."""
        with _library_errors(self._place):  # a pattern may give up on a text
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, dtype=np.uint32) for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return str(self._library.decode(list(ids), skip_special_tokens=False))

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return how many bytes every id stands for; an id that nothing has counts 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, number in self._library.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)  # spelled with one printable character for each byte
        for number, added in self._added.items():
            lengths[number] = 0 if added.special else len(added.content.encode())
        return lengths


@contextmanager
def _library_errors(place: object) -> Iterator[None]:
    """Turn what the library raises, where it panics no Exception, into a DataError in one line."""
    try:
        yield
    except (HarnessError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(f"{place}: cannot be used as a tokenizer ({str(error)[:200]})") from None


def _splits_at_spaces(splitter: Any) -> bool:
    """Return whether a word ends before a space and a line end, where long texts are cut."""
    return {2, 5} <= {start for _, (start, _) in splitter.pre_tokenize_str("ab cd\nef")}


def _byte_level(library: Any, use_regex: bool) -> Any:
    """Complete a tokenizer as GPT-2's is: byte-level, with an <|endoftext|> after all other ids."""
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return library


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer."""
    return Gpt2Tokenizer()


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose tokens are bytes."""
    return ByteTokenizer()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocab_size` ids from texts (Sennrich et al. 2016), split into words as GPT-2's is.

    The ids are the 256 bytes, the merges in their order, and <|endoftext|>. A small text may give fewer merges. The
    same texts in any order give the same tokenizer, on any number of cores.
    """
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(printable_bytes().values())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=letters, show_progress=False)
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(_byte_level(library, use_regex=True).to_str(pretty=True), "trained")


def read_tokenizer(path: Path, wanted_sha256: str | None = None) -> Tokenizer:
    """Read a tokenizer.json; raises DataError where it is missing, has another SHA-256, or cannot be used."""
    if not path.is_file():
        raise DataError(f"{path}: found no such file, wanted a tokenizer.json")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{path}: found {path.stat().st_size:,} bytes, wanted a tokenizer of at most {MAX_FILE_BYTES:,}"
        )
    try:
        document = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}: cannot be read as a tokenizer (not UTF-8)") from None
    found = byte_tokenizer() if document == byte_tokenizer().document else LibraryTokenizer(document, path)
    if wanted_sha256 is not None and found.sha256 != wanted_sha256:
        raise DataError(
            f"{path}: found SHA-256 {found.sha256}, wanted {wanted_sha256}, with which the tokens were made"
        )
    return found


def tokenizer_of_tokens(file: TokenFile) -> Tokenizer | None:
    """Return the tokenizer that a token file was made with; None where neither it nor its format says."""
    name = file.metadata.get("tokenizer")
    if name is None:
        known = file.is_llmc or file.path.parent.name in PUBLISHED_IN_GPT2
        return gpt2_tokenizer() if known else None
    if name == GPT2:
        return gpt2_tokenizer()
    if (sha256 := file.metadata.get("tokenizer_sha256")) is None:
        return None
    return read_tokenizer(file.path.with_name(TOKENIZER_FILE), sha256)


def tokenizer_of_model(path: Path, vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer of a model: the file `path` if it is there, else GPT-2's; None if the ids are too few.

    Raises ConfigError for a tokenizer.json with more ids than the model.
    """
    if not path.is_file():
        return gpt2_tokenizer() if vocab_size >= VOCAB_SIZE else None
    found = read_tokenizer(path)
    require_room(found, vocab_size)
    return found


def require_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model, as `tokenizer_of_model`; raises ConfigError where there is none."""
    found = tokenizer_of_model(path, vocab_size)
    if found is None:
        raise ConfigError(
            f"model.json: vocab_size: found {vocab_size} and no {path}, wanted at least {VOCAB_SIZE} ids to read and "
            "write text with the GPT-2 encoding, or that file"
        )
    return found


def require_room(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError where a model has fewer ids than a tokenizer."""
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.json: vocab_size: found {vocab_size}, wanted at least the {tokenizer.vocab_size:,} ids of the "
            f"dataset's tokenizer ({tokenizer})"
        )
