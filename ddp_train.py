"""Train one run.

A run is a folder with model.json and train.json. Start it, and start it again after an interruption, with

  torchrun --nproc_per_node=8 ddp_train.py 8xa100m40-baseline datasets

or with plain python for one process. What is run lies in the run's files; how to run it, in the flags.
"""

import argparse
import os
import sys
from pathlib import Path

from harness.config import ModelConfig, TrainConfig, hash_of_json, recipe_hash
from harness.errors import exit_status_of
from harness.plan import (
    Plan,
    describe,
    flops_per_token,
    identity_of,
    make_plan,
    peak_flops_per_second,
    validation_sequences,
)
from harness.run_folder import RunFolder, describe_start, json_number, open_run, write_json

ROOT = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name of a folder in the runs directory")
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path, help="where datasets lie, or are put")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="resume from it: a name, latest or best")
    parser.add_argument("--fresh", action="store_true", help="start over; what there was is moved aside")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs", help="where runs live (default: runs)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    parser.add_argument("--max-steps", type=_positive, metavar="K", help="stop, saved, after global step K-1")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--world-size", type=_positive, metavar="W", help="with --dry-run: plan for W processes")
    parser.add_argument(
        "--dump-initial-weights", type=Path, metavar="FILE", help="write the untrained model and exit"
    )
    arguments = parser.parse_args()
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; when training, torchrun sets the number of processes")
    if arguments.fresh and arguments.checkpoint:
        parser.error("--fresh starts over, so it takes no CHECKPOINT")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number above 0")
    return int(text)


def read_request() -> tuple[argparse.Namespace, RunFolder, ModelConfig, TrainConfig]:
    """Read the command line and the run's two files; raises ConfigError with every error in them."""
    arguments = parse_arguments()
    folder = open_run(arguments.runs_dir, arguments.run)
    return arguments, folder, *folder.read_configs()


# What every process of a machine finds wrong alike, the first of them says.
speaks = os.environ.get("LOCAL_RANK", "0") == "0"

if __name__ == "__main__" and (status := exit_status_of(read_request, speaks)):
    # Importing torch takes seconds, so a mistyped key is refused before it.
    sys.exit(status)

import math
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import data
from harness import checkpoint, distributed
from harness.charts import ChartPainter
from harness.distributed import Launch, StopRequest, gradient_sync
from harness.errors import StopRequestedError
from harness.evaluate import sequence_losses
from harness.loss import Objective, first_loss_warning
from harness.metrics import StepLog, StepReport
from harness.optim import guarded_step, learning_rate_at, make_optimizer, require_gradients
from harness.randomness import seed_dropout, stream_seed
from harness.sampling import SampleSettings, continue_text
from harness.tokenizer import VOCAB_SIZE
from model import GPTModel, empty_model, fingerprint, initialise


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
    state: checkpoint.TrainState
    identity: dict[str, object]
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
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def main() -> None:
    """Read the run, prepare everything that can be refused, then train and report."""
    arguments, folder, model_config, config = read_request()
    launch = distributed.launch_from_environment()
    if arguments.dry_run:
        dry_run(arguments, model_config, config, arguments.world_size or launch.world_size)
        return
    if arguments.dump_initial_weights:
        if launch.is_main:
            weights = untrained_model(model_config, config).state_dict()
            checkpoint.save_tensors(weights, arguments.dump_initial_weights)
        return
    device = distributed.choose_device(arguments.device, launch)
    distributed.set_up_kernels(device, use_tf32=config.use_amp, deterministic=config.deterministic)

    with ExitStack() as stack:
        painter = ChartPainter(folder)
        if launch.is_main:
            stack.enter_context(folder.locked())
            stack.enter_context(painter)
            stack.enter_context(folder.reporting_failure())
        data.ensure_dataset(arguments.datasets_dir, config)
        splits = data.open_splits(
            arguments.datasets_dir, model_config, config, launch.world_size, reads_through=launch.local_rank == 0
        )

        stack.enter_context(distributed.process_group(launch, device))
        identity = identity_of(model_config, config, splits.plan, splits.train.fingerprint())
        distributed.agree(launch, "configuration, plan or data", hash_of_json([identity, asdict(splits.plan)]))
        start = distributed.on_main(launch, lambda: choose_start(folder, arguments, identity))
        stop_step = min(arguments.max_steps or splits.plan.global_steps, splits.plan.global_steps)
        if start.state.next_step >= stop_step:
            report_nothing_to_do(launch, folder, splits.plan, start.state)
            return

        trainee = build(model_config, config, launch, device, start)
        stage = Stage(
            launch=launch,
            device=device,
            folder=folder,
            model_config=model_config,
            config=config,
            splits=splits,
            trainee=trainee,
            objective=wrap(trainee.model, config, launch, device),
            state=start.state,
            identity=identity,
            stop_step=stop_step,
        )
        warm_up(stage)
        record_start(stage)
        train(stage, painter)
        report_end(stage)


def choose_start(folder: RunFolder, arguments: argparse.Namespace, identity: dict[str, object]) -> checkpoint.Start:
    """Decide where to begin; with --fresh what there was is moved aside first."""
    if arguments.fresh and (aside := folder.set_aside(folder.checkpoints, folder.metrics_jsonl, folder.evals)):
        print(f"Starting over; what there was is in {aside}")
    return checkpoint.choose_start(folder, arguments.checkpoint, identity)


def report_nothing_to_do(launch: Launch, folder: RunFolder, plan: Plan, state: checkpoint.TrainState) -> None:
    """Say that the run has got as far as it was asked to; its last process may have died before it could say so."""
    if not launch.is_main:
        return
    if state.next_step >= plan.global_steps:
        print(f"{folder.path} is already complete: {state.next_step:,} global steps")
        if folder.read_status().get("state") != "complete":
            folder.write_status("complete", state.next_step - 1, 0)
    else:
        print(f"{folder.path} has already done {state.next_step:,} global steps, as many as --max-steps asks for")


def train(stage: Stage, painter: ChartPainter) -> None:
    """Train until stage.stop_step; one pass of the loop is one global step.

    Raises StopRequestedError after saving where a rank was asked to stop, and NonFiniteError.
    """
    config, plan, state, launch = stage.config, stage.plan, stage.state, stage.launch
    peak = peak_flops_per_second(distributed.device_name(stage.device))
    log = StepLog(
        launch=launch,
        plan=plan,
        config=config,
        progress=state,
        file=stage.folder.metrics_jsonl,
        flops_per_token=flops_per_token(stage.model_config),
        peak_flops_per_second=None if peak is None else peak * launch.world_size,
        device=stage.device,
    )
    stop = StopRequest()
    with stop.listening(), closing(log):
        for step in range(state.next_step, stage.stop_step):
            learning_rate = learning_rate_at(config, step, plan.global_steps)
            losses = accumulate_gradients(stage, step)
            outcome = guarded_step(
                stage.trainee.optimizer, stage.trainee.scaler, learning_rate, config.clipping_max_norm
            )
            report = StepReport(launch, losses, outcome.grad_norm, outcome.is_finite, stop.requested)
            log.submit(step, report, learning_rate)

            is_scheduled = plan.is_checkpoint_step(step, config.checkpoint_interval)
            validation = None
            if is_scheduled or plan.is_validation_step(step, config.validation_interval):
                log.catch_up()  # now the device is idle, and what follows is in no step's time
                validation, observed = observe(stage, is_scheduled)
                log.settle(**observed)
                log.restart_clock()
            if step == 0:
                warn_of_first_loss(stage, log)
            if is_scheduled or step == stage.stop_step - 1 or log.stop_agreed:
                log.settle()
                save(stage, is_scheduled, validation)
                log.restart_clock()
            if log.stop_agreed and step < stage.stop_step - 1:
                reason = f"asked to stop: saved after global step {step:,}; run the same command to go on"
                raise StopRequestedError(*([reason] if launch.is_main else []))
            if launch.is_main:
                painter.draw_now_and_then()


def accumulate_gradients(stage: Stage, step: int) -> Tensor:
    """Add up one global step's gradients, averaged over accumulation steps and ranks.

    Gives each accumulation step's loss on this rank (nats per token) as a tensor on the device; nothing waits for
    it. Gradients are all-reduced once, while the last micro-batch's backward pass runs.
    """
    steps = stage.plan.accumulation_steps
    losses = []
    for accumulation_step in range(steps):
        tokens, targets = stage.splits.train.microbatch(step, accumulation_step, stage.launch.rank)
        seed_dropout(stage.config.seed_of("dropout"), step, accumulation_step, stage.launch.rank)
        with gradient_sync(stage.objective, enabled=accumulation_step == steps - 1):
            with stage.autocast():
                loss = stage.objective(stage.on_device(tokens), stage.on_device(targets))
            stage.trainee.scaler.scale(loss / steps).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def warn_of_first_loss(stage: Stage, log: StepLog) -> None:
    """Print one line if the first loss is not that of an untrained model, on rank 0."""
    assert log.last is not None
    warning = first_loss_warning(log.last.loss, stage.trainee.model, stage.model_config.vocab_size)
    if warning is not None and stage.launch.is_main:
        print(warning, file=sys.stderr)


def observe(stage: Stage, is_scheduled: bool) -> tuple[float | None, dict[str, object]]:
    """Measure what goes into metrics besides training: validation loss and, at a scheduled checkpoint, a sample.

    Gives the validation loss, None where the run does not validate, and the metrics.
    """
    validation: float | None = None
    observed: dict[str, object] = {}
    if stage.splits.validation is not None:
        validation = validation_loss(stage)
        observed["val/loss"] = json_number(validation)
    if is_scheduled and stage.launch.is_main and stage.model_config.vocab_size >= VOCAB_SIZE:
        settings = SampleSettings(seed=stream_seed("sample", stage.config.random_seed))
        observed["sample"] = continue_text(
            stage.trainee.model, stage.model_config, stage.config.sample_prompt, settings
        )
    return validation, observed


def validation_loss(stage: Stage) -> float:
    """Give the mean loss over the first validation_batches global batches of the validation split, on every rank."""
    assert stage.splits.validation is not None
    launch, plan = stage.launch, stage.plan
    sequences = validation_sequences(stage.config, plan)
    share = range(sequences * launch.rank // launch.world_size, sequences * (launch.rank + 1) // launch.world_size)
    batches = data.evaluation_batches(
        stage.splits.validation, stage.config.start_val_token, share, plan.context_length, plan.microbatch_size
    )
    with stage.autocast():
        losses = sequence_losses(stage.trainee.model, batches, stage.device)
    total = torch.tensor([losses.sum()], dtype=torch.float32, device=stage.device)
    return float(distributed.gather(launch, total).double().sum()) / sequences


def save(stage: Stage, is_scheduled: bool, validation: float | None) -> None:
    """Write a checkpoint on rank 0 and wait for it on all; a scheduled one ends the interval and may be the best."""
    is_best = is_scheduled and stage.state.close_interval(validation)

    def write() -> None:
        folder, state = stage.folder, stage.state
        checkpoint.save(folder, stage.trainee, state, stage.identity)
        if is_best:
            checkpoint.link_best(folder, state.next_step - 1)
        checkpoint.prune(folder, stage.config.checkpoints_to_keep, state.best_step)
        folder.write_status("running", state.next_step - 1)

    distributed.on_main(stage.launch, write)


def untrained_model(model_config: ModelConfig, config: TrainConfig) -> GPTModel:
    """Give the model with its initial weights, on the CPU."""
    model = empty_model(model_config, config.activation_checkpointing)
    initialise(model, config.seed_of("init"))
    return model


def build(
    model_config: ModelConfig, config: TrainConfig, launch: Launch, device: torch.device, start: checkpoint.Start
) -> checkpoint.Trainee:
    """Make model, optimizer and scaler on the device, with the start's values on every rank.

    Rank 0 alone draws or reads them and hands them on, so that only one machine needs the run's folder.
    """
    if launch.is_main and start.path is None:
        model = untrained_model(model_config, config).to(device)
    else:
        model = empty_model(model_config, config.activation_checkpointing).to(device)
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
        loss = stage.objective(stage.on_device(tokens), stage.on_device(tokens))
    loss.backward()
    require_gradients(stage.trainee.model)
    stage.trainee.optimizer.zero_grad(set_to_none=True)


def record_start(stage: Stage) -> None:
    """Write run.json, which says what really ran, and status.json."""
    device_names = distributed.gather_strings(stage.launch, distributed.device_name(stage.device))
    if not stage.launch.is_main:
        return
    folder, plan, from_step = stage.folder, stage.plan, stage.state.next_step
    earlier = folder.read_starts() if from_step else []
    document = {
        "model": asdict(stage.model_config),
        "train": asdict(stage.config),
        "recipe_hash": recipe_hash(stage.model_config, stage.config),
        "plan": {**asdict(plan), "global_batch": plan.global_batch, "train_tokens": plan.train_tokens},
        "dataset": [asdict(check) for check in stage.splits.checks],
        "starts": [*earlier, describe_start(from_step, device_names, ROOT)],
    }
    write_json(folder.run_json, document)
    folder.write_status("running", from_step - 1 if from_step else None)


def report_end(stage: Stage) -> None:
    """Print the four closing lines and write the final status, on rank 0."""
    if not stage.launch.is_main:
        return
    state = stage.state
    is_complete = state.next_step == stage.plan.global_steps
    # A scheduled checkpoint after the last step has just closed its interval.
    loss = state.interval_loss if state.interval_steps else state.last_interval_loss
    print(f"Training complete in {state.elapsed_seconds:,.3f} seconds")
    print(f"Tokens seen: {state.tokens:,}")
    print(f"Throughput: {state.tokens / state.elapsed_seconds:,.0f} tokens/second")
    print(f"Final train loss: {math.nan if loss is None else loss:.3f}")
    if is_complete:
        stage.folder.write_status("complete", state.next_step - 1, 0)
    else:
        stage.folder.write_status("stopped", state.next_step - 1, 0, "--max-steps")


def dry_run(arguments: argparse.Namespace, model_config: ModelConfig, config: TrainConfig, world_size: int) -> None:
    """Print what a run would do; the dataset is needed only where min_train_tokens is -1."""
    available = None
    if config.min_train_tokens == -1:
        file = data.open_split(arguments.datasets_dir, config.dataset, "train")
        available = file.length - config.start_train_token
    plan = make_plan(model_config, config, world_size, available)
    rows = describe(model_config, config, plan)
    rows.append(("Initial weights", f"SHA-256 {fingerprint(untrained_model(model_config, config))}"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label + ':':<{width + 1}} {value}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main, speaks))
