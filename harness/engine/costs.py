"""What a run takes, before it runs: memory, disk, hours and money. Estimates, made without torch."""

from dataclasses import dataclass

from harness.engine.optimizers import OPTIMIZERS
from harness.run.config import ModelConfig, TrainConfig
from harness.run.model_size import ParameterCount, count_parameters, feed_forward_width, flops_per_token
from harness.run.plan import Plan
from harness.run.units import in_gib, in_hours

GIB = 2**30
FLOAT32_BYTES = 4
# What a process holds besides tensors: CUDA's context with its kernels and cuBLAS's workspace, and NCCL's buffers.
CONTEXT_GIB = 0.7
NCCL_GIB = 0.5


@dataclass(frozen=True)
class Hardware:
    """What a machine trains with."""

    kind: str
    """cuda, mps or cpu."""
    name: str
    count: int
    """GPUs, or 1."""
    memory_gib: float
    """Of one GPU, or of the machine."""
    has_bfloat16: bool
    flops_per_second: float
    """Of one device in matrix products, at best."""


def loss_chunk_rows(device_type: str) -> int:
    """Return the most rows of logits that training holds at a time.

    On a GPU the narrowest product of a chunk has rows / 128 x width / 128 tiles, which must keep over 100
    multiprocessors busy. A CPU gains nothing beyond 2048, 0.4 GB of float32 at GPT-2's vocabulary.
    """
    return 2048 if device_type == "cpu" else 4096


@dataclass(frozen=True)
class RunCost:
    """What one run takes; hours and money are None where speed or price are not known."""

    plan: Plan
    parameters: ParameterCount
    flops_per_token: int
    state_gib: float
    """Weights, gradients, optimizer state and on rank 0 the average of the weights, per GPU."""
    microbatch_gib: float
    """Activations of a micro-batch at their peak, per GPU."""
    runtime_gib: float
    """CUDA's and NCCL's own memory, per GPU."""
    checkpoint_bytes: int
    tokens_per_second: float | None
    price_per_hour: float | None
    currency: str

    @property
    def peak_gib(self) -> float:
        """Memory of one GPU at its peak."""
        return self.state_gib + self.microbatch_gib + self.runtime_gib

    @property
    def hours(self) -> float | None:
        """Hours of the whole machine."""
        if self.tokens_per_second is None:
            return None
        return self.plan.train_tokens / self.tokens_per_second / 3600

    @property
    def money(self) -> float | None:
        """Price of the run, in its currency."""
        return None if self.hours is None or self.price_per_hour is None else self.hours * self.price_per_hour


def cost_of(
    model: ModelConfig,
    train: TrainConfig,
    plan: Plan,
    measured_speed: float | None = None,
    device_type: str = "cuda",
) -> RunCost:
    """Estimate what a run takes; the speed in tokens per second is as measured, or else as train.json expects it."""
    parameters = count_parameters(model)
    state = OPTIMIZERS[train.optimizer].state_bytes(parameters)
    weights = FLOAT32_BYTES * parameters.total
    average = 0 if train.weight_average_decay is None else weights
    return RunCost(
        plan=plan,
        parameters=parameters,
        flops_per_token=flops_per_token(model),
        state_gib=(2 * weights + state + average) / GIB,  # gradients are as large as the weights
        microbatch_gib=microbatch_gib(model, train, device_type),
        runtime_gib=CONTEXT_GIB + (NCCL_GIB if plan.world_size > 1 else 0),
        checkpoint_bytes=weights + state + average,
        tokens_per_second=measured_speed or train.expected_tokens_per_second,
        price_per_hour=train.price_per_hour,
        currency=train.currency or "",
    )


def microbatch_gib(model: ModelConfig, train: TrainConfig, device_type: str = "cuda") -> float:
    """Estimate the activations of one micro-batch in GiB, at their peak.

    A block keeps for its backward pass, per position and channel: the residual stream twice in float32; in the type
    of the products two normalised inputs, query, key and value, the attention's output, and the hidden layer before
    and after its activation; and a byte for each of two dropout masks. Rotation, QK norm and the mixing of values
    keep two more tensors each, gates one more hidden layer (where they are not compiled, two). A mixture of experts
    keeps the router's input in float32, and of every active expert its input, hidden layers and output. With
    recomputation a block keeps the stream once, and after the loss one block everything. Half-precision copies of the
    blocks' weights are kept too, unless compiled code makes them again. The loss holds a chunk of logits and of their
    gradient, the head in half precision and the head's gradient in float32; where it is not compiled, float32 copies
    of the logits besides. Tested against `benchmarks/memory.py`, and against generated code in
    benchmarks/results/cuda-check.json.
    """
    width, product = model.emb_dim, 2 if train.use_amp else FLOAT32_BYTES
    is_eager = not (device_type == "cuda" if train.compile == "auto" else train.compile)
    pairs = (model.positions == "rotary") + model.qk_norm + model.value_residual
    hidden_layers = 2 + (model.feed_forward == "swiglu") * (2 if is_eager else 1)
    per_block = (2 * FLOAT32_BYTES + (6 + 2 * pairs) * product + 2 * (model.drop_rate > 0)) * width
    rows = 1 if model.moe is None else model.moe.num_active_experts
    per_block += rows * hidden_layers * feed_forward_width(model) * product
    if model.moe is not None:
        per_block += (FLOAT32_BYTES - product + 2 * rows * product) * width
    tokens = train.microbatch_size * model.context_length
    ends = (2 * FLOAT32_BYTES + 3 * product) * width  # embeddings and final norm; the loss's input and its gradient
    keeps_casts = train.use_amp and (is_eager or not train.activation_checkpointing)
    weights = product * count_parameters(model).without_embeddings if keeps_casts else 0
    per_logit = 2 * product
    if is_eager and train.use_amp:  # the softmax, and in bfloat16 its input
        per_logit += FLOAT32_BYTES + (2 if train.amp_dtype == "bfloat16" and model.logit_softcap is None else 0)
    if is_eager and model.logit_softcap is not None:  # the capped logits and their slope
        per_logit += 2 * FLOAT32_BYTES
    logits = min(tokens, loss_chunk_rows(device_type)) * model.vocab_size * per_logit
    head = model.vocab_size * width * (product + FLOAT32_BYTES)
    if train.activation_checkpointing:
        blocks, at_once = model.n_layers * FLOAT32_BYTES * width, max(tokens * per_block, logits)
    else:
        blocks, at_once = model.n_layers * per_block, logits
    return (tokens * (blocks + ends) + weights + head + at_once) / GIB


def describe(cost: RunCost, train: TrainConfig, device_type: str = "cuda") -> list[tuple[str, str]]:
    """Return what `--dry-run` prints about a run on such devices, as pairs of a label and a value."""
    plan, parameters = cost.plan, cost.parameters
    written = plan.checkpoints(train.checkpoint_interval)
    # The newest K, the best, and the one being written before the oldest goes.
    kept = min(written, (train.checkpoints_to_keep or written) + 2)
    checkpoint_gib = cost.checkpoint_bytes / GIB
    is_sparse = parameters.active < parameters.total
    active = f"; {parameters.active:,} active for each token" if is_sparse else ""
    rows = [
        ("Parameters", f"{parameters.total:,} ({parameters.without_embeddings:,} without embeddings{active})"),
        ("Tokens", f"{plan.train_tokens:,}"),
        ("Global steps", f"{plan.global_steps:,}"),
        ("Global batch", f"{plan.global_batch:,} sequences, {plan.tokens_per_global_step:,} tokens"),
        (
            "Made of",
            f"{plan.world_size} processes x micro-batch {plan.microbatch_size} x "
            f"accumulation {plan.accumulation_steps}",
        ),
        _memory_row(cost, device_type),
        ("FLOPs per token", f"{cost.flops_per_token / 1e6:,.1f} million"),
        ("FLOPs in total", f"{cost.flops_per_token * plan.train_tokens:.3e}"),
        (
            "Checkpoints",
            f"{written:,} of {in_gib(checkpoint_gib)}, at most {in_gib(kept * checkpoint_gib)} on disk",
        ),
    ]
    if cost.hours is None:
        return [
            *rows,
            ("Time and cost", "unknown; give expected_tokens_per_second and price_per_hour in train.json"),
        ]
    rows.append(("Time", f"{in_hours(cost.hours)} at {cost.tokens_per_second:,.0f} tokens/second"))
    if cost.money is not None:
        rows.append(("Cost", f"{cost.money:,.2f} {cost.currency}".rstrip()))
    return rows


def _memory_row(cost: RunCost, device_type: str) -> tuple[str, str]:
    parts = f"{in_gib(cost.state_gib)} for weights and optimizer, {in_gib(cost.microbatch_gib)} for a micro-batch"
    if device_type == "cuda":
        return "Peak memory per GPU", f"about {in_gib(cost.peak_gib)} ({parts}, {in_gib(cost.runtime_gib)} for CUDA)"
    tensors_gib = cost.state_gib + cost.microbatch_gib
    return "Peak memory per process", f"about {in_gib(tensors_gib)} ({parts}), besides the program's own"
