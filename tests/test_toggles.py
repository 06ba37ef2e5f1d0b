"""Every key of both files, one row each: what it must change, and that it leaves everything else alone to the bit.

A row's run is compared with the baseline's in seven respects. What a row does not list must be equal; a key without a
row fails.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save

import data
import ddp_train
from harness.observers.charts import ChartPainter
from harness.run.config import ModelConfig, TrainConfig
from model import Block, GPTModel, initialise
from tests.helpers import TINY_MODEL, metrics

STEPS = 6
BASE = {
    "min_train_tokens": STEPS * 8 * 16,
    "checkpoint_interval": 2,
    "clipping_max_norm": 0.5,
    "price_per_hour": 3600.0,  # a second costs one
}


def imported_weights() -> bytes:
    """Give other initial weights than the runs' seeds would draw, as a file."""
    model = GPTModel(ModelConfig(**TINY_MODEL))
    initialise(model, init_seed=1234)
    return save(model.state_dict())


IMPORTED = imported_weights()


@dataclass
class Row:
    """A key's new value, what it must change, and what the baseline needs to have for that."""

    value: Any
    changes: set[str]
    context: dict[str, Any] = field(default_factory=dict)
    drop: str | None = None
    """A key that has to go when this one comes."""


# The token budget stays, so another batch or sequence length makes another number of global steps.
STEPS_CHANGE = {"plan", "checkpoints"}
MODEL_ROWS = {
    "vocab_size": Row(101, {"parameters", "losses"}),
    "context_length": Row(8, {"parameters", "order", "losses", *STEPS_CHANGE}),
    "emb_dim": Row(32, {"parameters", "losses"}),
    "n_heads": Row(4, {"losses"}),
    "n_layers": Row(1, {"parameters", "losses"}),
    "drop_rate": Row(0.0, {"losses"}),
    "qkv_bias": Row(True, {"parameters", "losses"}),
    "tie_weights": Row(True, {"parameters", "losses"}),
}
TRAIN_ROWS = {
    "dataset": Row("other", {"order", "losses", "extras"}),
    "dataset_revision": Row("abc", set()),  # acts on downloads only: see test_data_download.py
    "min_train_tokens": Row(2 * STEPS * 8 * 16, {"losses", *STEPS_CHANGE}),
    "start_train_token": Row(64, {"order", "losses"}),
    "start_val_token": Row(512, {"extras"}, {"validation_interval": 1, "validation_batches": 1}),
    "microbatch_size": Row(4, {"order", "losses", "rate", "extras", *STEPS_CHANGE}),
    "gradient_accumulation_steps": Row(2, {"losses", *STEPS_CHANGE}),
    "global_batch_size": Row(16, {"losses", "rate", "extras", *STEPS_CHANGE}, drop="gradient_accumulation_steps"),
    "checkpoint_interval": Row(3, {"checkpoints"}),
    "checkpoints_to_keep": Row(2, {"checkpoints"}, {"checkpoint_interval": 1}),
    "validation_interval": Row(2, {"extras"}, {"validation_interval": 3, "validation_batches": 1}),
    "validation_batches": Row(2, {"extras"}, {"validation_interval": 1, "validation_batches": 1}),
    "learning_rate": Row(0.02, {"losses", "rate"}),
    "schedule_learning_rate": Row(True, {"losses", "rate"}),
    "warmup_period_percent": Row(50, {"losses", "rate"}, {"schedule_learning_rate": True}),
    "weight_decay": Row(0.5, {"losses"}),
    "clipping_max_norm": Row(50.0, {"losses", "extras"}),
    "use_amp": Row(True, {"losses"}),
    "amp_dtype": Row("bfloat16", {"losses"}, {"use_amp": True}),
    "random_seed": Row(1, {"initial", "losses"}),
    "init_seed": Row(1, {"initial", "losses"}),
    "order_seed": Row(1, {"order", "losses"}, {"shuffle": True}),
    "dropout_seed": Row(1, {"losses"}),
    "initial_weights": Row(hashlib.sha256(IMPORTED).hexdigest(), {"initial", "losses"}),
    "shuffle": Row(True, {"order", "losses"}),
    "compile": Row(True, {"losses"}),
    "activation_checkpointing": Row(True, set()),
    "deterministic": Row(True, set()),
    "nonfinite_patience": Row(1, set()),
    "sample_prompt": Row("other", set()),
    "price_per_hour": Row(7200.0, {"extras"}),
    "currency": Row("EUR", set()),
    "expected_tokens_per_second": Row(100.0, {"dry run"}),
    "loggers": Row(["tensorboard"], set()),  # what it logs: see acceptance/test_watching.py
    "notes": Row("other", set()),
}
# Keys whose effect is none of the seven respects have a test of their own below, or in the file named.
SHOWN_ELSEWHERE = {
    "dataset_revision", "activation_checkpointing", "deterministic", "nonfinite_patience", "sample_prompt",
    "currency", "loggers", "notes",
}  # fmt: skip


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


BASELINES: dict[str, Observed] = {}  # by context, because most rows share one
SLOW = {"compile"}  # makes kernels with a C++ compiler


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=pytest.mark.slow if key in SLOW else ()) for key in (*MODEL_ROWS, *TRAIN_ROWS)]
)
def test_a_key_acts_and_leaves_the_rest_alone(observe: Trainer, key: str) -> None:
    row = MODEL_ROWS.get(key) or TRAIN_ROWS[key]
    context = json.dumps(row.context)
    if context not in BASELINES:
        BASELINES[context] = observe("base", {}, row.context)
    base = BASELINES[context]
    changed = (
        observe("changed", {key: row.value}, row.context)
        if key in MODEL_ROWS
        else observe("changed", {}, {**row.context, key: row.value}, row.drop)
    )
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
    silent = {key for key, row in TRAIN_ROWS.items() if not row.changes}
    assert silent == SHOWN_ELSEWHERE


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
