"""The published losses judged as in the worked example, and a small study planned, run and judged, as a user does."""

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ddp_train
import experiment
import test_loss
from harness.observers.charts import ChartPainter
from harness.run.errors import exit_status_of
from study import running
from tests.conftest import Called
from tests.helpers import ROOT, run, write, write_run

PUBLISHED = ROOT / "docs" / "published" / "losses.csv"
HEADER = "run,recipe,init_seed,train_seed,test_loss"
SINGLES = [
    "gradient-clipping", "qkv-bias", "no-amp", "weight-decay-0.01", "remove-dropout", "schedule-learning-rate",
    "weight-tying", "weight-decay-cerebras",
]  # fmt: skip
STACKS = ["stacked-1", "stacked-2", "stacked-3"]
BASELINE_KEYS = {"recipe", "n", "mean", "sd"}
ARM_KEYS = {
    "recipe", "n", "method", "mean", "difference", "se", "df", "t", "p", "p_holm", "low", "high",
    "p_better", "verdict",
}  # fmt: skip
VERDICTS = (
    "HELPS", "HURTS", "LEANS BETTER", "LEANS WORSE", "BETTER BY LESS THAN 0.01", "WORSE BY LESS THAN 0.01",
    "NO DIFFERENCE LARGER THAN 0.01", "CANNOT TELL",
)  # fmt: skip
STUDY = ("toy-baseline-s1", "toy-fast-s1", "toy-baseline-s2", "toy-fast-s2")


def published(call: Callable[..., Called], *words: object, table: Path = PUBLISHED) -> dict[str, Any]:
    """Judge a table against its baseline and give the JSON."""
    done = call(experiment.main, "compare", "--baseline", "baseline", *words, "--losses", table, "--format", "json")
    assert done.status == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def arms_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["recipe"]: arm for arm in document["arms"]}


# --- the published losses ------------------------------------------------------------------------------------


def test_seven_baselines_and_the_single_runs(call: Callable[..., Called]) -> None:
    document = published(call)
    baseline = document["baseline"]
    assert (baseline["recipe"], baseline["n"], document["family"]) == ("baseline", 7, 11)
    assert (baseline["mean"], baseline["sd"]) == pytest.approx((3.674103, 0.012339), abs=5e-7)
    # Difference, t, p by the baselines' spread: science.md's table, "any init". One run each is no proof.
    wanted = {
        "gradient-clipping": (0.0042, 0.32, 0.760, "CANNOT TELL"),
        "qkv-bias": (-0.0047, -0.36, 0.733, "CANNOT TELL"),
        "no-amp": (0.0049, 0.37, 0.725, "CANNOT TELL"),
        "weight-decay-0.01": (-0.0312, -2.36, 0.056, "CANNOT TELL"),
        "remove-dropout": (-0.0328, -2.49, 0.047, "LEANS BETTER"),
        "schedule-learning-rate": (-0.0722, -5.47, 0.0016, "LEANS BETTER"),
        "weight-tying": (0.2002, 15.2, 5e-6, "LEANS WORSE"),
        "weight-decay-cerebras": (0.1398, 10.6, 4e-5, "LEANS WORSE"),
    }
    arms = arms_of(document)
    assert list(arms) == [*SINGLES, *STACKS]
    for recipe, (difference, t, p, verdict) in wanted.items():
        arm = arms[recipe]
        assert (arm["n"], arm["df"], arm["verdict"], arm["method"]) == (1, 6, verdict, "single run")
        assert arm["difference"] == pytest.approx(difference, abs=5e-5)
        assert arm["se"] == pytest.approx(0.01319, abs=5e-6)
        assert arm["t"] == pytest.approx(t, abs=0.05 if abs(t) > 10 else 5e-3)
        assert arm["p"] == pytest.approx(p, rel=0.1, abs=5e-4 if p > 1e-3 else 0)
        assert "its own noise is unknown" in arm["warnings"][0]
    # Weight tying would have to stand five times the noise seen: 0.2002 / (0.012339 sqrt(25 + 1/7)) on 6 df, of 11.
    assert arms["weight-tying"]["p_holm"] == pytest.approx(0.195, abs=5e-3)
    schedule = arms["schedule-learning-rate"]
    assert (schedule["low"], schedule["high"]) == pytest.approx((-0.1045, -0.0399), abs=5e-5)


def test_naming_recipes_narrows_the_view_and_not_the_family(call: Callable[..., Called]) -> None:
    whole, part = published(call), published(call, *STACKS)
    assert list(arms_of(part)) == STACKS
    for name in STACKS:
        assert arms_of(part)[name] == arms_of(whole)[name]
    assert part["family"] == 11
    assert "3 of 11 shown: p values are adjusted for all of them." in part["notes"]


def part_of_published(path: Path, runs: Sequence[str]) -> Path:
    """Write a table of a few published rows."""
    lines = PUBLISHED.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line for line in lines if line.split(",")[0] in runs)]) + "\n")
    return path


@pytest.mark.parametrize(
    ("numbers", "mean", "sd", "p"),
    [
        (("", "-3", "-4"), 3.672857, 0.018974, 0.084),  # both seeds differ
        (("", "-5", "-6"), 3.684462, 0.0061, None),  # the same initial weights
    ],
)
def test_three_baselines(
    call: Callable[..., Called], tmp_path: Path, numbers: tuple[str, ...], mean: float, sd: float, p: float | None
) -> None:
    runs = [f"8xa100m40-baseline{number}" for number in numbers]
    table = part_of_published(tmp_path / "part.csv", [*runs, "8xa100m40-schedule-learning-rate"])
    document = published(call, table=table)
    assert document["baseline"]["n"] == 3
    assert document["baseline"]["mean"] == pytest.approx(mean, abs=5e-7)
    assert document["baseline"]["sd"] == pytest.approx(sd, abs=5e-5 if p is None else 5e-7)
    (arm,) = document["arms"]
    assert arm["df"] == 2
    if p is not None:
        assert arm["p"] == pytest.approx(p, abs=5e-4)


def test_same_init_noise_by_hand(call: Callable[..., Called], tmp_path: Path) -> None:
    # Pooled within two initial weights on 3 df, as the worked example has it.
    runs = ["8xa100m40-baseline", "8xa100m40-baseline-5", "8xa100m40-baseline-6", "8xa100m40-schedule-learning-rate"]
    table = part_of_published(tmp_path / "part.csv", runs)
    (arm,) = published(call, "--noise-sd", "0.006659", "--noise-df", "3", table=table)["arms"]
    assert (arm["difference"], arm["se"]) == pytest.approx((-0.0825, 0.00769), abs=6e-5)
    assert arm["t"] == pytest.approx(-10.7, abs=0.05)
    assert (arm["p"], arm["df"]) == (pytest.approx(0.0017, abs=5e-5), 3)


def test_json_has_the_documented_keys_and_numbers(call: Callable[..., Called]) -> None:
    document = published(call)
    assert document.keys() >= {"baseline", "arms", "family"}
    assert document["baseline"].keys() >= BASELINE_KEYS
    for arm in document["arms"]:
        assert arm.keys() >= ARM_KEYS
        assert arm["low"] < arm["difference"] < arm["high"]
        assert arm["difference"] == pytest.approx(arm["mean"] - document["baseline"]["mean"])
        assert arm["t"] == pytest.approx(arm["difference"] / arm["se"])


def test_tables_say_the_same_in_every_format(call: Callable[..., Called]) -> None:
    printed = {
        name: call(
            experiment.main, "compare", "--baseline", "baseline", "--losses", PUBLISHED, "--format", name
        ).stdout
        for name in ("table", "markdown", "csv")
    }
    document = published(call)
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    assert [row["recipe"] for row in rows] == ["baseline", *SINGLES, *STACKS]
    assert rows[0]["test loss"] == "3.674103"
    for row, arm in zip(rows[1:], document["arms"], strict=True):
        assert row["verdict"] == arm["verdict"]
        assert float(row["Δ"]) == pytest.approx(arm["difference"], abs=5e-7)
    lines = printed["markdown"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    shown = [name for name in rows[0] if any(row[name] for row in rows)]  # for people, empty columns are left out
    assert cells == [shown, *([row[name] for name in shown] for row in rows)]
    assert set(lines[1]) == {"|", "-"}
    table = printed["table"].splitlines()
    assert table[0].split()[:2] == ["recipe", "n"]
    sentence = (
        "schedule-learning-rate: LEANS BETTER: Δ -0.0722 (95% CI -0.1045..-0.0399), t -5.47 on 6 df. "
        "Holm p 1 of 11 at 5 times the noise of the single run, n 1 v 7. Noise of a run 0.0123 on 6 df: the spread "
        "of 7 runs of the other side. P(better) >0.99; adopting it now loses 1.3e-05 on average by being wrong."
    )
    assert sentence in table
    assert f"- {sentence}" in lines


def test_a_test_set_that_is_too_long_is_refused_before_training(
    datasets_dir: Path, tmp_path: Path, call: Callable[..., Called]
) -> None:
    runs_dir = tmp_path / "runs"
    write_run(runs_dir / "base", {}, {})
    words = ("--design", "replicates", "--runs-dir", runs_dir, "--name", "noise", "--seeds", "1,2")
    assert (
        call(experiment.main, "plan", "base", *words).status == 0
    )  # 3,200 batches are more than the toy dataset has
    done = call(experiment.main, "run", runs_dir / "noise" / "experiment.json", datasets_dir)
    assert (done.status, len(done.stderr.splitlines())) == (3, 1)
    assert "--test-batches" in done.stderr
    assert not (runs_dir / "noise-baseline-s1" / "status.json").exists()


def test_naming_an_arm_twice_changes_nothing(call: Callable[..., Called], tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    rows = [f"{name}{i},{name},,,{loss + i / 100}" for name, loss in (("b", 3.5), ("x", 3.6)) for i in range(3)]
    path.write_text("\n".join([HEADER, *rows]))
    words = ("--losses", path, "--baseline", "b")
    assert (
        call(experiment.main, "compare", *words, "x", "x1").stdout
        == call(experiment.main, "compare", *words, "x").stdout
    )


def test_output_goes_to_a_file(call: Callable[..., Called], tmp_path: Path) -> None:
    words = ("--baseline", "baseline", "--losses", PUBLISHED, "--format", "json")
    printed = call(experiment.main, "compare", *words)
    silent = call(experiment.main, "compare", *words, "--output", tmp_path / "result.json")
    assert silent == (0, "", "")
    assert (tmp_path / "result.json").read_text() == printed.stdout


# --- bad input -----------------------------------------------------------------------------------------------

BAD_TABLES = {
    "": ["no rows"],
    HEADER: ["no rows"],
    "run,recipe,loss\na,base,3.6": ["wanted run,recipe,init_seed,train_seed,test_loss"],
    f"{HEADER}\na,baseline,,,x\nb,it,,,3.5\nc,it,,,": ["line 2: test_loss: found 'x'", "line 4: test_loss: found ''"],
    f"{HEADER}\n,baseline,,,3.6\nb,,,,3.5": ["line 2: found no run", "line 3: found no run or no recipe"],
    f"{HEADER}\na,baseline,,,3.6\na,it,,,3.5": ["run 'a' appears twice"],
    f'{HEADER}\na,baseline,,,3.6\nb,"it,,,3.5': ["cannot be read as a CSV table"],
    f"{HEADER}\na,baseline\nb,it,,,3.5": ["line 2: found 2 values, wanted 5"],
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_bad_tables_are_refused_line_by_line(call: Callable[..., Called], tmp_path: Path, text: str) -> None:
    table = tmp_path / "losses.csv"
    table.write_text(text)
    done = call(experiment.main, "compare", "--baseline", "baseline", "--losses", table)
    assert (done.status, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == len(BAD_TABLES[text])
    for line, said in zip(lines, BAD_TABLES[text], strict=True):
        assert line.startswith(f"{table}: ")
        assert said in line


def test_tables_that_are_not_text_or_not_there(call: Callable[..., Called], tmp_path: Path) -> None:
    table = tmp_path / "losses.csv"
    table.write_bytes(b"run,recipe\xff\xfe\n")
    for path in (table, tmp_path / "none.csv", tmp_path):
        done = call(experiment.main, "compare", "--baseline", "baseline", "--losses", path)
        assert done.status == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "words",
    [
        ("--baseline", "nobody"),
        ("--baseline", "baseline", "nobody"),
        ("--baseline", "baseline", "baseline"),
        ("--baseline", "baseline", "--margin", "0"),
        ("--baseline", "baseline", "--margin", "nan"),
        ("--baseline", "baseline", "--noise-sd", "0.1"),
        ("--baseline", "baseline", "--noise-df", "3"),
        ("--baseline", "baseline", "--experiment", "experiment.json"),
        ("--baseline", "baseline", "--format", "xml"),
        (),
    ],
)
def test_bad_usage(call: Callable[..., Called], words: tuple[str, ...]) -> None:
    done = call(experiment.main, "compare", *words, "--losses", PUBLISHED)
    assert (done.status, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "found" in done.stderr or "error:" in done.stderr


def test_table_of_the_baseline_alone_has_nothing_to_compare(call: Callable[..., Called], tmp_path: Path) -> None:
    table = part_of_published(tmp_path / "part.csv", ["8xa100m40-baseline", "8xa100m40-baseline-3"])
    done = call(experiment.main, "compare", "--baseline", "baseline", "--losses", table)
    assert done.status == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", ["new", "plan", "run", "compare", "report", "noise"])
def test_help_needs_no_torch_and_fits_a_screen(tmp_path: Path, verb: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    blocked = subprocess.run(
        [sys.executable, "-c", "import torch"], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "torch is blocked" in blocked.stderr
    done = run("experiment.py", verb, "--help", PYTHONPATH=str(tmp_path), COLUMNS="80")
    assert f"python experiment.py {verb}" in done.stdout
    assert len(done.stdout.splitlines()) <= 45


# --- a study, from a plan to a verdict -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a study with one intervention on two seeds, planned but not trained."""
    folder = tmp_path_factory.mktemp("study")
    write_run(folder / "runs" / "base", {}, {"min_train_tokens": 2 * 128, "checkpoint_interval": 100})
    interventions = write(folder / "interventions.json", {"fast": {"train": {"learning_rate": 0.05}}})
    words = ("--design", "one-at-a-time", "--seeds", "1,2", "--name", "toy", "--test-batches", "2")
    done = run("experiment.py", "plan", "base", interventions, *words, "--runs-dir", folder / "runs")
    assert "2 arms x 2 seeds = 4 runs" in done.stdout
    assert f"experiment.py run {folder / 'runs' / 'toy'} datasets" in done.stdout
    return folder / "runs"


def in_process(command: Sequence[str]) -> SimpleNamespace:
    """Run a script of a plan in this process, which spares importing torch for each of them."""
    assert command[0] == sys.executable
    mains = {ROOT / "ddp_train.py": ddp_train.main, ROOT / "test_loss.py": test_loss.main}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(command[1:]))
        patch.setattr(ChartPainter, "_start", lambda _: None)
        return SimpleNamespace(returncode=exit_status_of(mains[Path(command[1])]))


@pytest.fixture(scope="module")
def executed(study: Path, datasets_dir: Path) -> Path:
    """The same with every run trained and scored; its plan."""
    plan = study / "toy" / "experiment.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "subprocess", SimpleNamespace(run=in_process))
        patch.setattr(sys, "argv", ["experiment.py", "run", str(plan), str(datasets_dir)])
        assert exit_status_of(experiment.main) == 0
    return plan


def test_every_run_is_trained_and_scored_on_the_same_tokens(executed: Path) -> None:
    scores = {}
    for name in STUDY:
        folder = executed.parent.parent / name
        assert json.loads((folder / "status.json").read_text())["state"] == "complete"
        (path,) = (folder / "evals").glob("loss-*.json")
        scores[name] = json.loads(path.read_text())
    assert len({score["tokens_sha256"] for score in scores.values()}) == 1
    assert {score["split"] for score in scores.values()} == {"validation"}
    assert {score["tokens"] for score in scores.values()} == {2 * 6 * 16}
    assert len({score["loss"] for score in scores.values()}) == 4


def test_plan_is_judged_in_pairs(executed: Path, call: Callable[..., Called]) -> None:
    done = call(experiment.main, "compare", "--experiment", executed, "--format", "json")
    assert done.status == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["baseline"]["recipe"], document["baseline"]["n"]) == ("baseline", 2)
    (arm,) = document["arms"]
    assert (arm["recipe"], arm["n"], arm["method"]) == ("fast", 2, "pairs")
    assert arm["changes"] == "learning_rate 0.01→0.05"
    assert arm["verdict"] in VERDICTS
    losses = {
        name: json.loads(next((executed.parent.parent / name / "evals").glob("loss-*.json")).read_text())["loss"]
        for name in STUDY
    }
    difference = sum((-1 if "baseline" in name else 1) * loss / 2 for name, loss in losses.items())
    assert arm["mean"] - document["baseline"]["mean"] == pytest.approx(difference, abs=1e-9)
    table = call(experiment.main, "compare", "--experiment", executed)
    assert table.status == 0
    assert any(line.startswith("fast ") and line.split()[1] == "2" for line in table.stdout.splitlines())


def test_noise_is_learned_and_planned_with(executed: Path, call: Callable[..., Called]) -> None:
    runs_dir = executed.parent.parent
    pair = ("toy-baseline-s1", "toy-fast-s1", "--only-named", "--runs-dir", runs_dir, "--format", "json")
    unknown = json.loads(call(experiment.main, "compare", "--baseline", *pair).stdout)
    assert (unknown["arms"][0]["verdict"], unknown["arms"][0]["p"]) == ("CANNOT TELL", None)
    learned = call(experiment.main, "noise", "--baseline", "toy-baseline-s1", "--runs-dir", runs_dir)
    assert learned.status == 0, learned.stderr
    assert learned.stdout.count("all seeds: sd 0.") == 1
    try:
        words = ("base", runs_dir.parent / "interventions.json", "--dry-run", "--runs-dir", runs_dir)
        assert "earlier runs of toy-baseline in the noise ledger" in call(experiment.main, "plan", *words).stdout
    finally:
        (runs_dir / "noise-ledger.json").unlink()


def test_executing_again_does_nothing_but_what_is_missing(executed: Path, datasets_dir: Path) -> None:
    # In processes of their own, as users have them: the last run is complete, and only has to be scored.
    runs_dir = executed.parent.parent
    before = {name: (runs_dir / name / "metrics.jsonl").stat().st_mtime_ns for name in STUDY}
    shutil.rmtree(runs_dir / "toy-fast-s2" / "evals")
    done = run("experiment.py", "run", executed, datasets_dir)
    for number, name in enumerate(STUDY[:3], start=1):
        assert f"[{number}/4] {name}: already complete" in done.stdout
    assert f"[4/4] {STUDY[3]}: training" in done.stdout
    assert "Loss against our test dataset: " in done.stdout
    assert {name: (runs_dir / name / "metrics.jsonl").stat().st_mtime_ns for name in STUDY} == before


def test_planning_again_is_harmless_and_another_plan_is_refused(
    study: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    plan = study / "toy" / "experiment.json"
    before = plan.read_bytes()
    words = ("--seeds", "1,2", "--name", "toy", "--test-batches", "2", "--runs-dir", study)
    assert call(experiment.main, "plan", "base", study.parent / "interventions.json", *words).status == 0
    other = write(tmp_path / "other.json", {"slow": {"train": {"learning_rate": 0.001}}})
    done = call(experiment.main, "plan", "base", other, *words)
    assert done.status == 2
    assert done.stderr == f"{plan}: found another experiment of this name, wanted a new --name\n"
    assert plan.read_bytes() == before
    assert not list(study.glob("toy-slow-*"))


@pytest.mark.parametrize(
    "words",
    [
        ("base",),
        ("base", "interventions.json", "--generators", "C=AB"),
        ("base", "interventions.json", "--seeds", "1,1"),
        ("base", "interventions.json", "--seeds", "1,-2"),
        ("base", "interventions.json", "--design", "fraction"),
        ("base", "interventions.json", "--with-stack"),
        ("nobody", "interventions.json"),
        ("base", "nowhere.json"),
    ],
)
def test_impossible_plans(study: Path, call: Callable[..., Called], words: tuple[str, ...]) -> None:
    before = sorted(study.iterdir())
    place = [study.parent / word if word == "interventions.json" else word for word in words]
    done = call(experiment.main, "plan", *place, "--runs-dir", study)
    assert done.status == 2
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(study.iterdir()) == before
