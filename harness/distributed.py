"""Join and leave the process group, choose the device, agree between ranks, and notice requests to stop.

The environment variables of torchrun are read here and nowhere else. A single process needs no process group:
every function below works without one.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError, PeerError, as_harness_error

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
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

    @property
    def is_main(self) -> bool:
        """Say whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0


def launch_from_environment() -> Launch:
    """Read rank, local rank and world size from torchrun's environment."""
    names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    return Launch(*(int(os.environ.get(name, default)) for name, default in names))


def choose_device(choice: str, launch: Launch) -> torch.device:
    """Give this process's device for `--device` auto, cuda, cpu or mps; raises ConfigError."""
    has_mps = torch.backends.mps.is_available()
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "mps" if has_mps and launch.world_size == 1 else "cpu"
    if choice == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device: found cuda, wanted a device that this machine has; it has no CUDA GPU")
        if launch.local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc_per_node: found {launch.local_world_size} processes, "
                f"wanted at most one for each of the {torch.cuda.device_count()} GPUs"
            )
        return torch.device("cuda", launch.local_rank)
    if choice == "mps":
        if not has_mps:
            raise ConfigError("--device: found mps, wanted a device that this machine has; it has no MPS")
        if launch.world_size > 1:
            raise ConfigError(f"--device: found mps with {launch.world_size} processes, wanted one process")
    return torch.device(choice)


def device_name(device: torch.device) -> str:
    """Give the device's name for people and for looking up its peak speed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_up_kernels(device: torch.device, use_tf32: bool, deterministic: bool) -> None:
    """Choose this process's kernels and how it keeps memory, before the device is first used.

    TF32 rounds the inputs of float32 matrix multiplications to 10 bits of mantissa. Deterministic kernels give the
    same bits on every run on the same hardware.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    torch.set_float32_matmul_precision("high" if use_tf32 else "highest")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for to be reproducible
        torch.use_deterministic_algorithms(True)


def _keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the system as soon as they are freed.

    Logits are such blocks: every micro-batch would page them in again, which takes up to half of a step's time.
    """
    with suppress(OSError, AttributeError):  # no glibc: its own allocator decides
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process_group(launch: Launch, device: torch.device) -> Iterator[None]:
    """Join the other processes: NCCL for CUDA, gloo otherwise.

    The group is left on a clean exit only: after an error the other ranks may never answer, and leaving would wait
    for them.
    """
    if launch.world_size == 1:
        yield
        return
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=device if is_cuda else None
        )
        yield
    except RuntimeError as error:
        # gloo's errors are plain RuntimeErrors that name it; torch's own for NCCL and the store are DistErrors.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            first_line = str(error).splitlines()[0]
            raise PeerError(f"rank {launch.rank}: another rank was lost or hung ({first_line})") from error
        raise
    dist.destroy_process_group()


def gather_strings(launch: Launch, value: str) -> list[str]:
    """Give every rank's `value`, in rank order, on every rank."""
    if launch.world_size == 1:
        return [value]
    values: list[Any] = [None] * launch.world_size
    dist.all_gather_object(values, value)
    return values


def agree(launch: Launch, what: str, value: str) -> None:
    """Check that `value` is the same on all ranks; raises PeerError on every rank if not."""
    values = gather_strings(launch, value)
    if len(set(values)) > 1:
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        raise PeerError(*([f"ranks disagree on {what}: ranks {odd} differ from rank 0"] if launch.is_main else []))


def on_main(launch: Launch, function: Callable[[], T]) -> T:
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


def distribute(objective: nn.Module, launch: Launch, device: torch.device) -> nn.Module:
    """Wrap an objective in DDP where there are several processes; gradients are averaged over ranks."""
    if launch.world_size == 1:
        return objective
    return DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # after the all-reduce the gradients are the buckets, not copies of them
    )


def gradient_sync(objective: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Give the context for a forward *and* backward pass: gradients are all-reduced in it only if `enabled`.

    DDP decides in the forward pass whether the backward will reduce, so the backward alone is not enough.
    """
    if enabled or not hasattr(objective, "no_sync"):
        return nullcontext()
    context: AbstractContextManager[None] = objective.no_sync()  # type: ignore[operator]
    return context


class StopRequest:
    """Remembers SIGTERM or SIGINT so that the loop can stop at a step's end; a second signal stops at once.

    A handler only sets a flag: it may run at any moment, so it must neither wait nor speak to other ranks.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs, then put the former handlers back."""
        signals = (signal.SIGTERM, signal.SIGINT)
        former = {number: signal.signal(number, self._remember) for number in signals}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
