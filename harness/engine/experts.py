"""Mixture of experts: several feed-forwards in a block, of which every token sees a few that a router chooses.

Every token gets the experts it asks for, unless a capacity is set: rows are sorted by expert, and one product takes
all experts. What a token gets depends on its own sequence alone, so a global batch may be split in any way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.precision import product_type, without_autocast
from harness.run.config import ExpertsConfig
from harness.run.files import json_number

ROUTER_LOSS, DROPPED = -2, -1  # columns of a routing row, after the experts' shares
Layer = Callable[[Tensor], Tensor]


class Expert(Protocol):
    """A feed-forward that is told by which layers to transform: its own, or those of all experts at once."""

    def transform(self, x: Tensor, layer: Callable[[str], Layer]) -> Tensor:
        """Transform x with the layers that `layer` gives for a submodule's name."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return a layer by its name."""


class MixtureOfExperts(nn.Module):
    """A router and feed-forwards of equal shape (Shazeer et al. 2017, arXiv:1701.06538).

    A token's output is the mean of its experts' outputs, weighted with the softmax over their scores alone.
    """

    def __init__(self, width: int, config: ExpertsConfig, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x (B, T, C); return it and how its tokens were routed, (num_experts + 2,), as `route` says."""
        active, dtype = self.config.num_active_experts, product_type(x)
        with without_autocast(x):  # a router in half precision trains less stably
            scores = F.linear(x.to(self.router.weight.dtype), self.router.weight)  # (B, T, E)
        routing, told = route(scores, active, self.config.capacity_factor if self.training else None)
        if not has_kernel(x.device, dtype, x.shape[-1]):  # wait for the device here, and not in every product
            routing = replace(routing, ends=routing.ends.cpu())
        rows = x.to(dtype).flatten(0, 1).repeat_interleave(active, dim=0)  # (B x T x active, C)
        rows = Permuted.apply(rows, routing.order, routing.place)  # type: ignore[no-untyped-call]
        rows = cast(Expert, self.experts[0]).transform(rows, lambda name: routing.layer(self._layers(name)))
        rows = Permuted.apply(rows, routing.place, routing.order)  # type: ignore[no-untyped-call]
        shares = routing.weights.to(rows.dtype).unsqueeze(-1)  # (B, T, active, 1)
        return (rows.view(*x.shape[:-1], active, -1) * shares).sum(dim=-2), told

    def _layers(self, name: str) -> list[nn.Linear]:
        return [cast(nn.Linear, cast(Expert, expert).get_submodule(name)) for expert in self.experts]


@dataclass(frozen=True)
class Routing:
    """Which row, of a token and one of its experts, goes where; rows R = tokens x active experts."""

    order: Tensor
    """The rows sorted by expert (R,); those that no expert has room for are the last."""
    place: Tensor
    """Where each row went (R,), the inverse of the order."""
    weights: Tensor
    """Of every token's experts (B, T, active), 0 where one has no room."""
    membership: Tensor
    """Which expert each sorted row belongs to (R, E), as ones and zeros."""
    ends: Tensor
    """Where each expert's sorted rows end (E,), int32."""
    is_whole: bool
    """Whether no row is without an expert."""

    def layer(self, layers: Sequence[nn.Linear]) -> Layer:
        """Return the linear layers of all experts as one function of sorted rows (R, inputs)."""

        # Each viewed by itself: in a bare list the compiler would not see them when it cuts its graph by DDP's
        # buckets.
        def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat([tensor.to(dtype).unsqueeze(0) for tensor in tensors])

        def all_at_once(rows: Tensor) -> Tensor:
            weight = stacked([layer.weight for layer in layers], rows.dtype)  # (E, outputs, inputs)
            with without_autocast(rows):
                y: Tensor = grouped_product(rows, weight, self.ends, self.is_whole)
                if layers[0].bias is None:
                    return y
                bias = stacked([layer.bias for layer in layers], rows.dtype)
                return torch.addmm(y, self.membership.to(rows.dtype), bias)

        return all_at_once


def route(scores: Tensor, active: int, capacity_factor: float | None) -> tuple[Routing, Tensor]:
    """Choose each token's `active` experts of scores (B, T, E), in the scores' type.

    Returns the routing, and a row (E + 2,): the share of the tokens' choices that each expert got, the router loss,
    and the share of choices that were dropped. The router loss of a sequence is E x the sum over experts of (tokens
    that chose it / T) x (its mean probability), so `active` where all are equal: Fedus et al. 2021 (arXiv:2101.03961,
    equation 4), for more than one choice, and the mean over sequences. With a capacity factor, an expert takes the
    first factor x active x T / E choices of a sequence, rounded up, and the rest are dropped.
    """
    _, length, experts = scores.shape
    chosen = scores.detach().topk(active, dim=-1).indices  # (B, T, active)
    is_chosen = chosen.unsqueeze(-1) == torch.arange(experts, device=scores.device)  # (B, T, active, E)
    # Not the values of topk: their gradient is scattered, which the compiler of torch 2.13 loses beside that of the
    # router loss.
    weights = torch.where(is_chosen, scores.unsqueeze(-2), 0).sum(dim=-1).softmax(dim=-1)
    load = is_chosen.sum(dim=(1, 2)).to(scores.dtype) / length  # (B, E)
    router_loss = experts * (load * scores.softmax(dim=-1).mean(dim=1)).sum(dim=-1).mean()
    dropped = torch.zeros_like(router_loss)
    if capacity_factor is not None:
        capacity = math.ceil(capacity_factor * active * length / experts)
        queue = is_chosen.flatten(1, 2).cumsum(dim=1).view(is_chosen.shape)
        is_chosen = is_chosen & (queue <= capacity)
        has_room = is_chosen.any(dim=-1)  # (B, T, active)
        weights = weights * has_room
        chosen = torch.where(has_room, chosen, experts)
        dropped = 1 - has_room.to(scores.dtype).mean()
    order = chosen.flatten().argsort(stable=True)
    membership = is_chosen.flatten(0, 2)
    routing = Routing(
        order=order,
        place=order.argsort(),
        weights=weights,
        membership=membership[order],
        ends=membership.sum(dim=0).cumsum(dim=0, dtype=torch.int32),
        is_whole=capacity_factor is None,
    )
    return routing, torch.cat([load.mean(dim=0) / active, torch.stack([router_loss, dropped])])


def routing_metrics(values: Sequence[float], blocks: int) -> dict[str, float | None]:
    """Return what metrics.jsonl says of so many blocks' routing rows, one after the other; nothing without blocks.

    The router loss is the sum over blocks. The shares are those of the busiest and the idlest expert of any block, in
    multiples of the even share.
    """
    if not blocks:
        return {}
    width = len(values) // blocks
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    shares = [share * len(row[:ROUTER_LOSS]) for row in rows for share in row[:ROUTER_LOSS]]
    return {
        "moe/router_loss": json_number(sum(row[ROUTER_LOSS] for row in rows)),
        "moe/dropped": math.fsum(row[DROPPED] for row in rows) / blocks,
        "moe/busiest_expert": max(shares),
        "moe/idlest_expert": min(shares),
    }


class Permuted(torch.autograd.Function):
    """Rows in another order; the gradient is put back by the inverse order, for which nothing is added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """Return rows[order]; `place` is the inverse of the order."""
        ctx.save_for_backward(place)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the rows."""
        (place,) = ctx.saved_tensors
        return gradients[0][place], None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether torch has a kernel that takes all experts at once, for which the host need not know their rows.

    `torch.nn.functional.grouped_mm` runs one by one elsewhere, and refuses types and widths besides.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or width % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def multiply_groups(rows: Tensor, weight: Tensor, ends: Tensor, is_whole: bool) -> Tensor:
    """Multiply sorted rows (R, K) with their expert's matrix, of weight (E, N, K), transposed; returns (R, N).

    `ends` (E,) says where each expert's rows end; on a GPU, one kernel takes them all. Rows after the last expert's
    are given zeros; with `is_whole` there are none.
    """
    if ends.is_cuda:
        product = F.grouped_mm(rows, weight.mT, offs=ends)
        if not is_whole:
            product[torch.arange(len(rows), device=rows.device) >= ends[-1]] = 0
        return product
    product = rows.new_zeros(len(rows), weight.shape[1])
    for matrix, (start, end) in zip(weight, pairwise([0, *ends.tolist()]), strict=True):
        torch.mm(rows[start:end], matrix.t(), out=product[start:end])
    return product


def multiply_within_groups(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return each expert's product (N, K) of its rows of left (R, N), transposed, and right (R, K), as (E, N, K)."""
    if ends.is_cuda:
        return F.grouped_mm(left.t(), right, offs=ends)
    product = left.new_empty(len(ends), left.shape[1], right.shape[1])
    for matrix, (start, end) in zip(product, pairwise([0, *ends.tolist()]), strict=True):
        torch.mm(left[start:end].t(), right[start:end], out=matrix)
    return product


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, ends, is_whole = inputs
    ctx.save_for_backward(rows, weight, ends)
    ctx.is_whole = is_whole


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    rows, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_rows = grouped_product(gradient, weight.mT, ends, ctx.is_whole)
    return of_rows, products_within_groups(gradient, rows, ends), None, None


# Operators of their own, because how many rows an expert has is not known when code is compiled.
grouped_product = torch.library.custom_op("harness::grouped_product", multiply_groups, mutates_args=())
grouped_product.register_fake(lambda rows, weight, *_: rows.new_empty(len(rows), weight.shape[1]))
grouped_product.register_autograd(_gradients, setup_context=_keep)
products_within_groups = torch.library.custom_op(
    "harness::products_within_groups", multiply_within_groups, mutates_args=()
)
products_within_groups.register_fake(
    lambda left, right, ends: left.new_empty(len(ends), left.shape[1], right.shape[1])
)
