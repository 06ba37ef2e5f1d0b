"""The seam through which tests break a run: what it understands, and that it does nothing unless asked."""

import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ddp_train
from harness.engine import failpoints
from harness.run.errors import ConfigError
from harness.run.run_folder import RunFolder
from tests.conftest import Called
from tests.helpers import ROOT, assert_same_run, final_bits, metrics, train_in_fork, write_demanding


@pytest.mark.parametrize(
    ("text", "point", "steps", "rank", "action", "seconds"),
    [
        ("step.start:kill9", "step.start", None, None, "kill9", 0),
        ("step.opt@7:raise", "step.opt", range(7, 8), None, "raise", 0),
        ("metrics@7-9#1:enospc", "metrics", range(7, 10), 1, "enospc", 0),
        ("ckpt.file:state.json@0#0:stop", "ckpt.file:state.json", range(1), 0, "stop", 0),
        ("eval:sleep:0.25", "eval", None, None, "sleep", 0.25),
    ],
)
def test_what_is_understood(
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    point: str,
    steps: range | None,
    rank: int | None,
    action: str,
    seconds: float,
) -> None:  # fmt: skip
    monkeypatch.setenv(failpoints.VARIABLE, text)
    assert failpoints.configured() == failpoints.Fault(point, steps, rank, action, seconds)


@pytest.mark.parametrize(
    "text",
    ["", "kill9", "step.start", "step.start:", "step.begin:kill9", "step.start:explode", "step.start@:kill9",
     "step.start@9-:kill9", "step.start#x:kill9", "step.start:sleep:", "step.start:sleep:-1", " step.start:kill9",
     "step.start:kill9\n", "step.start:\x1b[31m", "x" * 5000],
)  # fmt: skip
def test_what_is_not_understood_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    make_run: Callable[..., Path],
    datasets_dir: Path,
    call: Callable[..., Called],
    text: str,
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, text)
    with pytest.raises(ConfigError):
        failpoints.configured()
    folder = make_run()
    done = call(ddp_train.main, folder.name, datasets_dir, "--runs-dir", folder.parent)
    assert (done.status, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("TRAIN_FAULT: found ")
    assert len(line) < 200
    assert line.isprintable()
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "train.json"]


def test_a_fault_is_due_at_its_point_step_and_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = failpoints.Fault("eval", range(3, 5), 1, "raise", 0)
    cases = itertools.product(("eval", "metrics"), (None, 2, 3, 4, 5), ("0", "1"))
    due = []
    for point, step, rank in cases:
        monkeypatch.setenv("RANK", rank)
        due += [(point, step, rank)] if fault.is_due(point, step) else []
    assert due == [("eval", 3, "1"), ("eval", 4, "1")]


def without_the_seam() -> None:
    """Take the seam out of the program, wherever it has been imported."""
    for module in list(sys.modules.values()):
        if hasattr(module, "failpoint"):
            module.failpoint = lambda *_: None


def test_without_a_fault_the_seam_does_nothing(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "seamless")
    (worker,) = train_in_fork(folder, datasets_dir, before=without_the_seam)
    assert "TRAIN_FAULT" not in worker.stdout + worker.stderr
    assert_same_run(folder, whole)


def test_a_fault_is_announced(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "announced")
    ranks = train_in_fork(folder, datasets_dir, "--max-steps", 1, count=2, fault="eval@99:raise")
    (line,) = [line for line in ranks[0].stderr.splitlines() if "TRAIN_FAULT" in line]
    assert line == "warning: TRAIN_FAULT is set: this run breaks on purpose (eval@99:raise)"
    assert "TRAIN_FAULT" not in ranks[1].stderr


def test_every_point_is_come_by_and_none_is_unknown() -> None:
    sources = [*ROOT.glob("*.py"), *(ROOT / "harness").rglob("*.py"), *(ROOT / "training").glob("*.py")]
    text = "".join(path.read_text() for path in sources if path.name != "failpoints.py")
    assert "TRAIN_FAULT" not in text
    reached = set(re.findall(r'failpoint\(f?"([a-z.:]+)', text))
    assert reached == {point.partition(":")[0] + (":" if ":" in point else "") for point in failpoints.POINTS}


def test_every_documented_row_has_a_test_and_every_test_a_row() -> None:
    documented = re.findall(r"^\| (F\d\d) \|", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    marked = {row for text in files for row in re.findall(r'"(F\d\d)"', text)}
    assert documented == sorted(marked)


def let_the_clock_jump() -> None:
    """Set the wall clock back by a day, forward by two, and into another time zone, at every look."""
    real, offsets = time.time, itertools.cycle((0, -86_400, 86_400))
    zones = itertools.cycle(("UTC", "Pacific/Kiritimati", "America/New_York"))

    def jumping() -> float:
        os.environ["TZ"] = next(zones)
        time.tzset()
        return real() + next(offsets)

    time.time = jumping


@pytest.mark.fault("F50")
def test_a_clock_that_jumps_changes_nothing(whole: Path, tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "jumping")
    train_in_fork(folder, datasets_dir, "--max-steps", 14, before=let_the_clock_jump)
    checkpoints = [RunFolder(folder).checkpoint(step) for step in RunFolder(folder).checkpoint_steps()]
    for age, path in enumerate(checkpoints):  # the newest looks oldest
        os.utime(path, (1_000_000_000 - age * 86_400,) * 2)
    (again,) = train_in_fork(folder, datasets_dir, before=let_the_clock_jump)
    assert "Resuming from step-00000013" in again.stdout
    elapsed = [line["elapsed"] for line in metrics(folder)]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[0] < elapsed[-1] < 3600
    assert all(line["train/tok_per_sec"] > 0 for line in metrics(folder))
    assert_same_run(folder, whole)


def stop_the_clock() -> None:
    """Let it be the same second for ever."""
    now = time.time()
    time.time = lambda: now


@pytest.mark.fault("F51")
def test_saves_in_the_same_second_have_names_of_their_own(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "quick", checkpoint_interval=1)
    train_in_fork(folder, datasets_dir, "--max-steps", 4, before=stop_the_clock)
    train_in_fork(folder, datasets_dir, "--max-steps", 8, before=stop_the_clock)
    assert RunFolder(folder).checkpoint_steps() == list(range(8))
    assert final_bits(folder)["state"]["train_state"]["next_step"] == 8
