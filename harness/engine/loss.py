"""Next-token cross-entropy, plain and memory-lean, and the objective that training compiles and distributes."""

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.costs import LOSS_CHUNK_ROWS

VOCAB_MULTIPLE = 64


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token; logits (B, T, V) of any float type, targets (B, T).

    Computed in float32 whatever the logits' type; the result is a float32 scalar on their device. This is the
    definition, which the memory-lean loss of training is tested and timed against.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every token in nats, float32 (B, T), for logits (B, T, V) and targets (B, T)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """The loss of a linear head, and its gradients, computed a chunk of rows at a time.

    A chunk's logits live only until their gradient has been used, in the forward pass already: the loss is a scalar,
    so the backward pass has nothing left to do but to scale. Gradients are kept before the division by the number of
    rows and the multiplication with the incoming gradient, which would underflow in float16.

    The vocabulary is padded with ids of no probability, so that all three products have sides that tensor cores like.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean loss for hidden (N, C), weight (V, C) and targets (N,); products are of type `dtype`."""
        rows, vocab_size = hidden.to(dtype), len(weight)  # (N, C)
        narrow = F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % VOCAB_MULTIPLE))  # (V', C)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(rows)
        weight_gradient = torch.zeros_like(narrow, dtype=torch.float32)
        for start in range(0, len(rows), LOSS_CHUNK_ROWS):
            chunk, wanted = rows[start : start + LOSS_CHUNK_ROWS], targets[start : start + LOSS_CHUNK_ROWS, None]
            logits = (chunk @ narrow.t()).float()  # (n, V')
            logits[:, vocab_size:] = -math.inf
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            total += (normaliser - logits.gather(-1, wanted)).sum()
            probabilities = logits.sub_(normaliser).exp_()  # in place: this is what takes the memory
            gradient = probabilities.scatter_add_(-1, wanted, -torch.ones_like(normaliser)).to(dtype)
            hidden_gradient[start : start + LOSS_CHUNK_ROWS] = gradient @ narrow
            weight_gradient += gradient.t() @ chunk
        ctx.save_for_backward(hidden_gradient, weight_gradient[:vocab_size])
        ctx.types = hidden.dtype, weight.dtype
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of hidden and weight, scaled by the gradient of the loss."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        scale = gradients[0] / len(hidden_gradient)
        return (hidden_gradient * scale).to(hidden_type), (weight_gradient * scale).to(weight_type), None, None


def chunked_next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return `next_token_loss(hidden @ head.T, targets)` and its gradients without holding all logits at once.

    hidden (B, T, C), head (V, C), targets (B, T). Under autocast the products are computed in its type, as the plain
    loss's are; sums over rows are float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss = ChunkedLinearCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten(), dtype)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


class LanguageModel(Protocol):
    """What the objective needs of a model besides logits."""

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return the final hidden states (B, T, C) for tokens (B, T)."""

    def head_weight(self) -> Tensor:
        """Return the output head's matrix (V, C)."""


class Objective(nn.Module):
    """What goes into torch.compile and DDP: tokens and targets in, loss out.

    Wrapping this instead of the model keeps the model's forward free to give logits, and its parameter names free
    of wrappers' prefixes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch; tokens and targets (B, T)."""
        model = cast(LanguageModel, self.model)
        return chunked_next_token_loss(model.hidden_states(tokens), model.head_weight(), targets)


def first_loss_warning(loss: float, model: nn.Module, vocab_size: int) -> str | None:
    """Return one line when the first loss is over 1 nat from ln(vocab_size), naming the likely cause; else None.

    A model that knows nothing spreads its bets: its loss is ln(vocab_size). Far above, it bets hard on noise; far
    below, it has seen the answers.
    """
    expected = math.log(vocab_size)
    if math.isfinite(loss) and abs(loss - expected) <= 1:
        return None
    start = f"warning: the first loss is {loss:.2f}, an untrained model's is ln({vocab_size}) = {expected:.2f}"
    if loss < expected:
        return f"{start}: the weights have been trained before, or the data repeats itself"
    parameters = dict(model.named_parameters())
    head = parameters.get("out_head.weight", parameters.get("tok_emb.weight"))
    if head is None:
        return f"{start}: the initial weights are probably too large"
    with torch.no_grad():
        std = head.std().item()
    if "out_head.weight" not in parameters:
        return (
            f"{start}: the output head shares a token embedding of standard deviation {std:.2g}, "
            f"which is probably too large for a head (about 0.02 is usual)"
        )
    return f"{start}: the initial weights are probably too large (output head's standard deviation {std:.2g})"
