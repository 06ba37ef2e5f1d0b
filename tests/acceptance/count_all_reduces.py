"""Trains like ddp_train.py, and counts the gradient all-reduces that DDP starts."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import ddp_train
from harness import distributed

calls = 0
distribute = distributed.distribute


def counting(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    global calls
    calls += 1
    return allreduce_hook(dist.group.WORLD, bucket)


def distribute_and_count(*arguments: object) -> nn.Module:
    wrapped = distribute(*arguments)  # type: ignore[arg-type]
    assert isinstance(wrapped, DistributedDataParallel)
    wrapped.register_comm_hook(None, counting)
    return wrapped


distributed.distribute = distribute_and_count
ddp_train.main()
print(f"all-reduces: {calls}")
