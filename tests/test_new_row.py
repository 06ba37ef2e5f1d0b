"""A new key, and a new optimizer, in a copy of the project: one row each, and what users own stays theirs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.acceptance.test_report import write_scored_run
from tests.helpers import ROOT, metrics, write_run

SOURCES = (
    "harness",
    "training",
    "study",
    "assets",
    "ddp_train.py",
    "model.py",
    "data.py",
    "test_loss.py",
    "experiment.py",
)
NEW_KEYS = (
    (
        "harness/run/config.py",
        '    """The output head shares the token embedding."""\n',
        '    """The output head shares the token embedding."""\n'
        "    moonlight: Later[Recipe[bool]] = False\n"
        '    """Made up."""\n',
    ),
    (
        "harness/run/config.py",
        '    """Free text, shown in reports."""\n',
        '    """Free text, shown in reports."""\n    starlight: Later[Recipe[float]] = 0.0\n    """Made up."""\n',
    ),
)
# SGD with momentum: its name, and one row in the table.
SGD = (
    ("harness/run/config.py", 'Literal["adamw", "muon"]', 'Literal["adamw", "muon", "sgd"]'),
    (
        "harness/engine/optimizers.py",
        "OPTIMIZERS = {\n",
        "def _sgd(model, config, device):\n"
        "    from torch.optim import SGD\n\n"
        "    return SGD(decayed_and_not(model.parameters(), config), lr=config.learning_rate, momentum=0.9)\n\n\n"
        "OPTIMIZERS = {\n"
        '    "sgd": OptimizerKind(_sgd, state_bytes=lambda parameters: 4 * parameters.total),\n',
    ),
)
# Imports torch once; every line that it is given is a command, which a fork of it runs.
SERVER = """
import json, os, runpy, sys
import torch._dynamo, ddp_train, experiment
from harness.observers.charts import ChartPainter

ChartPainter._start = lambda _: None
for line in sys.stdin:
    if not (child := os.fork()):
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv, status = json.loads(line), 0
        try:
            if sys.argv[0] == "-c":
                exec(sys.argv.pop(1))
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Project = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A function that runs a command of an edited copy of the project."""
    target = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target / name, ignore=ignored) if source.is_dir() else shutil.copy(
            source, target / name
        )
    for name, before, after in (*NEW_KEYS, *SGD):
        text = (target / name).read_text()
        assert text.count(before) == 1
        (target / name).write_text(text.replace(before, after))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=target, stdin=pipe, stdout=pipe, text=True, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(*words: object, check: int = 0) -> subprocess.CompletedProcess[str]:
        print(json.dumps(list(map(str, words))), file=server.stdin, flush=True)
        status = int(server.stdout.readline())  # type: ignore[union-attr]
        said = ((target / name).read_text() for name in ("stdout", "stderr"))
        done = subprocess.CompletedProcess(words, status, *said)
        assert status == check, done.stderr
        return done

    yield run
    server.stdin.close()
    server.wait()


def test_a_checkpoint_from_before_is_gone_on_from(
    edited: Project, trained: Path, whole: Path, datasets_dir: Path
) -> None:
    before = metrics(trained)
    shutil.rmtree(trained / "checkpoints" / "step-00000019")
    place = ("--runs-dir", trained.parent, "--device", "cpu")
    done = edited("ddp_train.py", trained.name, datasets_dir, *place)
    assert "Resuming from step-00000015" in done.stdout
    assert [line["train/loss"] for line in metrics(trained)] == [line["train/loss"] for line in before]


def test_a_checkpoint_that_names_an_unused_new_key_is_gone_on_from(
    edited: Project, trained: Path, datasets_dir: Path
) -> None:
    """As a version wrote that named every key, used or not."""
    state = trained / "checkpoints" / "step-00000019" / "state.json"
    document = json.loads(state.read_text())
    document["identity"] |= {"moonlight": False, "initial_weights": None}
    state.write_text(json.dumps(document))
    place = ("--runs-dir", trained.parent, "--device", "cpu")
    damaged = edited("ddp_train.py", trained.name, datasets_dir, *place)  # the manifest no longer holds
    assert "passing over a damaged checkpoint" in damaged.stderr
    code = (
        "from harness.engine.identity import ResumeIdentity; import json, sys; "
        "now, before = (ResumeIdentity(json.loads(text)) for text in sys.argv[1:]); "
        "print([item.key for item in now.differences_from(before)])"
    )
    clean = {key: value for key, value in document["identity"].items() if key not in ("moonlight", "initial_weights")}
    compared = edited("-c", code, json.dumps(clean), json.dumps(document["identity"]))
    assert compared.stdout == "[]\n"
    used = {**document["identity"], "moonlight": True}
    assert edited("-c", code, json.dumps(clean), json.dumps(used)).stdout == "['moonlight']\n"


def test_a_score_and_a_ledger_from_before_are_believed(edited: Project, tmp_path: Path) -> None:
    for name, gain in (("plain", 0.0), ("better", 0.2)):
        for seed in (1, 2, 3):
            change = {"random_seed": seed, **({"learning_rate": 0.02} if name == "better" else {})}
            write_scored_run(tmp_path / "runs" / f"{name}-s{seed}", 4.0 - gain + 0.01 * seed, seed, {}, change)
    place = ("--runs-dir", tmp_path / "runs")
    judged = edited("experiment.py", "compare", "--baseline", "plain-s1", *place, "--format", "json")
    (arm,) = json.loads(judged.stdout)["arms"]
    assert (arm["n"], arm["difference"]) == (3, pytest.approx(-0.2, abs=1e-6))
    learned = subprocess.run(
        [sys.executable, "experiment.py", "noise", "--baseline", "plain-s1", *map(str, place)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert edited("experiment.py", "noise", *place).stdout in learned.stdout
    for name, loss, change in (("plain-s9", 4.0, {}), ("better-s9", 3.8, {"learning_rate": 0.02})):
        write_scored_run(tmp_path / "runs" / name, loss, 9, {}, {"random_seed": 9, **change})
    alone = ("--baseline", "plain-s9", "better-s9", "--only-named", *place, "--format", "json")
    lent = json.loads(edited("experiment.py", "compare", *alone).stdout)["arms"][0]
    assert lent["noise"]["source"].startswith("3 earlier runs of plain in the noise ledger")


def test_a_committed_study_is_judged_as_before(edited: Project) -> None:
    words = ("experiment.py", "compare", "--experiment", ROOT / "studies" / "five-interventions" / "small")
    before = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert edited(*words).stdout == before.stdout


def test_a_new_key_that_is_used_makes_another_recipe(edited: Project, trained: Path, datasets_dir: Path) -> None:
    path = trained / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "starlight": 0.5}))
    place = ("--runs-dir", trained.parent, "--device", "cpu")
    done = edited("ddp_train.py", trained.name, datasets_dir, *place, check=2)
    assert "starlight: found 0.5, wanted None as in step-00000019" in done.stderr


def test_another_optimizer_is_one_row(edited: Project, tmp_path: Path, datasets_dir: Path) -> None:
    runs = tmp_path / "runs"
    place = ("--runs-dir", runs, "--device", "cpu")
    for name in ("whole", "halved"):
        write_run(runs / name, {}, {"optimizer": "sgd", "use_amp": False})
    edited("ddp_train.py", "whole", datasets_dir, *place)
    edited("ddp_train.py", "halved", datasets_dir, *place, "--max-steps", 8)
    assert "Resuming from" in edited("ddp_train.py", "halved", datasets_dir, *place).stdout
    for file in ("model", "optimizer"):
        one, other = (
            load_file(runs / name / "checkpoints" / "latest" / f"{file}.safetensors") for name in ("whole", "halved")
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert {key.partition(".")[0] for key in one} == {"momentum_buffer"}
    weights = sum(
        value.nbytes for value in load_file(runs / "whole" / "checkpoints" / "latest" / "model.safetensors").values()
    )
    written = sum(path.stat().st_size for path in (runs / "whole" / "checkpoints" / "latest").iterdir())
    assert 2 * weights < written < 2 * weights + 20_000  # as the row says: four bytes a parameter besides the weights
    code = (
        "import sys; from pathlib import Path; from harness.run.run_folder import RunFolder; "
        "from harness.run.plan import make_plan; from harness.engine.costs import cost_of; "
        "configs = RunFolder(Path(sys.argv[1])).read_configs(); "
        "print(cost_of(*configs, make_plan(*configs, 1)).checkpoint_bytes)"
    )
    assert int(edited("-c", code, runs / "whole").stdout) == 2 * weights
