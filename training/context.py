"""Build what training needs: model, optimizer and scaler on the device, wrapped for compilation and other ranks."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import data
from harness.engine import checkpoint, distributed
from harness.engine.averaging import WeightAverage
from harness.engine.background import BackgroundTask
from harness.engine.distributed import Launch
from harness.engine.identity import ResumeIdentity
from harness.engine.loss import Objective
from harness.engine.opening import imported_weights, read_tensors
from harness.engine.optimizer_state import description_of, empty_like_state, named_state
from harness.engine.optimizers import make_optimizer
from harness.engine.resume import ResumePoint, from_the_beginning
from harness.engine.step import require_gradients
from harness.engine.watchdog import StopRequest, Watchdog
from harness.run.config import ModelConfig, TrainConfig
from harness.run.plan import Plan
from harness.run.run_folder import RunFolder
from harness.run.train_state import TrainState
from harness.tokens.tokenizer import Tokenizer, tokenizer_of_model
from model import GPTModel, initialise, load_weights, uninitialized_model
from training.arguments import RunRequest
from training.reading import ReadAhead


@dataclass(frozen=True)
class TrainContext:
    """Everything that training needs; only model, optimizer, scaler, average and state change while it runs."""

    launch: Launch
    device: torch.device
    folder: RunFolder
    model_config: ModelConfig
    config: TrainConfig
    splits: data.Splits
    reader: ReadAhead
    """Of the train split."""
    model: GPTModel
    """The model without wrappers."""
    optimizer: Optimizer
    scaler: GradScaler
    average: WeightAverage | None
    """On rank 0, where the run keeps one."""
    objective: nn.Module
    """The model's loss, wrapped for compilation and for the other ranks."""
    state: TrainState
    identity: ResumeIdentity
    stop: StopRequest
    watchdog: Watchdog
    checkpoint_writer: BackgroundTask
    """Writes a checkpoint while training goes on."""
    stop_step: int
    """One past the last global step of this start: the plan's last, or less with --max-steps."""

    @property
    def plan(self) -> Plan:
        """Counts of the run."""
        return self.splits.plan

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the data; where they do not say, GPT-2's if the model has its ids."""
        return self.splits.tokenizer or tokenizer_of_model(self.folder.tokenizer_json, self.model_config.vocab_size)

    def autocast(self) -> torch.autocast:
        """Return the context in which a forward pass has the configured precision."""
        dtype = torch.bfloat16 if self.config.amp_dtype == "bfloat16" else torch.float16
        return torch.autocast(self.device.type, dtype, enabled=self.config.use_amp)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device; on CUDA the host does not wait for it."""
        tensor = tensor.contiguous()  # whatever the data's order: compiled code is made for one layout
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def build(
    request: RunRequest, launch: Launch, device: torch.device, point: ResumePoint
) -> tuple[GPTModel, Optimizer, GradScaler, WeightAverage | None]:
    """Make model, optimizer and scaler on the device, with the resume point's values on every rank.

    Rank 0 alone draws or reads them and hands them on, so that only one machine needs the run's folder. It alone has
    the average of the weights, where the run keeps one.
    """
    config, found = request.config, point.checkpoint
    model = uninitialized_model(request.model_config, config.activation_checkpointing)
    if found is None:
        distributed.run_on_rank0(launch, lambda: give_initial_weights(model, request.folder, config))
    model = model.to(device)
    scaler = GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
    optimizer = make_optimizer(model, config, device)
    tensors = list(model.state_dict().values())
    if found is not None:
        distributed.run_on_rank0(launch, lambda: checkpoint.load(found, model, optimizer))
        if scaler.is_enabled():
            scaler.load_state_dict(point.metadata.scaler)
        tensors += _optimizer_tensors_on_every_rank(launch, model, optimizer, point.metadata.optimizer_numbers)
    distributed.broadcast(launch, tensors)
    average = None
    if config.weight_average_decay is not None and launch.is_main:
        average = WeightAverage(model, config.weight_average_decay, point.state.optimizer_steps)
    if found is not None and config.weight_average_decay is not None:
        distributed.run_on_rank0(launch, lambda: checkpoint.load_average(found, cast(WeightAverage, average)))
    return model, optimizer, scaler, average


def _optimizer_tensors_on_every_rank(
    launch: Launch, model: GPTModel, optimizer: Optimizer, numbers: dict[str, float]
) -> list[Tensor]:
    """Make room on the other ranks for the optimizer state that rank 0 has read; return its tensors in order."""
    described = distributed.run_on_rank0(launch, lambda: description_of(named_state(optimizer, model)[0]))
    if launch.is_main:
        return list(named_state(optimizer, model)[0].values())
    return empty_like_state(optimizer, model, described, numbers)


def untrained_model(request: RunRequest) -> GPTModel:
    """Return the model with its initial weights, on the CPU."""
    model = uninitialized_model(request.model_config, request.config.activation_checkpointing)
    give_initial_weights(model, request.folder, request.config)
    return model


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of a model has, by name."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in GPTModel(config).state_dict().items()}


def give_initial_weights(model: GPTModel, folder: RunFolder, config: TrainConfig) -> None:
    """Set the values that training starts from in a model: drawn, or imported; raises CheckpointError."""
    if config.initial_weights is None:
        initialise(model, config.seed_of("init"))
    else:
        path = imported_weights(folder, config.initial_weights)
        load_weights(model, read_tensors(path), path)


def wrap(model: nn.Module, config: TrainConfig, launch: Launch, device: torch.device) -> nn.Module:
    """Make the objective and wrap it for the other ranks, then for the compiler, which sees through DDP's buckets."""
    objective = distributed.wrap_ddp(Objective(model, config.z_loss, config.moe_router_loss_scale), launch, device)
    is_compiled = device.type == "cuda" if config.compile == "auto" else config.compile
    return torch.compile(objective) if is_compiled else objective  # type: ignore[return-value]


def compile_and_build_buckets(context: TrainContext) -> None:
    """Run one pass on zeros and throw its gradients away, so that every start is alike before its first step.

    Compilation happens here, outside the clock. DDP reorders its buckets after the first pass it sees; without this
    one, a resumed run would add up its first gradients in another order than the run that never stopped.
    """
    tokens = torch.zeros(context.plan.microbatch_size, context.plan.context_length, dtype=torch.int64)
    with context.autocast():
        # Two tensors, as always: compiled code asks whether they are one.
        loss, _ = context.objective(context.on_device(tokens), context.on_device(tokens.clone()))
    loss.backward()
    require_gradients(context.model)
    context.optimizer.zero_grad(set_to_none=context.launch.world_size == 1)


def synthetic_context(request: RunRequest, plan: Plan, device: torch.device) -> TrainContext:
    """Make a context with drawn weights and random tokens that writes nothing, ready for its first step."""
    request = replace(request, config=replace(request.config, initial_weights=None))
    launch, stop, identity = Launch(), StopRequest(), ResumeIdentity({})
    point = from_the_beginning(identity)
    model, optimizer, scaler, average = build(request, launch, device, point)
    source = data.SyntheticData(plan, request.model_config.vocab_size)
    context = TrainContext(
        launch=launch,
        device=device,
        folder=RunFolder(Path(os.devnull)),
        model_config=request.model_config,
        config=request.config,
        splits=data.Splits(plan, source, None, None, {}, ""),
        reader=ReadAhead(source, 0, plan, range(0)),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        objective=wrap(model, request.config, launch, device),
        state=point.state,
        identity=identity,
        stop=stop,
        watchdog=Watchdog(0, 1, 0.0, stop, lambda _: None, None),
        checkpoint_writer=BackgroundTask(),
        stop_step=plan.global_steps,
    )
    compile_and_build_buckets(context)
    return context
