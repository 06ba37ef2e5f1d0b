"""Train one run.

A run is a folder with model.json and train.json. Start it, and start it again after an interruption, with

  torchrun --nproc_per_node=8 ddp_train.py 8xa100m40-baseline datasets

or with plain python for one process. What is run lies in the run's files; how to run it, in the flags.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds of importing ends without a traceback

from harness.engine import failpoints
from harness.run.errors import StopRequestedError, exit_status_of
from training.arguments import RunRequest, read_request

# What every process of a machine finds wrong alike, the first of them says.
speaks = os.environ.get("LOCAL_RANK", "0") == "0"
# Asked at once, because a launcher may die during the seconds in which torch is imported.
launcher = os.getppid()


def read_all() -> RunRequest:
    """Read all that a user may have got wrong in the command line, the run's files and the environment."""
    failpoints.configured()
    return read_request(__doc__)


if __name__ == "__main__" and (status := exit_status_of(read_all, speaks)):
    sys.exit(status)  # importing torch takes seconds, so a mistyped key is refused before it

from contextlib import ExitStack, closing

import torch
from torch import Tensor

import data
from harness.engine import distributed
from harness.engine.background import BackgroundTask
from harness.engine.distributed import Launch
from harness.engine.failpoints import failpoint
from harness.engine.gpu_peaks import peak_flops_per_second
from harness.engine.identity import identity_of
from harness.engine.metrics import PendingMetrics, StepLog
from harness.engine.schedules import learning_rate_at
from harness.engine.step import StepOutcome, guarded_step
from harness.engine.watchdog import StopRequest, Watchdog
from harness.observers.observers import Observers
from harness.run.model_size import flops_per_token
from harness.run.provenance import StartRecord, record_start
from harness.run.status import Status, failure_recorded
from harness.run.streams import ignore_output_errors
from harness.tokens.randomness import seed_dropout
from training.checkpointing import choose_resume_point, require_equal_runs, save_checkpoint
from training.context import TrainContext, build, compile_and_build_buckets, wrap
from training.dry_run import dry_run, dump_initial_weights
from training.reading import ReadAhead, require_data
from training.report import report_devices, report_end, report_nothing_to_do
from training.trials import find_max_microbatch_size, try_microbatch_size
from training.validation import validate_and_sample, warn_of_first_loss

STEPS_BETWEEN_DRIFT_CHECKS = 100


def main() -> None:
    """Read the run, prepare everything that can be refused, then train and report."""
    request = read_all()
    arguments, folder, model_config, config = request.arguments, request.folder, request.model_config, request.config
    launch = distributed.launch_from_environment()
    if did_without_training(request, launch):
        return
    device = distributed.choose_device(arguments.device, launch)
    distributed.set_up_kernels(device, use_tf32=config.use_amp, deterministic=config.deterministic)
    ignore_output_errors()
    stop = StopRequest(speaks=launch.is_main)
    observers = Observers(folder, config.loggers, os.environ, is_active=launch.is_main)
    watchdog = Watchdog(
        launch.rank,
        launch.world_size,
        timeout_seconds=arguments.peer_timeout,
        stop=stop,
        give_up=observers.record_failure,
        launcher=launcher if launch.has_launcher else None,
    )

    with ExitStack() as stack:
        stack.enter_context(stop)
        if launch.is_main:
            stack.enter_context(folder.locked())
            failpoints.announce()
            stack.enter_context(observers)
            stack.enter_context(failure_recorded(folder.status_json))
        stack.enter_context(watchdog)
        data.ensure_dataset(arguments.datasets_dir, config)
        splits = data.open_splits(
            arguments.datasets_dir, model_config, config, launch.world_size, reads_through=launch.local_rank == 0
        )
        plan = splits.plan
        stack.enter_context(distributed.process_group(launch, device, watchdog))
        stop_step = min(arguments.max_steps or plan.global_steps, plan.global_steps)
        splits = splits.bound_to(distributed.run_on_rank0(launch, lambda: splits.checks))
        identity = identity_of(model_config, config, plan, splits.fingerprint, splits.checked())
        require_equal_runs(request, launch, identity, stop_step)
        point = choose_resume_point(request, launch, splits, identity)
        if point.state.next_step >= stop_step:
            if launch.is_main:
                report_nothing_to_do(folder, plan, point.state)
            return

        devices = distributed.gather_strings(launch, distributed.device_name(device))
        start = StartRecord(point.state.next_step, launch.restart, devices, splits.describe())

        def record() -> None:
            report_devices(devices, device.type, config)
            record_start(folder.run_json, model_config, config, plan, start)
            Status("running", start.from_step - 1 if start.from_step else None).write(folder.status_json)

        distributed.run_on_rank0(launch, record)
        model, optimizer, scaler, average = build(request, launch, device, point)
        context = TrainContext(
            launch=launch,
            device=device,
            folder=folder,
            model_config=model_config,
            config=config,
            splits=splits,
            reader=ReadAhead(splits.train, launch.rank, plan, range(point.state.next_step, stop_step)),
            model=model,
            optimizer=optimizer,
            scaler=scaler,
            average=average,
            objective=wrap(model, config, launch, device),
            state=point.state,
            identity=identity,
            stop=stop,
            watchdog=watchdog,
            checkpoint_writer=stack.enter_context(BackgroundTask()),
            stop_step=stop_step,
        )
        compile_and_build_buckets(context)
        observers.begin(point.state.next_step)
        train(context, observers)
        if launch.is_main:
            report_end(folder, plan, point.state)


def did_without_training(request: RunRequest, launch: Launch) -> bool:
    """Do what a flag asks for in place of training; say whether one did."""
    arguments = request.arguments
    if arguments.dry_run:
        dry_run(request, launch)
    elif arguments.dump_initial_weights:
        if launch.is_main:
            dump_initial_weights(request)
    elif arguments.try_microbatch_size:
        try_microbatch_size(request, launch, accumulate_gradients)
    elif arguments.find_max_microbatch_size:
        find_max_microbatch_size(request, launch)
    else:
        return False
    return True


def train(context: TrainContext, observers: Observers) -> None:
    """Train until context.stop_step; one pass of the loop is one global step.

    Raises StopRequestedError after saving where a rank was asked to stop, DataError likewise, and NonFiniteError.
    """
    config, plan, state, launch = context.config, context.plan, context.state, context.launch
    context.stop.listen()
    with closing(step_log(context)) as log:
        for step in range(state.next_step, context.stop_step):
            context.watchdog.reached(step)
            failpoint("step.start", step, context.model)
            learning_rate = learning_rate_at(config, step, plan.global_steps)
            losses, routing = accumulate_gradients(context, step)
            failpoint("step.opt", step)
            outcome = change_weights(context, step, learning_rate)
            cannot_go_on = context.checkpoint_writer.has_failed or context.reader.failure is not None
            wants_to_stop = context.stop.requested or cannot_go_on
            pending = PendingMetrics(launch, losses, routing, outcome, wants_to_stop)
            log.submit(step, pending, learning_rate)

            is_scheduled = plan.is_checkpoint_step(step, config.checkpoint_interval)
            validation = None
            if is_scheduled or plan.is_validation_step(step, config.validation_interval):
                log.catch_up()  # waits for the device, so that what follows is in no step's time
                validation, measured = validate_and_sample(context, is_scheduled)
                log.settle(**measured)
                log.restart_clock()
            if step == 0 and config.initial_weights is None:
                warn_of_first_loss(context, log)
            is_last = step == context.stop_step - 1 or log.stop_agreed
            saves = is_scheduled or is_last
            if saves or step % STEPS_BETWEEN_DRIFT_CHECKS == 0:
                distributed.require_same_weights(launch, context.model, step)  # waits for the device
            if saves:
                log.settle()
                save_checkpoint(context, is_scheduled, validation, waits=is_last)
                log.restart_clock()
            if is_last:
                require_data(launch, context.reader, step)
            if log.stop_agreed and step < context.stop_step - 1:
                reason = f"asked to stop: saved after global step {step:,}; run the same command to go on"
                raise StopRequestedError(*([reason] if launch.is_main else []))
            observers.after_step()


def change_weights(context: TrainContext, step: int, learning_rate: float) -> StepOutcome:
    """Step the weights and then their average, or leave both where the gradients are not finite; nothing waits."""
    outcome = guarded_step(
        context.optimizer,
        context.scaler,
        learning_rate,
        context.config.clipping_max_norm,
        keep_gradients=context.launch.world_size > 1,  # DDP's buckets: freed, they would be held twice for a while
    )
    if context.average is not None:
        context.average.update(outcome.is_finite)
    return outcome


def step_log(context: TrainContext) -> StepLog:
    """Return the log that counts the run's steps and writes metrics.jsonl."""
    peak = peak_flops_per_second(distributed.device_name(context.device), context.config.use_amp)
    return StepLog(
        launch=context.launch,
        plan=context.plan,
        config=context.config,
        progress=context.state,
        file=context.folder.metrics,
        flops_per_token=flops_per_token(context.model_config),
        peak_flops_per_second=None if peak is None else peak * context.launch.world_size,
        device=context.device,
    )


def accumulate_gradients(context: TrainContext, step: int) -> tuple[Tensor, Tensor | None]:
    """Add up one global step's gradients, averaged over accumulation steps and ranks.

    Returns each accumulation step's loss on this rank (nats per token), and with a mixture of experts how each block
    routed tokens on average, as tensors on the device; nothing waits for them. Gradients are all-reduced once, while
    the last micro-batch's backward pass runs.
    """
    steps = context.plan.accumulation_steps
    losses, routings = [], []
    for accumulation_step, (tokens, targets) in enumerate(context.reader.take(step)):
        if context.model_config.drop_rate:
            seed_dropout(context.config.seed_of("dropout"), step, accumulation_step, context.launch.rank)
        with distributed.gradient_sync(context.objective, enabled=accumulation_step == steps - 1):
            with context.autocast():
                loss, routing = context.objective(context.on_device(tokens), context.on_device(targets))
            failpoint("step.backward", step, context.model)
            context.scaler.scale(loss / steps).backward()
        losses.append(loss.detach())
        routings.append(routing)
    is_dense = context.model_config.moe is None
    return torch.stack(losses), None if is_dense else torch.stack(routings).mean(dim=0)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(exit_status_of(main, speaks))
