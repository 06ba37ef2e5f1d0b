"""Asked to stop, a run stops: saved, on all ranks, and once."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from harness.engine import watchdog
from harness.engine.opening import open_checkpoint
from harness.run.run_folder import RunFolder
from tests.helpers import (
    assert_same_run,
    assert_tidy,
    metrics,
    start_training,
    status,
    train_in_fork,
    wait_for,
    workers,
    write_demanding,
)


def assert_stopped_after(folder: Path, step: int, later: int = 1) -> None:
    """Assert that a run stopped on request after global step `step` or up to `later` after it, with its state saved.

    A step's numbers, and the request with them, are read when the next one has begun, or at once before a save.
    """
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert step <= found["step"] <= step + later
    step = found["step"]
    assert len(metrics(folder)) == step + 1
    assert RunFolder(folder).checkpoint_steps()[-1] == step
    assert_tidy(folder)


@pytest.mark.fault("F24")
def test_sigterm_to_the_launcher_saves_on_all_ranks(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "stopped")
    launcher = start_training(folder, datasets_dir, 2, TRAIN_FAULT="step.start:sleep:0.2")
    wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 5)
    launcher.send_signal(signal.SIGTERM)
    at = len(metrics(folder))
    try:
        launcher.communicate(timeout=600)
    finally:
        launcher.kill()
    assert launcher.returncode == 1  # whatever the ranks say
    assert_stopped_after(folder, at + (status(folder)["step"] > at + 1))  # torchrun takes a moment to hand it on
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


@pytest.mark.fault("F25")
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_stops_all_at_one_step(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path, rank: int
) -> None:
    folder = write_demanding(tmp_path / "runs" / "stopped")
    ranks = train_in_fork(folder, datasets_dir, count=2, check=75, fault=f"step.start@10#{rank}:term")
    assert_stopped_after(folder, 10)
    assert "asked to stop: saved after global step 11; run the same command to go on" in ranks[0].stderr
    assert "asked to stop" not in ranks[1].stderr
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def stop_inside_step_7(folder: Path, datasets_dir: Path, number: signal.Signals) -> None:
    """Send a signal while a backward pass of step 7 runs; assert that the run stops after the step, saved."""
    with workers(folder, datasets_dir, fault="step.backward@7:sleep:0.7") as (worker,):
        wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 6)
        time.sleep(0.7)
        worker.send(number)
        assert worker.wait() == 75
    assert_stopped_after(folder, 7)
    assert 0 < worker.stderr.find("stopping once this step is done") < worker.stderr.find("asked to stop: saved")


@pytest.mark.fault("F24")
def test_a_terminal_that_is_closed_stops_the_run_saved(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "hung-up")
    stop_inside_step_7(folder, datasets_dir, signal.SIGHUP)
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F26")
def test_one_sigint_saves_and_a_second_ends_at_once(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "interrupted")
    stop_inside_step_7(folder, datasets_dir, signal.SIGINT)
    with workers(folder, datasets_dir, fault="step.backward@12:sleep:60") as (worker,):
        wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 11)
        time.sleep(0.7)
        worker.send(signal.SIGINT)
        time.sleep(0.3)
        assert worker.process.is_alive()
        worker.send(signal.SIGINT)
        again = time.monotonic()
        assert worker.wait() == -signal.SIGINT
        assert time.monotonic() - again < 50  # of the 60 seconds that the step sleeps
    for step in RunFolder(folder).checkpoint_steps():
        open_checkpoint(RunFolder(folder).checkpoint(step))
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


SAVE = ("begin", "file:model.safetensors", "manifest", "rename", "latest", "prune", "end")


@pytest.mark.fault("F27")
@pytest.mark.parametrize("points", [SAVE[:4], SAVE[4:]], ids=["written", "published"])
def test_sigterm_inside_a_save_lets_it_finish(
    whole: Path, tmp_path: Path, datasets_dir: Path, points: tuple[str, ...]
) -> None:
    """One start for every point of a save; each goes on from where the last was stopped."""
    folder = write_demanding(tmp_path / "runs" / "stopped", checkpoints_to_keep=2)
    step = 3
    for point in points:
        train_in_fork(folder, datasets_dir, check=75, fault=f"ckpt.{point}@{step}:term")
        assert_stopped_after(folder, step, later=5)  # tiny steps go by while a save is written, but not past the next
        for saved in RunFolder(folder).checkpoint_steps():
            open_checkpoint(RunFolder(folder).checkpoint(saved))
        step = 3 * (status(folder)["step"] // 3 + 1)  # the next save of the schedule
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F28")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_leaves_the_run_as_it_was(
    trained: Path, datasets_dir: Path, number: signal.Signals
) -> None:
    """While torch is imported nothing has been written, so there is nothing to save, and nothing to say."""
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    process = start_training(trained, datasets_dir)
    if (maps := Path(f"/proc/{process.pid}/maps")).exists():
        wait_for(lambda: "libtorch" in maps.read_text())
    else:
        time.sleep(1)
    process.send_signal(number)
    assert process.wait(timeout=600) == -number
    assert process.communicate()[1] == ""
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.fault("F28")
def test_sigterm_during_an_evaluation_is_heeded_after_it(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "stopped")
    train_in_fork(folder, datasets_dir, check=75, fault="eval@6:term")
    assert_stopped_after(folder, 7)
    assert all("val/loss" in line for line in metrics(folder) if line["step"] in (0, 3, 6))
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F29")
def test_a_survivor_that_is_told_to_stop_does_not_wait_for_the_dead(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    """When a rank dies the launcher sends SIGTERM to the others: their handlers must not enter a collective."""
    folder = write_demanding(tmp_path / "runs" / "survivor")
    with workers(folder, datasets_dir, count=2, fault="step.start@7#1:kill9") as (survivor, dead):
        assert dead.wait() == -signal.SIGKILL
        survivor.send(signal.SIGTERM)
        told = time.monotonic()
        assert survivor.wait() in (8, -signal.SIGTERM)
        assert time.monotonic() - told < 100  # a collective would wait for the peer timeout, 5 minutes
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def wait_in_c(step: int) -> None:
    """Let rank 0 wait as in NCCL from global step `step` on: Python runs no signal handler there."""
    watchdog.SILENT_SECONDS_WHEN_STOPPING = 2.0
    reached = watchdog.Watchdog.reached

    def reached_and_blocked(self: watchdog.Watchdog, at: int) -> None:
        reached(self, at)
        if at == step and os.environ["RANK"] == "0":
            mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # which is locked: no signal ends this wait

    watchdog.Watchdog.reached = reached_and_blocked  # type: ignore[method-assign]


@pytest.mark.fault("F29")
def test_a_survivor_that_waits_inside_the_driver_leaves_and_says_why(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    folder = write_demanding(tmp_path / "runs" / "survivor")
    options: dict[str, Any] = {"before": wait_in_c, "arguments": (7,), "fault": "step.start@7#1:kill9"}
    with workers(folder, datasets_dir, count=2, **options) as (survivor, dead):
        assert dead.wait() == -signal.SIGKILL
        wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 6)  # it listens
        survivor.send(signal.SIGTERM)
        assert survivor.wait(20) == 8
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 8)
    assert status(folder)["reason"].startswith("lost rank 1 at global step 7")
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def tell_when_the_group_is_left() -> None:
    """Print a line when the process group is destroyed."""
    destroy = dist.destroy_process_group

    def told() -> None:
        print("left the group")
        destroy()

    dist.destroy_process_group = told  # type: ignore[assignment]


@pytest.mark.fault("F25")
def test_ranks_that_agreed_to_stop_leave_their_group(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "stopped")
    options: dict[str, Any] = {"before": tell_when_the_group_is_left, "fault": "step.start@5#1:term"}
    ranks = train_in_fork(folder, datasets_dir, count=2, check=75, **options)
    assert all("left the group" in rank.stdout for rank in ranks)
