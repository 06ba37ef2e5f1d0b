"""Take, write, load and prune checkpoints: safetensors for tensors, JSON for the rest, never pickle.

A checkpoint is a folder that appears whole or not at all: it is written under a temporary name, its manifest (sizes
and SHA-256 of every file) last, everything is flushed to disk, and one rename makes it visible. The links `latest`
and `best` are hints for people; the truth is the newest folder whose manifest holds. Only rank 0 reads or writes.
"""

import errno
import math
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from harness.engine.averaging import WeightAverage
from harness.engine.failpoints import failpoint
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import (
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    CheckpointMetadata,
    VerifiedCheckpoint,
    read_tensors,
    require_fit,
)
from harness.engine.optimizer_state import named_state, restore_state
from harness.run.errors import CheckpointError, NonFiniteError, StorageError
from harness.run.files import file_sha256, fsync_folder, remove, replace_link, write_json
from harness.run.run_folder import AVERAGED_FILE, MODEL_FILE, STATE_FILE, TEMPORARY_PREFIX, RunFolder
from harness.run.train_state import TrainState


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: nothing that training does changes it any more."""

    metadata: CheckpointMetadata
    tensors: dict[str, dict[str, Tensor]]
    """On the CPU, by file: the model's in float32, the optimizer's in the types that it keeps."""

    @property
    def step(self) -> int:
        """The last completed global step."""
        return self.metadata.state.next_step - 1

    @property
    def tensor_bytes(self) -> int:
        """Size on disk, but for a few kilobytes."""
        return sum(tensor.nbytes for named in self.tensors.values() for tensor in named.values())


def snapshot(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    state: TrainState,
    identity: ResumeIdentity,
    average: WeightAverage | None = None,
) -> Snapshot:
    """Copy what a checkpoint of the last completed global step holds; waits for the device.

    `model` is the one without wrappers. Raises NonFiniteError where weights or optimizer state are not finite.
    """
    weights = model.state_dict()
    kept, numbers = named_state(optimizer, model)
    averaged = average.tensors if average else {}
    require_finite(
        {**weights, **kept, **{f"average of {name}": value for name, value in averaged.items()}}, state.next_step - 1
    )
    tensors = {
        MODEL_FILE: {name: _copied(tensor.float()) for name, tensor in weights.items()},
        OPTIMIZER_FILE: {name: _copied(tensor) for name, tensor in kept.items()},
        **({AVERAGED_FILE: {name: _copied(tensor) for name, tensor in averaged.items()}} if average else {}),
    }
    return Snapshot(CheckpointMetadata(replace(state), scaler.state_dict(), identity, numbers), tensors)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save(folder: RunFolder, taken: Snapshot, keep: int | None, is_best: bool) -> None:
    """Write a checkpoint, point the links at it and delete those that are no longer kept; errors as for `write`.

    The lines of metrics that a resume from it keeps are made durable first.
    """
    folder.metrics.flush()
    write(folder, taken)
    if is_best:
        link_best(folder, taken.step)
    prune(folder, keep, taken.metadata.state)
    failpoint("ckpt.end", taken.step)


def write(folder: RunFolder, taken: Snapshot) -> Path:
    """Write a checkpoint and point `latest` at it.

    Raises StorageError where that cannot be done; the older checkpoints and links are untouched then.
    """
    step = taken.step
    failpoint("ckpt.begin", step)
    target = folder.checkpoint(step)
    temporary = folder.checkpoints / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        folder.checkpoints.mkdir(exist_ok=True)
        temporary.mkdir()
        _write_files(temporary, taken)
        temporary.rename(target)
        fsync_folder(folder.checkpoints)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder.path).free
        raise StorageError(
            f"{target}: cannot be written ({error.strerror}); "
            f"it needs {taken.tensor_bytes:,} bytes, {free:,} are free; older checkpoints stand"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoint("ckpt.rename", step)
    replace_link(folder.checkpoints / "latest", target.name)
    failpoint("ckpt.latest", step)
    return target


def require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Check that all tensors are finite, waiting for the device; raises NonFiniteError naming one."""
    if not tensors:
        return
    # The largest magnitude is NaN or infinite if any value is, and finding it makes no copy.
    largest = torch.stack([torch.linalg.vector_norm(tensor.float(), math.inf) for tensor in tensors.values()])
    for name, value in zip(tensors, largest.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"global step {step}: {name} is not finite, so no checkpoint is written")


def require_room(folder: RunFolder, checkpoint_bytes: int) -> None:
    """Check that the disk has room for one checkpoint; raises StorageError with both sizes in bytes."""
    free = shutil.disk_usage(folder.path).free
    if free < checkpoint_bytes:
        raise StorageError(f"{folder.path}: found {free:,} bytes free, wanted {checkpoint_bytes:,} for a checkpoint")


def link_best(folder: RunFolder, step: int) -> None:
    """Point `best` at the checkpoint of global step `step`."""
    replace_link(folder.checkpoints / "best", folder.checkpoint(step).name)
    failpoint("ckpt.best", step)


def prune(folder: RunFolder, keep: int | None, state: TrainState) -> None:
    """Delete all but the newest `keep` checkpoints and the best; None keeps all. Only warns where it cannot.

    A checkpoint's manifest goes first, so that one half deleted is never taken for a whole one.
    """
    for step in folder.checkpoint_steps()[:-keep] if keep is not None else []:
        if step == state.best_step:
            continue
        try:
            if not folder.checkpoint(step).is_symlink():
                (folder.checkpoint(step) / MANIFEST_FILE).unlink(missing_ok=True)
            failpoint("ckpt.prune", state.next_step - 1)
            remove(folder.checkpoint(step))
        except OSError as error:
            print(f"warning: {folder.checkpoint(step)} cannot be deleted ({error.strerror})", file=sys.stderr)


def _write_files(temporary: Path, taken: Snapshot) -> None:
    with ThreadPoolExecutor() as pool:  # one file is hashed while the next is written
        hashes = {}
        for name in (*taken.tensors, STATE_FILE):
            if name in taken.tensors:
                save_tensors(taken.tensors[name], temporary / name)
            else:
                taken.metadata.write(temporary / name)
            failpoint(f"ckpt.file:{name}", taken.step)
            hashes[name] = pool.submit(file_sha256, temporary / name)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": found.result()}
            for name, found in hashes.items()
        }
    write_json(temporary / MANIFEST_FILE, {"step": taken.step, "files": files})
    failpoint("ckpt.manifest", taken.step)


def load(found: VerifiedCheckpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Copy a checkpoint that fits the model into it, and give the optimizer, which must be new, its state.

    Raises CheckpointError.
    """
    weights, kept = (read_tensors(found.path / name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    require_fit(found, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(weights[key])
    try:
        restore_state(optimizer, model, kept, found.metadata.optimizer_numbers)
    except KeyError as error:
        raise CheckpointError(f"{found.path / OPTIMIZER_FILE}: {error.args[0]} does not fit this model") from None


def load_average(found: VerifiedCheckpoint, average: WeightAverage) -> None:
    """Copy the average in a checkpoint that fits the model into `average`; raises CheckpointError."""
    if AVERAGED_FILE not in found.headers:
        raise CheckpointError(
            f"{found.path}: found no {AVERAGED_FILE}, wanted one (train.json: weight_average_decay)"
        )
    for name, value in read_tensors(found.path / AVERAGED_FILE).items():
        average.tensors[name].copy_(value)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, in their types, and flush them to disk; raises OSError."""
    try:
        path.touch()
        mode = path.stat().st_mode  # the library would leave a file that its owner alone can read
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(values, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    with path.open("rb+") as file:
        os.fsync(file.fileno())
