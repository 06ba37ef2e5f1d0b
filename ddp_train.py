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

from harness.command_line import Request, read_request
from harness.errors import ConfigError, DataError, DoesNotFitError, HarnessError, PeerError, exit_status_of
from harness.plan import (
    Plan,
    count_parameters,
    describe,
    flops_per_token,
    identity_of,
    make_plan,
    peak_flops_per_second,
    validation_sequences,
)
from harness.run_folder import RunFolder, json_number

STEPS_BETWEEN_DRIFT_CHECKS = 100

# What every process of a machine finds wrong alike, the first of them says.
speaks = os.environ.get("LOCAL_RANK", "0") == "0"
# Asked at once, because a launcher may die during the seconds in which torch is imported.
parent = os.getppid()

if __name__ == "__main__" and (status := exit_status_of(lambda: read_request(__doc__), speaks)):
    # Importing torch takes seconds, so a mistyped key is refused before it.
    sys.exit(status)

from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import torch
from torch import Tensor

import data
from harness import account, checkpoint, distributed, faults, microbatch, resume
from harness.background import Background
from harness.charts import ChartPainter
from harness.console import outlive_the_terminal
from harness.distributed import Launch, gradient_sync
from harness.errors import CheckpointError, StopRequestedError
from harness.evaluate import sequence_losses
from harness.loggers import Loggers
from harness.loss import first_loss_warning
from harness.messages import VARIABLE, Messenger
from harness.metrics import StepLog, StepReport
from harness.optim import guarded_step, learning_rate_at
from harness.randomness import seed_dropout, stream_seed
from harness.sampling import SampleSettings, continue_text
from harness.token_files import open_split, split_files
from harness.tokenizer import VOCAB_SIZE
from harness.watch import StopRequest, Watch
from model import fingerprint
from stage import Stage, build, rehearse, untrained_model, warm_up, wrap


def main() -> None:
    """Read the run, prepare everything that can be refused, then train and report."""
    request = read_request(__doc__)
    arguments, folder, model_config, config = request.arguments, request.folder, request.model, request.config
    launch = distributed.launch_from_environment()
    if answer_without_training(request, launch):
        return
    device = distributed.choose_device(arguments.device, launch)
    distributed.set_up_kernels(device, use_tf32=config.use_amp, deterministic=config.deterministic)
    outlive_the_terminal()
    stop = StopRequest()
    painter = ChartPainter(folder)
    loggers = Loggers(config.loggers if launch.is_main else (), folder, os.environ)
    messenger = Messenger(folder, os.environ.get(VARIABLE, "") if launch.is_main else "")
    watch = Watch(
        launch.rank,
        launch.world_size,
        timeout_seconds=arguments.peer_timeout,
        stop=stop,
        give_up=lambda error: leave_word(error, folder, messenger) if launch.is_main else None,
        launcher=parent if launch.has_launcher else None,
    )

    with ExitStack() as stack:
        stack.enter_context(stop)
        if launch.is_main:
            stack.enter_context(folder.locked())
            faults.announce()
            stack.enter_context(painter)
            stack.enter_context(loggers)
            stack.enter_context(messenger)
            stack.enter_context(folder.reporting_failure())
        stack.enter_context(watch)
        data.ensure_dataset(arguments.datasets_dir, config)
        splits = data.open_splits(
            arguments.datasets_dir, model_config, config, launch.world_size, reads_through=launch.local_rank == 0
        )

        stack.enter_context(distributed.process_group(launch, device, watch))
        stop_step = min(arguments.max_steps or splits.plan.global_steps, splits.plan.global_steps)
        basis = checkpoint.Basis(
            identity=identity_of(model_config, config, splits.plan, splits.fingerprint),
            data=splits.checked(),
            split=splits.plan.split(),
        )
        require_agreement(request, launch, basis, stop_step)
        start = distributed.on_main(launch, lambda: choose_start(request, launch, basis))
        if start.state.next_step >= stop_step:
            if launch.is_main:
                account.report_nothing_to_do(folder, splits.plan, start.state)
            return

        names = distributed.gather_strings(launch, distributed.device_name(device))
        how = account.RunningAs(start.state.next_step, launch.restart, names, splits.describe())
        distributed.on_main(launch, lambda: account.record_start(folder, model_config, config, splits.plan, how))
        trainee = build(request, launch, device, start)
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
            basis=basis,
            stop=stop,
            watch=watch,
            saving=stack.enter_context(Background()),
            stop_step=stop_step,
        )
        warm_up(stage)
        if launch.is_main:
            loggers.start(start.state.next_step)
            messenger.begin()
        train(stage, painter)
        if launch.is_main:
            account.report_end(folder, splits.plan, start.state)


def leave_word(error: HarnessError, folder: RunFolder, messenger: Messenger) -> None:
    """Say why rank 0 is about to be ended, since no context of it will be left."""
    folder.write_failure(error)
    messenger.end()


def answer_without_training(request: Request, launch: Launch) -> bool:
    """Do what a flag asks for in place of training; say whether one did."""
    arguments = request.arguments
    if arguments.dry_run:
        dry_run(request, arguments.world_size or launch.world_size)
    elif arguments.dump_initial_weights:
        if launch.is_main:
            weights = untrained_model(request).state_dict()
            checkpoint.save_tensors(weights, arguments.dump_initial_weights)
    elif arguments.try_microbatch_size:
        try_microbatch_size(request, launch)
    elif arguments.find_max_microbatch_size:
        find_max_microbatch_size(request, launch)
    else:
        return False
    return True


def require_agreement(request: Request, launch: Launch, basis: checkpoint.Basis, stop_step: int) -> None:
    """Check that all ranks are about to do the same; raises the same error on all, naming what differs.

    Machines may have copies of their own of the run's folder and of the dataset.
    """
    identity = dict(basis.identity)
    distributed.agree(launch, {"data_fingerprint": identity.pop("data_fingerprint")}, DataError)
    distributed.agree(launch, {**identity, **basis.split, "--max-steps": stop_step}, ConfigError)
    distributed.agree(launch, {"torch": torch.__version__}, PeerError)
    if not request.arguments.fresh:
        newest = max(request.folder.checkpoint_steps(), default=-1)
        steps = [int(step) for step in distributed.gather_strings(launch, str(newest))]
        distributed.on_main(launch, lambda: resume.require_main_to_have_the_newest(steps))


def choose_start(request: Request, launch: Launch, basis: checkpoint.Basis) -> resume.Start:
    """Decide where to begin, and check that there is room for what will be written."""
    wish = resume.Wish(request.arguments.checkpoint, request.arguments.fresh, launch.restart)
    start = resume.choose_start(request.folder, wish, basis)
    checkpoint.require_room(request.folder, count_parameters(request.model).total)
    return start


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
    stage.stop.listen()
    with closing(log):
        for step in range(state.next_step, stage.stop_step):
            stage.watch.reached(step)
            faults.reach("step.start", step, stage.trainee.model)
            learning_rate = learning_rate_at(config, step, plan.global_steps)
            losses = accumulate_gradients(stage, step)
            faults.reach("step.opt", step)
            outcome = guarded_step(
                stage.trainee.optimizer,
                stage.trainee.scaler,
                learning_rate,
                config.clipping_max_norm,
                keep_gradients=launch.world_size > 1,  # DDP's buckets: freed, they would be held twice for a while
            )
            wants_to_stop = stage.stop.requested or stage.saving.has_failed
            report = StepReport(launch, losses, outcome.grad_norm, outcome.is_finite, wants_to_stop)
            log.submit(step, report, learning_rate)

            is_scheduled = plan.is_checkpoint_step(step, config.checkpoint_interval)
            validation = None
            if is_scheduled or plan.is_validation_step(step, config.validation_interval):
                log.catch_up()  # now the device is idle, and what follows is in no step's time
                validation, observed = observe(stage, is_scheduled)
                log.settle(**observed)
                log.restart_clock()
            if step == 0 and config.initial_weights is None:
                warn_of_first_loss(stage, log)
            is_last = step == stage.stop_step - 1 or log.stop_agreed
            saves = is_scheduled or is_last
            if saves or step % STEPS_BETWEEN_DRIFT_CHECKS == 0:
                distributed.require_same_weights(launch, stage.trainee.model, step)
            if saves:
                log.settle()
                save(stage, is_scheduled, validation, waits=is_last)
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
            faults.reach("step.backward", step, stage.trainee.model)
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
    faults.reach("eval", stage.state.next_step - 1)
    if stage.splits.validation is not None:
        validation = validation_loss(stage)
        observed["val/loss"] = json_number(validation)
    if is_scheduled and stage.launch.is_main and stage.model_config.vocab_size >= VOCAB_SIZE:
        settings = SampleSettings(seed=stream_seed("sample", stage.config.random_seed))
        with suppress(CheckpointError):  # of weights that are not numbers; saving, which is next, tells all ranks
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


def save(stage: Stage, is_scheduled: bool, validation: float | None, waits: bool) -> None:
    """Take a checkpoint on rank 0 and write it while training goes on, or wait for it; fails alike on all ranks.

    A scheduled one ends the interval and may be the best. An error in writing the one before is raised here.
    """
    is_best = is_scheduled and stage.state.close_interval(validation)

    def begin() -> None:
        stage.saving.finish()  # one at a time, in memory and on disk
        snapshot = checkpoint.take(stage.trainee, stage.state, stage.basis)
        stage.folder.write_status("running", snapshot.step)
        keep = stage.config.checkpoints_to_keep
        stage.saving.start(lambda: checkpoint.publish(stage.folder, snapshot, keep, is_best))
        if waits:
            stage.saving.finish()

    distributed.on_main(stage.launch, begin)


def find_max_microbatch_size(request: Request, launch: Launch) -> None:
    """Print the largest micro-batch that trains here, and the accumulation that keeps the run's global batch.

    Every rank tries every size in a fresh process on its own device; a size fits where it fits on all.
    """
    # How long the run is does not matter here, and need not be known: -1 would need the dataset.
    plan = make_plan(request.model, replace(request.config, min_train_tokens=1), launch.world_size)
    watch = Watch(launch.rank, launch.world_size, microbatch.TRIAL_SECONDS, StopRequest(), lambda _: None, None)
    with distributed.process_group(launch, torch.device("cpu"), watch):

        def fits(size: int) -> bool:
            trial = [sys.executable, *sys.argv, "--try-microbatch-size", str(size)]
            fits_here = microbatch.succeeds(trial, distributed.environment_of_one(launch))
            fits_everywhere = str(False) not in distributed.gather_strings(launch, str(fits_here))
            if launch.is_main:
                print(f"micro-batch {size}: {'trains' if fits_everywhere else 'does not fit'}", flush=True)
            return fits_everywhere

        largest = microbatch.largest_that_fits(fits, plan.microbatch_size)
    if launch.is_main:
        print(microbatch.describe(largest, plan))


def try_microbatch_size(request: Request, launch: Launch) -> None:
    """Train two global steps on made-up tokens; raises DoesNotFitError where memory does not suffice."""
    device = distributed.choose_device(request.arguments.device, launch)
    distributed.set_up_kernels(device, use_tf32=request.config.use_amp, deterministic=request.config.deterministic)
    if device.type == "cpu":
        microbatch.limit_memory(launch.local_world_size)
    size = request.arguments.try_microbatch_size
    plan = Plan(1, size, accumulation_steps=2, context_length=request.model.context_length, global_steps=2)
    try:
        stage = rehearse(request, plan, device)
        for step in range(plan.global_steps):
            accumulate_gradients(stage, step)
            outcome = guarded_step(
                stage.trainee.optimizer, stage.trainee.scaler, 0.0, request.config.clipping_max_norm
            )
        outcome.grad_norm.item()  # waits for the device
    except (MemoryError, RuntimeError) as error:
        if not microbatch.is_lack_of_memory(error):
            raise
        raise DoesNotFitError(f"micro-batch {size} does not fit") from error


def dry_run(request: Request, world_size: int) -> None:
    """Print what a run would do; a dataset that is there must do for it, and min_train_tokens -1 needs it."""
    model_config, config, available = request.model, request.config, None
    datasets_dir = request.arguments.datasets_dir
    is_there = bool(split_files(datasets_dir / config.dataset, "train"))
    if is_there or config.min_train_tokens == -1:
        available = open_split(datasets_dir, config.dataset, "train").length - config.start_train_token
    plan = make_plan(model_config, config, world_size, available)
    rows = describe(model_config, config, plan)
    rows.append(("Dataset", f"{config.dataset}, {'there' if is_there else 'to be downloaded by the first start'}"))
    rows.append(("Initial weights", f"SHA-256 {fingerprint(untrained_model(request))}"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label + ':':<{width + 1}} {value}")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(exit_status_of(main, speaks))
