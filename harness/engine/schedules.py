"""The learning rate of a global step: one row for each schedule."""

import math
from collections.abc import Callable

from harness.run.config import TrainConfig

START_OF_PEAK = 1e-5


def _cosine(config: TrainConfig, done: float) -> float:
    """Return half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts)."""
    return (1 + math.cos(math.pi * done)) / 2


def _linear(config: TrainConfig, done: float) -> float:
    return 1 - done


def _wsd(config: TrainConfig, done: float) -> float:
    """Return 1 until the cooldown, and from there a straight line (Hägele et al. 2024, arXiv:2405.18392)."""
    cooldown = config.cooldown_percent / (100 - config.warmup_period_percent)  # of the steps after the warm-up
    return min(1.0, (1 - done) / cooldown)


# The height of the decay, from 1 to 0, given how much of the steps after the warm-up is done, from 0 to 1. None is a
# constant rate, the only one that a run may be made longer with, for all others depend on the length from the start.
SCHEDULES: dict[str, Callable[[TrainConfig, float], float] | None] = {
    "constant": None,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
}


def learning_rate_at(config: TrainConfig, global_step: int, global_steps: int) -> float:
    """Return the learning rate of a global step, a pure function of the step whatever was skipped before it.

    A schedule begins with a straight line from 1e-5 of the peak over the warm-up. Its decay would reach
    final_rate_fraction of the peak one step after the last.
    """
    peak, height = config.learning_rate, SCHEDULES[config.schedule_name]
    if height is None:
        return peak
    warmup_steps = int(global_steps * config.warmup_period_percent / 100)
    if global_step < warmup_steps:
        return peak * (START_OF_PEAK + (1 - START_OF_PEAK) * global_step / warmup_steps)
    done = (global_step - warmup_steps) / (global_steps - warmup_steps)
    floor = config.final_rate_fraction * peak
    return floor + (peak - floor) * height(config, done)
