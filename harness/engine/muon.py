"""Muon: momentum whose matrices are made orthogonal before they change the weights, beside AdamW for the rest.

torch.optim.Muon computes the same. This one skips a step on the device as fused AdamW does, takes all matrices of a
shape at once, and lets every rank orthogonalise only its share of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from harness.engine.distributed import in_shares

HEAD = "out_head.weight"
MOMENTUM = 0.95
ITERATIONS = 5
# Chosen for the steepest rise at zero: singular values come to lie between 0.7 and 1.2, which does as well as 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STACK_ELEMENTS = 2**26  # orthogonalised at a time, which takes about ten bytes for each


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of the blocks: all but the embeddings and the output head."""
    outside = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        value for name, value in model.named_parameters() if value.ndim == 2 and name != HEAD and value not in outside
    ]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return U V^T for each matrix U S V^T of (N, rows, columns), approximately, in its type.

    Five steps of a quintic Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(AdamW):
    """AdamW whose groups with `is_muon` are Muon's: matrices with Nesterov momentum.

    The learning rate of a matrix is multiplied by sqrt(max(1, rows / columns)), as in the authors' implementation.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step every parameter, or none where `found_inf` is 1; nothing waits for the device."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("is_muon")]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("is_muon"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_shape[tuple(parameter.shape)].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            rest = iter(parameters)
            while stack := list(islice(rest, max(1, STACK_ELEMENTS // (rows * columns)))):
                self._step_stack(stack, group["lr"], group["weight_decay"])

    def _step_stack(self, parameters: list[nn.Parameter], rate: float, weight_decay: float) -> None:
        """Step matrices of one shape."""
        skips = getattr(self, "found_inf", torch.zeros((), device=parameters[0].device))  # 1.0 or 0.0
        # Half the bytes to send and tensor cores, where there are any; CPUs emulate bfloat16, many times slower.
        dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            gradient = torch.where(skips > 0, momentum, parameter.grad)  # which leaves the momentum as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            directions.append(gradient.lerp(momentum, MOMENTUM).to(dtype))
        updates = in_shares(orthogonalised, torch.stack(directions))
        rows, columns = parameters[0].shape
        acts = 1 - skips
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - acts * rate * weight_decay)
            parameter.addcmul_(update.float(), acts, value=-rate * math.sqrt(max(1, rows / columns)))
