"""Counts the gradient all-reduces that DDP starts, and their bytes, in a process that is about to train."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from harness.engine import distributed


def count_all_reduces() -> None:
    """Have DDP print a line for every all-reduce."""
    wrap_ddp = distributed.wrap_ddp
    sizes: list[int] = []

    def counting(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().nbytes)
        print(f"all-reduce {len(sizes)}: {sizes[-1]} bytes")
        return allreduce_hook(dist.group.WORLD, bucket)

    def distribute_and_count(*arguments: object) -> nn.Module:
        wrapped = wrap_ddp(*arguments)  # type: ignore[arg-type]
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, counting)
        return wrapped

    distributed.wrap_ddp = distribute_and_count
