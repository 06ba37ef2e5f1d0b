"""Join and leave the process group, choose the device, and agree between ranks.

The environment variables of torchrun are read here and nowhere else. A single process needs no process group:
every function below works without one.
"""

import atexit
import ctypes
import json
import math
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from harness.engine.watchdog import Watchdog
from harness.run.errors import ConfigError, HarnessError, PeerError, StopRequestedError, as_harness_error

# For all ranks to arrive, and for a collective that every rank has alive but some are slow to reach: those that died
# or were stopped, the watchdog finds sooner.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Where the driver of NVIDIA's GPUs shows itself, in a container only if that was given one.
NVIDIA_DEVICE = Path("/dev/nvidiactl")
# Numbers of glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Who this process is among those that torchrun started; alone it is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Processes on this machine."""
    restart: int = 0
    """How many times torchrun has restarted the ranks of this launch (--max-restarts)."""
    has_launcher: bool = False
    """Whether torchrun started this process."""

    @property
    def is_main(self) -> bool:
        """Say whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0


def launch_from_environment() -> Launch:
    """Read rank, world size and what else torchrun says from the environment."""

    def number(name: str, default: int = 0) -> int:
        return int(os.environ.get(name, default))

    return Launch(
        rank=number("RANK"),
        local_rank=number("LOCAL_RANK"),
        world_size=number("WORLD_SIZE", 1),
        local_world_size=number("LOCAL_WORLD_SIZE", 1),
        restart=number("TORCHELASTIC_RESTART_COUNT"),
        has_launcher="TORCHELASTIC_RUN_ID" in os.environ,
    )


def environment_of_one(launch: Launch) -> dict[str, str]:
    """Return the environment for a process that uses this rank's device and knows of no other rank."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    return {
        **inherited,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
    }


def choose_device(choice: str, launch: Launch) -> torch.device:
    """Return this process's device for `--device` auto, cuda, cpu or mps; raises ConfigError.

    A GPU that torch cannot use is an error, unless CUDA_VISIBLE_DEVICES hides it: a day on the CPU beside it is none
    that anybody meant to pay for.
    """
    has_mps = torch.backends.mps.is_available()
    if choice == "auto":
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if NVIDIA_DEVICE.exists() and not torch.cuda.is_available() and not is_hidden:
            raise ConfigError(
                f"--device: found a GPU that {_torch_and_driver()} cannot use; --device cpu does without"
            )
        choice = "cuda" if torch.cuda.is_available() else "mps" if has_mps and launch.world_size == 1 else "cpu"
    if choice == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device: found cuda, wanted a device that is there; {_torch_and_driver()} finds none"
            )
        if launch.local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc_per_node: found {launch.local_world_size} processes, "
                f"wanted at most one for each of the {torch.cuda.device_count()} GPUs"
            )
        _require_kernels(launch.local_rank)
        return torch.device("cuda", launch.local_rank)
    if choice == "mps":
        if not has_mps:
            raise ConfigError("--device: found mps, wanted a device that this machine has; it has no MPS")
        if launch.world_size > 1:
            raise ConfigError(f"--device: found mps with {launch.world_size} processes, wanted one process")
    return torch.device(choice)


def _torch_and_driver() -> str:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        driver = next(word for word in words if re.fullmatch(r"\d+\.\d+(\.\d+)?", word))
    except (OSError, StopIteration):
        return f"torch {torch.__version__} ({cuda})"
    return f"torch {torch.__version__} ({cuda}) with driver {driver}"


def _require_kernels(index: int) -> None:
    """Check that this build of torch has kernels for a GPU; raises ConfigError where the first would only crash."""
    major, minor = torch.cuda.get_device_capability(index)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    for kind, *number in (name.groups() for name in built if name):
        newest = (int(number[0]), int(number[1]))
        # Binary code runs on its own generation, from its number up; PTX on all that come later.
        if newest <= (major, minor) and (kind == "compute" or newest[0] == major):
            return
    raise ConfigError(
        f"--device: found {torch.cuda.get_device_name(index)} (sm_{major}{minor}), wanted a GPU that this torch has "
        f"kernels for ({', '.join(torch.cuda.get_arch_list())}); sm_50 to sm_70 need the wheel of "
        "https://download.pytorch.org/whl/cu126"
    )


def device_name(device: torch.device) -> str:
    """Return the device's name for people and for looking up its peak speed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_up_kernels(device: torch.device, use_tf32: bool, deterministic: bool) -> None:
    """Choose this process's kernels and how it keeps memory, before the device is first used.

    TF32 rounds the inputs of float32 matrix multiplications to 10 bits of mantissa. Deterministic kernels give the
    same bits on every run on the same hardware.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)  # else what is not said to be for this GPU, such as NCCL's, goes to the first
    torch.set_float32_matmul_precision("high" if use_tf32 else "highest")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for to be reproducible
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # else the compiler chooses kernels by timing them
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the system as soon as they are freed.

    Logits are such blocks: every micro-batch would page them in again, which takes up to half of a step's time.
    """
    with suppress(OSError, AttributeError):  # no glibc: its own allocator decides
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process_group(launch: Launch, device: torch.device, watchdog: Watchdog) -> Iterator[None]:
    """Join the other processes: NCCL for CUDA, gloo otherwise; `watchdog` watches them from then on.

    The group is left on a clean exit and where all ranks agreed to stop: after an error the others may never answer,
    and leaving would wait for them. A collective that fails becomes a PeerError that says what became of whom.
    """
    if launch.world_size == 1:
        yield
        return
    try:
        _join(launch, device, watchdog)
        yield
    except StopRequestedError:
        _leave()
        raise
    except BaseException as error:
        # gloo's errors are plain RuntimeErrors that name it; torch's own for NCCL and the store are DistErrors.
        is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        if is_gloo or isinstance(error, dist.DistError):
            raise watchdog.diagnose(str(error).splitlines()[0]) from error
        with suppress(RuntimeError):  # nobody may be left to tell
            watchdog.report(error, traceback.format_exc())
        raise
    _leave()


def _leave() -> None:
    # The last reference to the process group destroys it, which joins its threads. If DDP held that reference, its
    # destructor would join them while holding the GIL, which a thread may need in order to finish: a deadlock. Kept
    # here, the group is destroyed at interpreter exit, where the GIL is released first.
    atexit.register(lambda _: None, dist.group.WORLD)
    dist.destroy_process_group()


def _join(launch: Launch, device: torch.device, watchdog: Watchdog) -> None:
    is_cuda = device.type == "cuda"
    if not is_cuda and launch.local_world_size == launch.world_size:
        # All ranks are on this machine, so nobody else needs to reach them.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    shared, _, _ = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store = PrefixStore(_meet(launch, shared), shared)
    watchdog.announce(store)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if is_cuda else None,
    )
    watchdog.follow(store.clone())  # type: ignore[attr-defined]  # missing from torch's stubs


def _meet(launch: Launch, store: Any) -> str:
    """Agree with the ranks of this very attempt on a name that no earlier attempt has used.

    After a restart the launcher's store still holds the addresses of ranks that died, and the launchers of several
    machines need not agree on how many restarts there were. So rank 0 proposes a name, every rank answers it with a
    name of its own, and rank 0 publishes the answers: who finds its answer there has met living ranks.
    """
    mine = uuid.uuid4().hex
    if launch.is_main:
        store.set("attempt", mine)
        answers = store.multi_get([f"{mine}/answer/{rank}" for rank in range(1, launch.world_size)])
        store.set(f"{mine}/answers", b" ".join(answers))
        return mine
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        attempt: str = store.get("attempt").decode()
        store.set(f"{attempt}/answer/{launch.rank}", mine)
        if store.check([f"{attempt}/answers"]) and mine in store.get(f"{attempt}/answers").decode():
            return attempt
        time.sleep(0.02)
    raise PeerError(f"rank {launch.rank}: rank 0 did not answer for {COLLECTIVE_TIMEOUT.total_seconds():.0f} seconds")


def gather_strings(launch: Launch, value: str) -> list[str]:
    """Return every rank's `value`, in rank order, on every rank."""
    if launch.world_size == 1:
        return [value]
    values: list[Any] = [None] * launch.world_size
    dist.all_gather_object(values, value)
    return values


def require_equal_across_ranks(launch: Launch, value: dict[str, object], error_class: type[HarnessError]) -> None:
    """Check that `value` is the same on all ranks; raises `error_class` on every rank if not, naming the keys."""
    values = [json.loads(text) for text in gather_strings(launch, json.dumps(value))]
    lines = [
        f"ranks disagree on {key}: found {other.get(key)!r} on rank {rank}, wanted rank 0's {values[0].get(key)!r}"
        for rank, other in enumerate(values)
        for key in sorted(values[0].keys() | other.keys())
        if other.get(key) != values[0].get(key)
    ]
    if lines:
        raise error_class(*(lines if launch.is_main else []))


def require_same_weights(launch: Launch, model: nn.Module, step: int) -> None:
    """Check that all ranks hold the same parameters to the bit; raises PeerError on every rank, naming one tensor.

    Compares the sum of each tensor's bit patterns, modulo 2^64, which any single flipped bit changes. Waits for the
    device.
    """
    if launch.world_size == 1:
        return
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = torch.stack([parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in parameters])
    rows = gather(launch, sums).cpu()
    ranks, columns = (rows != rows[0]).nonzero(as_tuple=True)
    if len(ranks):
        drifted, tensors = sorted(set(ranks.tolist())), sorted(set(columns.tolist()))
        line = (
            f"ranks {drifted} drifted from rank 0 by global step {step}: {names[tensors[0]]} differs "
            f"(as do {len(tensors) - 1} other tensors); the newest checkpoint stands"
        )
        raise PeerError(*([line] if launch.is_main else []))


def run_on_rank0(launch: Launch, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its result on every rank; where it fails, every rank fails alike.

    Without that, an error on rank 0 would leave the others waiting in a collective until its timeout. The others
    raise rank 0's kind of error without its lines, which rank 0 prints.
    """
    result: list[Any] = [None, None]
    failure: Exception | None = None
    if launch.is_main:
        try:
            result[0] = function()
        except Exception as error:
            failure = error
            result[1] = type(as_harness_error(error) or PeerError())
    if launch.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    value, error_class = result
    if failure is not None:
        raise failure
    if error_class is not None:
        raise error_class()
    return value  # type: ignore[no-any-return]


def broadcast(launch: Launch, tensors: list[Tensor]) -> None:
    """Overwrite `tensors` in place with those of rank 0, in order."""
    if launch.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(launch: Launch, row: Tensor) -> Tensor:
    """Stack every rank's `row` (n,) into (world size, n) on every rank; does not wait for the device."""
    if launch.world_size == 1:
        return row.unsqueeze(0)
    rows = [torch.empty_like(row) for _ in range(launch.world_size)]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def in_shares(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """Return `function(stack)`, of which each rank computes its share of the first dimension; the same on every rank.

    `function` treats each entry of (N, ...) by itself and keeps shape and type. Does not wait for the device.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return function(stack)
    share = math.ceil(len(stack) / world_size)
    mine = stack[dist.get_rank() * share :][:share]
    padded = stack.new_zeros(share, *stack.shape[1:])
    if len(mine):
        padded[: len(mine)] = function(mine)
    whole = stack.new_empty(world_size * share, *stack.shape[1:])
    dist.all_gather_into_tensor(whole, padded)
    return whole[: len(stack)]


def wrap_ddp(objective: nn.Module, launch: Launch, device: torch.device) -> nn.Module:
    """Wrap an objective in DDP where there are several processes; gradients are averaged over ranks."""
    if launch.world_size == 1:
        return objective
    return DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # after the all-reduce the gradients are the buckets, not copies of them
    )


def gradient_sync(objective: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Return the context for a forward *and* backward pass: gradients are all-reduced in it only if `enabled`.

    DDP decides in the forward pass whether the backward will reduce, so the backward alone is not enough.
    """
    if enabled or not hasattr(objective, "no_sync"):
        return nullcontext()
    context: AbstractContextManager[None] = objective.no_sync()  # type: ignore[operator]
    return context
