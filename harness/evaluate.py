"""Losses of a model on given tokens, one for every sequence."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.loss import token_losses


@torch.no_grad()
def sequence_losses(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> NDArray[np.float64]:
    """Give each sequence's mean cross-entropy in nats per token, float64, in the order of `batches`.

    `batches` gives tokens and targets (B, T); the model is put into evaluation mode (no dropout) for the time being.
    Averages are taken in float64, so how sequences are batched matters only through the forward pass's rounding.
    The device is waited for once, at the end.
    """
    was_training = model.training
    model.eval()
    try:
        losses = [
            token_losses(model(tokens.to(device)), targets.to(device)).mean(dim=1, dtype=_mean_dtype(device))
            for tokens, targets in batches
        ]
    finally:
        model.train(was_training)
    return torch.cat(losses).cpu().double().numpy() if losses else np.empty(0)


def _mean_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
