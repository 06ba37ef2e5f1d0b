"""A run's progress: all counters that change during training, saved in every checkpoint."""

import math
from dataclasses import dataclass


@dataclass
class TrainState:
    """All counters of a run, as state.json stores them.

    An interval is the global steps since the last scheduled checkpoint. Losses are in nats per token.
    """

    next_step: int = 0
    """Global steps completed, and so the index of the next."""
    optimizer_steps: int = 0
    """Global steps that changed the weights."""
    skipped_steps: int = 0
    """Global steps skipped for non-finite gradients."""
    consecutive_skips: int = 0
    """Skipped steps since the last one that changed the weights."""
    tokens: int = 0
    """Tokens trained on."""
    elapsed_seconds: float = 0.0
    """Training time over all starts of the run."""
    interval_loss_sum: float = 0.0
    interval_steps: int = 0
    last_interval_loss: float | None = None
    """Mean train loss of the previous interval; null if it was not finite."""
    best_loss: float | None = None
    """Lowest mean train loss of an interval, or validation loss where the run validates."""
    best_step: int | None = None
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
