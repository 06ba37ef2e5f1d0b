"""What follows from a configuration for a world size: all batch arithmetic, done once, without torch.

A `Plan` is pure arithmetic: the same configuration and world size always give the same plan, on any machine.
It feeds `--dry-run`, and the training loop takes every count it needs from here.
"""

import math
from dataclasses import dataclass, replace

from harness.config import ModelConfig, TrainConfig, recipe
from harness.errors import ConfigError, DataError

GIB = 2**30
# float32 weight, gradient and the two AdamW moments.
STATE_BYTES_PER_PARAMETER = 16
# Rows of logits that training holds at a time: enough to keep a GPU busy, 0.4 GB of float32 at GPT-2's vocabulary.
LEAN_ROWS = 2048
# What a checkpoint holds: float32 weight and the two moments.
CHECKPOINT_BYTES_PER_PARAMETER = 12

# Dense half-precision peak of one GPU in TFLOP/s (vendor data sheets), by a part of the device's name; the
# first match wins. GeForce figures are those with float32 accumulation, which is what training uses.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("H200", 989.0), ("GH200", 989.0), ("B200", 2250.0),
    ("A100", 312.0), ("A10G", 70.0), ("A10", 125.0), ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("V100", 125.0),
    ("T4", 65.0), ("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 4080", 97.5), ("RTX 3090", 71.0),
    ("RTX 3080", 59.5), ("RTX A6000", 154.8),
)  # fmt: skip


def peak_flops_per_second(device_name: str) -> float | None:
    """Give the dense half-precision peak of a GPU in FLOP/s, or None where it is not known."""
    for part, tflops in PEAK_TFLOPS:
        if part.lower() in device_name.lower():
            return tflops * 1e12
    return None


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters: all of them, and those outside the two embeddings and the output head."""

    total: int
    without_embeddings: int


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count a model's parameters from its configuration; a shared matrix counts once."""
    width = model.emb_dim
    attention = 4 * width * width + width + (3 * width if model.qkv_bias else 0)
    feed_forward = 8 * width * width + 5 * width
    block = attention + feed_forward + 4 * width
    body = model.n_layers * block + 2 * width
    embeddings = (model.vocab_size + model.context_length) * width
    head = 0 if model.tie_weights else model.vocab_size * width
    return ParameterCount(total=body + embeddings + head, without_embeddings=body)


def flops_per_token(model: ModelConfig) -> int:
    """Give model FLOPs per trained token, forward and backward, counting attention in full.

    6 per matrix-multiplication weight (embedding look-ups are free, the head is not) plus 12 x layers x width
    x context for attention scores and values: appendix B of PaLM (arXiv:2204.02311).
    """
    width = model.emb_dim
    matrix_weights = model.n_layers * 12 * width * width + model.vocab_size * width
    return 6 * matrix_weights + 12 * model.n_layers * width * model.context_length


def microbatch_gib(model: ModelConfig, train: TrainConfig) -> float:
    """Estimate the activations of one micro-batch in GiB, at their peak.

    34 bytes per position, channel and block in half precision with fused attention (Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.1, less the attention-score term), twice that in float32, 2 or 4 bytes with
    recomputation plus one block in full; and what the memory-lean loss holds of the logits, 13 bytes an element of
    its rows (counted: benchmarks/memory.py).
    """
    half = 1 if train.use_amp else 2
    per_block = 34 * half * model.emb_dim
    if train.activation_checkpointing:
        per_token = model.n_layers * 2 * half * model.emb_dim + per_block
    else:
        per_token = model.n_layers * per_block
    tokens = train.microbatch_size * model.context_length
    logits = min(tokens, LEAN_ROWS) * model.vocab_size * 13
    return (tokens * per_token + logits) / GIB


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

    @property
    def tokens_needed(self) -> int:
        """Tokens read from the file: one more than trained, because the last target is the token after."""
        return self.train_tokens + 1

    def split(self) -> dict[str, int]:
        """Give how the global batch is split, which may change from one start of a run to the next."""
        return {
            "world_size": self.world_size,
            "microbatch_size": self.microbatch_size,
            "accumulation_steps": self.accumulation_steps,
        }

    def microbatch_index(self, global_step: int, accumulation_step: int, rank: int) -> int:
        """Give the place of a micro-batch in the data: ranks take turns within an accumulation step."""
        return (global_step * self.accumulation_steps + accumulation_step) * self.world_size + rank

    def is_checkpoint_step(self, global_step: int, interval: int) -> bool:
        """Say whether the schedule puts a checkpoint after this global step: 0, every interval, the last."""
        return global_step % interval == 0 or global_step == self.global_steps - 1

    def is_validation_step(self, global_step: int, interval: int | None) -> bool:
        """Say whether a validation follows this global step besides those at checkpoints; None validates never."""
        return interval is not None and global_step % interval == 0

    def checkpoints(self, interval: int) -> int:
        """Count the checkpoints that the schedule writes."""
        return (self.global_steps - 1) // interval + 1 + ((self.global_steps - 1) % interval != 0)


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Give micro-batches per GPU per global step; raises ConfigError where the global batch does not divide."""
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
    """Work out a run's counts.

    `tokens_available` is the number of tokens in the train split from start_train_token on; it is needed where
    min_train_tokens is -1, and otherwise only checked. Raises ConfigError or DataError.
    """
    one_step = Plan(
        world_size=world_size,
        microbatch_size=train.microbatch_size,
        accumulation_steps=accumulation_steps(train, world_size),
        context_length=model.context_length,
        global_steps=1,
    )
    per_step = one_step.tokens_per_global_step
    if train.min_train_tokens == -1:
        if tokens_available is None:
            raise DataError("train.json: min_train_tokens: found -1 (all that fit), wanted a number to plan with")
        # The last target is one token beyond the last input, hence the -1.
        plan = replace(one_step, global_steps=(tokens_available - 1) // per_step)
    else:
        plan = replace(one_step, global_steps=math.ceil(train.min_train_tokens / per_step))
    if tokens_available is not None and (plan.global_steps < 1 or plan.tokens_needed > tokens_available):
        wanted = max(plan.global_steps, 1)
        raise DataError(
            f"train split of {train.dataset}: found {max(tokens_available, 0):,} tokens from token "
            f"{train.start_train_token:,} on, wanted {wanted * per_step + 1:,} "
            f"({wanted:,} global steps x {per_step:,} tokens + 1)"
        )
    return plan


def identity_of(model: ModelConfig, train: TrainConfig, plan: Plan, data_fingerprint: str) -> dict[str, object]:
    """Give what a start must share with a checkpoint to resume from it: all that decides what the run computes.

    How the global batch is split over processes and accumulation steps may change; so may the number of tokens,
    unless a schedule depends on it.
    """
    free = {"min_train_tokens", "microbatch_size", "gradient_accumulation_steps", "global_batch_size"}
    free |= {"compile", "activation_checkpointing", "deterministic", "nonfinite_patience"}
    kept = {key: value for key, value in recipe(model, train).items() if key not in free}
    steps = {"global_steps": plan.global_steps} if train.schedule_learning_rate else {}
    return {**kept, **train.seeds(), "global_batch": plan.global_batch, **steps, "data_fingerprint": data_fingerprint}


def validation_sequences(train: TrainConfig, plan: Plan) -> int:
    """Give the sequences of one validation."""
    return (train.validation_batches or 0) * plan.global_batch


def describe(model: ModelConfig, train: TrainConfig, plan: Plan) -> list[tuple[str, str]]:
    """Give what `--dry-run` prints about a plan, as pairs of a label and a value."""
    parameters = count_parameters(model)
    flops = flops_per_token(model)
    state_gib = parameters.total * STATE_BYTES_PER_PARAMETER / GIB
    activations_gib = microbatch_gib(model, train)
    written = plan.checkpoints(train.checkpoint_interval)
    # The newest K, the best, and the one being written before the oldest goes.
    kept = min(written, (train.checkpoints_to_keep or written) + 2)
    checkpoint_gib = parameters.total * CHECKPOINT_BYTES_PER_PARAMETER / GIB
    rows = [
        ("Parameters", f"{parameters.total:,} ({parameters.without_embeddings:,} without embeddings)"),
        ("Tokens", f"{plan.train_tokens:,}"),
        ("Global steps", f"{plan.global_steps:,}"),
        ("Global batch", f"{plan.global_batch:,} sequences, {plan.tokens_per_global_step:,} tokens"),
        (
            "Made of",
            f"{plan.world_size} processes x micro-batch {plan.microbatch_size} x "
            f"accumulation {plan.accumulation_steps}",
        ),
        (
            "Peak memory per GPU",
            f"about {state_gib + activations_gib:.1f} GiB ({state_gib:.1f} for weights and optimizer, "
            f"{activations_gib:.1f} for a micro-batch)",
        ),
        ("FLOPs per token", f"{flops / 1e6:,.1f} million"),
        ("FLOPs in total", f"{flops * plan.train_tokens:.3e}"),
        (
            "Checkpoints",
            f"{written:,} of {checkpoint_gib:.2f} GiB, at most {kept * checkpoint_gib:.1f} GiB on disk",
        ),
    ]
    if train.expected_tokens_per_second is None:
        rows.append(("Time and cost", "unknown; give expected_tokens_per_second and price_per_hour in train.json"))
    else:
        hours = plan.train_tokens / train.expected_tokens_per_second / 3600
        rows.append(("Time", f"{hours:,.2f} hours at {train.expected_tokens_per_second:,.0f} tokens/second"))
        if train.price_per_hour is not None:
            rows.append(("Cost", f"{hours * train.price_per_hour:,.2f} {train.currency or ''}".rstrip()))
    return rows
