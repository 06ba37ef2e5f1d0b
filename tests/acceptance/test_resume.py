"""Kill it, run the same command, get the same bits."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers import (
    LAST_STEP,
    assert_same_run,
    metrics,
    start_training,
    status,
    train,
    wait_for,
    write_demanding,
)

# So that a signal sent after a save arrives before the end.
SLOWLY = "step.start:sleep:0.05"


def kill_rank_0(folder: Path) -> None:
    """Kill the process that holds the run's lock; under torchrun the others end with it."""
    os.kill(int((folder / ".lock").read_text().split(":")[1]), signal.SIGKILL)


def kill_after_a_save(folder: Path, datasets_dir: Path, processes: int | None) -> None:
    """Start a run and kill it somewhere between two checkpoints."""
    process = start_training(folder, datasets_dir, processes, TRAIN_FAULT=SLOWLY)
    wait_for(lambda: (folder / "checkpoints" / "step-00000006").exists())
    kill_rank_0(folder)
    process.kill()
    process.communicate()
    assert not (folder / "checkpoints" / "step-00000029").exists()


@pytest.mark.fault("F01")
def test_killed_after_a_save_and_run_again_is_the_same_to_the_bit(
    whole: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    killed = write_demanding(tmp_path / "killed")
    kill_after_a_save(killed, datasets_dir, None)
    again = train(killed, datasets_dir)
    assert "Resuming from step-000000" in again.stdout
    assert_same_run(killed, whole)
    assert [line["step"] for line in metrics(killed)] == list(range(LAST_STEP + 1))


@pytest.mark.fault("F01")
def test_two_processes_killed_and_run_again_are_the_same_to_the_bit(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    killed = write_demanding(tmp_path / "killed")
    kill_after_a_save(killed, datasets_dir, 2)
    train(killed, datasets_dir, processes=2)
    assert_same_run(killed, whole_by_two)


def test_repeated_run_is_the_same_to_the_bit(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    repeated = write_demanding(tmp_path / "repeated")
    train(repeated, datasets_dir, processes=1)
    assert_same_run(repeated, whole)


def test_sigterm_saves_and_the_next_start_goes_on(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    stopped = write_demanding(tmp_path / "stopped")
    process = start_training(stopped, datasets_dir, TRAIN_FAULT=SLOWLY)
    wait_for(lambda: (stopped / "checkpoints" / "step-00000003").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["exit_code"] == 75
    train(stopped, datasets_dir)
    assert_same_run(stopped, whole)
