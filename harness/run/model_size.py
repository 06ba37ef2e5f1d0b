"""Parameters and floating-point operations per token of a model, computed from its configuration."""

from dataclasses import dataclass

from harness.run.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters: in total, and without the two embeddings and the output head."""

    total: int
    without_embeddings: int
    active: int
    """Those that act on a token: all, but for the experts that it is not sent to."""
    block_matrices: int
    """Weights in the matrices of all blocks."""


def feed_forward_width(model: ModelConfig) -> int:
    """Return the channels between the feed-forward layers.

    4 x emb_dim, or for SwiGLU, which has three matrices in place of two, 2/3 of that (Shazeer 2020,
    arXiv:2002.05202), rounded up to a multiple of 8, which tensor cores want.
    """
    return -(-8 * model.emb_dim // 24) * 8 if model.feed_forward == "swiglu" else 4 * model.emb_dim


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count a model's parameters; a shared matrix counts once."""
    width, hidden = model.emb_dim, feed_forward_width(model)
    experts, active = _experts(model)
    attention_biases = width + (3 * width if model.qkv_bias else 0)
    expert_biases = width + (2 if model.feed_forward == "swiglu" else 1) * hidden
    norm = width * (2 if model.norm == "layer" and model.bias else 1)
    vectors = (attention_biases + experts * expert_biases if model.bias else 0) + 2 * norm  # of a block
    matrices = model.n_layers * _block_matrices(model, experts)
    body = matrices + model.n_layers * vectors + norm + (model.n_layers - 1 if model.value_residual else 0)
    embeddings = (model.vocab_size + (model.context_length if model.positions == "learned" else 0)) * width
    head = 0 if model.tie_weights else model.vocab_size * width
    total = body + embeddings + head
    expert = _expert_matrices(model) + (expert_biases if model.bias else 0)
    return ParameterCount(total, body, total - model.n_layers * (experts - active) * expert, matrices)


def flops_per_token(model: ModelConfig) -> int:
    """Return model FLOPs per trained token, forward and backward, counting attention in full.

    6 per matrix-multiplication weight that acts on a token (embedding look-ups are free, the head is not) plus
    12 x layers x width x context for attention scores and values: appendix B of PaLM (arXiv:2204.02311).
    """
    _, active = _experts(model)
    matrix_weights = model.n_layers * _block_matrices(model, active) + model.vocab_size * model.emb_dim
    return 6 * matrix_weights + 12 * model.n_layers * model.emb_dim * model.context_length


def _experts(model: ModelConfig) -> tuple[int, int]:
    """Return how many feed-forwards a block has, and how many of them act on a token."""
    return (1, 1) if model.moe is None else (model.moe.num_experts, model.moe.num_active_experts)


def _block_matrices(model: ModelConfig, experts: int) -> int:
    """Return the weights in the matrices of one block with so many experts, its router's among them."""
    router = 0 if model.moe is None else model.moe.num_experts * model.emb_dim
    return 4 * model.emb_dim**2 + router + experts * _expert_matrices(model)


def _expert_matrices(model: ModelConfig) -> int:
    """Return the weights in the matrices of one feed-forward."""
    return (3 if model.feed_forward == "swiglu" else 2) * feed_forward_width(model) * model.emb_dim
