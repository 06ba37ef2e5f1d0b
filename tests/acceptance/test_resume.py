"""Kill it, run the same command, get the same bits."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.helpers import final_bits, metrics, start_training, status, train, wait_for, write, write_run

# What could make a resumed run differ: dropout, accumulation, float16 with its scaler, a schedule, shuffling.
DEMANDING = {
    "min_train_tokens": 40 * 8 * 16,
    "microbatch_size": 1,
    "global_batch_size": 8,
    "use_amp": True,
    "schedule_learning_rate": True,
    "warmup_period_percent": 10,
    "clipping_max_norm": 0.5,
    "shuffle": True,
    "validation_interval": 7,
    "validation_batches": 1,
}


def write_demanding(folder: Path) -> Path:
    write_run(folder, {}, DEMANDING)
    train_json = json.loads((folder / "train.json").read_text())
    del train_json["gradient_accumulation_steps"]  # global_batch_size decides
    write(folder / "train.json", train_json)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path) -> Path:
    """A run of one process that was never interrupted."""
    folder = write_demanding(tmp_path_factory.mktemp("resume") / "runs" / "whole")
    train(folder, datasets_dir)
    return folder


def kill_rank_0(folder: Path) -> None:
    """Kill the process that holds the run's lock; under torchrun the others end with it."""
    os.kill(int((folder / ".lock").read_text().split(":")[1]), signal.SIGKILL)


def kill_after_a_save(folder: Path, datasets_dir: Path, processes: int | None) -> None:
    """Start a run and kill it somewhere between two checkpoints."""
    process = start_training(folder, datasets_dir, processes)
    wait_for(lambda: (folder / "checkpoints" / "step-00000010").exists())
    kill_rank_0(folder)
    process.kill()
    process.communicate()
    assert not (folder / "checkpoints" / "step-00000039").exists()


def test_killed_after_a_save_and_run_again_is_the_same_to_the_bit(
    whole: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    killed = write_demanding(tmp_path / "killed")
    kill_after_a_save(killed, datasets_dir, None)
    again = train(killed, datasets_dir)
    assert "Resuming from step-000000" in again.stdout
    assert final_bits(killed) == final_bits(whole)
    assert [line["step"] for line in metrics(killed)] == list(range(40))


def test_two_processes_killed_and_run_again_are_the_same_to_the_bit(tmp_path: Path, datasets_dir: Path) -> None:
    uninterrupted, killed = (write_demanding(tmp_path / name) for name in ("whole", "killed"))
    train(uninterrupted, datasets_dir, processes=2)
    kill_after_a_save(killed, datasets_dir, 2)
    train(killed, datasets_dir, processes=2)
    assert final_bits(killed) == final_bits(uninterrupted)


def test_repeated_run_is_the_same_to_the_bit(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    repeated = write_demanding(tmp_path / "repeated")
    train(repeated, datasets_dir, processes=1)
    assert final_bits(repeated) == final_bits(whole)


def test_sigterm_saves_and_the_next_start_goes_on(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    stopped = write_demanding(tmp_path / "stopped")
    process = start_training(stopped, datasets_dir)
    wait_for(lambda: (stopped / "checkpoints" / "step-00000005").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["exit_code"] == 75
    train(stopped, datasets_dir)
    assert final_bits(stopped) == final_bits(whole)
