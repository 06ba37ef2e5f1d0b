"""Kill it, run the same command, get the same bits."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import final_bits, metrics, start_training, status, train, wait_for

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


def demanding(make_run: Callable[..., Path], name: str) -> Path:
    folder = make_run(name, train=DEMANDING)
    train_json = json.loads((folder / "train.json").read_text())
    del train_json["gradient_accumulation_steps"]
    (folder / "train.json").write_text(json.dumps(train_json))
    return folder


def kill_rank_0(folder: Path) -> None:
    """Kill the process that holds the run's lock; under torchrun the others end with it."""
    os.kill(int((folder / ".lock").read_text().split(":")[1]), signal.SIGKILL)


@pytest.mark.parametrize("processes", [None, 2], ids=["python", "torchrun x 2"])
def test_killed_after_a_save_and_run_again_is_the_same_to_the_bit(
    make_run: Callable[..., Path], datasets_dir: Path, processes: int | None
) -> None:
    whole, killed = demanding(make_run, "whole"), demanding(make_run, "killed")
    train(whole, datasets_dir, processes=processes)

    process = start_training(killed, datasets_dir, processes)
    wait_for(lambda: (killed / "checkpoints" / "step-00000010").exists())
    kill_rank_0(killed)
    process.kill()
    process.communicate()
    assert not (killed / "checkpoints" / "step-00000039").exists()

    again = train(killed, datasets_dir, processes=processes)
    assert "Resuming from step-000000" in again.stdout
    assert final_bits(killed) == final_bits(whole)
    assert [line["step"] for line in metrics(killed)] == list(range(40))


def test_repeated_run_is_the_same_to_the_bit(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    first, second = demanding(make_run, "first"), demanding(make_run, "second")
    for folder in (first, second):
        train(folder, datasets_dir, processes=1)
    assert final_bits(first) == final_bits(second)


def test_sigterm_saves_and_the_next_start_goes_on(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    whole, stopped = demanding(make_run, "whole"), demanding(make_run, "stopped")
    train(whole, datasets_dir)
    process = start_training(stopped, datasets_dir)
    wait_for(lambda: (stopped / "checkpoints" / "step-00000005").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["exit_code"] == 75
    train(stopped, datasets_dir)
    assert final_bits(stopped) == final_bits(whole)
