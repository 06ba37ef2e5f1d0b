"""A full, limited or read-only disk, and a terminal that is gone, cost a run nothing that it had."""

import ctypes
import os
import re
import resource
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import ddp_train
from harness.engine import checkpoint
from harness.run.run_folder import RunFolder
from tests.helpers import (
    FORKS,
    assert_same_run,
    metrics,
    status,
    train_in_fork,
    workers,
    write_demanding,
)

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
PARAMETERS = 2 * 97 * 16 + 16 * 16 + 12 * 16 * 16 + 10 * 16 + 2 * 16  # of the demanding run's model: one block
CHECKPOINT_BYTES = 12 * PARAMETERS  # weights and two moments in float32


def have_mounts_of_one_s_own() -> None:
    """Leave the machine's mount namespace, so that what is mounted next is seen, and lasts, here alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", Path("/"), None, MS_REC | MS_PRIVATE)


def mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [None if word is None else str(word).encode() for word in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


def can_mount_or_exit() -> None:
    try:
        have_mounts_of_one_s_own()
    except (OSError, AttributeError):
        os._exit(1)


@cache
def may_mount() -> bool:
    process = FORKS.Process(target=can_mount_or_exit)
    process.start()
    process.join()
    return process.exitcode == 0


@pytest.fixture
def mounts() -> None:
    """Skip where the system does not let this user mount."""
    if not may_mount():
        pytest.skip("needs leave to mount (root on Linux)")


def before_save(step: int, function: Callable[[], object]) -> None:
    """Have something happen just before the save of a global step."""
    write = checkpoint.write

    def write_after(folder: RunFolder, snapshot: checkpoint.Snapshot) -> Path:
        if snapshot.step == step:
            function()
        return write(folder, snapshot)

    checkpoint.write = write_after


def fill(place: Path, free: int) -> None:
    """Leave `free` bytes on a disk."""
    with (place / "ballast").open("wb") as file:
        file.write(b"\0" * max(0, shutil.disk_usage(place).free - free))


def on_a_small_disk(folder: Path, place: Path, free: int, step: int | None) -> None:
    """Put the run on a disk of its own that fills up before a step's save, or at once; copy it back at the end."""
    have_mounts_of_one_s_own()
    place.mkdir()
    mount("tmpfs", place, "tmpfs", 0, "size=4m")
    shutil.copytree(folder, place / folder.name, symlinks=True)
    ddp_train.sys.argv[ddp_train.sys.argv.index("--runs-dir") + 1] = str(place)
    if step is None:
        fill(place, free)
    else:
        before_save(step, lambda: fill(place, free))
    main = ddp_train.main

    def main_and_back() -> None:
        try:
            main()
        finally:
            shutil.rmtree(folder)
            shutil.copytree(place / folder.name, folder, symlinks=True)

    ddp_train.main = main_and_back


@pytest.mark.fault("F18")
@pytest.mark.parametrize("pages", [0, 3, 10, 20, 21, 22, 23])
def test_a_disk_that_fills_up_costs_no_older_checkpoint(
    mounts: None, whole: Path, tmp_path: Path, datasets_dir: Path, pages: int
) -> None:
    """The pages of 4 KiB left suffice for none, for some, or for nearly all of a checkpoint's files."""
    folder = write_demanding(tmp_path / "runs" / "full")
    arguments = (folder, tmp_path / "disk", pages * 4096, 9)
    (worker,) = train_in_fork(folder, datasets_dir, check=6, before=on_a_small_disk, arguments=arguments)
    (line,) = [line for line in worker.stderr.splitlines() if "cannot be written (" in line]
    needed = int(re.search(r"it needs ([\d,]+) bytes, ", line)[1].replace(",", ""))
    assert CHECKPOINT_BYTES <= needed < CHECKPOINT_BYTES + 1000  # the optimizer counts its steps too
    assert "are free; older checkpoints stand" in line
    assert "Traceback" not in worker.stderr
    assert RunFolder(folder).checkpoint_steps() == [0, 3, 6]
    assert not list(folder.rglob(".tmp-*"))
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F20")
def test_no_room_for_a_checkpoint_is_said_before_the_first_step(
    mounts: None, tmp_path: Path, datasets_dir: Path
) -> None:
    folder = write_demanding(tmp_path / "runs" / "full")
    arguments = (folder, tmp_path / "disk", CHECKPOINT_BYTES - 4096, None)
    (worker,) = train_in_fork(folder, datasets_dir, check=6, before=on_a_small_disk, arguments=arguments)
    assert "bytes free, wanted" in worker.stderr
    assert len(worker.stderr.splitlines()) == 1
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.fault("F18")
def test_a_disk_full_on_rank_0_ends_all_ranks(whole_by_two: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "full")
    with workers(folder, datasets_dir, count=2, fault="ckpt.file:optimizer.safetensors@9#0:enospc") as ranks:
        assert [rank.wait() for rank in ranks] == [6, 6]
    assert status(folder)["exit_code"] == 6
    train_in_fork(folder, datasets_dir, count=2)
    assert_same_run(folder, whole_by_two)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.fault("F19")
def test_a_limit_on_file_sizes_is_like_a_full_disk(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "limited")
    size = 6 * PARAMETERS  # more than the model's file, less than the optimizer's
    (worker,) = train_in_fork(folder, datasets_dir, check=6, before=limit_files, arguments=(size,))
    assert "File too large" in worker.stderr
    assert "Traceback" not in worker.stderr
    assert RunFolder(folder).checkpoint_steps() == []
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


def read_only(place: Path, step: int | None) -> None:
    """Make a folder read-only at once, or before a step's save."""
    have_mounts_of_one_s_own()

    def close() -> None:
        mount(str(place), place, None, MS_BIND)
        mount("none", place, None, MS_REMOUNT | MS_BIND | MS_RDONLY)

    if step is None:
        close()
    else:
        before_save(step, close)


@pytest.mark.fault("F21")
@pytest.mark.parametrize(("place", "step"), [(".", None), ("checkpoints", 9)], ids=["at once", "later"])
def test_a_read_only_folder_is_one_line(
    mounts: None, whole: Path, tmp_path: Path, datasets_dir: Path, place: str, step: int | None
) -> None:
    folder = write_demanding(tmp_path / "runs" / "closed")
    (worker,) = train_in_fork(folder, datasets_dir, check=6, before=read_only, arguments=(folder / place, step))
    assert "Traceback" not in worker.stderr
    (line,) = [line for line in worker.stderr.splitlines() if "Read-only file system" in line]
    assert str(folder) in line
    assert RunFolder(folder).checkpoint_steps() == ([] if step is None else [0, 3, 6])
    train_in_fork(folder, datasets_dir)
    assert_same_run(folder, whole)


@pytest.mark.fault("F22")
def test_metrics_that_cannot_be_written_wait(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "unlogged")
    (worker,) = train_in_fork(folder, datasets_dir, fault="metrics@5-16:enospc")
    assert worker.stderr.count("metrics.jsonl: cannot be written for now") == 1
    assert [line["step"] for line in metrics(folder)] == [line["step"] for line in metrics(whole)]
    assert_same_run(folder, whole)


def lose_the_terminal() -> None:
    """Let standard output and error be a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def log_to_a_full_disk() -> None:
    """Let standard output and error be a log on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


@pytest.mark.fault("F52")
@pytest.mark.parametrize("lose", [lose_the_terminal, log_to_a_full_disk])
def test_a_run_outlives_its_terminal(
    whole: Path, tmp_path: Path, datasets_dir: Path, lose: Callable[[], None]
) -> None:
    if lose is log_to_a_full_disk and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = write_demanding(tmp_path / "runs" / "unheard")
    train_in_fork(folder, datasets_dir, before=lose)
    assert_same_run(folder, whole)
