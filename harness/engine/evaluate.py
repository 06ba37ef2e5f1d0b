"""Losses of a model on given tokens: by sequence, by position, and by how often training saw the target."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.engine.loss import LanguageModel, token_losses

Floats = NDArray[np.float64]
MOST_LOGITS_BYTES = 2**31  # held at once
BYTES_PER_LOGIT = 4
PER_MILLION_BOUNDS = (0.0, 1.0, 10.0, 100.0, 1000.0, 10_000.0)


@torch.no_grad()
def token_loss_batches(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[Tensor]:
    """Yield every token's cross-entropy in nats, float32 (B, T) on the device, batch by batch.

    `batches` gives tokens and targets (B, T); the model is put into evaluation mode (no dropout) for the time being.
    Nothing here waits for the device.
    """
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            yield torch.cat(
                [
                    token_losses(model(tokens.to(device)), targets.to(device))
                    for tokens, targets in _parts(model, *batch)
                ]
            )
    finally:
        model.train(was_training)


def _parts(model: nn.Module, tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into parts whose logits are not too large to be held in float32; most batches are one part."""
    vocab_size = cast(LanguageModel, model).head_weight().shape[0]
    rows = max(1, MOST_LOGITS_BYTES // (tokens.shape[1] * vocab_size * BYTES_PER_LOGIT))
    return zip(torch.split(tokens, rows), torch.split(targets, rows), strict=True)


def sequence_losses(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Floats:
    """Return each sequence's mean cross-entropy in nats per token, float64, in the order of `batches`.

    Averages are taken in float64, so how sequences are batched matters only through the forward pass's rounding.
    The device is waited for once, at the end.
    """
    mean_dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    losses = [batch.mean(dim=1, dtype=mean_dtype) for batch in token_loss_batches(model, batches, device)]
    return torch.cat(losses).cpu().double().numpy() if losses else np.empty(0)


class LossTally:
    """Adds up token losses in float64: by sequence, by position in the sequence, by target id, and by document."""

    def __init__(self, context_length: int, vocab_size: int, document_end: int | None = None) -> None:
        """Take what batches will be like; `document_end` is the id that ends a document, None where none is known."""
        self._sequences: list[Floats] = []
        self._by_position = np.zeros(context_length)
        self._by_target = np.zeros(vocab_size)
        self._target_count = np.zeros(vocab_size, dtype=np.int64)
        self._document_end = document_end
        self._documents: list[Floats] = []
        self._unfinished = 0.0
        """Losses of the document that has not ended yet."""

    def add(self, losses: Floats, targets: NDArray[np.int64]) -> None:
        """Take a batch: losses in nats and target ids, each (B, T)."""
        self._sequences.append(losses.mean(axis=1))
        self._by_position += losses.sum(axis=0)
        size = len(self._by_target)
        self._by_target += np.bincount(targets.ravel(), weights=losses.ravel(), minlength=size)
        self._target_count += np.bincount(targets.ravel(), minlength=size)
        sums = np.cumsum(losses, dtype=np.float64)
        ended = sums[targets.ravel() == self._document_end] if self._document_end is not None else sums[:0]
        self._documents.append(np.diff(ended, prepend=-self._unfinished))
        self._unfinished = float(sums[-1] - ended[-1]) if len(ended) else self._unfinished + float(sums[-1])

    def sequence_losses(self) -> Floats:
        """Return each sequence's mean loss in nats per token, (N,)."""
        return np.concatenate(self._sequences)

    def document_losses(self) -> Floats:
        """Return the summed loss in nats of each document that has ended, with its end, in the order of targets.

        The first may have begun before the targets.
        """
        return np.concatenate(self._documents)

    def by_position(self) -> list["Bucket"]:
        """Return the mean loss in buckets of positions that double in width: 0, 1, 2-3, 4-7, ..."""
        sequences = sum(map(len, self._sequences))
        first, buckets = 0, []
        while first < len(self._by_position):
            end = min(max(1, 2 * first), len(self._by_position))
            total = float(self._by_position[first:end].sum())
            buckets.append(Bucket(float(first), float(end), sequences * (end - first), total))
            first = end
        return buckets

    def by_frequency(self, training_count: NDArray[np.int64]) -> list["Bucket"]:
        """Return the mean loss in buckets of how often the target occurs in a million training tokens.

        `training_count` (V,) counts every id in the training tokens. Empty buckets are left out.
        """
        per_million = training_count / max(1, int(training_count.sum())) * 1e6
        bounds = (*PER_MILLION_BOUNDS, np.inf)
        buckets = []
        for low, high in pairwise(bounds):
            inside = (per_million >= low) & (per_million < high)
            count, total = int(self._target_count[inside].sum()), float(self._by_target[inside].sum())
            if count:
                buckets.append(Bucket(low, high, count, total))
        return buckets


@dataclass(frozen=True)
class Bucket:
    """Tokens that have something in common, which lies in [low, high)."""

    low: float
    high: float
    tokens: int
    total: float
    """Sum of their losses in nats."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.total / self.tokens
