"""The optimizers: one row for each, with how it is made and what it keeps.

torch is imported where it is used, because plans read this table without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.run.config import TrainConfig
from harness.run.model_size import ParameterCount

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer."""

    make: Callable[[nn.Module, TrainConfig, torch.device], Optimizer]
    """Makes it for every parameter of a model that lies on the device."""
    state_bytes: Callable[[ParameterCount], int]
    """Bytes that it keeps for a model of so many parameters, on the device and in a checkpoint."""


def _adamw(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Make AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with PyTorch's betas and epsilon."""
    from torch.optim import AdamW

    groups = decayed_and_not(model, config.weight_decay)
    # The fused kernel can skip a step on the device; MPS has none that can.
    return AdamW(groups, lr=config.learning_rate, fused=device.type != "mps")


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, state_bytes=lambda parameters: 8 * parameters.total),  # two float32 moments
}


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Make the configured optimizer for every parameter of the model."""
    return OPTIMIZERS[config.optimizer].make(model, config, device)


def decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Put matrices and embeddings, which are decayed, into one group and vectors (biases, norms) into another.

    Decaying only what multiplies activations is the custom since GPT-3.
    """
    parameters = list(model.parameters())
    return [
        {
            "params": [value for value in parameters if (value.ndim >= 2) == is_decayed],
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
