"""A step with non-finite gradients changes nothing, on any rank, is counted, and too many in a row end the run."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import ROOT, metrics, run, status

SCRIPT = str(Path(__file__).parent / "inject_nan.py")


def train_poisoned(
    folder: Path, datasets_dir: Path, poison: tuple[int, int, int], check: int = 0, processes: int | None = None
) -> None:
    """Train with a NaN from a step on, on a rank, for a number of steps; assert the exit status."""
    run(
        SCRIPT, *poison, folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu",
        check=check, processes=processes, PYTHONPATH=str(ROOT),
    )  # fmt: skip


@pytest.mark.parametrize("amp", [{"use_amp": False}, {"use_amp": True}], ids=["float32", "float16"])
def test_one_rank_s_nan_makes_all_ranks_skip_the_step(
    make_run: Callable[..., Path], datasets_dir: Path, amp: dict[str, bool]
) -> None:
    folder = make_run(train={"min_train_tokens": 6 * 16 * 16, "checkpoint_interval": 1, **amp})
    train_poisoned(folder, datasets_dir, (3, 1, 1), processes=2)
    lines = metrics(folder)
    assert [line["train/skipped"] for line in lines] == [False, False, False, True, False, False]
    assert lines[3]["train/grad_norm"] is None
    assert all(math.isfinite(line["train/loss"]) for line in lines)

    def checkpoint(step: int) -> Path:
        return folder / "checkpoints" / f"step-{step:08d}"

    for name in ("model.safetensors", "optimizer.safetensors"):
        before, skipped, after = (load_file(checkpoint(step) / name) for step in (2, 3, 4))
        assert all(np.array_equal(before[key], skipped[key]) for key in before)
        assert any(not np.array_equal(skipped[key], after[key]) for key in skipped)
    state = json.loads((checkpoint(5) / "state.json").read_text())
    assert state["train_state"]["skipped_steps"] == 1
    assert state["train_state"]["optimizer_steps"] == 5
    if amp["use_amp"]:
        scales = [json.loads((checkpoint(step) / "state.json").read_text())["scaler"]["scale"] for step in (2, 3)]
        assert scales[1] == scales[0] / 2


def test_patience_ends_the_run_with_finite_weights_saved(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    folder = make_run(train={"nonfinite_patience": 3, "checkpoint_interval": 2})
    train_poisoned(folder, datasets_dir, (5, 0, 100), check=7)
    assert [line["train/skipped"] for line in metrics(folder)] == [False] * 5 + [True] * 3
    assert status(folder)["state"] == "failed"
    assert status(folder)["exit_code"] == 7
    for name in ("latest", "best"):
        weights = load_file(folder / "checkpoints" / name / "model.safetensors")
        assert all(np.isfinite(value).all() for value in weights.values())
