"""How much memory does a sequence take? The 163M-parameter model in half precision, by accounting.

  python -m benchmarks.memory

A training step (forward and backward pass) runs on meta tensors, which have shapes and lifetimes but no values. Every
storage that comes to life is counted until it dies, so the peak holds what autograd saves and what kernels need
besides. Steps with one and two sequences give the bytes a sequence adds and those that are there anyway. Autocast is
imitated as CUDA's: products in half precision, normalisation and softmax in float32; flash attention as a kernel that
saves its inputs, its output and one number a row. Compilation, which saves more, cannot be counted in this way.

Weights, gradients and AdamW's moments are 16 bytes a parameter; a GPU's context is taken to be 0.7 GiB. How many
sequences fit is what is left, divided. Written to benchmarks/results/memory.md and .json.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.arrangements import Techniques, replace_modules
from benchmarks.throughput import GPT2
from harness.engine import experts
from harness.engine.costs import FLOAT32_BYTES, GIB
from harness.engine.loss import loss_and_gradients, next_token_loss
from harness.engine.optimizers import OPTIMIZERS
from harness.run.config import ModelConfig
from harness.run.files import write_json
from harness.run.model_size import count_parameters
from model import GPTModel

RESULTS = Path(__file__).parent / "results"
CONTEXT_GIB = 0.7
CARDS_GIB = (24, 40, 80)
HALF = torch.bfloat16
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm}
IN_FLOAT32 = {F.layer_norm, F.softmax, torch.softmax, F.cross_entropy}


class Flash(torch.autograd.Function):
    """What flash attention saves, and nothing of what it computes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor like the query."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tensors like query, key and value."""
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class FusedRMSNorm(torch.autograd.Function):
    """What CUDA's RMS norm saves, which elsewhere is put together from parts: its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None) -> Tensor:
        """Return a tensor like x (..., C)."""
        ctx.save_for_backward(x, scale, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tensors like x and the scale."""
        x, scale, _ = ctx.saved_tensors
        return torch.empty_like(x), None if scale is None else torch.empty_like(scale)


class LeanLoss(torch.autograd.Function):
    """The memory-lean loss, looked into: as an operator it would be counted from outside alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        """Return the loss of hidden (N, C), weight (V, C) and targets (N,)."""
        loss, *gradients = loss_and_gradients(
            hidden, weight, targets, (softcap or math.inf, 0.0), HALF, is_compiled=False
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the scaled gradients of hidden and weight."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient.float() * scale[0], weight_gradient * scale[0], None, None


class CudaAutocast(TorchFunctionMode):
    """Casts as CUDA's autocast does: weights are copied to half precision once, everything else each time."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return Flash.apply(*(self._cast(value) for value in args[:3]))
        if function is F.rms_norm:
            scale = args[2] if len(args) > 2 else None
            return FusedRMSNorm.apply(args[0] if scale is None else args[0].float(), scale)
        if function in PRODUCTS:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        elif function in IN_FLOAT32:
            args, kwargs = tree_map(lambda value: value.float() if _is_half(value) else value, (args, kwargs))
        return function(*args, **kwargs)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same under this mode."""

        def inside(*args: Any) -> Any:
            with self:
                return function(*args)

        return inside

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, torch.nn.Parameter):
            return self._copies.setdefault(id(value), value.to(HALF))
        return value.to(HALF)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == HALF


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of all storages alive, but those that were there before."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in before}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._known:
                    self._alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@dataclass(frozen=True)
class Row:
    """One arrangement: bytes for each sequence and besides, and the micro-batches that fit a card."""

    arrangement: str
    sequence_mib: float
    constant_mib: float
    fits: dict[int, int]


def main() -> None:
    """Count, print and store."""
    base = Techniques()
    fused = replace(base, fused_attention=True, fused_layer_norm=True)
    dropped = replace(GPT2, drop_rate=0.1)
    rows = [
        count("published (dropout 0.1)", dropped, base),
        count("published, no dropout", GPT2, base),
        count("+ fused attention (SDPA)", GPT2, replace(base, fused_attention=True)),
        count("+ fused LayerNorm", GPT2, fused),
        count("+ memory-lean loss: the default", GPT2, fused, is_lean=True),
        count("the default with dropout 0.1", dropped, fused, is_lean=True),
        count("the default with activation_checkpointing", GPT2, fused, is_lean=True, checkpointing=True),
    ]
    lines = [
        "| arrangement | MiB per sequence | MiB besides | "
        + " | ".join(f"fits {card} GB" for card in CARDS_GIB)
        + " |",
        "|---|---:|---:|" + "---:|" * len(CARDS_GIB),
    ]
    for row in rows:
        fits = " | ".join(str(row.fits[card]) for card in CARDS_GIB)
        lines.append(f"| {row.arrangement} | {row.sequence_mib:,.0f} | {row.constant_mib:,.0f} | {fits} |")
    print("\n".join(lines))
    RESULTS.joinpath("memory.md").write_text("\n".join(lines) + "\n")
    write_json(RESULTS / "memory.json", {"torch": torch.__version__, "rows": [asdict(row) for row in rows]})


def count(
    name: str, config: ModelConfig, techniques: Techniques, is_lean: bool = False, checkpointing: bool = False
) -> Row:
    """Count an arrangement's memory with a few sequences, and work out how many fit."""
    few, more = (peak_bytes(config, techniques, size, is_lean, checkpointing) for size in (8, 16))
    sequence = (more - few) / 8
    constant = few - 8 * sequence
    parameters = count_parameters(config)
    state = 2 * FLOAT32_BYTES * parameters.total + OPTIMIZERS["adamw"].state_bytes(parameters)
    fixed = state + constant + CONTEXT_GIB * GIB
    fits = {card: math.floor((card * GIB - fixed) / sequence) for card in CARDS_GIB}
    return Row(name, sequence / 2**20, constant / 2**20, fits)


def peak_bytes(config: ModelConfig, techniques: Techniques, size: int, is_lean: bool, checkpointing: bool) -> int:
    """Return the peak bytes of one forward and backward pass, besides weights, gradients and moments."""
    with torch.device("meta"):
        model = GPTModel(config, checkpointing)
        tokens = torch.zeros(size, config.context_length, dtype=torch.int64)
    replace_modules(model, techniques)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), tokens]  # type: ignore[misc]
    loss_of = _lean_loss if is_lean else _plain_loss
    autocast = CudaAutocast()
    for block in model.trf_blocks:  # a block that is computed again does so outside of every mode but its own
        block.forward = autocast.around(block.forward)
    # Of a mixture of experts, what CUDA's autocast would choose, and the kernel for all experts at once.
    on_cuda = patch.multiple(experts, product_type=lambda _: HALF, has_kernel=lambda *_: True)
    with on_cuda, PeakTracker(before) as tracker:
        with autocast:
            loss = loss_of(model, tokens)
        loss.backward()
    return tracker.peak


def _plain_loss(model: GPTModel, tokens: Tensor) -> Tensor:
    return next_token_loss(model(tokens), tokens)


def _lean_loss(model: GPTModel, tokens: Tensor) -> Tensor:
    hidden, _ = model.hidden_states(tokens)
    with torch._C.DisableTorchFunction():
        loss: Tensor = LeanLoss.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), model.head_weight(), tokens.flatten(), model.logit_softcap
        )
    return loss


if __name__ == "__main__":
    main()
