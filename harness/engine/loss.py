"""Next-token cross-entropy, plain and memory-lean, and the objective that training compiles and distributes."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.costs import loss_chunk_rows
from harness.engine.experts import ROUTER_LOSS
from harness.engine.precision import product_type, without_autocast

VOCAB_MULTIPLE = 64


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token; logits (B, T, V) of any float type, targets (B, T).

    Computed in float32 whatever the logits' type; the result is a float32 scalar on their device. This is the
    definition, which the memory-lean loss of training is tested and timed against.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every token in nats, float32 (B, T), for logits (B, T, V) and targets (B, T).

    A chunk of rows at a time, because its float32 copy and softmax are larger than the logits themselves.
    """
    size = loss_chunk_rows(logits.device.type)
    chunks = zip(torch.split(logits.flatten(0, 1), size), torch.split(targets.flatten(), size), strict=True)
    return torch.cat([F.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in chunks]).view_as(targets)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Bound logits between -softcap and softcap (Gemma Team 2024, arXiv:2408.00118, section 2)."""
    return softcap * torch.tanh(logits / softcap)


def softmax_gradient(logits: Tensor, targets: Tensor, softcap: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of logits (n, V) in float32, and the gradient (n, V) in the logits' type.

    With a finite softcap, it is that of the capped logits. A logit of -inf has no probability and no gradient. The
    gradient is that of the cross-entropy plus z_loss x log(Z)^2, where Z normalises the softmax (Chowdhery et al.
    2022, arXiv:2204.02311, section 5): probabilities count 1 + 2 x z_loss x log(Z) times.
    """
    ids, dtype, slope = targets.unsqueeze(-1), logits.dtype, None
    if softcap < math.inf:
        bounded = capped(logits.float(), softcap)
        slope = 1 - (bounded / softcap).square_()
        logits = bounded.masked_fill_(logits == -math.inf, -math.inf)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    wanted = log_probabilities.gather(-1, ids)  # (n, 1)
    gradient, of_target = log_probabilities.exp_(), wanted.exp()  # in place: this is what takes the memory
    if z_loss:
        factor = 1 + 2 * z_loss * (logits.gather(-1, ids).float() - wanted)
        gradient, of_target = gradient.mul_(factor), of_target.mul_(factor)
    of_target = of_target.sub_(1)
    if slope is not None:
        gradient, of_target = gradient.mul_(slope), of_target.mul_(slope.gather(-1, ids))
    gradient = gradient.to(dtype)
    gradient.scatter_(-1, ids, of_target.to(dtype))
    return -wanted.sum(), gradient


@cache
def compiled_softmax_gradient() -> Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]:
    """Return `softmax_gradient` compiled: the logits are read twice and the gradient is written, nothing else."""
    return torch.compile(softmax_gradient, fullgraph=True, dynamic=False)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 matrix; the product is rounded to half precision before only on a CPU or MPS."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, terms: Sequence[float], dtype: torch.dtype, is_compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss of a linear head, and its gradients, computed a chunk of rows at a time.

    hidden (N, C), weight (V, C), targets (N,); products are of type `dtype`. A chunk's logits live only until their
    gradient has been used, in the forward pass already: the loss is a scalar, so the backward pass has nothing left
    to do but to scale. The gradients of hidden (in `dtype`) and of weight (float32) are those of the sum over rows:
    divided by their number and multiplied with the incoming gradient, they would underflow in float16. They are those
    of the loss with the z-loss; the loss returned is without, so that it can be compared.

    `terms` are a softcap (infinite for none) and the weight of the z-loss. `is_compiled` compiles what happens
    between the products. The vocabulary is padded with ids of no probability, so that all three products have sides
    that tensor cores like.
    """
    vocab_size, width = weight.shape
    rows = hidden.to(dtype)  # (N, C)
    narrow = weight.new_empty(vocab_size + -vocab_size % VOCAB_MULTIPLE, width, dtype=dtype)  # (V', C)
    narrow[:vocab_size], narrow[vocab_size:] = weight, 0.0
    gradient_of = compiled_softmax_gradient() if is_compiled else softmax_gradient
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(rows)
    weight_gradient = torch.zeros_like(narrow, dtype=torch.float32)
    # Chunks of equal size, but for the last: compiled code is made for at most two sizes.
    size = math.ceil(len(rows) / math.ceil(len(rows) / loss_chunk_rows(hidden.device.type)))
    for chunk, chunk_targets, chunk_gradient in zip(
        *(torch.split(tensor, size) for tensor in (rows, targets, hidden_gradient)), strict=True
    ):
        logits = chunk @ narrow.t()  # (n, V')
        logits[:, vocab_size:] = -math.inf
        loss, gradient = gradient_of(logits, chunk_targets, *terms)
        del logits
        total += loss
        torch.mm(gradient, narrow, out=chunk_gradient)
        add_product(weight_gradient, gradient.t(), chunk)
        del gradient  # or it would live beside the next chunk's logits
    return total / len(rows), hidden_gradient, weight_gradient[:vocab_size]


def _empty_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, terms: Sequence[float], dtype: torch.dtype, is_compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden, dtype=dtype), torch.empty_like(weight, dtype=torch.float32)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, *_ = inputs
    _, hidden_gradient, weight_gradient = output
    ctx.set_materialize_grads(False)  # no zeros for the two outputs that nobody differentiates
    ctx.save_for_backward(hidden_gradient, weight_gradient)
    ctx.types = hidden.dtype, weight.dtype


def _scale_gradients(ctx: Any, loss_gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    hidden_gradient, weight_gradient = ctx.saved_tensors
    hidden_type, weight_type = ctx.types
    scale = loss_gradient / len(hidden_gradient)
    # Cast before they are scaled, or the loss scale would overflow in float16.
    of_hidden, of_weight = hidden_gradient.to(hidden_type) * scale, (weight_gradient * scale).to(weight_type)
    return of_hidden, of_weight, None, None, None, None


# An operator of its own, so that the compiler does not look inside: unrolled, all chunks would live at once.
chunked_linear_cross_entropy = torch.library.custom_op(
    "harness::chunked_linear_cross_entropy", loss_and_gradients, mutates_args=()
)
chunked_linear_cross_entropy.register_fake(_empty_loss_and_gradients)
chunked_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def chunked_next_token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, z_loss: float = 0.0
) -> Tensor:
    """Return `next_token_loss(hidden @ head.T, targets)` and its gradients without holding all logits at once.

    hidden (B, T, C), head (V, C), targets (B, T); with a softcap, the logits are `capped` before. The gradients alone
    have the z-loss in them. Under autocast the products are computed in its type, as the plain loss's are; sums over
    rows are float32.
    """
    dtype = product_type(hidden)
    terms = (math.inf if softcap is None else softcap, z_loss)
    with without_autocast(hidden):
        loss, _, _ = chunked_linear_cross_entropy(
            hidden.flatten(0, 1), head, targets.flatten(), terms, dtype, torch.compiler.is_compiling()
        )
    return cast(Tensor, loss)


class LanguageModel(Protocol):
    """What the objective needs of a model besides logits."""

    logit_softcap: float | None
    """What bounds the logits that head and hidden states make."""

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the final hidden states (B, T, C) for tokens (B, T), and how experts were chosen, if any are."""

    def head_weight(self) -> Tensor:
        """Return the output head's matrix (V, C)."""


class Objective(nn.Module):
    """What goes into torch.compile and DDP: tokens and targets in, loss out.

    Wrapping this instead of the model keeps the model's forward free to give logits, and its parameter names free
    of wrappers' prefixes.
    """

    def __init__(self, model: nn.Module, z_loss: float = 0.0, router_loss_scale: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss
        self.router_loss_scale = router_loss_scale

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean cross-entropy of a micro-batch, and how each block chose experts, if there are any.

        tokens and targets (B, T), and by block (n_layers, num_experts + 2). The gradient alone has the z-loss and the
        router loss in it.
        """
        model = cast(LanguageModel, self.model)
        hidden, routing = model.hidden_states(tokens)
        loss = chunked_next_token_loss(hidden, model.head_weight(), targets, model.logit_softcap, self.z_loss)
        if routing is None:
            return loss, None
        router_loss = self.router_loss_scale * routing[:, ROUTER_LOSS].sum()
        return loss + (router_loss - router_loss.detach()), routing.detach()


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
