"""Bad sectors, strangers' checkpoints and damaged lines: passed over with a warning, never in the way of a start."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import test_loss
import test_smoke
from harness.engine import resume
from harness.engine.opening import CheckpointMetadata, open_checkpoint, open_weights
from harness.observers.charts import draw
from harness.run.errors import CheckpointError
from harness.run.files import file_sha256, write_json
from harness.run.metrics_file import MetricsFile
from harness.run.run_folder import RunFolder
from harness.run.score import Score
from tests.conftest import Called
from tests.helpers import metrics, train_in_fork

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NEWEST, BEFORE = "step-00000019", "step-00000015"
Call = Callable[..., Called]


@contextmanager
def bad_sector(path: Path) -> Iterator[None]:
    """Have every read of a file fail with EIO: this process's memory, whose first page is unmapped, lies over it."""
    over = ["mount", "--bind", f"/proc/{os.getpid()}/mem", str(path)]
    if shutil.which("mount") is None or subprocess.run(over, capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount anything")
    try:
        yield
    finally:
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        (place,) = [place for place in mounts if place.endswith(f"/{path.name}")]  # a start may have moved it aside
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.fault("F53")
@pytest.mark.parametrize("name", FILES)
def test_a_bad_sector_is_passed_over(trained: Path, datasets_dir: Path, name: str) -> None:
    bad = trained / "checkpoints" / NEWEST / name
    with bad_sector(bad):
        with pytest.raises(OSError, match="Input/output error"):
            bad.read_bytes()
        (done,) = train_in_fork(trained, datasets_dir, "--max-steps", 17)
        (refused,) = train_in_fork(trained, datasets_dir, NEWEST, check=4)
    assert f"Resuming from {BEFORE}" in done.stdout
    assert f"passing over a damaged checkpoint: {bad}: cannot be read" in done.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.fault("F53")
@pytest.mark.parametrize("name", FILES)
def test_an_error_in_reading_is_damage(trained: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same where nothing can be mounted: the error is raised where the file is opened."""
    bad, original = trained / "checkpoints" / NEWEST / name, os.open

    def opened(path: Any, *more: Any, **options: Any) -> int:
        if str(path) == str(bad):
            raise OSError(5, "Input/output error", str(path))
        return original(path, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    found = resume.find(RunFolder(trained), None)
    assert found is not None
    assert found.path.name == BEFORE


def reseal(target: Path) -> None:
    """Make a checkpoint's manifest agree with its files, as a stranger would."""
    files = {
        name: {"bytes": (target / name).stat().st_size, "sha256": file_sha256(target / name)} for name in FILES[:3]
    }
    write_json(target / "manifest.json", {"step": int(target.name[5:]), "files": files})


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a step too many": lambda state: state["train_state"].update(next_step=21),
    "a negative step": lambda state: state["train_state"].update(next_step=-5),
    "a word for a step": lambda state: state["train_state"].update(next_step="20"),
    "a truth for a step": lambda state: state["train_state"].update(next_step=True),
    "other tokens": lambda state: state["train_state"].update(tokens=1),
    "more steps than steps": lambda state: state["train_state"].update(optimizer_steps=21),
    "a best step to come": lambda state: state["train_state"].update(best_step=20),
    "time before time": lambda state: state["train_state"].update(elapsed_seconds=-1.0),
    "an unknown counter": lambda state: state["train_state"].update(made_up=1),
    "a list for the state": lambda state: state.update(train_state=[]),
    "a list for the scaler": lambda state: state.update(scaler=[]),
    "half a scaler": lambda state: state.update(scaler={"scale": 1.0}),
    "a word for the identity": lambda state: state.update(identity="mine"),
    "numbers for hashes": lambda state: state.update(data={"train": 1}),
    "words for counts": lambda state: state.update(split={"world_size": "2"}),
    "words for numbers": lambda state: state.update(optimizer_numbers={"step.tok_emb.weight": "1"}),
}


@pytest.mark.fault("F54")
@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_that_contradicts_itself_is_damage(trained: Path, change: Callable[[dict[str, Any]], object]) -> None:
    target = trained / "checkpoints" / NEWEST
    state = json.loads((target / "state.json").read_text())
    change(state)
    (target / "state.json").write_text(json.dumps(state))
    reseal(target)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        open_checkpoint(target)
    found = resume.find(RunFolder(trained), None)
    assert found is not None
    assert found.path.name == BEFORE


def with_a_name_too_many(tensors: dict[str, torch.Tensor]) -> None:
    tensors["made_up"] = torch.zeros(1)


def without_a_name(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def in_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = max(tensors, key=lambda name: tensors[name].ndim)
    tensors[name] = tensors[name].unsqueeze(0).contiguous()


def as_int64(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)] = tensors[max(tensors)].long()


def as_complex(tensors: dict[str, torch.Tensor]) -> None:
    name = max(tensors, key=lambda name: tensors[name].ndim)
    tensors[name] = tensors[name].to(torch.complex64)


@pytest.mark.fault("F54")
@pytest.mark.parametrize(
    ("file", "change"),
    [
        *product(FILES[:2], [with_a_name_too_many, in_another_shape, as_complex]),
        *product(FILES[:1], [without_a_name, as_int64]),  # an optimizer may keep no state, or a whole number
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_moves(
    trained: Path, datasets_dir: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """An older checkpoint is named, so that newer ones would be moved aside if it were believed."""
    target = trained / "checkpoints" / BEFORE
    tensors = load_file(target / file)
    change(tensors)
    save_file(tensors, target / file)
    reseal(target)
    (done,) = train_in_fork(trained, datasets_dir, BEFORE, check=4)
    (line,) = done.stderr.splitlines()
    assert line.startswith(str(target / file))
    assert (trained / "checkpoints" / NEWEST / "manifest.json").is_file()
    assert not list(trained.glob("aside-*"))


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def scoring(folder: Path, datasets_dir: Path, name: str) -> tuple[Callable[[], None], list[object]]:
    """The command line that scores a checkpoint."""
    model = [datasets_dir, folder / "model.json", folder / "checkpoints" / name / "model.safetensors"]
    return test_loss.main, [*model, "--dataset", "toy", "--start-token", 0, "--batches", 2, "--device", "cpu"]


@pytest.mark.fault("F55")
def test_no_command_reads_damaged_weights(trained: Path, datasets_dir: Path, call: Call, tmp_path: Path) -> None:
    weights = trained / "checkpoints" / "latest" / "model.safetensors"
    flip_a_bit(weights)
    place = ("--runs-dir", trained.parent)
    main, words = scoring(trained, datasets_dir, "latest")
    for done in (
        call(main, *words),
        call(test_smoke.main, trained / "model.json", weights, "--device", "cpu"),
        call(convert.main, "import", weights.resolve(), "mine", "--n-heads", 2, *place),
        call(convert.main, "export", "tiny/checkpoints/latest", tmp_path / "out", "--no-check", *place),
    ):
        assert (done.status, done.stdout) == (4, ""), done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(str(weights.resolve()))
        assert "SHA-256" in line


@pytest.mark.fault("F55")
def test_an_unfinished_checkpoint_is_not_scored(trained: Path, datasets_dir: Path, call: Call) -> None:
    (trained / "checkpoints" / NEWEST / "manifest.json").unlink()
    main, words = scoring(trained, datasets_dir, NEWEST)
    done = call(main, *words)
    assert done.status == 4
    assert "found no manifest.json, wanted a complete checkpoint" in done.stderr


@pytest.mark.fault("F56")
def test_the_model_that_was_loaded_is_the_one_recorded(
    trained: Path, datasets_dir: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latest` moves on, and its old checkpoint is deleted, as in a live run, while the model is scored."""
    checkpoints = trained / "checkpoints"
    sha256 = file_sha256(checkpoints / NEWEST / "model.safetensors")
    original = test_loss.tally_losses

    def meanwhile(*arguments: Any) -> None:
        (checkpoints / "latest").unlink()
        (checkpoints / "latest").symlink_to(BEFORE)
        shutil.rmtree(checkpoints / NEWEST)
        original(*arguments)

    monkeypatch.setattr(test_loss, "tally_losses", meanwhile)
    main, words = scoring(trained, datasets_dir, "latest")
    assert call(main, *words).status == 0
    (score,) = (trained / "evals").glob("*.json")
    found = json.loads(score.read_text())
    assert (found["step"], found["model_sha256"]) == (19, sha256)
    assert found["tokens_seen"] == 20 * 128
    assert score.stem.endswith(NEWEST)


def test_a_loose_file_is_read_with_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = tmp_path / "loose.safetensors"
    shutil.copy(trained / "checkpoints" / NEWEST / "model.safetensors", loose)
    assert open_weights(loose).sha256 == file_sha256(loose)
    assert capsys.readouterr().err == f"warning: {loose}: nothing vouches for a file outside a run's checkpoints\n"
    open_weights(trained / "checkpoints" / "latest" / "model.safetensors")
    assert capsys.readouterr().err == ""


LINES = {
    "one byte": lambda line: line[:20] + b"\xff" + line[21:],
    "zeros": lambda line: b"\0" * (len(line) - 1) + b"\n",
    "a list": lambda _: b"[1, 2]\n",
    "a word for a step": lambda line: line.replace(b'"step": 7', b'"step": "7"'),
    "nested": lambda _: b"[" * 100_000 + b"\n",
    "no tokens": lambda _: b'{"step": 7}\n',
    "not a number": lambda line: line.replace(b'"tokens": ', b'"tokens": NaN, "was": '),
}


@pytest.mark.fault("F57")
@pytest.mark.parametrize("damage", LINES.values(), ids=LINES)
def test_a_damaged_line_is_set_aside(trained: Path, datasets_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = RunFolder(trained)
    lines = folder.metrics.path.read_bytes().splitlines(keepends=True)
    damaged = damage(lines[7])
    folder.metrics.path.write_bytes(b"".join([*lines[:7], damaged, *lines[8:], b'{"step": 20, "tok']))
    assert [line["step"] for line in folder.metrics.read()] == [*range(7), *range(8, 20)]
    draw(folder)
    (done,) = train_in_fork(trained, datasets_dir, BEFORE)
    assert f"{folder.metrics.path}: 1 damaged line moved to metrics.damaged" in done.stderr
    assert [line["step"] for line in metrics(trained)] == [*range(7), *range(8, 20)]
    assert folder.metrics.path.read_bytes().splitlines(keepends=True)[:7] == lines[:7]
    assert folder.metrics.damaged.read_bytes() == damaged
    (done,) = train_in_fork(trained, datasets_dir)
    assert "warning" not in done.stderr


def test_metrics_are_flushed_before_a_checkpoint_vouches_for_them(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.engine import checkpoint

    folder, order = RunFolder(trained), []
    monkeypatch.setattr(MetricsFile, "flush", lambda _: order.append("metrics"))
    monkeypatch.setattr(checkpoint, "write", lambda *_: order.append("checkpoint"))
    metadata = CheckpointMetadata.read(folder.checkpoint(19), 19)
    checkpoint.save(folder, checkpoint.Snapshot(metadata, {}), None, is_best=False)
    assert order == ["metrics", "checkpoint"]


def empty_file(raw: bytes) -> bytes:
    return raw[:0]


def half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def a_bit(raw: bytes) -> bytes:
    return raw[:150] + bytes([raw[150] ^ 1]) + raw[151:]


def a_pickle(_: bytes) -> bytes:
    return pickle.dumps({"sequence_losses": 1})


def a_bomb(_: bytes) -> bytes:
    """300 MB of zeros, packed into a thousandth."""
    file = io.BytesIO()
    np.savez_compressed(file, sequence_losses=np.zeros(300 * 2**17), sequence_documents=np.zeros(1, int))
    return file.getvalue()


def not_numbers(raw: bytes) -> bytes:
    file, arrays = io.BytesIO(), dict(np.load(io.BytesIO(raw)))
    np.savez(file, **{**arrays, "sequence_losses": arrays["sequence_losses"] * np.nan})
    return file.getvalue()


def with_documents(**documents: float) -> Callable[[bytes], bytes]:
    """Return damage that adds a document of a byte, a token and no nats, but for what is given."""
    kinds = {"keys": np.uint64, "num_bytes": np.int64, "tokens": np.int64, "nats": np.float64}
    values = {"keys": 1, "num_bytes": 1, "tokens": 1, "nats": 0.0, **documents}

    def damage(raw: bytes) -> bytes:
        file, arrays = io.BytesIO(), dict(np.load(io.BytesIO(raw)))
        added = {f"document_{name}": np.array([values[name]], kind) for name, kind in kinds.items()}
        np.savez(file, **{**arrays, **added})
        return file.getvalue()

    return damage


def another_mean(raw: bytes) -> bytes:
    file, arrays = io.BytesIO(), dict(np.load(io.BytesIO(raw)))
    np.savez(file, **{**arrays, "sequence_losses": arrays["sequence_losses"] - 0.01})
    return file.getvalue()


WRONG_ARRAYS = (
    *(empty_file, half, a_bit, a_pickle, a_bomb, not_numbers, another_mean),
    *(with_documents(num_bytes=0), with_documents(tokens=-1), with_documents(nats=np.nan), with_documents(nats=1e9)),
)


@pytest.mark.fault("F63")
@pytest.mark.parametrize("damage", WRONG_ARRAYS)
def test_a_damaged_score_does_not_count(
    trained: Path,
    datasets_dir: Path,
    call: Call,
    damage: Callable[[bytes], bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    main, words = scoring(trained, datasets_dir, NEWEST)
    assert call(main, *words).status == 0
    assert len(list(Score.of_checkpoint(RunFolder(trained), 19))) == 1
    (losses,) = (trained / "evals").glob("*.npz")
    losses.write_bytes(damage(losses.read_bytes()))
    assert not list(Score.of_checkpoint(RunFolder(trained), 19))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {losses.with_suffix('')}")
    assert line.endswith("; the score does not count")


@pytest.mark.fault("F63")
def test_a_score_is_written_whole_or_not_at_all(
    trained: Path, datasets_dir: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, words = scoring(trained, datasets_dir, NEWEST)
    assert call(main, *words).status == 0
    before = {path: path.read_bytes() for path in (trained / "evals").iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(trained))

    monkeypatch.setattr(os, "fsync", full)
    assert call(main, *words).status == 6
    assert {path: path.read_bytes() for path in (trained / "evals").iterdir()} == before


@pytest.mark.fault("F63")
def test_what_killed_scorings_left_is_deleted_and_what_others_write_is_not(
    trained: Path, datasets_dir: Path, call: Call
) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    (trained / "evals").mkdir()
    left, living = (
        trained / "evals" / f".loss-validation-0-192-{NEWEST}.npz.{process}.tmp"
        for process in (killed.pid, os.getppid())
    )
    main, words = scoring(trained, datasets_dir, BEFORE)
    for again in (lambda: call(main, *words), RunFolder(trained).remove_unfinished):
        for path in (left, living):
            path.write_text("half")
        again()
        assert (left.exists(), living.exists()) == (False, True)
    assert len(list(Score.of_checkpoint(RunFolder(trained), 15))) == 1
