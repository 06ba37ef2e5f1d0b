"""Trains like ddp_train.py, with NaN gradients on one rank: inject_nan.py FIRST_STEP RANK STEPS, then the rest."""

import sys

import torch

import ddp_train
from harness.distributed import launch_from_environment

first, rank, count = (int(word) for word in sys.argv[1:4])
del sys.argv[1:4]
accumulate = ddp_train.accumulate_gradients


def poisoned(stage: ddp_train.Stage, step: int) -> torch.Tensor:
    is_hit = first <= step < first + count and launch_from_environment().rank == rank
    parameter = next(stage.trainee.model.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * float("nan")) if is_hit else None
    losses = accumulate(stage, step)
    if hook is not None:
        hook.remove()
    return losses


ddp_train.accumulate_gradients = poisoned
sys.exit(ddp_train.exit_status_of(ddp_train.main))
