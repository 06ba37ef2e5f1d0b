"""The average of the weights: what it is, that it resumes, and that it is scored and compared apart."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import ddp_train
import experiment
import test_loss
from harness.engine.averaging import WeightAverage
from tests.conftest import Called

DECAY, STEPS = 0.7, 8
KEEPING = {"weight_average_decay": DECAY, "checkpoint_interval": 1, "min_train_tokens": STEPS * 128}


@pytest.fixture
def kept(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], without_charts: None
) -> Callable[..., Path]:
    """A function that trains a run of eight steps with an average of its weights."""

    def train(name: str, *stops: int, **keys: object) -> Path:
        folder = make_run(name, train={**KEEPING, **keys})
        place = (name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu")
        for words in (*(("--max-steps", stop) for stop in stops), ()):
            done = call(ddp_train.main, *place, *words)
            assert done.status == 0, done.stderr
        return folder

    return train


def file_of(folder: Path, step: int, name: str = "averaged") -> dict[str, np.ndarray]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_the_average_is_that_of_all_steps_weights_and_resumes_to_the_bit(kept: Callable[..., Path]) -> None:
    whole = kept("whole")
    weights = [file_of(whole, step, "model") for step in range(STEPS)]
    for step in (0, 1, STEPS - 1):
        shares = np.array([DECAY ** (step - n) for n in range(step + 1)])
        shares /= shares.sum()
        for name, found in file_of(whole, step).items():
            wanted = sum(
                share * tensors[name].astype(np.float64) for share, tensors in zip(shares, weights, strict=False)
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7, err_msg=f"{name} after step {step}")
    halved = kept("halved", 3)
    for name, found in file_of(halved, STEPS - 1).items():
        np.testing.assert_array_equal(found, file_of(whole, STEPS - 1)[name])
    plain = kept("plain", weight_average_decay=None)  # it is told, never asked
    for name, found in file_of(plain, STEPS - 1, "model").items():
        np.testing.assert_array_equal(found, weights[-1][name])
    assert not list(plain.rglob("averaged.safetensors"))


def test_skipped_steps_have_no_part_in_the_average_and_do_not_count() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    before, shares = average.tensors["weight"].clone(), []
    for step, changed in enumerate([False, False, True, False, True, True]):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(torch.tensor(changed))
        if changed:
            shares = [0.9 * share for share in shares] + [1.0]
        wanted = sum(share * at for share, at in zip(shares, (2, 4, 5), strict=False)) / (sum(shares) or 1.0)
        expected = torch.full((2, 3), wanted) if shares else before
        torch.testing.assert_close(average.tensors["weight"], expected)


def test_the_average_is_scored_apart_and_never_compared_with_last_weights(
    kept: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called]
) -> None:
    folders = [kept(f"{name}-s{seed}", random_seed=seed, learning_rate=rate)
               for name, rate in (("slow", 0.001), ("fast", 0.01)) for seed in (1, 2)]  # fmt: skip
    printed = {}
    for folder in folders:
        last = folder / "checkpoints" / "latest"
        for words in (("model",), ("model", "--weights", "averaged"), ("averaged",)):
            place = (datasets_dir, folder / "model.json", last / f"{words[0]}.safetensors", *words[1:])
            chosen = ("--dataset", "toy", "--start-token", 0, "--batches", 2, "--device", "cpu")
            done = call(test_loss.main, *place, *chosen)
            assert done.status == 0, done.stderr
            printed[folder.name, words] = float(done.stdout.rsplit(maxsplit=1)[-1])
        names = sorted(path.name for path in (folder / "evals").glob("*.json"))
        assert names == [f"loss-validation-0-192-step-0000000{STEPS - 1}{end}.json" for end in ("-averaged", "")]
        assert printed[folder.name, ("averaged",)] == printed[folder.name, ("model", "--weights", "averaged")]
        assert printed[folder.name, ("averaged",)] != printed[folder.name, ("model",)]
    for rule, words in (("last", ("model",)), ("averaged", ("averaged",))):
        done = call(
            experiment.main, "compare", "--baseline", "slow-s1", "--runs-dir", folders[0].parent,
            "--checkpoint", rule, "--format", "json",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        means = [np.mean([printed[f"{name}-s{seed}", words] for seed in (1, 2)]) for name in ("slow", "fast")]
        judged = json.loads(done.stdout)
        assert judged["baseline"]["mean"] == pytest.approx(means[0], abs=1e-6)
        assert judged["arms"][0]["difference"] == pytest.approx(means[1] - means[0], abs=1e-6)
    for path in (folders[0] / "evals").glob("*-averaged.*"):
        path.unlink()
    words = (
        "compare",
        "--baseline",
        "slow-s1",
        "fast-s1",
        "--runs-dir",
        folders[0].parent,
        "--checkpoint",
        "averaged",
    )
    done = call(experiment.main, *words)
    assert done.status == 2
    assert "slow-s1: found no score of its averaged weights" in done.stderr


def test_a_run_without_an_average_is_named(trained: Path, datasets_dir: Path, call: Callable[..., Called]) -> None:
    model = trained / "checkpoints" / "latest" / "model.safetensors"
    done = call(test_loss.main, datasets_dir, trained / "model.json", model, "--weights", "averaged")
    assert done.status == 2
    assert "wanted a run that keeps one (train.json: weight_average_decay)" in done.stderr


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_damaged_average_is_a_damaged_checkpoint(
    kept: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], harm: str
) -> None:
    folder = kept("tiny")
    path = folder / "checkpoints" / f"step-0000000{STEPS - 1}" / "averaged.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if harm == "changed":
        path.write_bytes(data)
    done = call(ddp_train.main, "tiny", datasets_dir, "--runs-dir", folder.parent, "--device", "cpu")
    assert done.status == 0, done.stderr
    assert "passing over a damaged checkpoint" in done.stderr
    assert f"Resuming from step-0000000{STEPS - 2}" in done.stdout
