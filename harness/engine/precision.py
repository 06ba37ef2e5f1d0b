"""The type of matrix products, which autocast chooses, for code that it does not look into."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product_type(x: Tensor) -> torch.dtype:
    """Return the type in which products with x are computed: autocast's where it is on, else its own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products on x's device have the type of their operands."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
