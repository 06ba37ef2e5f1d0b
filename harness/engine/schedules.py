"""The learning rate of a global step: one row for each schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from harness.run.config import TrainConfig

FLOOR_OF_PEAK = 0.1
START_OF_PEAK = 1e-5


@dataclass(frozen=True)
class Schedule:
    """One shape of the learning rate over a run."""

    rate: Callable[[TrainConfig, int, int], float]
    """Learning rate of a global step, given the configuration, the step and the run's number of steps."""
    depends_on_length: bool
    """Whether a run that is made longer would have had other rates from the beginning."""


def _constant(config: TrainConfig, global_step: int, global_steps: int) -> float:
    return config.learning_rate


def _cosine(config: TrainConfig, global_step: int, global_steps: int) -> float:
    """Return a rate that is linear from 1e-5 of the peak over the warm-up, and then a half cosine.

    The cosine would reach a tenth of the peak one step after the last (Loshchilov and Hutter 2017, arXiv:1608.03983,
    equation 5 without restarts).
    """
    peak = config.learning_rate
    warmup_steps = int(global_steps * config.warmup_period_percent / 100)
    if global_step < warmup_steps:
        return peak * (START_OF_PEAK + (1 - START_OF_PEAK) * global_step / warmup_steps)
    progress = (global_step - warmup_steps) / (global_steps - warmup_steps)
    floor = FLOOR_OF_PEAK * peak
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES = {
    "constant": Schedule(_constant, depends_on_length=False),
    "cosine": Schedule(_cosine, depends_on_length=True),
}


def learning_rate_at(config: TrainConfig, global_step: int, global_steps: int) -> float:
    """Return the learning rate of a global step, a pure function of the step whatever was skipped before it."""
    return SCHEDULES[config.schedule_name].rate(config, global_step, global_steps)
