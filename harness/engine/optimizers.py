"""The optimizers: one row for each, with how it is made and what it keeps.

torch is imported where it is used, because plans read this table without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """Make AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    from torch.optim import AdamW

    return AdamW(decayed_and_not(model.parameters(), config), **adam_options(config, device))


def _muon(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Make Muon for the matrices of the blocks, and AdamW for embeddings, output head, biases and norms."""
    from harness.engine.muon import Muon, hidden_matrices

    hidden = hidden_matrices(model)
    rest = set(model.parameters()) - set(hidden)
    groups = decayed_and_not([value for value in model.parameters() if value in rest], config)
    ratio = config.muon_learning_rate / config.learning_rate
    muon = {"params": hidden, "weight_decay": config.weight_decay, "is_muon": True, "lr_ratio": ratio}
    return Muon([*groups, muon], **adam_options(config, device))


# In float32, AdamW keeps two moments of every parameter and Muon one of its matrices.
OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, state_bytes=lambda parameters: 8 * parameters.total),
    "muon": OptimizerKind(_muon, state_bytes=lambda parameters: 8 * parameters.total - 4 * parameters.block_matrices),
}


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Make the configured optimizer for every parameter of the model."""
    return OPTIMIZERS[config.optimizer].make(model, config, device)


def adam_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Return AdamW's arguments besides the parameters."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "fused": device.type != "mps",  # the fused kernel can skip a step on the device; MPS has none that can
    }


def decayed_and_not(parameters: Iterable[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Put matrices and embeddings, which are decayed, into one group and vectors (biases, norms) into another.

    Decaying only what multiplies activations is the custom since GPT-3; with decay_all the vectors are decayed too.
    """
    parameters = list(parameters)
    return [
        {
            "params": [value for value in parameters if (value.ndim >= 2) == is_matrix],
            "weight_decay": config.weight_decay if is_matrix or config.decay_all else 0.0,
        }
        for is_matrix in (True, False)
    ]
