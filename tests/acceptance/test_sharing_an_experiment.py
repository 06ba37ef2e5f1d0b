"""Several `experiment.py run` of one experiment share its runs: none is trained twice, and none of them fails."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import experiment
from harness.run.errors import RunLockedError
from harness.run.run_folder import RunFolder
from study import running
from study.experiment import Experiment, PlannedRun, load_experiment
from tests.acceptance.test_report import write_scored_run
from tests.conftest import Called
from tests.helpers import write, write_run


@pytest.fixture
def plan(tmp_path: Path, call: Callable[..., Called]) -> Path:
    """An experiment of three recipes at two seeds, untrained."""
    write_run(tmp_path / "runs" / "base", {}, {})
    changes = {"drop": {"model": {"drop_rate": 0.0}}, "bias": {"model": {"qkv_bias": True}}}
    place = ("--runs-dir", tmp_path / "runs", "--name", "study", "--seeds", 2)
    done = call(experiment.main, "plan", "base", write(tmp_path / "changes.json", changes), *place)
    assert done.status == 0, done.stderr
    return tmp_path / "runs" / "study" / "experiment.json"


@pytest.mark.fault("F64")
@pytest.mark.parametrize("world_size", [1, 2])
def test_three_at_once_leave_each_other_s_runs_alone(
    plan: Path, datasets_dir: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    trained, failures = Counter[str](), []

    def train(folder: RunFolder, _: Path, processes: int) -> int:
        """As the trainer's processes do: take the lock, or end with its status, which torchrun makes 1."""
        try:
            with folder.locked():
                time.sleep(0.05)
                trained[folder.path.name] += 1
        except RunLockedError as error:
            return error.exit_status if processes == 1 else 1
        return 0

    def score(_: Experiment, __: PlannedRun, folder: RunFolder, ___: Path) -> None:
        made = folder.path.parent.parent / "made" / folder.path.name
        write_scored_run(made, 4.0, 1, *(json.loads((folder.path / f"{name}.json").read_text()) for name in FILES))
        for path in [*(made / "evals").iterdir(), made / "run.json", made / "status.json"]:
            path.replace(folder.path / path.relative_to(made))

    def run_once() -> None:
        try:
            running.run("study", datasets_dir, plan.parent.parent, world_size)
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(running, "score", score)
    monkeypatch.setattr(running, "check_test_set", lambda *_: None)
    threads = [threading.Thread(target=run_once) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert trained == {run.run: 1 for run in load_experiment(plan).runs}


FILES = ("model", "train")
