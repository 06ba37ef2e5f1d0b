"""The same command gives the same bits, and after a signal goes on; kills are in test_fault_kill.py."""

import signal
from pathlib import Path

from tests.helpers import (
    assert_same_run,
    start_training,
    status,
    train,
    train_in_fork,
    wait_for,
    write_demanding,
)

# So that a signal sent after a save arrives before the end.
SLOWLY = "step.start:sleep:0.05"


def test_repeated_run_is_the_same_to_the_bit(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    repeated = write_demanding(tmp_path / "repeated")
    train(repeated, datasets_dir, processes=1)
    assert_same_run(repeated, whole)


def test_sigterm_saves_and_the_next_start_goes_on(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    stopped = write_demanding(tmp_path / "stopped")
    process = start_training(stopped, datasets_dir, TRAIN_FAULT=SLOWLY)
    wait_for(lambda: (stopped / "checkpoints" / "step-00000003").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["exit_code"] == 75
    train_in_fork(stopped, datasets_dir)
    assert_same_run(stopped, whole)
