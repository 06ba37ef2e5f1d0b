"""What a terminal is told of a run: a plot that follows the loss, the score, and the device."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import test_loss
from harness.report import terminal
from harness.report.terminal import EIGHTHS, area
from tests.conftest import Called
from tests.helpers import run


def heights(lines: list[str]) -> list[int]:
    columns = zip(*(line.split("│")[1] for line in lines), strict=True)
    return [sum(EIGHTHS.index(cell) for cell in column) for column in columns]


def test_the_plot_follows_the_series() -> None:
    falling = area(np.linspace(8.0, 2.0, 300), width=30, height=5)
    assert len(falling) == 5
    assert (falling[0].split()[0], falling[-1].split()[0]) == ("8.00", "2.00")
    found = heights(falling)
    assert len(found) == 30
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (39, 1)


def test_a_missing_value_leaves_no_hole_and_a_constant_no_error() -> None:
    assert heights(area(np.array([4.0, np.nan, 1.0]), height=2)) == [16, 16, 1]
    assert set(heights(area(np.full(100, 3.0)))) == {1}


def test_a_bar_needs_no_semaphore() -> None:
    """As tqdm's own lock does on macOS, and from Python 3.14 on Linux; Python complains of it after a kill."""
    code = (
        "import multiprocessing; from multiprocessing.resource_tracker import _resource_tracker; "
        "from harness.run.console import progress_bar; multiprocessing.set_start_method('spawn'); "
        "progress_bar(1, 'x').close(); print(_resource_tracker._pid)"
    )
    assert run("-c", code).stdout == "None\n"


def test_a_run_is_summed_up(trained: Path, datasets_dir: Path, call: Callable[..., Called]) -> None:
    place = ("--runs-dir", trained.parent)
    words = (datasets_dir, "--run", trained.name, "--batches", 1, "--device", "cpu", *place)
    assert call(test_loss.main, *words).status == 0
    (evaluation,) = (trained / "evals").glob("loss-*.json")
    evaluation.write_text(json.dumps({**json.loads(evaluation.read_text()), "bits_per_byte": 1.2341}))
    said = call(terminal.main, trained.name, *place).stdout
    assert "1.234 bits per byte" in said
    assert "seconds on CPU, " in said
    empty = trained.parent / "untrained"
    empty.mkdir()
    for name in ("model.json", "train.json"):
        (empty / name).write_text((trained / name).read_text())
    done = call(terminal.main, "untrained", *place)
    assert done.status == 2
    assert len(done.stderr.splitlines()) == 1
    assert "wanted a run that has trained" in done.stderr
