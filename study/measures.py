"""What the losses of several runs are measured by: nats on the same test tokens, or bits on the same test documents.

Losses per token compare on the same tokens alone. Runs of different tokenizers compare by what the same text cost
them: the documents that every run predicted whole, from their first byte to the document end, wherever windows of
`context_length` tokens began. The unit is then bits per byte of UTF-8: the sum of nats over ln 2 and over bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from harness.run.errors import ConfigError
from harness.run.score import Score
from study.statistics import Floats

NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Measured:
    """One run's losses on what all runs were scored on: each test sequence's, or in bits per byte each document's."""

    unit: str
    loss: float
    parts: Floats
    """Loss of each part of the test set, (N,)."""
    clusters: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The document of each part, (N,)."""
    weights: Floats | None = None
    """How much each part counts: bytes of documents; None where all count alike."""
    bytes_per_token: float | None = None
    """Of the test documents in this run's tokens; known where the unit is bits per byte."""

    @property
    def per_nat(self) -> float:
        """What a nat per token is worth in the unit, on this text."""
        return 1.0 if self.bytes_per_token is None else bits_per_nat(self.bytes_per_token)


def bits_per_nat(bytes_per_token: float) -> float:
    """Return what a nat per token is in bits per byte, of text whose tokens stand for so many bytes."""
    return 1 / (math.log(2) * bytes_per_token)


def measure(scores: Mapping[str, Sequence[Score]]) -> dict[str, tuple[Score, Measured]]:
    """Return of each run the score that counts and its losses, by the run's name, on what all were scored on.

    Raises ConfigError where that is nothing.
    """
    by_tokens = {run: {score.tokens_sha256: score for score in found} for run, found in scores.items()}
    shared = set.intersection(*map(set, by_tokens.values())) if by_tokens else set()
    if shared:
        first = next(iter(by_tokens.values()))
        chosen = max(shared, key=lambda sha: (first[sha].tokens, sha))
        return {run: (found[chosen], in_nats(found[chosen])) for run, found in by_tokens.items()}
    if not scores:
        return {}
    longest = {
        run: max(found, key=lambda score: (score.tokens, score.tokens_sha256)) for run, found in scores.items()
    }
    tokenizers = {score.tokenizer for score in longest.values()}
    if len(tokenizers - {None}) > 1:
        return in_bits(longest)
    raise ConfigError(
        *(f"{run}: scored on {', '.join(one.test_in_words() for one in found)}" for run, found in scores.items()),
        "these runs were not all scored on the same test tokens, so their losses cannot be compared"
        + (" (scores of an earlier version name no tokenizer: score anew)" if None in tokenizers else ""),
    )


def in_nats(score: Score) -> Measured:
    """Return a score as it is, in nats per token."""
    arrays = score.read_arrays()
    loss = math.nan if score.loss is None else score.loss
    return Measured(NATS, loss, arrays.sequence_losses, arrays.sequence_documents)


def in_bits(scores: Mapping[str, Score]) -> dict[str, tuple[Score, Measured]]:
    """Return scores in bits per byte on the documents that all of them hold; raises ConfigError where there are none.

    A text that occurs more than once counts where it occurs first.
    """
    documents = {run: score.read_arrays().documents for run, score in scores.items()}
    lacking = [
        f"{run}: scored on {scores[run].test_in_words()}, found no whole document, wanted some to compare tokenizers "
        "on (more --batches, or text in more files)"
        for run, found in documents.items()
        if len(found.keys) == 0
    ]
    if lacking:
        raise ConfigError(*lacking)
    shared = reduce(np.intersect1d, (found.keys for found in documents.values()))
    if len(shared) == 0:
        tests = "; ".join(f"{run} on {score.test_in_words()}" for run, score in scores.items())
        raise ConfigError(
            "these runs have no test document in common, so they cannot be compared across tokenizers, wanted "
            f"datasets that were prepared from one text with the same options: {tests}"
        )
    measured = {}
    for run, found in documents.items():
        places = np.intersect1d(found.keys, shared, return_indices=True)[1]
        num_bytes = found.num_bytes[places].astype(np.float64)
        bits = found.nats[places] / math.log(2)
        measured[run] = Measured(
            unit=BITS,
            loss=float(bits.sum() / num_bytes.sum()),
            parts=bits / num_bytes,
            clusters=np.arange(len(places)),
            weights=num_bytes,
            bytes_per_token=float(num_bytes.sum() / found.tokens[places].sum()),
        )
    return {run: (scores[run], item) for run, item in measured.items()}
