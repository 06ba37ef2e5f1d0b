"""Which tokenizer a dataset gets: a known one, a file's, one of the Hub, or one learned from the source itself."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from huggingface_hub import hf_hub_download

from harness.run.errors import ConfigError, DataError, hub_errors
from harness.tokens.tokenizer import (
    BYTES,
    GPT2,
    TOKENIZER_FILE,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from preparation.encoding import texts_of
from preparation.readers import read_batches
from preparation.selection import PreparationSettings
from preparation.sources import SourceFile

TRAIN = "train:"
HUB = "hf:"
SMALLEST, LARGEST = 257, 2**20
SAMPLE_BYTES = 2**26
"""Text from which a tokenizer is learned: the source's first 64 MiB, without the documents that a hash holds out."""


def trained_vocab_size(words: str) -> int | None:
    """Return N of "train:N", None for other words; raises ConfigError where N is out of range."""
    if not words.startswith(TRAIN):
        return None
    number = words.removeprefix(TRAIN)
    if not (number.isascii() and number.isdigit()) or not SMALLEST <= int(number[:10]) <= LARGEST:
        raise ConfigError(f"--tokenizer: found {words[:80]!r}, wanted {TRAIN}N, N ids from {SMALLEST} to {LARGEST:,}")
    return int(number)


def known_tokenizer(words: str) -> Tokenizer | None:
    """Return the tokenizer that `words` name, None for "train:N"; raises ConfigError or DataError."""
    if trained_vocab_size(words) is not None:
        return None
    if words in (GPT2, BYTES):
        return gpt2_tokenizer() if words == GPT2 else byte_tokenizer()
    if words.startswith(HUB):
        with hub_errors(f"--tokenizer: {words} cannot be had from the Hub", DataError):
            return read_tokenizer(Path(hf_hub_download(words.removeprefix(HUB), TOKENIZER_FILE)))
    if not words.endswith(".json"):
        raise ConfigError(
            f"--tokenizer: found {words[:80]!r}, wanted {GPT2}, {BYTES}, {TRAIN}N, the name of a tokenizer.json or "
            f"{HUB}OWNER/NAME"
        )
    return read_tokenizer(Path(words))


class Opener(Protocol):
    """Makes a source file readable, downloading it where it is on the Hub."""

    def __call__(self, source: SourceFile) -> AbstractContextManager[SourceFile]:
        """Return a context that gives the file with its path, and deletes a download unless an error ends it."""


class _EnoughError(Exception):
    """Ends reading inside a download, so that the download is kept for the reading that follows."""


def learn_tokenizer(
    settings: PreparationSettings, sources: Sequence[SourceFile], opened: Opener, scratch: Path
) -> Tokenizer:
    """Train the tokenizer that `settings` ask for on the beginning of the source, and say on how much of it."""
    size, seen = trained_vocab_size(settings.tokenizer), 0
    assert size is not None

    def sample() -> Iterator[str]:
        nonlocal seen
        try:
            for source in sources:
                with opened(source) as file:
                    for text in _train_texts(file, settings, scratch):
                        if seen >= SAMPLE_BYTES:
                            raise _EnoughError
                        seen += len(text.encode())
                        yield text
        except _EnoughError:
            pass

    tokenizer = train_tokenizer(sample(), size)
    print(f"Tokenizer: {tokenizer.vocab_size:,} ids learned from {seen / 1e6:,.1f} MB of text", flush=True)
    return tokenizer


def _train_texts(file: SourceFile, settings: PreparationSettings, scratch: Path) -> Iterator[str]:
    """Yield the texts of a file, or the pieces of a long one, that are not held out by their hash."""
    for batch in read_batches(file, settings, 0, scratch):
        for text in filter(None, texts_of(batch, settings)[0]):
            key = batch.long.split_key if batch.long else settings.split_key([text.encode()])
            if settings.validation != "random" or not settings.is_held_out(key):
                yield text
