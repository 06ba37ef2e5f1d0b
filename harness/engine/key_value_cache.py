"""Keys and values of tokens that a model has read already, so that a new token costs one position's work."""

import torch
from torch import Tensor, nn


class KeyValueCache:
    """What every attention layer keeps of the tokens read so far, for rows of different lengths.

    Slot p of a row holds position p, and a position sees the slots up to its own. So padding needs no rule of its
    own: what stands behind a row's last token is out of sight, and overwritten before it would come into sight.
    """

    def __init__(self, slots: int) -> None:
        """Make room for positions below `slots`, at most the model's context length."""
        self.slots = slots
        self.positions = torch.empty(0, 0, dtype=torch.int64)
        self._visible = torch.empty(0, dtype=torch.bool)
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor) -> "KeyValueCache":
        """Say where the next call's tokens stand: positions (B, T), int64, each below `slots`; returns itself."""
        self.positions = positions
        slots = torch.arange(self.slots, device=positions.device)
        self._visible = (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, slots)
        return self

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a layer's keys and values (B, H, T, D) of this call's tokens; return all that it holds and the mask.

        Keys and values come as (B, H, slots, D), the mask as bool (B, 1, T, slots), true where a token may look.
        """
        if layer not in self._held:
            batch, heads, _, size = key.shape
            shape = (batch, heads, self.slots, size)
            self._held[layer] = key.new_zeros(shape), value.new_zeros(shape)
        held = self._held[layer]
        rows = torch.arange(len(key), device=key.device).unsqueeze(1)  # (B, 1)
        for whole, new in zip(held, (key, value), strict=True):
            whole[rows, :, self.positions] = new.transpose(1, 2)  # (B, T, H, D)
        return *held, self._visible
