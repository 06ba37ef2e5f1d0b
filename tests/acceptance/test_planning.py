"""Bad input is refused at once, and a dry run says what a run would be."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ddp_train
import training.dry_run
from study.experiment import load_experiment
from tests.conftest import Called
from tests.helpers import ROOT, command, run

PUBLISHED = sorted(
    name for path in (ROOT / "runs").glob("[18]x*/train.json") if not (name := path.parent.name).endswith("-modern")
)


def test_all_published_runs_ship() -> None:
    assert len(PUBLISHED) == 23
    assert [name for name in PUBLISHED if name.startswith("8xa100m40-baseline")] == [
        "8xa100m40-baseline", *(f"8xa100m40-baseline-{number}" for number in range(2, 9))
    ]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_of_a_published_run(call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The initial weights of 163M parameters take seconds; the quickstart's dry run below shows their line.
    monkeypatch.setattr(training.dry_run, "fingerprint", lambda _: "not drawn")
    monkeypatch.setattr(training.dry_run, "untrained_model", lambda *_: None)
    world_size = name.split("x")[0]
    done = call(ddp_train.main, name, "nowhere", "--dry-run", "--world-size", world_size)
    assert done.status == 0
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines())
    is_long = name == "1xrtx3090-moe-first-proper-run"
    assert printed["Global steps"].strip() == ("90,823" if is_long else "33,165")
    assert printed["Tokens"].strip() == ("8,928,264,192" if is_long else "3,260,252,160")
    assert printed["Global batch"].strip() == "96 sequences, 98,304 tokens"


def test_dry_run_says_everything(call: Callable[..., Called]) -> None:
    done = call(ddp_train.main, "quickstart", "nowhere", "--dry-run", "--world-size", 1)
    assert done.status == 0
    for label in (
        "Parameters", "Tokens", "Global steps", "Global batch", "Made of", "Peak memory per GPU", "FLOPs per token",
        "FLOPs in total", "Checkpoints", "Initial weights",
    ):  # fmt: skip
        assert f"{label}:" in done.stdout
    assert "without embeddings" in done.stdout


def test_dry_run_on_a_cpu_speaks_of_no_gpu(call: Callable[..., Called]) -> None:
    done = call(ddp_train.main, "quickstart", "nowhere", "--dry-run", "--device", "cpu")
    assert done.status == 0
    assert "Peak memory per process:" in done.stdout
    assert not re.search("GPU|CUDA", done.stdout)


def test_dry_run_counts_the_cost(call: Callable[..., Called], make_run: Callable[..., Path]) -> None:
    money = {"price_per_hour": 10.0, "currency": "USD", "expected_tokens_per_second": 1.0}
    folder = make_run(train={"min_train_tokens": 3600 * 128, **money})
    done = call(ddp_train.main, folder.name, "nowhere", "--dry-run", "--runs-dir", folder.parent)
    assert "128.00 hours" in done.stdout
    assert "1,280.00 USD" in done.stdout


def test_dry_run_looks_at_a_dataset_that_is_there(
    call: Callable[..., Called], make_run: Callable[..., Path], datasets_dir: Path
) -> None:
    """What the start would refuse, the dry run does too."""
    folder = make_run(train={"min_train_tokens": 10**7})
    place = ("--dry-run", "--runs-dir", folder.parent)
    done = call(ddp_train.main, folder.name, datasets_dir, *place)
    assert (done.status, "wanted 10,000,001" in done.stderr) == (3, True), done.stderr
    done = call(ddp_train.main, folder.name, "nowhere", *place)
    assert done.status == 0
    assert "toy, to be downloaded by the first start" in done.stdout


def test_output_that_nobody_reads_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = command("experiment.py", "compare", "--losses", "docs/published/losses.csv", "--baseline", "baseline")
    done = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_plan_is_written_whoever_reads_what_it_says(make_run: Callable[..., Path]) -> None:
    runs = make_run().parent
    reader, writer = os.pipe()
    os.close(reader)
    words = command("experiment.py", "plan", "tiny", "--design", "replicates", "--name", "seeds", "--runs-dir", runs)
    place = {"cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}, "timeout": 600}
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, **place)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(load_experiment(runs / "seeds" / "experiment.json").runs) == 3


def test_dry_run_of_all_tokens_reads_the_dataset(
    call: Callable[..., Called], make_run: Callable[..., Path], datasets_dir: Path
) -> None:
    folder = make_run(train={"min_train_tokens": -1})
    place = ("--dry-run", "--runs-dir", folder.parent)
    assert f"{24_999 // 128:,}" in call(ddp_train.main, folder.name, datasets_dir, *place).stdout
    refused = call(ddp_train.main, folder.name, "nowhere", *place)
    assert refused.status == 3
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_typo_is_refused_before_torch_is_imported(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(train={"learning_rat": 0.1}, model={"n_heads": 3})
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": str(tmp_path)}
    done = run("ddp_train.py", folder.name, tmp_path, "--runs-dir", folder.parent, check=2, **environment)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert "model.json: emb_dim: found 16, wanted a multiple of n_heads (3)" in lines[0]
    assert "train.json: learning_rat" in lines[1]
    assert "learning_rate" in lines[1]
    assert {path.name for path in folder.iterdir()} == {"model.json", "train.json"}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["no-such-run", "d"], 2),
        (["../runs/tiny", "d"], 2),
        (["/etc", "d"], 2),
        (["tiny"], 2),
        (["tiny", "d", "--world-size", "2"], 2),
        (["tiny", "d", "--dry-run", "--world-size", "0"], 2),
        (["tiny", "d", "latest", "--fresh"], 2),
        (["tiny", "d", "--max-steps", "-1"], 2),
        (["tiny", "d", "--device", "cuda"], 2),
        (["tiny", "d"], 3),
    ],
)
def test_bad_usage_costs_nothing(
    call: Callable[..., Called],
    make_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    status: int,
) -> None:
    if "cuda" in words:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("data.HfApi.dataset_info", _offline)
    folder = make_run()
    monkeypatch.chdir(folder.parent.parent)
    done = call(ddp_train.main, *words, "--runs-dir", folder.parent)
    assert done.status == status
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert not (folder / "checkpoints").exists()


def _offline(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


def test_initial_weights_of_two_processes_are_the_same_file(
    call: Callable[..., Called], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run()
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        words = ("--runs-dir", folder.parent, "--dump-initial-weights", file)
        assert call(ddp_train.main, folder.name, "nowhere", *words).status == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((folder / "model.json").read_text())["vocab_size"] == 97
