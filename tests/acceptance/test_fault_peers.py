"""Ranks that hang, fail, drift or disagree are found and named; two trainers never share a run."""

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.engine import distributed, watchdog
from harness.observers import observers
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from tests.helpers import (
    assert_same_run,
    metrics,
    start_training,
    status,
    strict_json,
    train_in_fork,
    wait_for,
    workers,
    write,
    write_demanding,
)


def listening_addresses(pid: int) -> set[str]:
    """Return the addresses at which a process listens for connections, as /proc writes them."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and words[9] in own:
                found.add(words[1].rpartition(":")[0])
    return found


@pytest.mark.fault("F30")
def test_a_rank_that_hangs_is_named(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "hung")
    with workers(folder, datasets_dir, "--peer-timeout", 5, count=2, fault="step.start@10#1:stop") as (first, second):
        wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 9)
        began = time.monotonic()
        if sys.platform == "linux":
            # All ranks are on this machine, so they are to be reached from nowhere else.
            assert listening_addresses(second.pid) <= {f"{socket.htonl(0x7F000001):08X}"}
        assert first.wait() == 8
        assert time.monotonic() - began < 120  # the default would wait for 5 minutes
        assert second.process.is_alive()
    wanted = "lost rank 1 at global step 10: it gave no sign of life for 5 seconds"
    assert wanted in first.stderr
    assert (status(folder)["exit_code"], status(folder)["reason"]) == (8, wanted)
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def fill_the_disk() -> None:
    """Have the word that a failed run leaves be refused, as by a full disk."""

    def refuse(*_: object) -> None:
        print("no room for status.json", file=sys.stderr, flush=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "status.json")

    observers.record_failure = refuse


@pytest.mark.fault("F30", "F18")
def test_a_lost_rank_ends_the_others_also_where_nothing_can_be_written(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "full")
    words = ("--peer-timeout", 2)
    with workers(folder, datasets_dir, *words, count=2, fault="step.start@10#1:stop", before=fill_the_disk) as ranks:
        assert ranks[0].wait() == 8
    assert "lost rank 1 at global step 10" in ranks[0].stderr
    assert "no room for status.json" in ranks[0].stderr


@pytest.mark.fault("F31")
def test_one_rank_s_error_ends_all_and_is_the_one_reported(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    folder = write_demanding(tmp_path / "runs" / "raised")
    with workers(folder, datasets_dir, count=2, fault="step.backward@10#1:raise") as (first, second):
        assert (first.wait(), second.wait()) == (8, 1)
    assert "rank 1 failed at global step 10: RuntimeError: TRAIN_FAULT: raised at step.backward" in first.stderr
    assert "Traceback" not in first.stderr
    assert status(folder)["exit_code"] == 8
    assert "in accumulate_gradients" in status(folder)["traceback"]
    assert "gloo" not in status(folder)["traceback"]
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def use_another_folder(runs_dir: Path) -> None:
    """Let rank 1 read a copy of the run, as another machine may have one."""
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--runs-dir") + 1] = str(runs_dir)


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    ("name", "key", "value"), [("train.json", "learning_rate", 0.02), ("model.json", "drop_rate", 0.2)]
)
def test_ranks_with_different_configurations_do_not_start(
    tmp_path: Path, datasets_dir: Path, name: str, key: str, value: float
) -> None:
    folder = write_demanding(tmp_path / "runs" / "run")
    other = write_demanding(tmp_path / "other" / "run")
    write(other / name, {**json.loads((other / name).read_text()), key: value})
    options = {"before": use_another_folder, "arguments": (other.parent,)}
    ranks = train_in_fork(folder, datasets_dir, count=2, check=2, **options)
    assert f"ranks disagree on {key}: found {value} on rank 1, wanted rank 0's" in ranks[0].stderr
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.fault("F33")
def test_a_drifted_weight_is_found_and_named(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "drifted")
    ranks = train_in_fork(folder, datasets_dir, count=2, check=8, fault="step.start@10#1:flipbit")
    assert "ranks [1] drifted from rank 0 by global step 12: " in ranks[0].stderr
    assert "trf_blocks.0." in ranks[0].stderr
    assert RunFolder(folder).checkpoint_steps()[-1] == 9
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


@pytest.mark.fault("F34")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_world_size_goes_on_with_the_same_data(
    tmp_path: Path, datasets_dir: Path, before: int, after: int
) -> None:
    """Without dropout the curve is the same up to rounding: the same sequences at every step."""
    folders = []
    for name in ("changed", "unchanged"):
        folder = write_demanding(tmp_path / "runs" / name, use_amp=False)
        write(folder / "model.json", {**json.loads((folder / "model.json").read_text()), "drop_rate": 0.0})
        folders.append(folder)
    changed, unchanged = folders
    train_in_fork(changed, datasets_dir, "--max-steps", 11, count=before)
    ranks = train_in_fork(changed, datasets_dir, count=after)
    assert "The global batch is split another way" in ranks[0].stdout
    train_in_fork(unchanged, datasets_dir, count=before)
    curves = [[(line["tokens"], line["train/loss"]) for line in metrics(folder)] for folder in folders]
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-4, rtol=0)
    weights = [load_file(folder / "checkpoints" / "latest" / "model.safetensors") for folder in folders]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=1e-3, err_msg=name)


@pytest.mark.fault("F36")
@pytest.mark.parametrize("race", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 20))])
def test_of_two_trainers_that_start_together_one_trains(
    whole: Path, tmp_path: Path, datasets_dir: Path, race: int
) -> None:
    folder = write_demanding(tmp_path / "runs" / "shared")
    slowly = {"fault": "step.start:sleep:0.05"}
    with workers(folder, datasets_dir, **slowly) as (first,), workers(folder, datasets_dir, **slowly) as (second,):
        both = {first.wait(): first, second.wait(): second}
    assert set(both) == {0, 5}
    assert f":{both[0].pid})" in both[5].stderr
    assert len(both[5].stderr.splitlines()) == 1
    assert_same_run(folder, whole)


@pytest.mark.fault("F37")
def test_a_lock_left_by_the_dead_holds_nobody(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "left")
    (folder / ".lock").write_text(f"{socket.gethostname()}:1\n")
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F39")
def test_restarts_without_progress_come_to_an_end(tmp_path: Path, datasets_dir: Path) -> None:
    """A launcher that restarts ten times is told to give up after three that got no further."""
    folder = write_demanding(tmp_path / "runs" / "stuck")
    for restart in range(5):  # the first restart has got further than the start before it
        train_in_fork(folder, datasets_dir, restart=restart, check=-9, fault="ckpt.begin@6:kill9")
    (last,) = train_in_fork(folder, datasets_dir, restart=5, check=8, fault="ckpt.begin@6:kill9")
    assert "restarted 3 times without progress beyond global step 4" in last.stderr
    assert status(folder)["exit_code"] == 8
    strict_json((folder / "status.json").read_text())
    train_in_fork(folder, datasets_dir)  # by hand, with the fault gone
    assert status(folder)["state"] == "complete"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault("F39")
def test_a_real_launcher_gives_up_restarting(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "stuck")
    launcher = start_training(folder, datasets_dir, 2, restarts=10, TRAIN_FAULT="step.start@7#1:raise")
    launcher.communicate(timeout=600)  # eleven starts of two ranks, each of which imports torch
    assert launcher.returncode == 1
    assert status(folder)["exit_code"] == 8
    assert len(RunRecord.read(folder / "run.json").starts) == 5


def lose_patience_soon() -> None:
    """Take a rank for stuck after two seconds."""
    watchdog.STUCK_SECONDS = 2.0


@pytest.mark.fault("F30")
def test_a_hang_in_which_all_ranks_live_comes_to_an_end(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "stuck")
    options: dict[str, Any] = {"before": lose_patience_soon, "fault": "step.start@7#1:sleep:60"}
    with workers(folder, datasets_dir, count=2, **options) as (first, _):
        assert first.wait(30) == 8
    assert status(folder)["exit_code"] == 8
    assert "stuck for 2 seconds at global step 7, though all ranks live" in status(folder)["reason"]


def test_a_hang_is_reported_before_nccl_ends_the_process() -> None:
    assert distributed.COLLECTIVE_TIMEOUT.total_seconds() > watchdog.STUCK_SECONDS
