"""The optimizer side of a global step: parameter groups, the learning rate, and the guarded step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

from harness.config import TrainConfig

FLOOR_OF_PEAK = 0.1
START_OF_PEAK = 1e-5


def learning_rate_at(config: TrainConfig, global_step: int, global_steps: int) -> float:
    """Give the learning rate of a global step, a pure function of the step whatever was skipped before it.

    With a schedule: linear from 1e-5 of the peak over the warm-up, then a half cosine that would reach a tenth of
    the peak one step after the last (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts).
    """
    peak = config.learning_rate
    if not config.schedule_learning_rate:
        return peak
    warmup_steps = int(global_steps * config.warmup_period_percent / 100)
    if global_step < warmup_steps:
        return peak * (START_OF_PEAK + (1 - START_OF_PEAK) * global_step / warmup_steps)
    progress = (global_step - warmup_steps) / (global_steps - warmup_steps)
    floor = FLOOR_OF_PEAK * peak
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> AdamW:
    """Make AdamW over every parameter: matrices and embeddings are decayed, vectors (biases, norms) are not.

    Decaying only what multiplies activations is the custom since GPT-3; the fused kernel can skip a step on the
    device, which the MPS one cannot.
    """
    parameters = list(model.named_parameters())
    groups = [
        {
            "params": [value for _, value in parameters if (value.ndim >= 2) == is_decayed],
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    return AdamW(groups, lr=config.learning_rate, fused=device.type != "mps")


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
    optimizer: AdamW, scaler: GradScaler, learning_rate: float, max_norm: float | None, keep_gradients: bool = False
) -> StepOutcome:
    """Unscale, take the global L2 norm, decide whether it is finite, clip, step or skip, update the scaler.

    One decision for all parameters, taken on the device, and the same on every rank because gradients were
    averaged before; no host sync on CUDA and CPU. A skipped step leaves weights and moments as they were. With
    `keep_gradients` they are set to zero and not freed, for a wrapper whose buckets they are.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    is_finite = grad_norm.isfinite()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler.is_enabled():
        # The scaler looked at every gradient; a norm that overflowed is its business too.
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, 1.0 - is_finite.float()))
        scaler.step(optimizer)
    elif optimizer.defaults["fused"]:
        optimizer.found_inf = 1.0 - is_finite.float()  # type: ignore[attr-defined]  # the kernel reads it and skips
        optimizer.step()
    elif is_finite:  # waits for the device, once a step
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return StepOutcome(grad_norm, is_finite)
