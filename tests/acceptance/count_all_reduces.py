"""Trains like ddp_train.py, and counts the gradient all-reduces that DDP starts, and their bytes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import ddp_train
from harness import distributed

calls, size = 0, 0
distribute = distributed.distribute


def counting(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    global calls, size
    calls += 1
    size += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)


def distribute_and_count(*arguments: object) -> nn.Module:
    wrapped = distribute(*arguments)  # type: ignore[arg-type]
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, counting)
    return wrapped


distributed.distribute = distribute_and_count
ddp_train.main()
print(f"all-reduces: {calls}, bytes: {size}")
