"""Find the largest micro-batch that trains: a search over trials, each of them training in a fresh process."""

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from harness.engine import distributed
from harness.engine.distributed import Launch
from harness.engine.evaluate import sequence_losses
from harness.engine.step import guarded_step
from harness.engine.watchdog import StopRequest, Watchdog
from harness.run.errors import ConfigError, DoesNotFitError, PeerError, error_of_status
from harness.run.plan import Plan, make_plan
from training.arguments import RunRequest
from training.context import TrainContext, synthetic_context

# A trial compiles, where training does, and takes two steps; one that takes longer than this hangs.
TRIAL_SECONDS = 1800
# What allocators say for want of memory, where they raise no error of their own.
WORDS_FOR_NO_MEMORY = (
    "can't allocate memory", "out of memory", "bad_alloc",
    "cublas_status_alloc_failed", "cublas_status_not_initialized",  # no room for cuBLAS's own workspace
)  # fmt: skip


def find_max_microbatch_size(request: RunRequest, launch: Launch) -> None:
    """Print the largest micro-batch that trains here, and the accumulation that keeps the run's global batch.

    Every rank tries every size in a fresh process on its own device; a size fits where it fits on all.
    """
    # How long the run is does not matter here, and need not be known: -1 would need the dataset.
    plan = make_plan(request.model_config, replace(request.config, min_train_tokens=1), launch.world_size)
    watchdog = Watchdog(launch.rank, launch.world_size, TRIAL_SECONDS, StopRequest(), lambda _: None, None)
    with distributed.process_group(launch, torch.device("cpu"), watchdog):

        def fits(size: int) -> bool:
            trial = [sys.executable, *sys.argv, "--try-microbatch-size", str(size)]
            fits_here = succeeds(trial, distributed.environment_of_one(launch))
            fits_everywhere = str(False) not in distributed.gather_strings(launch, str(fits_here))
            if launch.is_main:
                print(f"micro-batch {size}: {'trains' if fits_everywhere else 'does not fit'}", flush=True)
            return fits_everywhere

        largest = largest_that_fits(fits, plan.microbatch_size)
    if launch.is_main:
        print(describe(largest, plan))


def try_microbatch_size(
    request: RunRequest, launch: Launch, accumulate_gradients: Callable[[TrainContext, int], object]
) -> None:
    """Train two global steps on random tokens, and validate on some if the run does; raises DoesNotFitError."""
    device = distributed.choose_device(request.arguments.device, launch)
    distributed.set_up_kernels(device, use_tf32=request.config.use_amp, deterministic=request.config.deterministic)
    if device.type == "cpu":
        limit_memory(launch.local_world_size)
    size = request.arguments.try_microbatch_size
    assert size is not None
    plan = Plan(1, size, accumulation_steps=2, context_length=request.model_config.context_length, global_steps=2)
    try:
        context = synthetic_context(request, plan, device)
        for step in range(plan.global_steps):
            accumulate_gradients(context, step)
            outcome = guarded_step(context.optimizer, context.scaler, 0.0, request.config.clipping_max_norm)
        if request.config.validation_batches is not None:
            with context.autocast():
                sequence_losses(context.model, [context.splits.train.microbatch(0, 0, 0)], device)
        outcome.grad_norm.item()  # waits for the device
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise DoesNotFitError(f"micro-batch {size} does not fit") from error


def largest_that_fits(fits: Callable[[int], bool], start: int) -> int:
    """Return the largest size for which `fits` holds, 0 if not even 1 does; there is no upper limit.

    Sizes double or halve from `start` until they bracket the answer, which is then bisected: about 2 log2 trials.
    Wherever a size fits, smaller ones must.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while low == 0 and high > 1:
        if fits(high // 2):
            low = high // 2
        else:
            high //= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def succeeds(command: list[str], environment: dict[str, str]) -> bool:
    """Run one trial and say whether it fitted; raises its HarnessError, or RuntimeError where it has a defect."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise PeerError(
            f"--find-max-microbatch-size: a trial hangs, {TRIAL_SECONDS:,} seconds after its start"
        ) from None
    # The system's own way to say that there is no memory is to kill, and some allocators abort.
    if done.returncode == 0 or done.returncode == DoesNotFitError.exit_status or done.returncode < 0:
        return done.returncode == 0
    if (known := error_of_status(done.returncode)) is not None:
        raise known(*done.stderr.strip().splitlines()[-1:])
    raise RuntimeError(f"a trial failed with status {done.returncode}: {done.stderr.strip()}")


def is_lack_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory, of a GPU or the machine, ran out."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in WORDS_FOR_NO_MEMORY)


def limit_memory(processes: int) -> None:
    """Allow this process its share of the memory that can be had, so that a trial fails and not the machine.

    A limit that is set already (ulimit -d, a control group) counts too.
    """
    available = _number_in("/proc/meminfo", "MemAvailable:") * 1024
    group = _number_in("/sys/fs/cgroup/memory.max") - _number_in("/sys/fs/cgroup/memory.current", otherwise=0)
    set_already, hard = resource.getrlimit(resource.RLIMIT_DATA)
    shares = [value / processes for value in (available, group) if math.isfinite(value)]
    limits = [*shares, *([] if set_already == resource.RLIM_INFINITY else [set_already])]
    if limits:
        resource.setrlimit(resource.RLIMIT_DATA, (int(min(limits)), hard))


def describe(largest: int, plan: Plan) -> str:
    """Say what was found, and how to keep the run's global batch; raises ConfigError where nothing fits."""
    if largest == 0:
        raise ConfigError("--find-max-microbatch-size: not even one sequence at a time fits; wanted a smaller model")
    per_process = plan.global_batch // plan.world_size
    size = max(divisor for divisor in range(1, min(largest, per_process) + 1) if per_process % divisor == 0)
    return (
        f"Largest micro-batch that trains: {largest}\n"
        f"For the global batch of {plan.global_batch} sequences on {plan.world_size} "
        f"{'process' if plan.world_size == 1 else 'processes'}: "
        f'"microbatch_size": {size}, "gradient_accumulation_steps": {per_process // size}'
    )


def _number_in(path: str, name: str = "", otherwise: float = math.inf) -> float:
    """Return the number after `name` in a file of the system's, or `otherwise`."""
    try:
        words = Path(path).read_text().split()
        return float(words[words.index(name) + 1 if name else 0])
    except (OSError, ValueError, IndexError):
        return otherwise
