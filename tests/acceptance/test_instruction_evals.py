"""From two trained runs and an untrained one to a ranking, through both commands: the loss must rank them rightly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch

import ddp_train
import instruct
import prepare_dataset
from instruction.items import BUILTIN_SET
from instruction.recipe import DEFAULT_RECIPE
from tests.conftest import Called
from tests.helpers import ROOT, write, write_run
from tests.judge_server import KEY, JudgeServer

SMALL = {"vocab_size": 50257, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
TRAIN = {"dataset": "text", "microbatch_size": 8, "gradient_accumulation_steps": 1, "checkpoint_interval": 1000,
         "clipping_max_norm": 1.0, "schedule_learning_rate": True, "shuffle": True}  # fmt: skip
QUICK = {
    "max_tokens": 64,
    "epochs": 1,
    "batch_items": 16,
    "learning_rate": 0.001,
    "seeds": [1, 2],
    "max_test_items": 40,
}


def prepare_and_train(
    call: Callable[..., Called], folder: Path, source: str, model: dict[str, Any], steps: dict[str, int]
) -> None:
    """Tokenise a source and train a run for each number of global steps."""
    done = call(prepare_dataset.main, source, folder / "datasets" / "text", "--validation-fraction", "0.05")
    assert done.status == 0, done.stderr
    for name, count in steps.items():
        tokens = count * TRAIN["microbatch_size"] * model["context_length"]
        write_run(folder / "runs" / name, model, {**TRAIN, "learning_rate": 0.003, "min_train_tokens": tokens})
        words = (name, folder / "datasets", "--runs-dir", folder / "runs", "--device", "cpu")
        done = call(ddp_train.main, *words)
        assert done.status == 0, done.stderr


def evaluate(call: Callable[..., Called], folder: Path, recipe: dict[str, Any], every: int) -> dict[str, Any]:
    """Take both runs and the untrained one through `respond`, with a part of the items; gives results.json."""
    document = {**json.loads(DEFAULT_RECIPE.read_text()), **recipe}
    items = write(folder / "items.json", json.loads((ROOT / BUILTIN_SET).read_text())[::every])
    words = (
        "--data",
        items,
        "--out",
        folder / "out",
        "--recipe",
        write(folder / "recipe.json", document),
        "--device",
        "cpu",
    )
    done = call(instruct.main, "respond", "short", "long", "short/untrained", *words, "--runs-dir", folder / "runs")
    assert done.status == 0, done.stderr
    print(done.stdout)
    results: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return results


@pytest.fixture(autouse=True)
def any_kernels() -> Iterator[None]:
    """Restore the process's kernels: the command asks for deterministic ones."""
    yield
    torch.use_deterministic_algorithms(False)


def rightly_ranked(results: dict[str, Any]) -> None:
    losses = {item["model"]: item["response_loss"] for item in results["models"]}
    assert losses["long"]["mean"] < losses["short"]["mean"] < losses["short/untrained"]["mean"]
    assert losses["long"]["verdict"] == "HELPS"
    assert losses["short/untrained"]["verdict"] == "HURTS"


def test_small_models_are_ranked_rightly_and_judged(
    call: Callable[..., Called], tmp_path: Path, without_charts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    for name, text in topics.topics.items():  # the English that comes with every Python
        (tmp_path / "source" / f"{name}.txt").write_text(text)
    prepare_and_train(call, tmp_path, str(tmp_path / "source"), SMALL, {"short": 4, "long": 30})
    rightly_ranked(evaluate(call, tmp_path, QUICK, every=9))
    judge = JudgeServer()
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    files = sorted((tmp_path / "out" / "answers").iterdir())
    words = ("--judge", "stand-in", "--out", tmp_path / "judged", "--baseline", "short", "--max-items", 6)
    done = call(instruct.main, "judge", *files, *words)
    judge.close()
    assert done.status == 0, done.stderr
    print(done.stdout)
    document = json.loads((tmp_path / "judged" / "judgement.json").read_text())
    assert {item["model"] for item in document["models"]} == {"short", "long", "short/untrained"}
    assert document["seeds"] == 2
    assert (tmp_path / "judged" / "judgement.html").read_text().count("<article>") == 6 * 2 * 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_models_are_ranked_rightly(
    call: Callable[..., Called], tmp_path: Path, without_charts: None
) -> None:
    """At the scale of the quickstart, on Python's own documentation, with the recipe that ships."""
    model = {
        "vocab_size": 50257,
        "context_length": 128,
        "emb_dim": 64,
        "n_heads": 4,
        "n_layers": 4,
        "tie_weights": True,
    }
    prepare_and_train(call, tmp_path, "python-docs", {**model, "drop_rate": 0.0}, {"short": 30, "long": 300})
    rightly_ranked(evaluate(call, tmp_path, {}, every=1))
