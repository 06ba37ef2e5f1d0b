"""A plan prices every arm by what that arm is, and refuses what could not be compared."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import experiment
from harness.tokens.token_files import open_split
from preparation.prepare import prepare
from preparation.selection import PreparationSettings
from tests.conftest import Called
from tests.helpers import write, write_run

PRICED = {"price_per_hour": 36.0, "currency": "EUR", "expected_tokens_per_second": 2560.0}


@pytest.fixture
def planned(tmp_path: Path, call: Callable[..., Called]) -> Callable[..., Called]:
    """A function that plans changes of a priced base, without writing."""
    write_run(tmp_path / "runs" / "base", {}, PRICED)

    def make(changes: dict[str, Any], *words: object) -> Called:
        file = write(tmp_path / "changes.json", changes)
        place = ("--runs-dir", tmp_path / "runs", "--seeds", "1,2,3")
        return call(experiment.main, "plan", "base", file, *place, *words)

    return make


def cost_in(done: Called) -> float:
    assert done.status == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Cost:"))
    return float(line.split()[1])


def test_an_arm_that_is_dearer_costs_more(planned: Callable[..., Called]) -> None:
    same = cost_in(planned({"rate": {"train": {"learning_rate": 0.02}}}, "--dry-run"))
    dear = planned({"float32": {"train": {"price_per_hour": 108.0}}}, "--dry-run")
    slow = planned({"slow": {"train": {"expected_tokens_per_second": 853.333}}}, "--dry-run")
    assert cost_in(dear) == pytest.approx(2 * same, abs=0.02)
    assert cost_in(slow) == pytest.approx(2 * same, abs=0.02)
    assert "(float32)" in dear.stdout
    deep = cost_in(planned({"deep": {"model": {"n_layers": 20}}}, "--dry-run"))
    assert deep > 1.5 * same


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train": {"microbatch_size": 3}}, "change: would train on 2,688 tokens and baseline on 2,560"),
        ({"train": {"dataset": "other"}}, "change: dataset: found other, wanted baseline's toy"),
        ({"model": {"vocab_size": 100}}, "change: vocab_size: found 100, wanted baseline's 97"),
    ],
)
def test_what_compare_would_refuse_is_refused_before_it_costs_anything(
    tmp_path: Path, planned: Callable[..., Called], changes: dict[str, Any], complaint: str
) -> None:
    done = planned({"change": changes})
    assert done.status == 2
    assert len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["base"]


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of one text: `toy` and `other` in two tokenizers of equally many ids, `again` in the first."""
    folder = tmp_path_factory.mktemp("datasets")
    words = [f"{number} {number * 7} words of a text." for number in range(400)]
    for name, source in (("toy", words), ("other", [word[::-1] for word in words]), ("again", words)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in source))
        settings = PreparationSettings(str(path), validation_fraction=0.2, tokenizer="train:280")
        prepare(settings, folder / name, workers=1, is_fresh=False, checks_space=True)
    return folder


def test_another_tokenizer_is_known_by_what_it_is_and_judged_in_bits(
    tmp_path: Path, planned: Callable[..., Called], tokenized: Path
) -> None:
    ledger = {"component": "all", "recipe": "base", "recipe_hash": "0" * 64, "parameters": 10_000,
              "train_tokens": 2560, "hardware": "1x cpu", "sd": 0.01, "df": 4, "runs": ["r"]}  # fmt: skip
    (tmp_path / "runs" / "noise-ledger.json").write_text(json.dumps({"entries": [ledger]}))
    place = ("--datasets-dir", tokenized, "--dry-run")
    same = planned({"change": {"train": {"dataset": "again"}}}, *place)
    assert (same.status, "dataset: found again, wanted baseline's toy" in same.stderr) == (2, True)
    other = planned({"change": {"train": {"dataset": "other"}}}, *place)
    assert other.status == 0, other.stderr
    assert "nats" not in other.stdout
    held_out = open_split(tokenized, "toy", "validation")
    sigma = 0.01 / math.log(2) * held_out.length / int(held_out.metadata["bytes"])
    assert f"sigma = {sigma:.4f} bits per byte" in other.stdout
    (line,) = (line for line in other.stdout.splitlines() if line.startswith("Standard error:"))
    sigmas, shown = float(line.split()[2]), float(line.split()[5])
    assert shown == pytest.approx(sigmas * sigma, rel=0.02)
    unknown = planned({"change": {"train": {"dataset": "other"}, "model": {"vocab_size": 100}}}, "--dry-run")
    assert unknown.status == 0, unknown.stderr  # neither dataset is there: other ids are another tokenizer
    assert "called sigma below" in unknown.stdout


def test_other_designs_are_shown_at_equal_money(planned: Callable[..., Called]) -> None:
    changes = {name: {"train": {"weight_decay": decay}} for name, decay in (("a", 0.2), ("b", 0.3))}
    changes |= {"c": {"train": {"clipping_max_norm": 1.0}}, "d": {"model": {"qkv_bias": True}}}
    changes.pop("b")
    done = planned(changes, "--dry-run")
    assert done.status == 0, done.stderr
    table = done.stdout.split("for the same money:")[1].splitlines()[2:]
    runs = {(cells := re.split(" {2,}", line[2:]))[0]: int(cells[2]) for line in table}
    assert runs["one-at-a-time"] == 12
    assert all(6 < count <= 12 for count in runs.values())
    assert len(runs) >= 4


def test_power_is_that_of_the_family(tmp_path: Path, planned: Callable[..., Called]) -> None:
    def seen(*names: str) -> float:
        rates = {name: {"train": {"learning_rate": 0.02 + place / 100}} for place, name in enumerate(names)}
        done = planned(rates, "--dry-run")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("Sees four in five:"))
        assert (f"{len(names)} judged together" in line) == (len(names) > 1)
        return float(line.split("an effect of ")[1].split()[0])

    one, four = seen("a"), seen("a", "b", "c", "d")
    assert four > 1.5 * one
    pairs = [
        {"component": "pairs", "recipe": f"arm {n}", "recipe_hash": str(n) * 64, "parameters": 10_000,
         "train_tokens": 2560, "hardware": "1x cpu", "sd": 0.001 * (1 + n / 4), "df": 4, "runs": [f"r{n}"]}
        for n in range(5)
    ]  # fmt: skip
    (tmp_path / "runs" / "noise-ledger.json").write_text(json.dumps({"entries": pairs}))
    assert seen("a") < one  # a prior of paired noise lends degrees of freedom
