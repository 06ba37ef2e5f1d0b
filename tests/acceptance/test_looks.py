"""An experiment that is judged while it grows, from `run --looks` to the table, with losses that are made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import experiment
import study.running
from harness.run.run_folder import RunFolder
from study.experiment import Experiment, PlannedRun
from tests.acceptance.test_designed import score_as_planned
from tests.conftest import Called
from tests.helpers import write, write_run

GAINS = {"baseline": 0.0, "good": 0.4, "same": 0.0, "slight": 0.02}


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Called]) -> Path:
    """Nine seeds of three changes, planned; training and scoring make a loss up."""
    folder = tmp_path / "runs"
    write_run(folder / "base", {}, {})
    changes = {name: {"train": {"learning_rate": 0.02 + place / 100}} for place, name in enumerate(list(GAINS)[1:])}
    seeds = ",".join(map(str, range(1, 10)))
    words = (write(tmp_path / "changes.json", changes), "--name", "study", "--seeds", seeds, "--runs-dir", folder)
    done = call(experiment.main, "plan", "base", *words)
    assert done.status == 0, done.stderr
    monkeypatch.setattr(study.running, "train", lambda *_: 0)
    monkeypatch.setattr(study.running, "score", made_up_score)
    return folder


def made_up_score(_: Experiment, run: PlannedRun, folder: RunFolder, __: Path) -> None:
    noise = np.random.default_rng([run.seed, list(GAINS).index(run.arm)]).normal(0, 0.01)
    kept = {path.name: path.read_bytes() for path in (folder.model_json, folder.train_json)}
    shutil.rmtree(folder.path)  # a lock lies in it
    folder.path.mkdir()
    for name, content in kept.items():
        (folder.path / name).write_bytes(content)
    score_as_planned(folder.path, 4.0 - GAINS[run.arm] + float(noise))


def run(call: Callable[..., Called], runs_dir: Path, *words: object) -> Called:
    return call(experiment.main, "run", "study", "nowhere", "--runs-dir", runs_dir, *words)


def compare(call: Callable[..., Called], runs_dir: Path, *words: object) -> Called:
    return call(experiment.main, "compare", "--experiment", "study", "--runs-dir", runs_dir, *words)


def test_decided_arms_stop_and_the_table_counts_all_looks(runs_dir: Path, call: Callable[..., Called]) -> None:
    done = run(call, runs_dir, "--looks", 3)
    assert done.status == 0, done.stderr
    assert "Look 1, after 3 seeds:" in done.stdout
    document = json.loads((runs_dir / "study" / "experiment.json").read_text())["experiment"]
    assert document["looks"]["rule"] == "pocock"
    assert document["looks"]["seeds"] == [3, 6, 9]
    judged = json.loads(compare(call, runs_dir, "--format", "json").stdout)
    arms = {arm["recipe"]: arm for arm in judged["arms"]}
    assert arms["good"]["verdict"] == "HELPS"
    assert arms["good"]["n"] < 9
    assert arms["same"]["verdict"] != "HELPS"
    good = arms["good"]  # its interval is one of three that hold the truth together
    assert good["high"] - good["low"] > 2.2 * good["se"] * stats.t.ppf(0.975, good["df"])
    record = json.loads((runs_dir / "study" / "looks.json").read_text())
    assert arms["good"]["p_holm"] == record["looks"][-1]["p_holm"]["good"]
    again = run(call, runs_dir)
    assert again.status == 0
    assert "training" not in again.stdout


def test_looks_are_fixed_before_the_first_run(runs_dir: Path, call: Callable[..., Called]) -> None:
    early = compare(call, runs_dir)
    assert early.status == 2
    assert run(call, runs_dir, "--looks", 2).status == 0
    other = run(call, runs_dir, "--looks", 3)
    assert other.status == 2
    assert "wanted 2 pocock as fixed before the first run" in other.stderr


def test_looks_after_the_first_run_are_refused(runs_dir: Path, call: Callable[..., Called]) -> None:
    score_as_planned(runs_dir / "study-good-s1", 3.9)
    done = run(call, runs_dir, "--looks", 3)
    assert done.status == 2
    assert "study-good-s1 begun already" in done.stderr
    assert run(call, runs_dir, "--looks", 9).status == 2


def test_a_second_look_without_a_plan_says_so(runs_dir: Path, call: Callable[..., Called]) -> None:
    planned = json.loads((runs_dir / "study" / "experiment.json").read_text())["experiment"]["runs"]
    for count in (2, 4):
        for item in planned:
            if item["seed"] <= count and not (runs_dir / item["run"] / "evals").exists():
                made_up_score(None, PlannedRun(**item), RunFolder(runs_dir / item["run"]), runs_dir)  # type: ignore[arg-type]
        shown = compare(call, runs_dir)
        assert shown.status == 0, shown.stderr
        assert ("look 2 at a growing experiment (after 2, 4 seeds)" in shown.stdout) == (count == 4)
