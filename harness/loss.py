"""Next-token cross-entropy, and the objective that training compiles and distributes."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the mean cross-entropy in nats per token; logits (B, T, V) of any float type, targets (B, T).

    Computed in float32 whatever the logits' type; the result is a float32 scalar on their device.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the cross-entropy of every token in nats, float32 (B, T), for logits (B, T, V) and targets (B, T)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


class Objective(nn.Module):
    """What goes into torch.compile and DDP: tokens and targets in, loss out.

    Wrapping this instead of the model keeps the model's forward free to give logits, and its parameter names free
    of wrappers' prefixes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Give the mean loss of a micro-batch; tokens and targets (B, T)."""
        return next_token_loss(self.model(tokens), targets)


def first_loss_warning(loss: float, model: nn.Module, vocab_size: int) -> str | None:
    """Give one line when the first loss is over 1 nat from ln(vocab_size), naming the likely cause; else None.

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
