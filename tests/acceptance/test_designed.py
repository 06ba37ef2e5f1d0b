"""Designed experiments from plan to effects, with losses made up so that the truth is known."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import experiment
from tests.acceptance.test_report import write_scored_run
from tests.conftest import Called
from tests.helpers import TINY_MODEL, TINY_TRAIN, write, write_run

CHANGES = {
    "drop": {"model": {"drop_rate": 0.0}},
    "bias": {"model": {"qkv_bias": True}},
    "clip": {"train": {"clipping_max_norm": 1.0}},
    "decay": {"train": {"weight_decay": 0.01}},
    "late": {"train": {"learning_rate": 0.02}},
}
GAINS = {"drop": 0.1, "bias": 0.05, "clip": 0.0, "decay": 0.0, "late": -0.2}
SEED_LUCK = {1: 0.03, 2: -0.02, 3: 0.0}


@pytest.fixture
def planned(tmp_path: Path, call: Callable[..., Called]) -> Callable[..., Path]:
    """A function that plans an experiment over the first `count` changes, and makes up a loss for every run."""
    write_run(tmp_path / "runs" / "base", {}, {})

    def make(count: int, *words: object, interaction: float = 0.0) -> Path:
        names = list(CHANGES)[:count]
        changes = write(tmp_path / "changes.json", {name: CHANGES[name] for name in names})
        place = ("--runs-dir", tmp_path / "runs", "--name", "study")
        done = call(experiment.main, "plan", "base", changes, *words, *place)
        assert done.status == 0, done.stderr
        plan = tmp_path / "runs" / "study" / "experiment.json"
        for number, run in enumerate(json.loads(plan.read_text())["experiment"]["runs"]):
            loss = 4.0 + SEED_LUCK[run["seed"]] - sum(GAINS[name] for name in run["on"])
            loss += interaction if {"drop", "bias"} <= set(run["on"]) else 0.0
            loss += 0.0004 * ((number * 7919) % 11 - 5)
            score_as_planned(tmp_path / "runs" / run["run"], loss)
        return plan

    return make


def score_as_planned(folder: Path, loss: float) -> None:
    """Replace a planned run folder by one that was trained and scored, with the same configuration."""
    model, train = (json.loads((folder / name).read_text()) for name in ("model.json", "train.json"))
    for name in ("model.json", "train.json"):
        (folder / name).unlink()
    folder.rmdir()
    assert TINY_MODEL.keys() <= model.keys()
    assert TINY_TRAIN.keys() <= train.keys()
    write_scored_run(folder, loss, train["random_seed"], model, train)


def findings(call: Callable[..., Called], plan: Path) -> dict[str, dict[str, object]]:
    done = call(experiment.main, "compare", "--experiment", plan, "--format", "json")
    assert done.status == 0, done.stderr
    return {item["name"]: item for item in json.loads(done.stdout)["findings"]}


def test_a_full_factorial_finds_effects_and_their_interaction(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(3, "--design", "full-factorial", "--seeds", "1,2,3", interaction=0.08)
    found = findings(call, plan)
    assert len(found) == 6
    # Half of an interaction of 0.08 shows in each main effect, and half in the interaction's contrast.
    assert found["drop"]["difference"] == pytest.approx(-0.1 + 0.04, abs=0.003)
    assert found["bias"]["difference"] == pytest.approx(-0.05 + 0.04, abs=0.003)
    assert found["drop x bias"]["difference"] == pytest.approx(0.04, abs=0.003)
    assert found["drop"]["verdict"] == "HELPS"
    assert found["drop x bias"]["verdict"] == "INTERACTS"
    assert found["clip"]["verdict"] == "NO DIFFERENCE LARGER THAN 0.01"
    assert found["drop"]["df"] == pytest.approx(2, abs=0.1)  # each effect varies over three seeds by its own amount
    page = plan.with_name("page.html")
    assert call(experiment.main, "report", "--experiment", plan, "--output", page).status == 0
    (row,) = re.findall(r"<tr><td[^>]*>drop x bias</td>.*?</tr>", page.read_text())
    assert "INTERACTS" in row  # in words, not only where a mouse points


def test_half_the_tokens_are_a_change_of_their_own(
    planned: Callable[..., Path], call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHANGES, "drop", {"model": {"drop_rate": 0.0}, "train": {"min_train_tokens": 1280}})
    plan = planned(2, "--seeds", "1,2,3")
    for score in plan.parent.parent.glob("study-drop-s*/evals/loss-*.json"):
        score.write_text(score.read_text().replace('"tokens_seen": 7680', '"tokens_seen": 3840'))
    done = call(experiment.main, "compare", "--experiment", plan, "--format", "json")
    assert done.status == 0, done.stderr
    drop, bias = json.loads(done.stdout)["arms"]
    assert drop["sentence"].startswith("HELPS with half the tokens: Δ -0.09")
    assert "min_train_tokens 2560→1280" in drop["changes"]
    assert "tokens" not in bias["sentence"]
    # Runs that nobody planned like this are another matter: the difference may be an oversight.
    names = ("--baseline", "study-baseline-s1", "study-drop-s1", "--runs-dir", plan.parent.parent)
    done = call(experiment.main, "compare", *names)
    assert done.status == 2
    assert "saw 3,840 tokens and study-baseline 7,680" in done.stderr
    assert "--losses" in done.stderr


def test_a_followed_report_says_why_nothing_can_be_judged(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(1, "--seeds", "1,2")
    (score,) = (plan.parent.parent / "study-drop-s2" / "evals").glob("loss-*.json")
    score.write_text(score.read_text().replace("a" * 64, "b" * 64))
    page = plan.with_name("page.html")
    done = call(experiment.main, "report", "--experiment", plan, "--follow", "--output", page)
    assert done.status == 2
    for shown in (done.stderr, page.read_text()):
        assert "not all scored on the same test tokens" in shown
    assert "<h1>Experiment study</h1>" in page.read_text()


def test_a_fraction_names_what_it_cannot_tell_apart(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(3, "--design", "fraction", "--resolution", "III", "--seeds", "1,2")
    found = findings(call, plan)
    assert {name: item["aliases"] for name, item in found.items()} == {
        "drop": ["bias x clip"],
        "bias": ["drop x clip"],
        "clip": ["drop x bias"],
    }
    assert found["drop"]["difference"] == pytest.approx(-0.1, abs=0.004)


def test_without_replicates_lenth_judges(planned: Callable[..., Path], call: Callable[..., Called]) -> None:
    plan = planned(5, "--design", "fraction", "--resolution", "V", "--seeds", "3")
    done = call(experiment.main, "compare", "--experiment", plan)
    assert "Lenth" in done.stdout
    found = findings(call, plan)
    assert len(found) == 15
    assert found["late"]["verdict"] == "HURTS"
    assert found["late"]["difference"] == pytest.approx(0.2, abs=0.004)
    assert found["late"]["df"] == 5
    assert found["decay"]["verdict"] not in ("HELPS", "HURTS")


def test_a_stack_that_adds_up_and_one_that_does_not(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(3, "--with-stack", "--seeds", "1,2,3", interaction=0.12)
    found = findings(call, plan)
    gap = found["stack v sum of parts"]
    assert gap["difference"] == pytest.approx(0.12, abs=0.005)
    assert gap["verdict"] == "LESS THAN THE SUM"
    best = found["stack v best part drop"]
    assert best["difference"] == pytest.approx(-0.05 + 0.12, abs=0.005)
    assert best["verdict"] == "HURTS"
    assert best["low"] > 0


def test_a_plan_is_judged_on_the_seeds_that_are_done(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(2, "--seeds", "1,2,3")
    shutil.rmtree(plan.parent.parent / "study-bias-s3" / "evals")
    done = call(experiment.main, "compare", "--experiment", plan, "--format", "json")
    arms = json.loads(done.stdout)["arms"]
    assert [(arm["recipe"], arm["n"], arm["noise"]["df"]) for arm in arms] == [("drop", 3, 2), ("bias", 2, 1)]
    assert "Not every arm is scored yet on seeds 3" in call(experiment.main, "compare", "--experiment", plan).stdout


def test_leaving_one_out_is_judged_against_the_stack(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(2, "--design", "leave-one-out", "--seeds", "1,2,3")
    judged = json.loads(call(experiment.main, "compare", "--experiment", plan, "--format", "json").stdout)
    assert judged["baseline"]["recipe"] == "stack"
    arms = {arm["recipe"]: arm for arm in judged["arms"]}
    assert arms["without-drop"]["difference"] == pytest.approx(0.1, abs=0.004)
    assert arms["without-drop"]["verdict"] == "HURTS"  # leaving it out hurts: it helps in the stack
    assert arms["without-drop"]["noise"]["sd"] < 0.005  # the seeds' own luck, 0.03, cancels


def test_a_plan_says_what_it_costs_and_sees(tmp_path: Path, call: Callable[..., Called]) -> None:
    priced = {"price_per_hour": 36.0, "currency": "EUR", "expected_tokens_per_second": 2560.0}
    write_run(tmp_path / "runs" / "base", {}, priced)
    changes = write(tmp_path / "changes.json", CHANGES)
    place = ("--runs-dir", tmp_path / "runs", "--design", "fraction", "--seeds", "1")
    done = call(experiment.main, "plan", "base", changes, *place, "--dry-run")
    assert done.status == 0, done.stderr
    for expected in ("16 arms x 1 seeds = 16 runs", "Tokens:            40,960", "0.16 EUR", "E=ABCD (resolution V)"):
        assert expected in done.stdout
    assert "Standard error:    0.50 sigma" in done.stdout
    assert "one-at-a-time" in done.stdout.split("Designs for these interventions")[1]
    assert not (tmp_path / "runs" / "base-fraction").exists()
    entry = {
        "component": "all", "recipe": "base", "recipe_hash": "0" * 64, "parameters": 10_000, "train_tokens": 2560,
        "hardware": "1x cpu", "sd": 0.0123, "df": 6, "runs": ["a", "b"],
    }  # fmt: skip
    (tmp_path / "runs" / "noise-ledger.json").write_text(json.dumps({"entries": [entry]}))
    done = call(experiment.main, "plan", "base", changes, *place, "--dry-run")
    assert "borrowed from another recipe (base)" in done.stdout
    assert "0.50 sigma = 0.0062 nats per token" in done.stdout


def test_noise_is_learned_against_the_arm_that_others_are_compared_with(
    planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    plan = planned(2, "--design", "leave-one-out", "--seeds", "1,2,3")
    runs_dir = plan.parent.parent
    learned = call(experiment.main, "noise", "--experiment", "study", "--runs-dir", runs_dir)
    assert learned.status == 0, learned.stderr
    found = json.loads((runs_dir / "noise-ledger.json").read_text())["entries"]
    names = {entry["recipe"] for entry in found}
    assert {"without-drop v stack", "without-bias v stack"} <= names
    assert not any(name.endswith("v baseline") for name in names)


@pytest.mark.parametrize(
    ("changes", "words", "complaint"),
    [
        ({"a": {"train": {"moe_router_loss_scale": 0.01}}}, [], "acts only with moe"),
        ({"a": {"train": {"learning_rat": 1}}}, [], "learning_rat"),
        ({"a": {"model": {"n_heads": 3}}}, [], "n_heads"),
        ({"a": {}}, [], "wanted patches"),
        ({}, [], "found no intervention"),
        ({"a b": {"train": {"weight_decay": 0.0}}}, [], "wanted a name"),
        (CHANGES, ["--design", "fraction", "--generators", "E=A"], "--generators"),
        ({name: CHANGES[name] for name in ("drop", "bias")}, ["--design", "fraction"], "--design full-factorial"),
        ({"drop": CHANGES["drop"]}, ["--design", "leave-one-out"], "at least 2"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_whole(
    tmp_path: Path, call: Callable[..., Called], changes: dict[str, object], words: list[str], complaint: str
) -> None:
    write_run(tmp_path / "runs" / "base", {}, {})
    file = write(tmp_path / "changes.json", changes)
    done = call(experiment.main, "plan", "base", file, *words, "--runs-dir", tmp_path / "runs", "--seeds", "1")
    assert done.status == 2
    assert complaint in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["base"]


def test_noise_of_pairs_is_learned_for_later_experiments(
    tmp_path: Path, planned: Callable[..., Path], call: Callable[..., Called]
) -> None:
    planned(4, "--seeds", "1,2,3")
    place = ("--runs-dir", tmp_path / "runs")
    learned = call(experiment.main, "noise", "--experiment", "study", *place)
    assert learned.status == 0, learned.stderr
    assert learned.stdout.count("pairs seeds: sd 0.00") == 4  # the seeds' own luck, 0.03, cancels
    entries = json.loads((tmp_path / "runs" / "noise-ledger.json").read_text())["entries"]
    assert all(entry["component"] == "pairs" and entry["df"] == 2 and len(entry["runs"]) == 6 for entry in entries)
