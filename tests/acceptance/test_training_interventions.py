"""The interventions of train.json, all on: a run resumes to the bit, and its ranks' split changes only rounding."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from harness.engine.costs import cost_of
from harness.run.config import load_run_configs
from harness.run.plan import make_plan
from tests.helpers import assert_same_run, metrics, train_in_fork, write_run

ALL_ON = {
    "optimizer": "muon",
    "muon_learning_rate": 0.02,
    "adam_beta2": 0.95,
    "schedule": "wsd",
    "warmup_period_percent": 10,
    "cooldown_percent": 50.0,
    "final_rate_fraction": 0.0,
    "decay_all": True,
    "z_loss": 1e-3,
    "weight_average_decay": 0.8,
}


def write_modern(folder: Path, accumulation: int) -> Path:
    return write_run(folder, {"drop_rate": 0.0}, {**ALL_ON, "gradient_accumulation_steps": accumulation})


def test_all_resume_to_the_bit_and_ranks_share_the_work(tmp_path: Path, datasets_dir: Path) -> None:
    alone, together, halved = (
        write_modern(tmp_path / "runs" / name, steps) for name, steps in (("x1", 4), ("x2", 2), ("halved", 2))
    )
    train_in_fork(alone, datasets_dir)
    train_in_fork(together, datasets_dir, count=2)
    train_in_fork(halved, datasets_dir, "--max-steps", 8, count=2)
    train_in_fork(halved, datasets_dir, count=2)
    assert_same_run(halved, together)
    averages = [folder / "checkpoints" / "latest" / "averaged.safetensors" for folder in (halved, together)]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in averages}) == 1

    curves = [[line["train/loss"] for line in metrics(folder)] for folder in (alone, together)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.5
    for name in ("model", "averaged"):
        one, two = (
            load_file(folder / "checkpoints" / "latest" / f"{name}.safetensors") for folder in (alone, together)
        )
        for key, tensor in two.items():
            np.testing.assert_allclose(tensor, one[key], atol=1e-3, err_msg=key)

    configs = load_run_configs(alone / "model.json", alone / "train.json")
    planned = cost_of(*configs, make_plan(*configs, 1)).checkpoint_bytes
    written = sum(path.stat().st_size for path in (alone / "checkpoints" / "latest").iterdir())
    assert planned < written < planned + 30_000  # headers and state.json
