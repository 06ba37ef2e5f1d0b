"""Run folders of the published harness: brought in at once, and never trained over by mistake."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import ddp_train
import test_loss
from harness.engine.opening import open_checkpoint
from harness.run.config import ExpertsConfig, ModelConfig, load_train_config
from harness.run.errors import ConfigError
from harness.run.run_folder import RunFolder
from model import GPTModel, initialise
from tests.conftest import Called
from tests.helpers import TINY_MODEL, TINY_TRAIN, metrics, status, write

Call = Callable[..., Called]
EXPERTS = ExpertsConfig(num_experts=3, num_active_experts=2)
STEPS = (0, 5, 10, 15, 19)


def write_published(folder: Path, train: dict[str, Any], **model: Any) -> Path:
    """Write a run as the published harness leaves it: checkpoints by time, links, a chart and a page."""
    folder.mkdir(parents=True)
    shape = {**TINY_MODEL, **model}
    write(folder / "model.json", shape)
    write(folder / "train.json", train)
    for number, step in enumerate(STEPS):
        network = GPTModel(ModelConfig(**TINY_MODEL, moe=EXPERTS if "moe" in model else None))
        initialise(network, step)
        path = folder / "checkpoints" / f"2025110{number}Z120000-iteration-{step}"
        path.mkdir(parents=True)
        masks = {f"trf_blocks.{block}.att.mask": torch.ones(16, 16).triu(1) for block in range(2)}
        save_file({**network.state_dict(), **masks}, path / "model.safetensors")
        (path / "optimizer.pt").write_bytes(b"a pickle")
        write(
            path / "meta.json",
            {"min_train_loss": 4.0 - number / 10, "max_train_loss": 5.0, "avg_train_loss": 4.5 - number / 10,
             "max_grad_norms": 2.0, "avg_grad_norms": 1.0, "frac_clipped": 0.0, "global_step": step,
             "is_best": number < 4},
        )  # fmt: skip
    (folder / "checkpoints" / "latest").symlink_to(path.name)
    (folder / "checkpoints" / "best").symlink_to("20251103Z120000-iteration-15")
    (folder / "big-training-run-chart.png").write_bytes(b"a picture")
    (folder / "training-run-chart.html").write_text("their page")
    return folder


TRAIN = {**TINY_TRAIN, "microbatch_size": 1}
OLDEST = {
    "dataset": "toy", "min_train_tokens": 2560, "start_train_token": 0, "start_val_token": 0,
    "minibatch_size": 4, "validation_interval": 5, "validation_batches": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "runs"
    write_published(folder / "2xtoy", TRAIN)
    write_published(folder / "oldest", OLDEST)
    write_published(folder / "unknown", TRAIN, experts={"num_experts": 6})
    sparse = {"num_experts": 3, "num_active_experts": 2, "log_moe_balance_file": "runs/sparse/routing.jsonl"}
    write_published(folder / "sparse", {**TRAIN, "moe_router_loss_scale": 0.005}, moe=sparse)
    (folder / "unstarted").mkdir()
    for name in ("model.json", "train.json"):
        write(folder / "unstarted" / name, TINY_MODEL if name == "model.json" else TRAIN)
    return folder


def tree(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_runs_come_in_at_once(call: Call, theirs: Path, tmp_path: Path, datasets_dir: Path) -> None:
    before = tree(theirs)
    runs = tmp_path / "runs"
    done = call(convert.main, "import", "--all", theirs, "--runs-dir", runs)
    assert done.status == 0, done.stderr
    assert tree(theirs) == before
    assert "4 of 5 runs imported" in done.stdout
    assert done.stderr.startswith("skipped unknown: ")
    assert "minibatch_size is microbatch_size, validation_interval is checkpoint_interval" in done.stdout
    assert load_train_config(runs / "oldest" / "train.json").checkpoint_interval == 5

    for name in ("2xtoy", "oldest", "sparse"):
        folder = RunFolder(runs / name)
        assert folder.checkpoint_steps() == list(STEPS)
        for path, step in zip(sorted((theirs / name / "checkpoints").glob("2025*")), STEPS, strict=True):
            found = open_checkpoint(folder.checkpoint(step))
            assert found.metadata.state.tokens == (step + 1) * 8 * 16
            given, kept = load_file(path / "model.safetensors"), load_file(folder.weights(step))
            assert all(torch.equal(given[key], value) for key, value in kept.items())
        assert (folder.checkpoints / "latest").readlink().name == "step-00000019"
        assert (folder.checkpoints / "best").readlink().name == "step-00000015"
        assert [(line["step"], line["train/loss"]) for line in metrics(folder.path)][-1] == (19, 4.1)
        assert status(folder.path)["state"] == "complete"
        assert (folder.charts / "big-training-run-chart.png").read_bytes() == b"a picture"
    assert json.loads((runs / "2xtoy" / "run.json").read_text())["plan"]["world_size"] == 2
    assert not list((runs / "unstarted" / "checkpoints").glob("*"))

    run = runs / "2xtoy"
    weights = run / "checkpoints" / "latest" / "model.safetensors"
    scored = call(test_loss.main, datasets_dir, run / "model.json", weights, "--dataset", "toy", "--start-token", 0,
                  "--batches", 2)  # fmt: skip
    assert scored.status == 0, scored.stderr
    assert scored.stderr.count("warning") == 0
    assert [path.name for path in (run / "evals").glob("*.json")] == ["loss-validation-0-192-step-00000019.json"]

    refused = call(ddp_train.main, "2xtoy", datasets_dir, "--runs-dir", runs, "--device", "cpu")
    assert refused.status == 2
    assert "trained_by: found None, wanted another harness" in refused.stderr
    again = call(convert.main, "import", "--all", theirs, "--runs-dir", runs)
    assert again.status == 2
    assert "wanted the name of a run that does not exist yet" in again.stderr


@pytest.mark.fault("F66")
def test_a_hostile_run_is_no_traceback_and_shows_nothing_from_outside(
    call: Call, theirs: Path, tmp_path: Path
) -> None:
    """Numbers that are none, a FIFO for weights, and a link for a chart."""
    for name in ("numbers", "fifo"):
        shutil.copytree(theirs / "2xtoy", tmp_path / "theirs" / name, symlinks=True)
    newest = sorted((tmp_path / "theirs").glob("*/checkpoints/*-19"))
    meta = json.loads((newest[1] / "meta.json").read_text())
    hostile = {**meta, "avg_train_loss": float("nan"), "min_train_loss": 10**400, "max_train_loss": float("inf")}
    write(newest[1] / "meta.json", hostile)
    (newest[0] / "model.safetensors").unlink()
    os.mkfifo(newest[0] / "model.safetensors")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "theirs" / "numbers" / "planted.png").symlink_to(tmp_path / "secret")
    done = call(convert.main, "import", "--all", tmp_path / "theirs", "--runs-dir", tmp_path / "runs")
    assert done.status == 0, done.stderr
    assert done.stderr == f"skipped fifo: {newest[0] / 'model.safetensors'}: not a regular file\n"
    imported = tmp_path / "runs" / "numbers"
    assert "train/loss_min" not in metrics(imported)[-1]
    assert metrics(imported)[-1]["train/loss"] is None
    assert not (imported / "charts" / "planted.png").exists()


def test_nothing_of_theirs_is_trained_over(
    call: Call, theirs: Path, tmp_path: Path, datasets_dir: Path, without_charts: None
) -> None:
    shutil.copytree(theirs / "2xtoy", tmp_path / "2xtoy", symlinks=True)
    words = ("2xtoy", datasets_dir, "--runs-dir", tmp_path, "--device", "cpu", "--max-steps", 1)
    before = tree(tmp_path)
    for _ in range(2):
        done = call(ddp_train.main, *words)
        assert done.status == 2
        assert f"import --all {tmp_path} --runs-dir ELSEWHERE" in done.stderr
        after = tree(tmp_path)
        assert {path: after[path] for path in before} == before
    shutil.rmtree(tmp_path / "2xtoy" / "checkpoints")  # a page alone is theirs too
    assert "training-run-chart.html of another harness" in call(ddp_train.main, *words).stderr
    assert call(ddp_train.main, *words, "--fresh").status == 0
    assert (tmp_path / "2xtoy" / "aside-1" / "training-run-chart.html").read_text() == "their page"
    assert call(ddp_train.main, *words).status == 0


def test_the_oldest_files_say_what_took_the_key_s_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(write(tmp_path / "train.json", OLDEST))
    text = "\n".join(caught.value.lines)
    assert "minibatch_size: found an unknown key, wanted a known one; the nearest is microbatch_size" in text
    assert "validation_interval: found without checkpoint_interval, which took its place" in text


@pytest.mark.parametrize("words", [["--all"], ["--all", "x", "y"], ["x"], [], ["x", "y", "--all", "z"]])
def test_bad_usage_is_status_2(call: Call, tmp_path: Path, words: list[str]) -> None:
    assert call(convert.main, "import", *words, "--runs-dir", tmp_path).status == 2


def test_a_folder_without_runs_is_one_line(call: Call, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        done = call(convert.main, "import", "--all", place, "--runs-dir", tmp_path / "runs")
        assert done.status == 2
        assert len(done.stderr.splitlines()) == 1
