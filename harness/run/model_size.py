"""Parameters and floating-point operations per token of a model, computed from its configuration."""

from dataclasses import dataclass

from harness.run.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters: in total, and without the two embeddings and the output head."""

    total: int
    without_embeddings: int
    block_matrices: int
    """Weights in the matrices of all blocks."""


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count a model's parameters; a shared matrix counts once."""
    width = model.emb_dim
    attention = 4 * width * width + width + (3 * width if model.qkv_bias else 0)
    feed_forward = 8 * width * width + 5 * width
    block = attention + feed_forward + 4 * width
    body = model.n_layers * block + 2 * width
    embeddings = (model.vocab_size + model.context_length) * width
    head = 0 if model.tie_weights else model.vocab_size * width
    return ParameterCount(body + embeddings + head, body, block_matrices=model.n_layers * 12 * width * width)


def flops_per_token(model: ModelConfig) -> int:
    """Return model FLOPs per trained token, forward and backward, counting attention in full.

    6 per matrix-multiplication weight (embedding look-ups are free, the head is not) plus 12 x layers x width
    x context for attention scores and values: appendix B of PaLM (arXiv:2204.02311).
    """
    width = model.emb_dim
    matrix_weights = model.n_layers * 12 * width * width + model.vocab_size * width
    return 6 * matrix_weights + 12 * model.n_layers * width * model.context_length
