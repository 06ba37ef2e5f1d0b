"""An exponential average of the weights, which often scores better than the last weights and costs one more copy."""

import math

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's weights over the global steps that changed them, where the model is.

    Step n counts 1 - decay, each older one `decay` times the next, and all of them together 1 (as Kingma and Ba 2015,
    arXiv:1412.6980, correct their means), so that the initial weights have no part in it. `steps` are those that the
    average, once loaded, holds already.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
        device = next(iter(self.tensors.values())).device
        self._steps = torch.tensor(float(steps), device=device)
        self._log_decay = torch.tensor(math.log(decay), device=device)

    @torch.no_grad()
    def update(self, changed: Tensor) -> None:
        """Take the weights after a global step in, unless `changed` (0-dimensional, on the device) says no.

        Nothing waits for the device.
        """
        self._steps += changed
        held = torch.expm1(self._log_decay * self._steps.clamp(min=1))  # decay ** steps - 1, exact where it is small
        share = changed * (torch.expm1(self._log_decay) / held)
        for name, value in self.model.state_dict().items():
            self.tensors[name].lerp_(value, share)
