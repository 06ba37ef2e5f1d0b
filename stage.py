"""Set the stage for training: model, optimizer and scaler on the device, wrapped for compilation and other ranks."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import data
from harness import checkpoint, distributed, resume
from harness.background import Background
from harness.command_line import Request
from harness.config import ModelConfig, TrainConfig
from harness.distributed import Launch
from harness.loss import Objective
from harness.optim import make_optimizer, require_gradients
from harness.plan import Plan
from harness.run_folder import RunFolder
from harness.train_state import TrainState
from harness.watch import StopRequest, Watch
from model import GPTModel, empty_model, initialise, load_weights, read_weights


@dataclass(frozen=True)
class Stage:
    """Everything that training needs; only what `trainee` and `state` hold changes while it runs."""

    launch: Launch
    device: torch.device
    folder: RunFolder
    model_config: ModelConfig
    config: TrainConfig
    splits: data.Splits
    trainee: checkpoint.Trainee
    objective: nn.Module
    """The model's loss, wrapped for compilation and for the other ranks."""
    state: TrainState
    basis: checkpoint.Basis
    stop: StopRequest
    watch: Watch
    saving: Background
    """Writes a checkpoint while training goes on."""
    stop_step: int
    """One past the last global step of this start: the plan's last, or less with --max-steps."""

    @property
    def plan(self) -> Plan:
        """Counts of the run."""
        return self.splits.plan

    def autocast(self) -> torch.autocast:
        """Give the context in which a forward pass has the configured precision."""
        dtype = torch.bfloat16 if self.config.amp_dtype == "bfloat16" else torch.float16
        return torch.autocast(self.device.type, dtype, enabled=self.config.use_amp)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device; on CUDA the host does not wait for it."""
        if self.device.type == "cuda":
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def untrained_model(request: Request) -> GPTModel:
    """Give the model with its initial weights, on the CPU."""
    model = empty_model(request.model, request.config.activation_checkpointing)
    give_initial_weights(model, request.folder, request.config)
    return model


def give_initial_weights(model: GPTModel, folder: RunFolder, config: TrainConfig) -> None:
    """Give a model the values that training starts from: drawn, or imported; raises CheckpointError."""
    if config.initial_weights is None:
        initialise(model, config.seed_of("init"))
    else:
        path = checkpoint.imported_weights(folder, config.initial_weights)
        load_weights(model, read_weights(path), path)


def build(request: Request, launch: Launch, device: torch.device, start: resume.Start) -> checkpoint.Trainee:
    """Make model, optimizer and scaler on the device, with the start's values on every rank.

    Rank 0 alone draws or reads them and hands them on, so that only one machine needs the run's folder.
    """
    config = request.config
    model = empty_model(request.model, config.activation_checkpointing)
    if start.path is None:
        distributed.on_main(launch, lambda: give_initial_weights(model, request.folder, config))
    model = model.to(device)
    scaler = GradScaler(device.type, enabled=config.use_amp and config.amp_dtype == "float16")
    trainee = checkpoint.Trainee(model, make_optimizer(model, config, device), scaler)
    tensors = list(model.state_dict().values())
    if start.path is not None:
        path = start.path
        distributed.on_main(launch, lambda: checkpoint.load(path, trainee))
        scaler.load_state_dict(start.scaler)
        tensors += trainee.optimizer_tensors().values()
    distributed.broadcast(launch, tensors)
    return trainee


def wrap(model: nn.Module, config: TrainConfig, launch: Launch, device: torch.device) -> nn.Module:
    """Make the objective and wrap it for the other ranks, then for the compiler, which sees through DDP's buckets."""
    objective = distributed.distribute(Objective(model), launch, device)
    is_compiled = device.type == "cuda" if config.compile == "auto" else config.compile
    return torch.compile(objective) if is_compiled else objective  # type: ignore[return-value]


def warm_up(stage: Stage) -> None:
    """Run one pass on zeros and throw its gradients away, so that every start is alike before its first step.

    Compilation happens here, outside the clock. DDP orders its buckets anew after the first pass it sees; without
    this one, a resumed run would add up its first gradients in another order than the run that never stopped.
    """
    tokens = torch.zeros(stage.plan.microbatch_size, stage.plan.context_length, dtype=torch.int64)
    with stage.autocast():
        # Two tensors, as always: compiled code asks whether they are one.
        loss = stage.objective(stage.on_device(tokens), stage.on_device(tokens.clone()))
    loss.backward()
    require_gradients(stage.trainee.model)
    stage.trainee.optimizer.zero_grad(set_to_none=stage.launch.world_size == 1)


def rehearse(request: Request, plan: Plan, device: torch.device) -> Stage:
    """Make a stage with drawn weights and made-up tokens that writes nothing, ready for its first step."""
    request = replace(request, config=replace(request.config, initial_weights=None))
    launch, start, stop = Launch(), resume.Start(None, TrainState(), {}), StopRequest()
    trainee = build(request, launch, device, start)
    stage = Stage(
        launch=launch,
        device=device,
        folder=RunFolder(Path(os.devnull)),
        model_config=request.model,
        config=request.config,
        splits=data.Splits(plan, data.MadeUpData(plan, request.model.vocab_size), None, [], ""),
        trainee=trainee,
        objective=wrap(trainee.model, request.config, launch, device),
        state=start.state,
        basis=checkpoint.Basis({}),
        stop=stop,
        watch=Watch(0, 1, 0.0, stop, lambda _: None, None),
        saving=Background(),
        stop_step=plan.global_steps,
    )
    warm_up(stage)
    return stage
