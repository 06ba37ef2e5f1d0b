"""Checkpoints appear whole or not at all, are verified before they are believed, and are pruned with care."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

import ddp_train
from harness.engine import checkpoint
from harness.engine.opening import CheckpointMetadata, open_checkpoint
from harness.engine.optimizers import make_optimizer
from harness.run.errors import CheckpointError, StorageError
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from harness.run.train_state import TrainState
from model import GPTModel
from tests.conftest import Called
from tests.helpers import status

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def words(folder: Path, datasets_dir: Path, *more: str) -> list[str]:
    return [folder.name, str(datasets_dir), *more, "--runs-dir", str(folder.parent), "--device", "cpu"]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = (flip_a_bit, truncate, Path.unlink)
# Every file, and every damage, by default; all of both is slow. (test_fault_damage.py sees every damage noticed.)
DAMAGED = [
    pytest.param(name, damage, marks=[pytest.mark.slow] * ((place + number) % 3 > 0), id=f"{name}-{damage.__name__}")
    for place, name in enumerate(FILES)
    for number, damage in enumerate(DAMAGES)
]


@pytest.mark.fault("F11")
@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_checkpoint_is_passed_over_and_never_loaded(
    trained: Path, datasets_dir: Path, call: Callable[..., Called], name: str, damage: Callable[[Path], None]
) -> None:
    damage(trained / "checkpoints" / "step-00000019" / name)
    done = call(ddp_train.main, *words(trained, datasets_dir))
    assert done.status == 0
    assert "Resuming from step-00000015" in done.stdout
    assert "passing over a damaged checkpoint" in done.stderr
    assert (trained / "aside-1" / "checkpoints" / "step-00000019").is_dir()
    open_checkpoint(trained / "checkpoints" / "step-00000019")


@pytest.mark.fault("F12")
def test_a_damaged_checkpoint_that_was_named_is_an_error(
    trained: Path, datasets_dir: Path, call: Callable[..., Called]
) -> None:
    flip_a_bit(trained / "checkpoints" / "step-00000010" / "model.safetensors")
    done = call(ddp_train.main, *words(trained, datasets_dir, "step-00000010"))
    assert done.status == 4
    assert "SHA-256" in done.stderr
    assert json.loads((trained / "status.json").read_text())["exit_code"] == 4


@pytest.mark.fault("F13")
def test_no_valid_checkpoint_is_an_error_and_fresh_is_the_way_out(
    trained: Path, datasets_dir: Path, call: Callable[..., Called]
) -> None:
    for folder in (trained / "checkpoints").glob("step-*"):
        truncate(folder / "state.json")
    done = call(ddp_train.main, *words(trained, datasets_dir))
    assert done.status == 4
    assert len(done.stderr.splitlines()) == 6  # five reasons, and what to do
    assert call(ddp_train.main, *words(trained, datasets_dir, "--fresh")).status == 0


@pytest.mark.parametrize("name", ["step-00000010", "latest", "best"])
def test_a_checkpoint_can_be_named(trained: Path, datasets_dir: Path, call: Callable[..., Called], name: str) -> None:
    before = (trained / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in before]
    assert call(ddp_train.main, *words(trained, datasets_dir, name)).status == 0
    after = (trained / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] for line in after] == losses


@pytest.mark.parametrize("name", ["step-00000011", "../checkpoints", "..", "/etc", "step-00000010/../..", "."])
def test_an_unknown_or_hostile_checkpoint_name_is_refused(
    trained: Path, datasets_dir: Path, call: Callable[..., Called], name: str
) -> None:
    assert call(ddp_train.main, *words(trained, datasets_dir, name)).status == 4


@pytest.mark.fault("F35")
@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.02), ("random_seed", 1), ("microbatch_size", 4), ("start_train_token", 1)]
)
def test_a_changed_recipe_is_refused_with_the_key(
    trained: Path, datasets_dir: Path, call: Callable[..., Called], key: str, value: float
) -> None:
    config = json.loads((trained / "train.json").read_text())
    (trained / "train.json").write_text(json.dumps({**config, key: value}))
    done = call(ddp_train.main, *words(trained, datasets_dir))
    assert done.status == 2
    assert {"random_seed": "init_seed", "microbatch_size": "global_batch"}.get(key, key) in done.stderr


def test_links_follow_when_an_older_checkpoint_is_resumed(
    trained: Path, datasets_dir: Path, call: Callable[..., Called]
) -> None:
    done = call(ddp_train.main, *words(trained, datasets_dir, "step-00000005", "--max-steps", "6"))
    assert done.status == 0
    assert "as many as --max-steps asks for" in done.stdout
    assert (status(trained)["state"], status(trained)["exit_code"]) == ("stopped", 0)
    for link in ("latest", "best"):
        assert (trained / "checkpoints" / link).resolve().name == "step-00000005"


@pytest.mark.fault("F35", "F48")
def test_other_data_under_the_same_name_are_refused(
    trained: Path, datasets_dir: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    tokens = load_file(datasets_dir / "toy" / "train.safetensors")["tokens"]
    tokens[-1] += 1
    (tmp_path / "toy").mkdir()
    save_file({"tokens": tokens}, tmp_path / "toy" / "train.safetensors")
    done = call(ddp_train.main, *words(trained, tmp_path))
    assert done.status == 3
    assert "data_fingerprint" in done.stderr


def test_a_run_whose_process_died_before_saying_so_is_called_complete(
    trained: Path, datasets_dir: Path, call: Callable[..., Called]
) -> None:
    Status("running", 19).write(trained / "status.json")
    assert call(ddp_train.main, *words(trained, datasets_dir)).status == 0
    assert Status.read(trained / "status.json").state == "complete"


def test_a_constant_rate_run_can_be_made_longer(
    trained: Path, datasets_dir: Path, call: Callable[..., Called]
) -> None:
    config = json.loads((trained / "train.json").read_text())
    (trained / "train.json").write_text(json.dumps({**config, "min_train_tokens": 24 * 128}))
    done = call(ddp_train.main, *words(trained, datasets_dir))
    assert "Resuming from step-00000019" in done.stdout
    assert "Tokens seen: 3,072" in done.stdout


@pytest.mark.fault("F18")
@pytest.mark.parametrize("point", [*(f"ckpt.file:{name}" for name in FILES[:3]), "ckpt.manifest"])
def test_an_interrupted_save_leaves_the_older_checkpoints_and_no_litter(
    trained: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    folder = RunFolder(trained)
    model_config, config = folder.read_configs()
    model = GPTModel(model_config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    metadata = CheckpointMetadata.read(folder.checkpoint(19), 19)
    state = TrainState(**{**vars(metadata.state), "next_step": 26})
    taken = checkpoint.snapshot(model, optimizer, scaler, state, metadata.identity)
    monkeypatch.setenv("TRAIN_FAULT", f"{point}:enospc")
    with pytest.raises(StorageError, match="No space left on device"):
        checkpoint.write(folder, taken)
    assert folder.checkpoint_steps() == [0, 5, 10, 15, 19]
    assert not list(folder.checkpoints.glob(".*"))
    assert (folder.checkpoints / "latest").readlink() == Path("step-00000019")
    open_checkpoint(folder.checkpoint(19))


@pytest.mark.fault("F23")
def test_pruning_keeps_the_newest_and_the_best(trained: Path) -> None:
    folder, state = RunFolder(trained), TrainState(next_step=20, best_step=5)
    checkpoint.prune(folder, 2, state)
    assert folder.checkpoint_steps() == [5, 15, 19]
    checkpoint.prune(folder, None, state)
    assert folder.checkpoint_steps() == [5, 15, 19]


@pytest.mark.fault("F16")
def test_a_stranger_s_manifest_cannot_reach_outside(trained: Path, tmp_path: Path) -> None:
    target = trained / "checkpoints" / "step-00000019"
    outside = tmp_path / "secret"
    outside.write_text("secret")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 6, "sha256": "0"}
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="wanted a checkpoint's three"):
        open_checkpoint(target)
    (target / "state.json").unlink()
    (target / "state.json").symlink_to(outside)
    del manifest["files"]["../secret"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(target)


@pytest.mark.fault("F43")
def test_best_is_the_interval_with_the_lowest_finite_mean() -> None:
    state = TrainState()
    verdicts = []
    for losses in ([5.0], [4.0, 3.0], [float("nan"), 3.4], [float("inf")], [3.45]):
        for loss in losses:
            state.count(tokens=1, loss=loss, was_skipped=False)
        verdicts.append(state.close_interval(None))
    assert verdicts == [True, True, True, False, False]
    assert (state.best_loss, state.best_step) == (3.4, 4)


def test_validation_loss_decides_where_there_is_one() -> None:
    state = TrainState()
    state.count(tokens=1, loss=1.0, was_skipped=False)
    assert state.close_interval(3.0)
    state.count(tokens=1, loss=0.5, was_skipped=False)
    assert not state.close_interval(3.1)
    assert state.best_loss == 3.0
    assert state.last_interval_loss == 0.5


def test_a_run_that_begins_to_validate_compares_anew() -> None:
    state = TrainState()
    for loss, validation in ((1.0, None), (0.9, 2.0), (0.8, 2.5), (0.7, 1.9)):
        state.count(100, loss, was_skipped=False)
        assert state.close_interval(validation) == (validation != 2.5)


@pytest.mark.fault("F05")
def test_links_are_never_missing_while_they_are_replaced(tmp_path: Path) -> None:
    """Read in one process what another replaces as fast as it can."""
    import subprocess

    from harness.run.files import replace_link

    link = tmp_path / "latest"
    replace_link(link, "a")
    code = (
        "import sys; from pathlib import Path; from harness.run.files import replace_link\n"
        "for n in range(3000): replace_link(Path(sys.argv[1]), 'ab'[n % 2])"
    )
    root = Path(__file__).parent.parent
    writer = subprocess.Popen([sys.executable, "-c", code, str(link)], cwd=root)
    reads = 0
    while writer.poll() is None:
        assert os.readlink(link) in {"a", "b"}
        reads += 1
    assert writer.returncode == 0
    assert reads > 100
