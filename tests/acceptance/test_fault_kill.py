"""Kill it anywhere, run the same command, get the same bits."""

import os
import random
import re
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from harness.engine.opening import FILES, open_checkpoint
from harness.run.errors import CheckpointError, RunLockedError
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from tests.helpers import (
    DEMANDING,
    LAST_STEP,
    Worker,
    assert_same_run,
    metrics,
    start_training,
    train_in_fork,
    wait_for,
    workers,
    write_demanding,
)

INTERVAL = DEMANDING["checkpoint_interval"]
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a launcher in /proc")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.fault("F01")
@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 1), (1, 1), (2, 2), *(pytest.param(seed, 1 + seed % 2, marks=pytest.mark.slow) for seed in range(3, 20))],
)
def test_killed_at_random_moments(
    request: pytest.FixtureRequest, tmp_path: Path, datasets_dir: Path, seed: int, count: int
) -> None:
    draw = random.Random(seed)
    folder = write_demanding(tmp_path / "runs" / "killed")
    done = 0
    for _ in range(3):
        enough = done + draw.randint(0, 12)
        with workers(folder, datasets_dir, count=count) as ranks:
            wait_for(lambda: lines_in(folder / "metrics.jsonl") >= enough or ranks[0].process.exitcode is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            for rank in ranks:
                rank.process.kill()
        if resumed := re.search(r"Resuming from step-\d+: (\d+) global steps are done", ranks[0].stdout):
            assert done - int(resumed[1]) <= 2 * INTERVAL  # the next one passes while a checkpoint is written
        done = lines_in(folder / "metrics.jsonl")
    train_in_fork(folder, datasets_dir, count=count)
    assert_same_run(folder, request.getfixturevalue("whole" if count == 1 else "whole_by_two"))


def rank_processes(launcher: int) -> dict[int, int]:
    """Return the process number of every rank that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(pid)
    return found


@pytest.mark.fault("F02")
def test_a_killed_rank_is_replaced(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    """What a launcher does when rank 1 dies: it asks the other one to leave, and starts both again."""
    folder = write_demanding(tmp_path / "runs" / "replaced")
    with workers(folder, datasets_dir, count=2, fault="step.start@9#1:kill9") as (survivor, killed):
        assert killed.wait() == -9
        survivor.send(signal.SIGTERM)
        survivor.wait()
    train_in_fork(folder, datasets_dir, count=2, restart=1)
    assert [start["restart"] for start in RunRecord.read(folder / "run.json").starts] == [0, 1]
    assert_same_run(folder, whole_by_two)


@needs_proc
@pytest.mark.fault("F02", "F03")
@pytest.mark.parametrize(
    "kills", [[0], *(pytest.param([n % 2, 1 - n % 2], marks=pytest.mark.slow) for n in range(10))]
)
def test_a_killed_rank_is_restarted_by_the_launcher(
    whole_by_two: Path, tmp_path: Path, datasets_dir: Path, kills: list[int]
) -> None:
    """A launch survives the death of rank 0, which holds the run's lock and the files."""
    folder = write_demanding(tmp_path / "runs" / "restarted")
    launcher = start_training(folder, datasets_dir, 2, restarts=3, TRAIN_FAULT="step.start:sleep:0.1")
    starts = lambda: RunRecord.read(folder / "run.json").starts  # noqa: E731
    try:
        for number, rank in enumerate(kills, start=1):
            wait_for(lambda: lines_in(folder / "metrics.jsonl") >= 8 * number)  # noqa: B023
            os.kill(rank_processes(launcher.pid)[rank], 9)
            began = time.monotonic()
            wait_for(lambda: len(starts()) > number)  # noqa: B023
            print(f"restarted in {time.monotonic() - began:.1f} seconds")
        _, errors = launcher.communicate(timeout=600)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == 0, errors
    assert [start["restart"] for start in starts()] == [*range(len(kills) + 1)]
    assert_same_run(folder, whole_by_two)


@needs_proc
@pytest.mark.fault("F04")
def test_ranks_do_not_outlive_their_launcher(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "orphans")
    launcher = start_training(folder, datasets_dir, 2, TRAIN_FAULT="step.start@7:sleep:4")
    try:
        wait_for(lambda: lines_in(folder / "metrics.jsonl") >= 6)
        orphans = rank_processes(launcher.pid)
    finally:
        launcher.kill()
    with pytest.raises(RunLockedError, match=f":{orphans[0]}\\)"), RunFolder(folder).locked():
        pass  # what a second trainer does, without the seconds that its start would take
    wait_for(lambda: not any(is_running(pid) for pid in orphans.values()))
    assert lines_in(folder / "metrics.jsonl") <= 8  # step 7 slept while the launcher died; they trained no further
    launcher.communicate()
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def die(folder: Path, datasets_dir: Path, fault: str) -> Worker:
    """Train until the fault kills the process; check that both links lead to whole checkpoints or nowhere."""
    (worker,) = train_in_fork(folder, datasets_dir, check=-9, fault=f"{fault}:kill9")
    for name in ("latest", "best"):
        link = folder / "checkpoints" / name
        if link.is_symlink():
            open_checkpoint(link.resolve())
    return worker


LEAVES_A_PART = (*(f"ckpt.file:{name}" for name in FILES), "ckpt.manifest")
POINTS = ("ckpt.begin", *LEAVES_A_PART, "ckpt.rename", "ckpt.latest", "ckpt.best", "ckpt.prune", "ckpt.end")


@pytest.mark.fault("F05", "F06", "F08")
def test_killed_at_every_point_of_a_save_in_turn(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    """Every start dies inside a save, the first in the first and the last before the last; the next one goes on."""
    folder = write_demanding(tmp_path / "runs" / "killed", checkpoints_to_keep=2)
    deaths = {
        "ckpt.file:model.safetensors": 0,
        "ckpt.best": 3,
        "ckpt.begin": 6,
        "ckpt.file:optimizer.safetensors": 9,
        "ckpt.file:state.json": 12,
        "ckpt.manifest": 15,
        "ckpt.rename": 18,
        "ckpt.latest": 21,
        "ckpt.prune": 24,
        "ckpt.end": 27,
        "step.opt": LAST_STEP,
    }
    assert set(POINTS) <= set(deaths)
    starts = [die(folder, datasets_dir, f"{point}@{step}") for point, step in deaths.items()]
    starts += train_in_fork(folder, datasets_dir)
    for (point, step), (_, after) in zip(deaths.items(), pairwise(starts), strict=True):
        was_cut_off = f"Removed step-{step:08d}, which was cut off" in after.stdout
        assert was_cut_off == (point in LEAVES_A_PART), (point, after.stdout)
    assert "There is no complete checkpoint; starting at step 0" in starts[1].stdout
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.fault("F05")
@pytest.mark.parametrize("step", [0, 3, LAST_STEP], ids=["first", "second", "last"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_a_save(whole: Path, tmp_path: Path, datasets_dir: Path, point: str, step: int) -> None:
    if (point == "ckpt.prune" and step < LAST_STEP) or (point == "ckpt.best" and step == LAST_STEP):
        pytest.skip("this save does not come by that point")
    folder = write_demanding(tmp_path / "runs" / "killed", checkpoints_to_keep=2)
    die(folder, datasets_dir, f"{point}@{step}")
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F08")
def test_killed_between_the_last_step_and_its_save(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "killed")
    die(folder, datasets_dir, f"ckpt.begin@{LAST_STEP}")
    assert len(metrics(folder)) == LAST_STEP + 1
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F23")
def test_killed_while_pruning(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "killed", checkpoints_to_keep=2)
    die(folder, datasets_dir, "ckpt.prune@9")
    valid = [step for step in RunFolder(folder).checkpoint_steps() if is_valid(RunFolder(folder).checkpoint(step))]
    assert len(valid) >= 2
    assert {(folder / "checkpoints" / name).resolve().name for name in ("latest", "best")} <= {
        f"step-{step:08d}" for step in valid
    }
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)
    assert all(is_valid(path) for path in (folder / "checkpoints").glob("step-*"))


def is_valid(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True
