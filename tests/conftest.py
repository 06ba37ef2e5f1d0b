"""Shared fixtures: a tiny model, a toy dataset on disk, and run folders made from both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

TINY_MODEL = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
TINY_TRAIN = {
    "dataset": "toy",
    "min_train_tokens": 20 * 8 * 16,  # 20 global steps of 8 sequences
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 2,
    "gradient_accumulation_steps": 4,
    "checkpoint_interval": 5,
    "learning_rate": 0.01,
    "use_amp": False,
}


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset `toy`: ids below 97 with a pattern that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "toy").mkdir()
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(0, 3, 30_000)) % 97).astype(np.uint16)
    save_file({"tokens": tokens[:25_000]}, folder / "toy" / "train.safetensors")
    save_file({"tokens": tokens[25_000:]}, folder / "toy" / "validation.safetensors")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes runs/NAME with the tiny configuration, changed as asked, and gives its folder."""

    def make(name: str = "tiny", model: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(json.dumps({**TINY_MODEL, **(model or {})}))
        (folder / "train.json").write_text(json.dumps({**TINY_TRAIN, **(train or {})}))
        return folder

    return make
