"""Stacks of interventions through real processes: resumed to the bit, and the global batch split another way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import DEMANDING, TINY_MODEL, assert_same_run, metrics, train_in_fork, write_run

# The softcap is so low that it bends even the logits of so few steps.
MODERN: dict[str, Any] = {
    "positions": "rotary", "norm": "rms", "feed_forward": "relu_squared", "qk_norm": True, "bias": False,
    "embedding_norm": True, "value_residual": True, "logit_softcap": 0.5, "init": "zero_projections",
}  # fmt: skip
LLAMA: dict[str, Any] = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "init": "torch"}
SPARSE: dict[str, Any] = {"moe": {"num_experts": 4, "num_active_experts": 2, "capacity_factor": 1.0}}
SETTINGS = {**DEMANDING, "checkpoint_interval": 20}


@pytest.mark.parametrize("model", [MODERN, LLAMA, SPARSE], ids=["modern", "llama", "sparse"])
def test_a_resumed_run_is_the_run_that_never_stopped(
    model: dict[str, Any], tmp_path: Path, datasets_dir: Path
) -> None:
    settings = SETTINGS if model is not SPARSE else {**SETTINGS, "moe_router_loss_scale": 0.005}
    whole, halved = (write_run(tmp_path / "runs" / name, model, settings) for name in ("whole", "halved"))
    train_in_fork(whole, datasets_dir)
    train_in_fork(halved, datasets_dir, "--max-steps", 14)
    train_in_fork(halved, datasets_dir)
    assert_same_run(halved, whole)


@pytest.mark.parametrize("model", [MODERN, LLAMA, SPARSE], ids=["modern", "llama", "sparse"])
def test_the_global_batch_may_be_split_another_way(model: dict[str, Any], tmp_path: Path, datasets_dir: Path) -> None:
    settings = {"min_train_tokens": 12 * 8 * 16, "checkpoint_interval": 100, "gradient_accumulation_steps": None}
    settings |= {"moe_router_loss_scale": 0.005} if model is SPARSE else {}
    runs = []
    for processes, microbatch in ((1, 8), (1, 2), (2, 2)):
        folder = tmp_path / "runs" / f"{processes}x{microbatch}"
        split = {**settings, "global_batch_size": 8, "microbatch_size": microbatch}
        write_run(folder, {**TINY_MODEL, **model, "drop_rate": 0.0}, split)
        train_in_fork(folder, datasets_dir, count=processes)
        runs.append(folder)
    routed = [f"moe/{name}" for name in ("router_loss", "dropped", "busiest_expert", "idlest_expert")]
    keys = ["train/loss", "train/grad_norm", *(routed if model is SPARSE else ())]
    curves = [[[line[key] for key in keys] for line in metrics(folder)] for folder in runs]
    if model is SPARSE:
        assert all(4 <= router_loss < 8 and 0 < dropped < 0.5 for _, _, router_loss, dropped, *_ in curves[0])
    weights = [load_file(folder / "checkpoints" / "latest" / "model.safetensors") for folder in runs]
    for curve, tensors in zip(curves[1:], weights[1:], strict=True):
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, weights[0][name], atol=1e-4, err_msg=name)
