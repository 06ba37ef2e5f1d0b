"""Running the commands as a user does, and reading what they leave."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
TINY_TRAIN: dict[str, Any] = {
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


# The keys that have no default, and no other.
REQUIRED_TRAIN: dict[str, Any] = {
    "dataset": "toy",
    "min_train_tokens": 2560,
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 6,
    "checkpoint_interval": 5,
}


def write(path: Path, value: object) -> Path:
    """Write a JSON file and give its path."""
    path.write_text(json.dumps(value))
    return path


def write_toy_dataset(datasets_dir: Path) -> None:
    """Write dataset `toy`: ids below 97 with a pattern that a tiny model can learn."""
    (datasets_dir / "toy").mkdir()
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(0, 3, 30_000)) % 97).astype(np.uint16)
    save_file({"tokens": tokens[:25_000]}, datasets_dir / "toy" / "train.safetensors")
    save_file({"tokens": tokens[25_000:]}, datasets_dir / "toy" / "validation.safetensors")


def write_run(folder: Path, model: dict[str, Any], train: dict[str, Any]) -> Path:
    """Write a run folder with the tiny configuration, changed as asked, and give it."""
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({**TINY_MODEL, **model}))
    (folder / "train.json").write_text(json.dumps({**TINY_TRAIN, **train}))
    return folder


def command(script: str, *words: object, processes: int | None = None) -> list[str]:
    """Give the command line of a script, under torchrun where `processes` is given."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, script, *map(str, words)]


def run(
    script: str, *words: object, processes: int | None = None, check: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and assert its exit status, unless `check` is None."""
    done = subprocess.run(
        command(script, *words, processes=processes),
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert check is None or done.returncode == check, done.stderr
    return done


def train(folder: Path, datasets_dir: Path, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train a run on the CPU, by its folder."""
    place = ("--runs-dir", folder.parent, "--device", "cpu")
    return run("ddp_train.py", folder.name, datasets_dir, *words, *place, **options)


def start_training(folder: Path, datasets_dir: Path, processes: int | None = None) -> subprocess.Popen[str]:
    """Start training a run on the CPU in a process group of its own, and do not wait."""
    place = ("--runs-dir", folder.parent, "--device", "cpu")
    return subprocess.Popen(
        command("ddp_train.py", folder.name, datasets_dir, *place, processes=processes),
        cwd=ROOT,
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict[str, Any]:
    """Read a run's status."""
    value: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return value


def final_bits(folder: Path) -> dict[str, Any]:
    """Give what must be equal to the bit between two runs: the last model, optimizer and scaler, and every loss."""
    last = folder / "checkpoints" / "latest"
    state = json.loads((last / "state.json").read_text())
    del state["train_state"]["elapsed_seconds"]
    hashes = {
        name: hashlib.sha256((last / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    losses = [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in metrics(folder)]
    return {**hashes, "state": state, "losses": losses}
