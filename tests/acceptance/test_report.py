"""The report: one page that needs nothing else, shows what it should, and runs no script but its own."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import experiment
from harness.run.config import load_run_configs
from harness.run.recipe import recipe_hash, run_hash
from tests.conftest import Called
from tests.helpers import ROOT, write_run

HOSTILE = '</script><script>document.title = "broken into"</script>'
SEEDS = (1, 2, 3)


def write_scored_run(
    folder: Path, loss: float, seed: int, model: dict[str, object], train: dict[str, object] | None = None
) -> None:
    """Write a run folder as training and test_loss.py would have left it, with losses made up."""
    write_run(folder, model, train or {"random_seed": seed, "notes": HOSTILE})
    generator = np.random.default_rng([seed, *folder.name.encode()])
    lines = [
        {"step": step, "tokens": (step + 1) * 128, "elapsed": 0.1 * (step + 1), "train/loss": 5 - 0.01 * step + loss}
        for step in range(60)
    ]
    for step in (0, 30, 59):
        lines[step]["sample"] = f"after step {step} {HOSTILE}"  # type: ignore[assignment]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"plan": {"global_steps": 60}, "starts": [{"devices": ["cpu"]}]}))
    (folder / "status.json").write_text(json.dumps({"state": "complete", "step": 59, "exit_code": 0}))
    configs = load_run_configs(folder / "model.json", folder / "train.json")
    score = {
        "dataset": "toy", "split": "validation", "start_token": 0, "tokens": 640, "tokens_sha256": "a" * 64,
        "loss": loss, "step": 59, "tokens_seen": 60 * 128, "recipe_hash": recipe_hash(*configs),
        "run_hash": run_hash(*configs),
    }  # fmt: skip
    (folder / "evals").mkdir()
    stored = folder / "evals" / "loss-validation-0-640-step-00000059.json"
    stored.write_text(json.dumps(score))
    noise = generator.standard_normal(40)
    losses = loss + 0.001 * (noise - noise.mean())
    np.savez(stored.with_suffix(".npz"), sequence_losses=losses, sequence_documents=np.arange(40))


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Three seeds of a baseline, of a change that helps by 0.1, and of one that does nothing."""
    for seed in SEEDS:
        for name, model, gain in (
            ("plain", {}, 0.0),
            ("better", {"drop_rate": 0.0}, 0.1),
            ("same", {"qkv_bias": True, "moe": {"num_experts": 4, "num_active_experts": 2}}, 0.0),
        ):
            loss = 4.0 + 0.02 * seed - gain + 0.001 * ((seed * 7 + len(name)) % 3)
            write_scored_run(tmp_path / "runs" / f"{name}-s{seed}", loss, seed, model)
    return tmp_path / "runs"


class Text(HTMLParser):
    """The page's visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words += data + " "


def test_replicates_are_found_and_judged_in_pairs(runs_dir: Path, call: Callable[..., Called]) -> None:
    words = ("--baseline", "plain-s1", "better-s1", "same-s2", "--runs-dir", runs_dir, "--format", "json")
    done = call(experiment.main, "compare", *words)
    assert done.status == 0, done.stderr
    judged = json.loads(done.stdout)
    assert {arm["method"] for arm in judged["arms"]} == {"pairs"}
    assert judged["baseline"]["n"] == 3
    verdicts = {arm["recipe"]: arm["verdict"] for arm in judged["arms"]}
    assert verdicts == {"better": "HELPS", "same": "NO DIFFERENCE LARGER THAN 0.01"}
    (better,) = (arm for arm in judged["arms"] if arm["recipe"] == "better")
    assert better["changes"] == "drop_rate 0.1→0"
    assert better["se"] > better["se_training"] > 0
    assert 1 < better["tokens_factor"]["low"] < better["tokens_factor"]["factor"] < better["tokens_factor"]["high"]
    (same,) = (arm for arm in judged["arms"] if arm["recipe"] == "same")
    assert same["changes"] == "qkv_bias off→on, moe none→(num_experts 4, num_active_experts 2)"
    assert same["tokens_factor"] is None  # what is not told is worth nothing


def test_a_report_shows_everything_and_needs_nothing(
    runs_dir: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    done = call(experiment.main, "report", "--baseline", "plain-s1", "--runs-dir", runs_dir, "--output", output)
    assert done.status == 0, done.stderr
    page = output.read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)
    words = Text(page).words
    for expected in (
        "HELPS",
        "NO DIFFERENCE LARGER THAN 0.01",
        "drop_rate",
        "better",
        "plain",
        "qkv_bias",
        "Samples",
    ):
        assert expected in words
    rows = re.findall(r"<tbody><tr>.*?</tbody>", page)[0].split("</tr>")
    assert "better" in rows[0]  # the lowest loss leads
    assert page.count("<polyline") == 3
    assert page.count("<script") == 1


def test_unfair_comparisons_are_refused_with_the_reason(runs_dir: Path, call: Callable[..., Called]) -> None:
    score = next((runs_dir / "better-s1" / "evals").glob("*.json"))
    known = json.loads(score.read_text())
    score.write_text(json.dumps({**known, "tokens_seen": 1}))
    words = ("--baseline", "plain-s1", "better-s1", "--only-named", "--runs-dir", runs_dir)
    done = call(experiment.main, "compare", *words)
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert "better-s1: saw 1 tokens" in done.stderr
    score.write_text(json.dumps({**known, "tokens_sha256": "b" * 64}))
    done = call(experiment.main, "compare", *words)
    assert done.status == 2
    assert "same test tokens" in done.stderr
    score.write_text(json.dumps({**known, "run_hash": "c" * 64}))
    assert "scored with another" in call(experiment.main, "compare", *words).stderr


def test_noise_is_learned_and_borrowed(runs_dir: Path, call: Callable[..., Called]) -> None:
    alone = ("--baseline", "plain-s1", "better-s1", "--only-named", "--runs-dir", runs_dir)
    unknown = call(experiment.main, "compare", *alone)
    assert "noise unknown" in unknown.stdout
    assert "-0.09" in unknown.stdout  # the difference itself is known
    done = call(experiment.main, "noise", "--baseline", "plain-s1", "--runs-dir", runs_dir)
    assert done.status == 0, done.stderr
    ledger = json.loads((runs_dir / "noise-ledger.json").read_text())
    (plain,) = (entry for entry in ledger["entries"] if entry["recipe"] == "plain")
    losses = [4.0 + 0.02 * seed + 0.001 * ((seed * 7 + 5) % 3) for seed in SEEDS]
    assert plain["sd"] == pytest.approx(np.std(losses, ddof=1))
    assert (plain["df"], plain["component"], plain["runs"]) == (2, "all", ["plain-s1", "plain-s2", "plain-s3"])
    # What was learned from a run that is being judged is no prior of it.
    assert "noise unknown" in call(experiment.main, "compare", *alone).stdout
    for name, model, loss in (("plain-s9", {}, 4.0), ("better-s9", {"drop_rate": 0.0}, 3.9)):
        write_scored_run(runs_dir / name, loss, 9, model)
    later = ("--baseline", "plain-s9", "better-s9", "--only-named", "--runs-dir", runs_dir)
    lent = call(experiment.main, "compare", *later)
    assert "3 earlier runs of plain in the noise ledger" in lent.stdout
    assert "noise unknown" in call(experiment.main, "compare", *later, "--prior", "none").stdout


def test_a_diverged_run_is_reported_never_dropped(runs_dir: Path, call: Callable[..., Called]) -> None:
    folder = runs_dir / "better-s2"
    shutil.rmtree(folder / "evals")
    (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 30, "exit_code": 7}))
    done = call(experiment.main, "compare", "--baseline", "plain-s1", "better-s1", "--runs-dir", runs_dir)
    assert done.status == 0, done.stderr
    assert "Diverged: 1 of 3 runs, of the baseline 0 of 3 (Fisher p 1, Holm p 1)." in done.stdout
    for seed in SEEDS:
        folder = runs_dir / f"better-s{seed}"
        shutil.rmtree(folder / "evals", ignore_errors=True)
        (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 30, "exit_code": 7}))
    done = call(experiment.main, "compare", "--baseline", "better-s1", "plain-s1", "--runs-dir", runs_dir)
    assert "CANNOT TELL: every run of better diverged" in done.stdout
    assert "better: 3 of 3 runs diverged and have no loss: better-s1, better-s2, better-s3." in done.stdout
    output = runs_dir / "report.html"
    only = ("report", *(f"better-s{seed}" for seed in SEEDS), "--runs-dir", runs_dir, "--output", output)
    done = call(experiment.main, *only)
    assert done.status == 0, done.stderr
    assert "better: 3 of 3 runs diverged" in output.read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_a_report_in_a_real_browser(runs_dir: Path, call: Callable[..., Called], tmp_path: Path) -> None:
    """The slider shows the last step's samples, hostile text stays text, and a screenshot is not blank."""
    output, picture = tmp_path / "report.html", tmp_path / "page.png"
    assert (
        call(experiment.main, "report", "--baseline", "plain-s1", "--runs-dir", runs_dir, "--output", output).status
        == 0
    )
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --window-size=400,1200"
    )

    def browse(what: str) -> str:
        command = ["chromium", *switches.split(), f"--user-data-dir={tmp_path}/profile", what, output.as_uri()]
        home = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=home).stdout

    shown = browse("--dump-dom")
    assert "<title>Runs compared</title>" in shown
    assert '<output id="step-shown">59</output>' in shown
    assert re.search(r"<pre>after step 59 &lt;/script&gt;", shown)
    browse(f"--screenshot={picture}")
    assert picture.stat().st_size > 20_000


def test_the_published_table_makes_a_page(call: Callable[..., Called], tmp_path: Path) -> None:
    losses = ROOT / "docs" / "published" / "losses.csv"
    done = call(
        experiment.main, "report", "--losses", losses, "--baseline", "baseline", "--output", tmp_path / "out.html"
    )
    assert done.status == 0, done.stderr
    words = Text((tmp_path / "out.html").read_text()).words
    assert words.count("LEANS WORSE") >= 2


def test_a_followed_report_shows_runs_that_train_and_ends_with_them(
    runs_dir: Path, call: Callable[..., Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, pages = tmp_path / "report.html", []
    for name in ("plain-s1", "better-s1"):  # not scored yet
        (runs_dir / name / "evals").rename(runs_dir / name / "kept")
    states = {"better-s1": "running", "plain-s1": "running"}

    def write_states() -> None:
        for name, state in states.items():
            (runs_dir / name / "status.json").write_text(json.dumps({"state": state, "step": 59}))

    def go_on(_: float) -> None:
        """First one run is trained but not scored, then both are scored."""
        pages.append(output.read_text())
        states.update({"better-s1" if len(pages) == 1 else "plain-s1": "complete"})
        write_states()
        for name in states if len(pages) == 2 else ():
            (runs_dir / name / "kept").rename(runs_dir / name / "evals")

    write_states()
    monkeypatch.setattr("study.following.time.sleep", go_on)
    words = ("--baseline", "plain-s1", "better-s1", "--runs-dir", runs_dir, "--output", output, "--follow")
    done = call(experiment.main, "report", *words)
    assert done.status == 0, done.stderr
    assert len(pages) == 2
    assert all('http-equiv="refresh"' in page for page in pages)
    assert "No run is scored yet" in Text(pages[0]).words
    assert "better-s1 (training)" in Text(pages[0]).words
    assert "No run is scored yet" in Text(pages[1]).words
    assert "plain-s1 (training)" in Text(pages[1]).words
    assert "better-s1 (trained)" in Text(pages[1]).words
    last = output.read_text()
    assert 'http-equiv="refresh"' not in last
    assert not re.search(r"\((training|trained)\)", last)
    assert "HELPS" in Text(last).words
    table = tmp_path / "losses.csv"
    table.write_text("run,recipe,init_seed,train_seed,test_loss\na,a,1,1,3.0\n")
    refused = call(experiment.main, "report", "--losses", table, "--baseline", "a", "--follow")
    assert (refused.status, len(refused.stderr.splitlines())) == (2, 1)
