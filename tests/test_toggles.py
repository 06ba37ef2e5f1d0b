"""Every key of both files, one row each: what it must change, and that it leaves everything else alone to the bit.

A row's run is compared with the baseline's in seven respects. What a row does not list must be equal; a key without a
row fails.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import data
import ddp_train
from harness.observers.charts import ChartPainter
from harness.run.config import ModelConfig, TrainConfig
from model import Block
from tests.helpers import ROOT, metrics
from tests.key_table import IMPORTED, MODEL_ROWS, TRAIN_ROWS


@dataclass
class Observed:
    """A run in the respects in which two runs are compared."""

    parameters: set[tuple[str, tuple[int, ...]]]
    initial: dict[tuple[str, tuple[int, ...]], bytes]
    order: list[str]
    losses: list[Any]
    rate: list[float]
    plan: dict[str, Any]
    checkpoints: list[str]
    extras: list[Any]
    dry_run: str


Trainer = Callable[..., Observed]


@pytest.fixture
def observe(
    make_run: Callable[..., Path], datasets_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Trainer]:
    """A function that trains in this process, without charts, and gives what was observed."""
    monkeypatch.setattr(ChartPainter, "_start", lambda _: None)
    other = datasets_dir / "other"
    if not other.exists():
        other.mkdir()
        for split in data.SPLITS:
            tokens = np.random.default_rng(7).integers(0, 97, 20_000).astype(np.uint16)
            save_file({"tokens": tokens}, other / f"{split}.safetensors")
    read: list[str] = []
    original = data.TrainData.microbatch

    def microbatch(self: data.TrainData, *place: int) -> Any:
        tokens, targets = original(self, *place)
        read.append(hashlib.sha256(tokens.numpy().tobytes() + targets.numpy().tobytes()).hexdigest())
        return tokens, targets

    monkeypatch.setattr(data.TrainData, "microbatch", microbatch)
    capture = tmp_path / "initial.safetensors"

    def main(folder: Path, *words: object) -> None:
        place = ["--runs-dir", str(folder.parent), "--device", "cpu"]
        arguments = ["ddp_train.py", folder.name, str(datasets_dir), *map(str, words), *place]
        monkeypatch.setattr(sys, "argv", arguments)
        ddp_train.main()

    def train(name: str, model: dict[str, Any], train: dict[str, Any], drop: str | None = None) -> Observed:
        folder = make_run(name, model, {**BASE, **train})
        if drop:
            written = json.loads((folder / "train.json").read_text())
            del written[drop]
            (folder / "train.json").write_text(json.dumps(written))
        if "initial_weights" in train:
            (folder / "imported").mkdir()
            (folder / "imported" / "model.safetensors").write_bytes(IMPORTED)
        main(folder, "--dump-initial-weights", capture)
        read.clear()
        main(folder)
        lines, weights = metrics(folder), load_file(capture)
        keys = ("train/clipped", "val/loss")
        price = round(lines[-1]["cost"] / lines[-1]["elapsed"])
        return Observed(
            parameters={(key, value.shape) for key, value in weights.items()},
            initial={(key, value.shape): value.tobytes() for key, value in weights.items()},
            order=read[: 4 * STEPS],
            losses=[(line["train/loss"], line["train/grad_norm"]) for line in lines],
            rate=[line["train/lr"] for line in lines[:STEPS]],
            plan=json.loads((folder / "run.json").read_text())["plan"],
            checkpoints=sorted(path.name for path in (folder / "checkpoints").glob("step-*")),
            extras=[[line.get(key) for key in keys] for line in lines[:STEPS]] + [[price]],
            dry_run="",
        )

    yield train
    torch.use_deterministic_algorithms(False)


STEPS = 6
BASE = {
    "min_train_tokens": STEPS * 8 * 16,
    "checkpoint_interval": 2,
    "clipping_max_norm": 0.5,
    "price_per_hour": 3600.0,  # a second costs one
}
BASELINES: dict[str, Observed] = {}  # by context, because most rows share one
SLOW = {"compile"}  # makes kernels with a C++ compiler


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=pytest.mark.slow if key in SLOW else ()) for key in (*MODEL_ROWS, *TRAIN_ROWS)]
)
def test_a_key_acts_and_leaves_the_rest_alone(observe: Trainer, key: str) -> None:
    row = MODEL_ROWS.get(key) or TRAIN_ROWS[key]
    context = json.dumps(row.context)
    model = {name: value for name, value in row.context.items() if name in MODEL_ROWS}
    train = {name: value for name, value in row.context.items() if name in TRAIN_ROWS}
    if context not in BASELINES:
        BASELINES[context] = observe("base", model, train)
    base = BASELINES[context]
    (model if key in MODEL_ROWS else train)[key] = row.value
    changed = observe("changed", model, train, row.drop)
    differences = {
        name
        for name in ("parameters", "order", "losses", "rate", "plan", "checkpoints", "extras")
        if getattr(base, name) != getattr(changed, name)
    }
    shared = base.initial.keys() & changed.initial.keys()
    if any(base.initial[name] != changed.initial[name] for name in shared):
        differences.add("initial")
    assert differences == row.changes - {"dry run"}


def test_every_key_has_a_row() -> None:
    assert [row for row in MODEL_ROWS] == [item.name for item in fields(ModelConfig)]  # noqa: C416
    assert [row for row in TRAIN_ROWS] == [item.name for item in fields(TrainConfig)]  # noqa: C416
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for key, row in {**MODEL_ROWS, **TRAIN_ROWS}.items():
        assert bool(row.changes) != bool(row.shown_in), key
        assert not row.shown_in or row.shown_in in files, key


def test_activation_checkpointing_runs_every_block_twice(observe: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *x: passes.append(self.training) or forward(self, *x))
    counts = []
    for name, value in (("plain", False), ("checkpointed", True)):
        passes.clear()
        observe(name, {}, {"activation_checkpointing": value})
        counts.append(sum(passes))
    assert counts[1] == 2 * counts[0]


def test_compile_compiles(observe: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as always but run eagerly, because making kernels takes a minute on a CPU: the bits stay the same."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    eager = observe("eager", {}, {"compile": "auto"})
    assert not counters["stats"]["unique_graphs"]
    compiled = observe("compiled", {}, {"compile": True})
    assert counters["stats"]["unique_graphs"]
    assert compiled == eager


def test_deterministic_asks_torch_for_it(observe: Trainer) -> None:
    observe("free", {}, {})
    assert not torch.are_deterministic_algorithms_enabled()
    observe("deterministic", {}, {"deterministic": True})
    assert torch.are_deterministic_algorithms_enabled()
