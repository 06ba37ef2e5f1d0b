"""A run's progress: all counters that change during training, saved in every checkpoint."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


@dataclass
class TrainState:
    """All counters of a run, as state.json stores them.

    An interval is the global steps since the last scheduled checkpoint. Losses are in nats per token.
    """

    # For what reads state.json, which may be a stranger's.
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    next_step: Count = 0
    """Global steps completed, and so the index of the next."""
    optimizer_steps: Count = 0
    """Global steps that changed the weights."""
    skipped_steps: Count = 0
    """Global steps skipped for non-finite gradients."""
    consecutive_skips: Count = 0
    """Skipped steps since the last one that changed the weights."""
    tokens: Count = 0
    """Tokens trained on."""
    elapsed_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Training time over all starts of the run."""
    interval_loss_sum: float = 0.0
    interval_steps: Count = 0
    last_interval_loss: float | None = None
    """Mean train loss of the previous interval; null if it was not finite."""
    best_loss: float | None = None
    """Lowest mean train loss of an interval, or validation loss where the run validates."""
    best_step: Count | None = None
    best_is_validation: bool = False
    """Whether best_loss is a validation loss."""

    def count(self, tokens: int, loss: float, was_skipped: bool) -> None:
        """Count one completed global step; a non-finite loss is left out of the interval's mean."""
        self.next_step += 1
        self.tokens += tokens
        self.optimizer_steps += not was_skipped
        self.skipped_steps += was_skipped
        self.consecutive_skips = self.consecutive_skips + 1 if was_skipped else 0
        if math.isfinite(loss):
            self.interval_loss_sum += loss
            self.interval_steps += 1

    @property
    def interval_loss(self) -> float:
        """Mean train loss of the interval so far; NaN before its first step."""
        return self.interval_loss_sum / self.interval_steps if self.interval_steps else math.nan

    def close_interval(self, validation_loss: float | None) -> bool:
        """End the interval at a scheduled checkpoint; return whether that checkpoint is the best so far."""
        loss = self.interval_loss if validation_loss is None else validation_loss
        self.last_interval_loss = self.interval_loss if self.interval_steps else None
        is_validation = validation_loss is not None
        # Train and validation losses are not comparable: a run that starts or stops validating has no best loss yet.
        best = self.best_loss if self.best_is_validation == is_validation else None
        is_best = math.isfinite(loss) and (best is None or loss < best)
        if is_best:
            self.best_loss, self.best_step, self.best_is_validation = loss, self.next_step - 1, is_validation
        self.interval_loss_sum, self.interval_steps = 0.0, 0
        return is_best

    def contradiction(self, step: int, tokens_per_step: int | None) -> str | None:
        """Return what cannot be true after global step `step`, as "found X, wanted Y"; None where all agrees.

        `tokens_per_step` is None where it is not known.
        """
        done = step + 1
        wanted: dict[str, tuple[int, int]] = {
            "next_step": (self.next_step, done),
            "optimizer_steps + skipped_steps": (self.optimizer_steps + self.skipped_steps, done),
            "consecutive_skips": (self.consecutive_skips, min(self.consecutive_skips, self.skipped_steps)),
            "interval_steps": (self.interval_steps, min(self.interval_steps, done)),
            "tokens": (self.tokens, self.tokens if tokens_per_step is None else done * tokens_per_step),
            "best_step": (self.best_step or 0, min(self.best_step or 0, step)),
        }
        for name, (found, right) in wanted.items():
            if found != right:
                return f"{name}: found {found}, wanted {right} after global step {step}"
        if (self.best_step is None) != (self.best_loss is None):
            return "found a best step without its loss, or a best loss without its step"
        return None
