"""`model.safetensors` of another harness that uses the same names: the shape is read off the tensors."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.run.config import ModelConfig, config_from
from harness.run.errors import CheckpointError, ConfigError

HEAD_SIZE = 64  # channels a head, as in every GPT-2
BLOCK = re.compile(r"trf_blocks\.(\d+)\.")
TOKEN_EMBEDDING, POSITION_EMBEDDING, HEAD = "tok_emb.weight", "pos_emb.weight", "out_head.weight"


def config_of(tensors: Mapping[str, Tensor], n_heads: int | None, source: object) -> ModelConfig:
    """Return the configuration whose model has these tensors; raises CheckpointError or ConfigError.

    `n_heads` leaves no trace in the tensors: None takes one head for every 64 channels. Nor does dropout, which is
    given as 0. The head is tied where it is left out, or equal to the token embedding to the bit.
    """
    embedding = tensors.get(TOKEN_EMBEDDING, tensors.get(HEAD))
    positions = tensors.get(POSITION_EMBEDDING)
    blocks = {int(match[1]) for name in tensors if (match := BLOCK.match(name))}
    if embedding is None or positions is None or embedding.dim() != 2 or positions.dim() != 2 or not blocks:
        wanted = f"{TOKEN_EMBEDDING}, {POSITION_EMBEDDING} and trf_blocks"
        hint = " (for a Hugging Face model, give its folder)" if any("wte" in name for name in tensors) else ""
        raise CheckpointError(f"{source}: found {_some(tensors)}, wanted {wanted}{hint}")
    vocab_size, width = embedding.shape
    if n_heads is None and width % HEAD_SIZE:
        raise ConfigError(f"--n-heads: missing, wanted it because {HEAD_SIZE} channels a head do not divide {width}")
    head = tensors.get(HEAD)
    shape = {
        "vocab_size": vocab_size,
        "context_length": positions.shape[0],
        "emb_dim": width,
        "n_heads": n_heads or width // HEAD_SIZE,
        "n_layers": len(blocks),
        "drop_rate": 0.0,
        "qkv_bias": any(name.endswith("att.W_query.bias") for name in tensors),
        "tie_weights": head is None or torch.equal(head, embedding),
    }
    return config_from(ModelConfig, shape, source if isinstance(source, str) else str(source))


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(name[:60] for name in tensors)
    return f"tensors {names[:3]}{' and others' if len(names) > 3 else ''}" if names else "no tensors"
