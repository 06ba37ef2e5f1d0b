"""What an optimizer keeps for each parameter, by the parameter's name, whichever optimizer it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Any]


def named_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the optimizer's tensors and its plain numbers, both by "KIND.PARAMETER", as `exp_avg.tok_emb.weight`.

    A parameter that has not been stepped yet has none. What is neither tensor, number nor None raises TypeError.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{kind}.{name}"] = value
            elif isinstance(value, int | float):
                numbers[f"{kind}.{name}"] = value
            elif value is not None:
                raise TypeError(f"optimizer state {kind} of {name} is a {type(value).__name__}, wanted a tensor")
    return tensors, numbers


def restore_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """Load into a new optimizer the state that `named_state` returned, in its types, on the parameters' device.

    Raises KeyError, with the name, for state of a parameter that the model lacks or of another shape than it has.
    """
    parameters = dict(model.named_parameters())
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in (*tensors.items(), *numbers.items()):
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise KeyError(key)
        parameter = parameters[name]
        if isinstance(value, Tensor):
            if not is_state_of(tuple(value.shape), tuple(parameter.shape)):
                raise KeyError(key)
            value = value.to(_place_of(value, parameter, group_of[parameter]), copy=True)
        optimizer.state[parameter][kind] = value


def is_state_of(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Say whether a state tensor of one shape can belong to a parameter of another: a count, or a value for each."""
    return shape in ((), parameter)


def _place_of(value: Tensor, parameter: nn.Parameter, group: State) -> torch.device:
    """Return the device of a state tensor: PyTorch counts steps on the host unless a kernel reads the count."""
    is_count = value.ndim == 0 and not group.get("fused") and not group.get("capturable")
    return torch.device("cpu") if is_count else parameter.device


def empty_like_state(
    optimizer: Optimizer,
    model: nn.Module,
    described: Mapping[str, tuple[tuple[int, ...], str]],
    numbers: Mapping[str, float],
) -> list[Tensor]:
    """Load `numbers` into a new optimizer, with room for tensors as `description_of` describes them; return those."""
    tensors = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in described.items()}
    restore_state(optimizer, model, tensors, numbers)
    kept, _ = named_state(optimizer, model)
    return [kept[key] for key in described]


def description_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Describe tensors by shape and type ("float32"), so that another rank can make room for them."""
    return {key: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in tensors.items()}
