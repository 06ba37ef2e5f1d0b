"""A run's folder that others may write to: its lock stays locked, and nothing in it leads outside or blocks."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ddp_train
from harness.run.errors import RunLockedError
from harness.run.run_folder import RunFolder
from tests.conftest import Called
from tests.helpers import assert_tidy, train_in_fork, wait_for, workers


@pytest.mark.fault("F58")
def test_deleting_the_lock_file_lets_nobody_in(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    folder = make_run(train={"checkpoint_interval": 100})
    with workers(folder, datasets_dir, fault="step.start@9:sleep:60") as (first,):
        wait_for(lambda: len(RunFolder(folder).metrics.read()) >= 5)
        holder = (folder / ".lock").read_text().strip()
        for _ in range(2):
            (folder / ".lock").unlink(missing_ok=True)
            train_in_fork(folder, datasets_dir, check=5)
        (folder / ".lock").write_text(holder)
        (second,) = train_in_fork(folder, datasets_dir, check=5)
        assert holder.endswith(f":{first.pid}")
        assert f"another trainer holds this run ({holder})" in second.stderr


def test_a_folder_that_cannot_be_locked_is_locked_by_a_file(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network filesystems, which lock only what is open for writing."""
    import errno
    import fcntl
    import stat

    from harness.run import locks

    original = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        original(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    folder = RunFolder(make_run())
    with folder.locked(), pytest.raises(RunLockedError, match=f":{os.getpid()}"), folder.locked():
        pass
    with folder.locked():
        pass


OUTSIDE = b"what lies outside\n"


@pytest.mark.fault("F59")
@pytest.mark.parametrize(
    "place", [".lock", "checkpoints/.tmp-step-00000003", ".status.json.1.tmp", "checkpoints/step-00000019"]
)
@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "file", "pipe"])
def test_nothing_in_a_shared_folder_leads_outside_or_blocks(
    trained: Path, tmp_path: Path, datasets_dir: Path, place: str, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.json").write_bytes(OUTSIDE)
    planted = trained / place
    if planted.is_dir():
        planted.rename(tmp_path / "was")
    if kind == "file":
        planted.write_bytes(b"mine\n")
    elif kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(outside if kind == "link to a folder" else outside / "manifest.json")
    (done,) = train_in_fork(trained, datasets_dir, check=0)
    assert "Traceback" not in done.stderr
    assert [path.name for path in outside.iterdir()] == ["manifest.json"]
    assert (outside / "manifest.json").read_bytes() == OUTSIDE
    assert_tidy(trained)


@pytest.mark.fault("F60")
@pytest.mark.parametrize(
    ("name", "status"),
    [("model.json", 2), ("train.json", 2), ("metrics.jsonl", 6), ("run.json", 0), ("status.json", 0)],
)
def test_a_pipe_in_place_of_a_file_hangs_nothing(
    trained: Path, datasets_dir: Path, call: Callable[..., Called], name: str, status: int
) -> None:
    (trained / name).unlink()
    os.mkfifo(trained / name)
    done = call(ddp_train.main, trained.name, datasets_dir, "--runs-dir", trained.parent, "--device", "cpu")
    assert done.status == status
    if status:
        (line,) = done.stderr.splitlines()
        assert line.startswith(str(trained / name))
        assert "regular file" in line


@pytest.mark.fault("F59")
def test_metrics_are_not_written_through_a_link(
    make_run: Callable[..., Path], tmp_path: Path, datasets_dir: Path
) -> None:
    folder = make_run()
    (tmp_path / "outside").write_bytes(OUTSIDE)
    (folder / "metrics.jsonl").symlink_to(tmp_path / "outside")
    (done,) = train_in_fork(folder, datasets_dir, "--max-steps", 2)
    assert (tmp_path / "outside").read_bytes() == OUTSIDE
    assert "Traceback" not in done.stderr
