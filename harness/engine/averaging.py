"""An exponential average of the weights, which often scores better than the last weights and costs one more copy."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's weights over its global steps, where the model is.

    Step n counts 1 - decay, each older one `decay` times the next, and all of them together 1 (as Kingma and Ba 2015,
    arXiv:1412.6980, correct their means), so that the initial weights have no part in it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, global_step: int, changed: Tensor) -> None:
        """Take the weights after a global step in, unless `changed` (0-dimensional, on the device) says no.

        Nothing waits for the device.
        """
        share = changed * ((1 - self.decay) / (1 - self.decay ** (global_step + 1)))
        for name, value in self.model.state_dict().items():
            self.tensors[name].lerp_(value, share)
