"""A step with non-finite gradients changes nothing, on any rank, is counted, and too many in a row end the run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.run.run_folder import RunFolder
from harness.tokens.gpt2 import VOCAB_SIZE
from tests.helpers import assert_tidy, metrics, status, strict_json, train_in_fork

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"use_amp": False},
    "bfloat16": {"use_amp": True, "amp_dtype": "bfloat16"},
    "float16": {"use_amp": True},
}


def assert_finite(folder: Path) -> None:
    """Assert that `latest` and `best` hold finite weights, and that the run's files are strict JSON."""
    assert_tidy(folder)
    for name in ("latest", "best"):
        weights = load_file(folder / "checkpoints" / name / "model.safetensors")
        assert all(np.isfinite(value).all() for value in weights.values())


@pytest.mark.fault("F40")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_rank_s_nan_makes_all_ranks_skip_the_step(
    make_run: Callable[..., Path], datasets_dir: Path, precision: str
) -> None:
    config = {"min_train_tokens": 6 * 16 * 16, "checkpoint_interval": 1, **PRECISIONS[precision]}
    folder = make_run(train={**config, "schedule_learning_rate": True})
    train_in_fork(folder, datasets_dir, count=2, fault="step.backward@3#1:nan")
    lines = metrics(folder)
    assert [line["train/skipped"] for line in lines] == [False, False, False, True, False, False]
    assert lines[3]["train/grad_norm"] is None
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    # The learning rate follows the global step, whatever was skipped.
    rates = [line["train/lr"] for line in lines]
    assert rates == sorted(set(rates), reverse=True)

    def checkpoint(step: int) -> Path:
        return RunFolder(folder).checkpoint(step)

    for name in ("model.safetensors", "optimizer.safetensors"):
        before, skipped, after = (load_file(checkpoint(step) / name) for step in (2, 3, 4))
        assert all(np.array_equal(before[key], skipped[key]) for key in before)
        assert any(not np.array_equal(skipped[key], after[key]) for key in skipped)
    state = json.loads((checkpoint(5) / "state.json").read_text())
    assert state["train_state"]["skipped_steps"] == 1
    assert state["train_state"]["optimizer_steps"] == 5
    if precision == "float16":
        scales = [json.loads((checkpoint(step) / "state.json").read_text())["scaler"]["scale"] for step in (2, 3)]
        assert scales[1] == scales[0] / 2
    assert_finite(folder)


@pytest.mark.fault("F41")
def test_patience_ends_the_run_with_finite_weights_saved(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    """A weight that is NaN makes every gradient so; the weights from before it are the ones on disk."""
    folder = make_run(train={"nonfinite_patience": 3, "checkpoint_interval": 4})
    (worker,) = train_in_fork(folder, datasets_dir, check=7, fault="step.start@5:nan")
    assert [line["train/skipped"] for line in metrics(folder)] == [False] * 5 + [True] * 3
    assert [line["train/loss"] is None for line in metrics(folder)] == [False] * 5 + [True] * 3
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("failed", 7)
    assert "not finite for 3 steps in a row (nonfinite_patience)" in worker.stderr
    assert RunFolder(folder).checkpoint_steps() == [0, 4]
    assert_finite(folder)


@pytest.mark.fault("F41", "F43")
@pytest.mark.parametrize(("step", "vocab_size"), [(0, 97), (5, 97), (5, VOCAB_SIZE)])
def test_weights_that_are_not_finite_are_never_saved(
    make_run: Callable[..., Path], datasets_dir: Path, step: int, vocab_size: int
) -> None:
    """A scheduled save comes before patience ends: it refuses, and names the tensor. So it does after a sample."""
    folder = make_run(model={"vocab_size": vocab_size, "emb_dim": 8})
    (worker,) = train_in_fork(folder, datasets_dir, check=7, fault=f"step.start@{step}:nan")
    assert f"global step {step}: trf_blocks.1." in worker.stderr
    assert "is not finite, so no checkpoint is written" in worker.stderr
    assert status(folder)["exit_code"] == 7
    assert RunFolder(folder).checkpoint_steps() == ([] if step == 0 else [0])
    strict_json((folder / "status.json").read_text())
    if step:
        assert_finite(folder)


@pytest.mark.fault("F42")
def test_an_overflow_that_does_not_end_ends_the_run(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    """The scale is halved at every step until patience, or the scale's own minimum, is reached."""
    folder = make_run(train={"use_amp": True, "min_train_tokens": 40 * 128})
    train_in_fork(folder, datasets_dir, check=7, fault="step.backward@3-99:nan")
    assert [line["train/skipped"] for line in metrics(folder)] == [False] * 3 + [True] * 20
    saved = [json.loads(path.read_text()) for path in sorted(folder.glob("checkpoints/step-*/state.json"))]
    scales = {one["train_state"]["next_step"]: one["scaler"]["scale"] for one in saved}
    assert scales[21] == scales[1] / 2**18
    assert (status(folder)["exit_code"], saved[-1]["train_state"]["consecutive_skips"]) == (7, 18)
    assert_finite(folder)


@pytest.mark.fault("F43")
def test_a_first_window_that_is_not_finite_is_never_the_best(
    make_run: Callable[..., Path], datasets_dir: Path
) -> None:
    folder = make_run(train={"validation_interval": 5, "validation_batches": 1})
    train_in_fork(folder, datasets_dir, fault="step.backward@0:nan")
    assert metrics(folder)[0]["train/grad_norm"] is None
    state = json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())["train_state"]
    assert math.isfinite(state["best_loss"])
    assert_finite(folder)
