"""Shared fixtures: a tiny model, a toy dataset on disk, and run folders made from both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import write_run, write_toy_dataset


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
