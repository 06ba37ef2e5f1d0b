"""The run page opens from disk, holds its charts, shows strangers' text as text, and reloads while the run lives."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.observers.charts import ChartPainter, draw
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from tests.helpers import status, train

HOSTILE = "</td><script>document.title = 'broken into'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def folder(make_run: Callable[..., Path]) -> RunFolder:
    """A run of 300 steps as the trainer leaves it, with a sample that tries to be markup."""
    run = RunFolder(make_run(train={"clipping_max_norm": 1.5, "currency": "EUR"}))
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": 128 * (step + 1),
            "elapsed": 0.1 * (step + 1),
            "train/loss": 4 / (1 + step / 50),
            "train/loss_min": 3.5 / (1 + step / 50),
            "train/loss_max": 4.5 / (1 + step / 50),
            "train/lr": 0.001,
            "train/grad_norm": 2 / (1 + step / 100),
            "train/skipped": False,
            "train/tok_per_sec": 1000.0 + step % 7,
            "cost": step / 100,
        }
        for step in range(300)
    ]
    lines[100] |= {"train/loss": None, "train/grad_norm": None, "train/skipped": True}
    lines[250] |= {"sample": HOSTILE, "val/loss": 1.0}
    run.metrics.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.checkpoint(250).mkdir(parents=True)
    (run.checkpoints / "best").symlink_to("step-00000250")
    run.run_json.write_text(json.dumps({"plan": {"global_steps": 400, "train_tokens": 51200}}))
    Status("running", 299).write(run.status_json)
    return run


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_escapes(folder: RunFolder) -> None:
    draw(folder)
    page = Page(folder.page)
    assert [tag for tag, _ in page.tags].count("figure") == 4
    assert not any(tag in {"script", "link", "iframe", "img"} for tag, _ in page.tags)
    assert HOSTILE in page.text
    assert "300 of 400" in page.text
    assert "2.99 EUR" in page.text


@pytest.mark.parametrize(("state", "is_live"), [("running", True), ("complete", False), ("failed", False)])
def test_page_reloads_only_while_the_run_lives(folder: RunFolder, state: str, is_live: bool) -> None:
    Status(state, 299).write(folder.status_json)
    draw(folder)
    reloads = any(attributes.get("http-equiv") == "refresh" for _, attributes in Page(folder.page).tags)
    assert reloads == is_live


def test_a_live_page_says_when_it_was_drawn_and_a_finished_one_when_the_run_ended(folder: RunFolder) -> None:
    for state, is_shown in (("running", False), ("complete", True)):
        folder.status_json.write_text(json.dumps({"state": state, "step": 299, "time": "2020-02-02T20:20:20+00:00"}))
        draw(folder)
        assert ("2020-02-02 20:20:20 UTC" in Page(folder.page).text) == is_shown


def test_all_four_charts_are_drawn_again_over_the_old(folder: RunFolder) -> None:
    draw(folder)
    names = {"loss.png", "learning-rate.png", "grad-norm.png", "throughput.png"}
    assert {path.name for path in folder.charts.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.charts.iterdir())
    draw(folder)
    assert {path.name for path in folder.charts.iterdir()} == names


def test_a_run_without_a_step_has_a_page(make_run: Callable[..., Path]) -> None:
    folder = RunFolder(make_run())
    draw(folder)
    assert "0 of 0" in Page(folder.page).text


@pytest.mark.fault("F22")
def test_a_chart_error_never_stops_training(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    folder = make_run(train={"min_train_tokens": 3 * 128})
    (folder / "charts").write_text("in the way of the charts folder")
    done = train(folder, datasets_dir)
    assert "warning: the charts could not be drawn" in done.stderr
    assert status(folder)["state"] == "complete"


def test_a_painter_that_never_saw_training_draws_nothing(make_run: Callable[..., Path]) -> None:
    folder = RunFolder(make_run())
    with ChartPainter(folder):
        pass
    assert not folder.page.exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_page_in_a_real_browser(folder: RunFolder, tmp_path: Path) -> None:
    """From disk, with scripts allowed: the charts have a size, and the sample did not run."""
    Status("complete", 299).write(folder.status_json)
    draw(folder)
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000"
    )
    done = subprocess.run(
        ["chromium", *switches.split(), f"--user-data-dir={tmp_path}/profile", "--dump-dom", folder.page.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert re.search(r"<title>tiny</title>", done.stdout), done.stderr[-500:]
    assert "broken into" not in re.sub(r"<pre.*?</pre>", "", done.stdout)
    assert done.stdout.count("<figure>") == 4
