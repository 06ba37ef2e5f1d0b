"""All batch arithmetic of a run, derived once from its configuration and the world size, without torch.

The same configuration and world size give the same plan on any machine. The training loop takes every count from it.
"""

import math
from dataclasses import asdict, dataclass, replace

from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError, DataError


@dataclass(frozen=True)
class Plan:
    """Counts of one run at one world size. Batches are in sequences, sizes in tokens."""

    world_size: int
    microbatch_size: int
    accumulation_steps: int
    context_length: int
    global_steps: int

    @property
    def global_batch(self) -> int:
        """Sequences per global step."""
        return self.world_size * self.microbatch_size * self.accumulation_steps

    @property
    def tokens_per_global_step(self) -> int:
        """Trained tokens per global step."""
        return self.global_batch * self.context_length

    @property
    def train_tokens(self) -> int:
        """Trained tokens of the whole run."""
        return self.global_steps * self.tokens_per_global_step

    def describe(self) -> dict[str, int]:
        """Return the counts as run.json has them."""
        return {**asdict(self), "global_batch": self.global_batch, "train_tokens": self.train_tokens}

    def batch_split(self) -> dict[str, int]:
        """Return how the global batch is split, which may change between two starts of a run."""
        return {
            "world_size": self.world_size,
            "microbatch_size": self.microbatch_size,
            "accumulation_steps": self.accumulation_steps,
        }

    def microbatch_index(self, global_step: int, accumulation_step: int, rank: int) -> int:
        """Return the index of a micro-batch in the data; within an accumulation step, ranks take consecutive ones."""
        return (global_step * self.accumulation_steps + accumulation_step) * self.world_size + rank

    def is_checkpoint_step(self, global_step: int, interval: int) -> bool:
        """Return whether a checkpoint is scheduled after this global step: step 0, every interval, the last."""
        return global_step % interval == 0 or global_step == self.global_steps - 1

    def is_validation_step(self, global_step: int, interval: int | None) -> bool:
        """Return whether a validation follows this global step, besides those at checkpoints; None: never."""
        return interval is not None and global_step % interval == 0

    def checkpoints(self, interval: int) -> int:
        """Return the number of scheduled checkpoints."""
        return (self.global_steps - 1) // interval + 1 + ((self.global_steps - 1) % interval != 0)


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Return micro-batches per GPU per global step; raises ConfigError if they do not divide the global batch."""
    if train.global_batch_size is None:
        return train.gradient_accumulation_steps
    per_pass = train.microbatch_size * world_size
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.json: global_batch_size: found {train.global_batch_size}, wanted a multiple of "
            f"microbatch_size x world size ({train.microbatch_size} x {world_size} = {per_pass})"
        )
    return train.global_batch_size // per_pass


def make_plan(model: ModelConfig, train: TrainConfig, world_size: int, tokens_available: int | None = None) -> Plan:
    """Return a run's plan.

    `tokens_available` is the number of tokens in the train split from start_train_token on, of a mixture until one of
    its datasets is used up; it is required if min_train_tokens is -1, and otherwise only checked. Raises ConfigError
    or DataError.
    """
    one_step = Plan(
        world_size=world_size,
        microbatch_size=train.microbatch_size,
        accumulation_steps=accumulation_steps(train, world_size),
        context_length=model.context_length,
        global_steps=1,
    )
    per_step = one_step.tokens_per_global_step
    most_steps = None
    if tokens_available is not None:
        most_steps = train.epochs * epoch_sequences(tokens_available, model.context_length) // one_step.global_batch
    if train.min_train_tokens == -1:
        if most_steps is None:
            raise DataError("train.json: min_train_tokens: found -1 (all that fit), wanted a number to plan with")
        plan = replace(one_step, global_steps=most_steps)
    else:
        plan = replace(one_step, global_steps=math.ceil(train.min_train_tokens / per_step))
    if most_steps is not None and not 1 <= plan.global_steps <= most_steps:
        assert tokens_available is not None
        often = f", {train.epochs} times (train.json: epochs)" if train.epochs > 1 else ""
        if len(train.datasets) > 1:
            often = f" until one of them is used up{often or ' (train.json: epochs lets them be repeated)'}"
        wanted = max(plan.global_steps, 1)
        raise DataError(
            f"train split of {train.dataset_shares}: found {max(tokens_available, 0):,} tokens from token "
            f"{train.start_train_token:,} on{often}, wanted {wanted * per_step + 1:,} "
            f"({wanted:,} global steps x {per_step:,} tokens + 1)"
        )
    return plan


def epoch_sequences(tokens_available: int, context_length: int) -> int:
    """Return the whole sequences in so many tokens; the last target is one token beyond the last input."""
    return max(0, tokens_available - 1) // context_length


def validation_sequences(train: TrainConfig, plan: Plan) -> int:
    """Return the number of sequences in one validation."""
    return (train.validation_batches or 0) * plan.global_batch
