"""The guarded optimizer step: unscale, measure, clip, and step or skip, without waiting for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


def require_gradients(model: nn.Module) -> None:
    """Check that every parameter takes part in the loss; raises ValueError naming those without a gradient."""
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if idle:
        raise ValueError(f"no gradient reaches {', '.join(idle)}: the model's forward does not use them")


@dataclass(frozen=True)
class StepOutcome:
    """What a guarded step found, as 0-dimensional tensors on the device: nothing waits for it."""

    grad_norm: Tensor
    is_finite: Tensor


def guarded_step(
    optimizer: Optimizer,
    scaler: GradScaler,
    learning_rate: float,
    max_norm: float | None,
    keep_gradients: bool = False,
) -> StepOutcome:
    """Unscale, take the global L2 norm, decide whether it is finite, clip, step or skip, update the scaler.

    One decision for all parameters, taken on the device, and the same on every rank because gradients were
    averaged before. A skipped step leaves weights and optimizer state as they were. Nothing waits for the device
    where the optimizer can skip by itself (fused AdamW, Muon); others wait for the decision once a step. With
    `keep_gradients` they are set to zero and not freed, for a wrapper whose buckets they are. A group with an
    `lr_ratio` has that multiple of the learning rate.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    is_finite = grad_norm.isfinite()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
    if scaler.is_enabled():
        # The scaler looked at every gradient; a norm that overflowed is its business too.
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, 1.0 - is_finite.float()))
        scaler.step(optimizer)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1.0 - is_finite.float()  # type: ignore[attr-defined]  # the kernel reads it and skips
        optimizer.step()
    elif is_finite:  # waits for the device
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return StepOutcome(grad_norm, is_finite)
