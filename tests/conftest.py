"""Shared fixtures: a tiny model, a toy dataset on disk, and run folders made from both."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models gain nothing from more

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.observers.charts import ChartPainter
from harness.run.errors import exit_status_of
from tests.helpers import train_in_fork, write_demanding, write_run, write_toy_dataset

# A shell ignores SIGINT for what it runs in the background, and nohup SIGHUP; what is started there would do so too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Called(NamedTuple):
    """What a command came to."""

    status: int
    stdout: str
    stderr: str


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Show, for `pytest -m fault --collect-only -q`, which test is behind which row of docs/reliability.md."""
    if not config.option.collectonly or config.option.markexpr != "fault":
        return []
    shown: dict[str, set[str]] = {}
    for item in items:
        tiers = [name for name in ("slow", "gpu") if item.get_closest_marker(name)]
        test = f"{item.nodeid.partition('[')[0]}  {', '.join(tiers) or 'default'}"
        for marker in item.iter_markers("fault"):
            for row in marker.args:
                shown.setdefault(row, set()).add(test)
    return [f"{row}  {test}" for row in sorted(shown) for test in sorted(shown[row])]


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset `toy`."""
    folder = tmp_path_factory.mktemp("datasets")
    write_toy_dataset(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes runs/NAME with the tiny configuration, changed as asked, and gives its folder."""

    def make(name: str = "tiny", model: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> Path:
        return write_run(tmp_path / "runs" / name, model or {}, train or {})

    return make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """A function that runs a command's main in this process, as its last line does, and gives what came of it."""

    def run(main: Callable[[], None], *words: object) -> Called:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            status = exit_status_of(main)
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        return Called(status, *capfd.readouterr())

    return run


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep training from drawing, which takes longer than a tiny run."""
    monkeypatch.setattr(ChartPainter, "_start", lambda _: None)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path) -> Path:
    """A run with checkpoints after steps 0, 5, 10, 15 and 19, for reading only."""
    folder = write_run(tmp_path_factory.mktemp("trained") / "runs" / "tiny", {}, {})
    train_in_fork(folder, datasets_dir)
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return shutil.copytree(trained_once, tmp_path / "runs" / "tiny", symlinks=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path) -> Path:
    """The demanding run of one process that nothing befell, for reading only."""
    folder = write_demanding(tmp_path_factory.mktemp("whole") / "runs" / "whole")
    train_in_fork(folder, datasets_dir)
    return folder


@pytest.fixture(scope="session")
def whole_by_two(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path) -> Path:
    """The demanding run of two ranks that nothing befell, for reading only."""
    folder = write_demanding(tmp_path_factory.mktemp("whole") / "runs" / "whole-by-two")
    train_in_fork(folder, datasets_dir, count=2)
    return folder
