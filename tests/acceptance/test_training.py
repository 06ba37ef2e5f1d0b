"""Training through real processes: what is printed and written, and that splitting the batch changes nothing."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ddp_train
from harness.run.config import load_model_config
from harness.run.model_size import count_parameters
from tests.acceptance.count_all_reduces import count_all_reduces
from tests.conftest import Called
from tests.helpers import metrics, start_training, status, train, train_in_fork, wait_for

SAME_DATA = {"min_train_tokens": 12 * 8 * 16, "checkpoint_interval": 100}


def test_a_run_prints_and_writes_what_it_promises(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    folder = make_run(train={"price_per_hour": 3600.0, "checkpoints_to_keep": 2, "clipping_max_norm": 1.0})
    done = train(folder, datasets_dir)
    closing = (
        r"Training complete in [\d,]+\.\d{3} seconds\nTokens seen: 2,560\n"
        r"Throughput: [\d,]+ tokens/second\nFinal train loss: \d\.\d{3}\n"
    )
    assert re.search(closing + r"\Z", done.stdout), done.stdout
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(20))
    assert lines[-1]["tokens"] == 2560
    # Seconds are written to three decimals and money to four, so a fast run differs by half a millisecond.
    assert lines[-1]["cost"] == pytest.approx(lines[-1]["elapsed"], abs=6e-4)
    assert all(line["train/loss_min"] <= line["train/loss"] <= line["train/loss_max"] for line in lines)
    mean = np.mean([line["train/loss"] for line in lines[-4:]])  # steps 16 to 19, since the checkpoint after 15
    assert f"Final train loss: {mean:.3f}" in done.stdout
    checkpoints = folder / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert (checkpoints / "latest").readlink() == Path("step-00000019")
    assert names >= {"latest", "best", "step-00000015", "step-00000019"}
    assert len(names) <= 5
    assert {path.name for path in (checkpoints / "latest").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert {path.name for path in (folder / "charts").iterdir()} == {
        "loss.png",
        "learning-rate.png",
        "grad-norm.png",
        "throughput.png",
    }
    assert {key: status(folder)[key] for key in ("state", "step", "exit_code", "reason")} == {
        "state": "complete", "step": 19, "exit_code": 0, "reason": "",
    }  # fmt: skip
    record = json.loads((folder / "run.json").read_text())
    assert record["train"]["price_per_hour"] == 3600.0
    assert record["plan"]["global_steps"] == 20
    assert record["starts"][0]["devices"] == ["cpu"]
    assert record["dataset"][0]["count"] == 2561


@pytest.mark.fault("F09")
def test_running_a_finished_run_again_changes_nothing(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], without_charts: None
) -> None:
    folder = make_run(train=SAME_DATA)
    place = (folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu")
    assert call(ddp_train.main, *place).status == 0

    def tree() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = tree()
    assert "already complete" in call(ddp_train.main, *place).stdout
    assert tree() == before


@pytest.mark.fault("F44")
def test_splitting_the_global_batch_changes_only_rounding(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    """1 process x micro-batch 2 x accumulation 4, 2 x 2 x 2 and 4 x 2 x 1."""
    folders = []
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        split = {**SAME_DATA, "gradient_accumulation_steps": accumulation, "validation_batches": 1}
        folder = make_run(f"x{processes}", model={"drop_rate": 0.0}, train={**split, "validation_interval": 4})
        train_in_fork(folder, datasets_dir, count=processes)
        folders.append(folder)
    curves = [[(line["train/loss"], line["train/grad_norm"]) for line in metrics(folder)] for folder in folders]
    validations = [[line.get("val/loss", 0.0) for line in metrics(folder)] for folder in folders]
    weights = [load_file(folder / "checkpoints" / "latest" / "model.safetensors") for folder in folders]
    for curve, validation, tensors in zip(curves[1:], validations[1:], weights[1:], strict=True):
        np.testing.assert_allclose(curve, curves[0], rtol=2e-5)
        np.testing.assert_allclose(validation, validations[0], rtol=2e-5)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, weights[0][name], atol=2e-5, err_msg=name)


@pytest.mark.fault("F44")
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_gradients_are_reduced_once_a_global_step(
    make_run: Callable[..., Path], datasets_dir: Path, processes: int
) -> None:
    """Whatever the accumulation, a global step moves every gradient once: 4 bytes a parameter; alone, none."""
    folder = make_run(train=SAME_DATA)  # 4 accumulation steps
    ranks = train_in_fork(folder, datasets_dir, count=processes, before=count_all_reduces)
    passes = len(metrics(folder)) + 1 if processes > 1 else 0  # one a step, and one of the warm-up pass
    parameters = count_parameters(load_model_config(folder / "model.json")).total
    for rank in ranks:
        counts = re.findall(r"all-reduce (\d+): (\d+) bytes", rank.stdout)
        assert [int(number) for number, _ in counts] == list(range(1, passes + 1))
        assert sum(int(size) for _, size in counts) == passes * 4 * parameters


def test_max_steps_stops_saved_on_the_same_schedule(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], without_charts: None
) -> None:
    def run_to(folder: Path, *words: object) -> str:
        done = call(ddp_train.main, folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu", *words)
        assert done.status == 0
        return done.stdout.strip()

    schedule = {"schedule_learning_rate": True, "warmup_period_percent": 20}
    whole, parts = make_run("whole", train=schedule), make_run("parts", train=schedule)
    run_to(whole)
    for steps in (6, 8):  # with and without a scheduled checkpoint at the end
        output = run_to(parts, "--max-steps", steps)
        assert f"Tokens seen: {steps * 128:,}" in output
        assert re.search(r"Final train loss: \d\.\d{3}$", output)
        assert status(parts)["step"] == steps - 1
    run_to(parts)
    keys = ("step", "train/loss", "train/lr", "train/grad_norm")
    assert [[line[key] for key in keys] for line in metrics(parts)] == [
        [line[key] for key in keys] for line in metrics(whole)
    ]


@pytest.mark.fault("F36")
def test_two_trainers_cannot_share_a_run(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    folder = make_run()
    process = start_training(folder, datasets_dir)
    try:
        wait_for(lambda: (folder / ".lock").exists() and (folder / ".lock").read_text() != "")
        process.send_signal(signal.SIGSTOP)  # so that it cannot be done before the second one asks
        second = train(folder, datasets_dir, check=5)
        assert f":{process.pid}" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        process.kill()
        process.communicate()


def test_fresh_moves_the_old_run_aside(
    make_run: Callable[..., Path],
    datasets_dir: Path,
    call: Callable[..., Called],
    without_charts: None,
    tmp_path: Path,
) -> None:
    folder = make_run(train=SAME_DATA)
    options = ("--runs-dir", folder.parent, "--device", "cpu")
    stopped = call(ddp_train.main, folder.name, datasets_dir, *options, "--max-steps", 3)
    said = (
        r"Stopped by --max-steps after 3 of 12 global steps and \d\.\d{3} seconds, "
        r"saved; without it the same command goes on\nTokens seen: 384\n"
    )
    assert re.search(said, stopped.stdout), stopped.stdout
    assert "complete" not in stopped.stdout
    mistyped = call(ddp_train.main, folder.name, tmp_path / "elsewhere", *options, "--fresh")
    assert (mistyped.status, len(metrics(folder))) == (3, 3)  # refused before anything was moved
    done = call(ddp_train.main, folder.name, datasets_dir, *options, "--fresh")
    assert "Resuming" not in done.stdout
    assert (folder / "aside-1" / "checkpoints" / "step-00000002" / "model.safetensors").is_file()
    assert len((folder / "aside-1" / "metrics.jsonl").read_text().splitlines()) == 3
    assert [line["step"] for line in metrics(folder)] == list(range(12))
