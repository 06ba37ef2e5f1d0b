"""A run folder that follows from a dataset and a machine, and trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiment
from harness.engine import hardware
from harness.engine.costs import Hardware, cost_of
from harness.run.config import TrainConfig, config_from
from harness.run.files import ROOT
from harness.run.model_size import count_parameters
from harness.run.plan import make_plan
from harness.run.run_folder import RunFolder
from harness.tokens.tokenizer import byte_tokenizer, gpt2_tokenizer
from preparation.prepare import prepare
from preparation.selection import PreparationSettings
from study.new_run import NewRunRequest, Text, choose_shape, design
from tests.conftest import Called
from tests.helpers import metrics, train_in_fork, write, write_run

Call = Callable[..., Called]
CPU = Hardware("cpu", "cpu", 1, 16.0, has_bfloat16=False, flops_per_second=1e11)
A100 = Hardware("cuda", "A100", 8, 40.0, has_bfloat16=True, flops_per_second=312e12)
T4 = Hardware("cuda", "T4", 1, 15.0, has_bfloat16=False, flops_per_second=65e12)
MACHINES = [CPU, A100, T4]
TEXTS = [
    Text("tiny", 900, 0, byte_tokenizer()),
    Text("book", 40_000_000, 400_000, byte_tokenizer()),
    Text("web", 10_000_000_000, 100_000_000, gpt2_tokenizer()),
]


def asked(**changes: Any) -> NewRunRequest:
    values = {"name": "it", "data": "any", "datasets_dir": Path(), "runs_dir": Path(), "tokens_per_parameter": 20.0,
              "epochs": None, "hours": 12.0, "dry_run": False}  # fmt: skip
    return NewRunRequest(**{**values, **changes})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in (ROOT / "LICENSE").read_text().split("\n\n"))
    )
    settings = PreparationSettings(str(folder / "a.jsonl"), validation_fraction=0.2, tokenizer="bytes")
    prepare(settings, folder / "licence", workers=1, is_fresh=False, checks_space=True)
    return folder


def test_a_new_run_is_shown_written_and_trains(
    datasets: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "SIZE", 64)
    words = (
        "new",
        "mine",
        "--data",
        "licence",
        "--datasets-dir",
        datasets,
        "--runs-dir",
        tmp_path,
        "--device",
        "cpu",
    )
    shown = call(experiment.main, *words, "--dry-run")
    assert shown.status == 0, shown.stderr
    assert not list(tmp_path.iterdir())
    done = call(experiment.main, *words)
    assert done.stdout.startswith(shown.stdout.split("expected_tokens_per_second")[0])
    folder = RunFolder(tmp_path / "mine")
    model, train = folder.read_configs()
    assert (train.dataset, train.use_amp, model.vocab_size) == ("licence", False, 257)
    assert train.notes is not None
    for key in ("n_layers", "epochs", "global_batch_size", "microbatch_size", "learning_rate", "use_amp"):
        assert f"{key}: " in train.notes
    changes = write(tmp_path / "changes.json", {"plain": {"model": {"qk_norm": False}}})
    place = ("--runs-dir", tmp_path, "--datasets-dir", datasets, "--dry-run")
    planned = call(experiment.main, "plan", "mine", changes, *place)  # as much as is here, known without the text
    assert planned.status == 0, planned.stderr
    train_in_fork(folder.path, datasets, "--max-steps", 3)
    losses = [line["train/loss"] for line in metrics(folder.path)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert "val/loss" in metrics(folder.path)[0]
    again = call(experiment.main, *words)
    assert again.status == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_every_draft_is_a_valid_plan_that_fits(text: Text, machine: Hardware) -> None:
    request = asked()
    shape, _ = choose_shape(text, machine, request, epochs=1 if text.name == "web" else 4)
    draft = design(text, machine, request)
    train = config_from(TrainConfig, draft.train, "train.json")
    plan = make_plan(shape.model, train, machine.count, text.train_tokens)
    assert cost_of(shape.model, train, plan).peak_gib <= machine.memory_gib
    assert 0.9 * shape.tokens - plan.tokens_per_global_step <= plan.train_tokens <= shape.tokens
    assert plan.checkpoints(train.checkpoint_interval) < 60
    assert draft.reasons.keys() <= draft.model.keys() | draft.train.keys() | {"epochs"}
    half_precision = {"A100": "bfloat16", "T4": "float16"}.get(machine.name)
    assert draft.train.get("amp_dtype") == half_precision
    assert train.use_amp == (half_precision is not None)


def test_what_is_scarce_decides_the_size() -> None:
    book, web = TEXTS[1:]
    parameters = {
        (text.name, hours): count_parameters(choose_shape(text, A100, asked(hours=hours), 1)[0].model).total
        for text in (book, web)
        for hours in (0.1, 12.0)
    }
    assert parameters["book", 0.1] == parameters["book", 12.0] <= book.train_tokens / 20
    assert parameters["web", 0.1] < parameters["web", 12.0] <= web.train_tokens / 20
    small = choose_shape(book, CPU, asked(tokens_per_parameter=40.0), 1)
    assert count_parameters(small[0].model).total <= book.train_tokens / 40 or "smallest model" in small[1]
    assert "too short for a larger one" in choose_shape(web, A100, asked(hours=0.1), 1)[1]


def test_a_short_text_is_not_starved_of_parameters() -> None:
    """20 tokens for each parameter are the rule of long texts; the quickstart's 1.3 million saw 0.2 each."""
    for text in (Text("page", 90_000, 9_000, byte_tokenizer()), *TEXTS[1:]):
        by_length, by_rule = (
            count_parameters(choose_shape(text, A100, asked(tokens_per_parameter=asked_for), 4)[0].model).total
            for asked_for in (None, 20.0)
        )
        assert by_length > 3 * by_rule if text.name == "page" else by_length >= by_rule
        assert (by_length == by_rule) == (text.name == "web")


def test_half_precision_halves_nothing_on_a_cpu_and_is_warned_of(datasets: Path, tmp_path: Path) -> None:
    small = {"vocab_size": 257, "emb_dim": 8, "n_layers": 1}
    folder = write_run(tmp_path / "slow", small, {"dataset": "licence", "use_amp": True})
    (worker,) = train_in_fork(folder, datasets, "--max-steps", 1)
    assert 'write "use_amp": false in train.json' in worker.stderr
    folder = write_run(tmp_path / "other", small, {"dataset": "licence", "use_amp": True, "amp_dtype": "bfloat16"})
    (worker,) = train_in_fork(folder, datasets, "--max-steps", 1)
    assert "warning: float16" not in worker.stderr


@pytest.mark.parametrize("ratio", [5e-324, 1e308])
def test_the_smallest_and_the_largest_wish_are_a_draft(ratio: float) -> None:
    draft = design(TEXTS[1], CPU, asked(tokens_per_parameter=ratio))
    assert draft.train["global_batch_size"] >= 1
    assert 0 < draft.train["min_train_tokens"] <= 4 * TEXTS[1].train_tokens
    assert (draft.train["min_train_tokens"] > 3.9 * TEXTS[1].train_tokens) == (ratio > 1)


def test_tokens_of_an_unknown_tokenizer_or_no_dataset_are_one_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "nano").mkdir()
    np.zeros(500, "<u2").tofile(tmp_path / "nano" / "train.bin")
    (tmp_path / "word").mkdir()
    np.zeros(8, "<u2").tofile(tmp_path / "word" / "train.bin")
    problems = (
        ("nano", 2, "does not say its tokenizer"),
        ("gone", 3, "found no such file"),
        ("word", 3, "wanted at least 9"),
    )
    for name, status, said in problems:
        words = ("--data", name, "--datasets-dir", tmp_path, "--runs-dir", tmp_path, "--device", "cpu")
        done = call(experiment.main, "new", "it", *words)
        assert done.status == status
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
