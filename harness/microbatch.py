"""The largest micro-batch that trains: a search over trials, each of them the training code in a fresh process."""

import math
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness.errors import ConfigError, DoesNotFitError
from harness.plan import Plan

# A trial compiles, where training does, and takes two steps; one that takes longer than this hangs.
TRIAL_SECONDS = 1800
# What allocators say for want of memory, where they raise no error of their own.
WORDS_FOR_NO_MEMORY = (
    "can't allocate memory", "out of memory", "bad_alloc",
    "cublas_status_alloc_failed", "cublas_status_not_initialized",  # no room for cuBLAS's own workspace
)  # fmt: skip


def largest_that_fits(fits: Callable[[int], bool], start: int) -> int:
    """Give the largest size for which `fits` holds, 0 if not even 1 does; there is no upper limit.

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
    """Run one trial and say whether it fitted; raises RuntimeError where it failed for another reason than memory."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    # The system's own way to say that there is no memory is to kill, and some allocators abort.
    if done.returncode == 0 or done.returncode == DoesNotFitError.exit_status or done.returncode < 0:
        return done.returncode == 0
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
    """Give the number after `name` in a file of the system's, or `otherwise`."""
    try:
        words = Path(path).read_text().split()
        return float(words[words.index(name) + 1 if name else 0])
    except (OSError, ValueError, IndexError):
        return otherwise
