"""Our model and step in several arrangements: from the published harness's to the default one, a technique at a time.

Every arrangement is made by `build(shape, device)`, which gives a function that trains one global step and waits for
nothing but what the arrangement itself waits for. A contender from outside is a Python file with the same function.
"""

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

import ddp_train
from data import SyntheticData
from harness.engine import distributed
from harness.engine.loss import Objective, next_token_loss
from harness.engine.optimizers import make_optimizer
from harness.engine.step import guarded_step
from harness.run.config import ModelConfig, TrainConfig
from harness.run.plan import Plan
from harness.run.run_folder import RunFolder
from model import Attention, GPTModel, LayerNorm, initialise, uninitialized_model
from training.arguments import RunRequest, parse_arguments
from training.context import synthetic_context

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """What is trained: the model, and sequences per micro-batch and global step."""

    model: ModelConfig
    microbatch_size: int
    accumulation_steps: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Trained tokens per global step."""
        return self.microbatch_size * self.accumulation_steps * self.model.context_length

    def tied(self) -> "Shape":
        """Return the shape with its output head tied to the embedding, as most other projects' models are."""
        return replace(self, model=replace(self.model, tie_weights=True))

    def microbatches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the same random tokens and targets, each (B, T), to every arrangement."""
        plan = Plan(1, self.microbatch_size, self.accumulation_steps, self.model.context_length, 1)
        made_up = SyntheticData(plan, self.model.vocab_size)
        return [made_up.microbatch(0, step, 0) for step in range(self.accumulation_steps)]


class NaiveAttention(Attention):
    """Attention as the textbook writes it: all scores, a mask, softmax, dropout, and a weighted sum."""

    def forward(self, x: Tensor, *_: None) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # of GPT-2 alone
        """Let every position of x (B, T, C) attend to itself and those before it; return what the model's does."""
        length = x.shape[1]
        query, key, value = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.W_query, self.W_key, self.W_value)
        )
        scores = query @ key.transpose(2, 3)  # (B, H, T, T)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(later, -math.inf) / math.sqrt(key.shape[-1]), dim=-1)
        weights = F.dropout(weights, self.drop_rate, self.training)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2)), value


class PlainLayerNorm(LayerNorm):
    """Layer normalisation as the textbook writes it: mean and variance one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


@dataclass(frozen=True)
class Techniques:
    """What an arrangement does differently from the published one; all off is the published arrangement."""

    fused_attention: bool = False
    fused_layer_norm: bool = False
    device_side_step: bool = False
    """Fused AdamW, finite check, clipping and loss sum that never make the host wait."""
    kept_memory: bool = False
    """On a CPU: the allocator keeps large blocks instead of paging them in anew for every micro-batch."""
    bfloat16: bool = False
    compiled: bool = False
    lean_loss: bool = False


def build_arrangement(shape: Shape, device: torch.device, techniques: Techniques) -> Step:
    """Return a global step of our model in an arrangement; on a CPU it computes in float32."""
    model = prepared_model(shape, device, techniques)
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if techniques.bfloat16 else torch.float16
    scaler = GradScaler(device.type, enabled=is_cuda and not techniques.bfloat16)
    config = train_config(shape)
    optimizer = make_optimizer(model, config, device)
    if not techniques.device_side_step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1, fused=False)
    objective = Objective(model) if techniques.lean_loss else PlainObjective(model)
    forward = torch.compile(objective) if techniques.compiled else objective
    batches = shape.microbatches()

    def backward(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=is_cuda):
            loss, _ = forward(tokens.to(device), targets.to(device))
        scaler.scale(loss / shape.accumulation_steps).backward()
        return loss.detach()

    def published_step() -> None:
        keep_freed_memory(techniques.kept_memory)
        for batch in batches:
            backward(*batch).item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.5).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def device_side_step() -> None:
        keep_freed_memory(techniques.kept_memory)
        torch.stack([backward(*batch) for batch in batches]).sum()
        guarded_step(optimizer, scaler, config.learning_rate, config.clipping_max_norm)

    return device_side_step if techniques.device_side_step else published_step


class PlainObjective(nn.Module):
    """The loss from all logits in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Return the mean loss of a micro-batch, as Objective does; tokens and targets (B, T)."""
        return next_token_loss(self.model(tokens), targets), None


def prepared_model(shape: Shape, device: torch.device, techniques: Techniques) -> GPTModel:
    """Make the model with its initial weights, and the plain modules in place of those not yet wanted."""
    model = uninitialized_model(shape.model)
    initialise(model, 42)
    replace_modules(model, techniques)
    return model.to(device)


def replace_modules(model: GPTModel, techniques: Techniques) -> None:
    """Put the plain modules in place of the fused ones that are not wanted."""
    for module in model.modules():
        if isinstance(module, Attention) and not techniques.fused_attention:
            module.__class__ = NaiveAttention
        elif isinstance(module, LayerNorm) and not techniques.fused_layer_norm:
            module.__class__ = PlainLayerNorm


def build_default(shape: Shape, device: torch.device) -> Step:
    """Return the global step of `ddp_train.py` itself: its own functions, on made-up tokens."""
    config = train_config(shape)
    plan = Plan(1, shape.microbatch_size, shape.accumulation_steps, shape.model.context_length, 10**6)
    distributed.set_up_kernels(device, use_tf32=config.use_amp, deterministic=False)
    request = RunRequest(
        parse_arguments(None, ["made-up", "datasets"]), RunFolder(Path(os.devnull)), shape.model, config
    )
    context = synthetic_context(request, plan, device)

    def step() -> None:
        keep_freed_memory(True)
        ddp_train.accumulate_gradients(context, 0)
        guarded_step(context.optimizer, context.scaler, config.learning_rate, config.clipping_max_norm)

    return step


def train_config(shape: Shape) -> TrainConfig:
    """Return the training configuration of the published runs with clipping, in bfloat16 on a GPU."""
    return TrainConfig(
        dataset="made-up",
        min_train_tokens=shape.tokens_per_step,
        start_train_token=0,
        start_val_token=0,
        microbatch_size=shape.microbatch_size,
        gradient_accumulation_steps=shape.accumulation_steps,
        checkpoint_interval=1,
        clipping_max_norm=3.5,
        use_amp=torch.cuda.is_available(),
        amp_dtype="bfloat16",
    )


def keep_freed_memory(keep: bool) -> None:
    """Switch between glibc's defaults for large blocks and what the harness sets, within one process."""
    if keep:
        distributed.keep_freed_memory()
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(distributed.M_MMAP_MAX, 65_536)
    libc.mallopt(distributed.M_TRIM_THRESHOLD, 128 * 1024)
    libc.malloc_trim(0)
