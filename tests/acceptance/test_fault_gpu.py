"""What of the fault matrix only a GPU can show."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, throughput
from harness.engine import checkpoint
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import open_checkpoint
from harness.engine.optimizers import make_optimizer
from harness.run.config import ModelConfig, TrainConfig
from harness.run.run_folder import RunFolder
from harness.run.train_state import TrainState
from model import initialise, uninitialized_model
from tests.acceptance.test_fault_kill import lines_in, needs_proc, rank_processes
from tests.helpers import (
    REQUIRED_TRAIN,
    assert_same_run,
    run,
    start_process,
    status,
    wait_for,
    write_demanding,
)

EXACT: dict[str, Any] = {"deterministic": True, "compile": False}


def place(folder: Path, datasets_dir: Path) -> tuple[object, ...]:
    return ("ddp_train.py", folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cuda")


@pytest.mark.gpu
@pytest.mark.fault("F01", "F40")
@pytest.mark.parametrize(("amp_dtype", "compiled"), [("float16", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_killed_run_is_the_same_to_the_bit_on_cuda(
    tmp_path: Path, datasets_dir: Path, amp_dtype: str, compiled: bool
) -> None:
    """With deterministic kernels; a step is skipped on the way, so that the scaler's state matters."""
    exact = {**EXACT, "compile": compiled, "amp_dtype": amp_dtype}
    whole, killed = (write_demanding(tmp_path / "runs" / name, **exact) for name in ("whole", "killed"))
    run(*place(whole, datasets_dir), TRAIN_FAULT="step.backward@5:nan")
    run(*place(killed, datasets_dir), "--max-steps", 6, TRAIN_FAULT="step.backward@5:nan")
    run(*place(killed, datasets_dir), check=-9, TRAIN_FAULT="ckpt.manifest@12:kill9")
    run(*place(killed, datasets_dir))
    assert_same_run(killed, whole)


@pytest.mark.gpu
@needs_proc
@pytest.mark.fault("F02", "F03")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_restarted_with_nccl(tmp_path: Path, datasets_dir: Path, rank: int) -> None:
    whole, restarted = (write_demanding(tmp_path / "runs" / name, **EXACT) for name in ("whole", "restarted"))
    run(*place(whole, datasets_dir), processes=2)
    slowly = {"TRAIN_FAULT": "step.start:sleep:0.2"}
    launcher = start_process(*place(restarted, datasets_dir), processes=2, restarts=3, **slowly)
    try:
        wait_for(lambda: lines_in(restarted / "metrics.jsonl") >= 8)
        os.kill(rank_processes(launcher.pid)[rank], 9)
        _, errors = launcher.communicate(timeout=600)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == 0, errors
    assert_same_run(restarted, whole)


@pytest.mark.parametrize(
    ("device_type", "config"), [("cpu", gpu_check.TINY), pytest.param("cuda", throughput.GPT2, marks=pytest.mark.gpu)]
)
def test_a_checkpoint_is_saved_and_verified_in_seconds(tmp_path: Path, device_type: str, config: ModelConfig) -> None:
    """GPT-2 small's has two gigabytes; times are printed, and bounded so loosely that only a mistake exceeds them."""
    model = uninitialized_model(config)
    initialise(model, 1)
    device = torch.device(device_type)
    model.to(device)
    optimizer = make_optimizer(model, TrainConfig(**REQUIRED_TRAIN), device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now it has its state
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler(device_type)
    began = time.monotonic()
    snapshot = checkpoint.snapshot(
        model, optimizer, scaler, TrainState(next_step=1, optimizer_steps=1), ResumeIdentity({})
    )
    taken = time.monotonic()
    saved = checkpoint.write(RunFolder(tmp_path), snapshot)
    written = time.monotonic()
    found = open_checkpoint(saved)
    verified = time.monotonic()
    held = torch.cuda.memory_allocated()  # nothing, without a GPU
    checkpoint.load(found, model, make_optimizer(model, TrainConfig(**REQUIRED_TRAIN), device))
    # The new optimizer's state is all that stays on the GPU: what is loaded passes through main memory.
    assert torch.cuda.memory_allocated() < held + 8 * sum(p.numel() for p in model.parameters()) + 2**28
    print(
        f"taken in {taken - began:.1f} s, saved in {written - began:.1f} s, verified in {verified - written:.1f} s",
        file=sys.stderr,
    )
    assert written - began < 60
    assert verified - written < 30


@pytest.mark.gpu
@pytest.mark.fault("F29")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_survivor_of_a_rank_that_died_under_nccl_says_so(tmp_path: Path, datasets_dir: Path) -> None:
    """It waits inside the driver, where no signal handler runs; torchrun would kill it after 30 seconds."""
    folder = write_demanding(tmp_path / "runs" / "survivor", **EXACT)
    run(*place(folder, datasets_dir), processes=2, check=1, TRAIN_FAULT="step.start@7#1:kill9")
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("failed", 8)
    assert "rank 1" in found["reason"]
