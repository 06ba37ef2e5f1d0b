"""Take, write, verify, load and prune checkpoints: safetensors for tensors, JSON for the rest, never pickle.

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

from harness import faults
from harness.config import read_strict_json
from harness.errors import CheckpointError, ConfigError, NonFiniteError, StorageError
from harness.plan import CHECKPOINT_BYTES_PER_PARAMETER
from harness.run_folder import (
    STEP_FOLDER,
    TEMPORARY_PREFIX,
    RunFolder,
    file_sha256,
    fsync_folder,
    json_text,
    replace_link,
    write_json,
)
from harness.train_state import TrainState

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
ADAMW_TENSORS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Basis:
    """What a run rests on: what a start must share with a checkpoint to resume from it, and what it may change."""

    identity: dict[str, object]
    """All that decides what the run computes; must be equal."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the tokens that were read through, by their place; must be equal where both have the place."""
    split: dict[str, int] = field(default_factory=dict)
    """How the global batch is split over processes and accumulation steps; may change."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's state.json holds."""

    state: TrainState
    scaler: dict[str, float]
    basis: Basis


@dataclass(frozen=True)
class Trainee:
    """What a checkpoint holds besides the state: the model without wrappers, its optimizer and scaler."""

    model: nn.Module
    optimizer: AdamW
    scaler: GradScaler

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Give AdamW's tensors as `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`, making them if need be."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors.update({f"{kind}.{name}": state[kind] for kind in ADAMW_TENSORS})
        return tensors


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: nothing that training does changes it any more."""

    contents: Contents
    tensors: dict[str, dict[str, Tensor]]
    """Float32 on the CPU, by file."""

    @property
    def step(self) -> int:
        """The last completed global step."""
        return self.contents.state.next_step - 1


def take(trainee: Trainee, state: TrainState, basis: Basis) -> Snapshot:
    """Copy what a checkpoint of the last completed global step holds; waits for the device.

    Raises NonFiniteError where the weights or moments are not finite.
    """
    require_finite(trainee, state.next_step - 1)
    live = {MODEL_FILE: trainee.model.state_dict(), OPTIMIZER_FILE: trainee.optimizer_tensors()}
    tensors = {
        file: {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in named.items()}
        for file, named in live.items()
    }
    return Snapshot(Contents(replace(state), trainee.scaler.state_dict(), basis), tensors)


def publish(folder: RunFolder, snapshot: Snapshot, keep: int | None, is_best: bool) -> None:
    """Write a checkpoint, point the links at it and delete those that are no longer kept; errors as for `write`."""
    write(folder, snapshot)
    if is_best:
        link_best(folder, snapshot.step)
    prune(folder, keep, snapshot.contents.state)
    faults.reach("ckpt.end", snapshot.step)


def write(folder: RunFolder, snapshot: Snapshot) -> Path:
    """Write a checkpoint and point `latest` at it.

    Raises StorageError where that cannot be done; the older checkpoints and links are untouched then.
    """
    step = snapshot.step
    faults.reach("ckpt.begin", step)
    target = folder.checkpoint(step)
    temporary = folder.checkpoints / f"{TEMPORARY_PREFIX}{target.name}"
    try:
        folder.checkpoints.mkdir(exist_ok=True)
        temporary.mkdir()
        _write_files(temporary, snapshot)
        temporary.rename(target)
        fsync_folder(folder.checkpoints)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{target}: cannot be written ({error.strerror}); {_room(folder, snapshot)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    faults.reach("ckpt.rename", step)
    replace_link(folder.checkpoints / "latest", target.name)
    faults.reach("ckpt.latest", step)
    return target


def require_finite(trainee: Trainee, step: int) -> None:
    """Check that weights and moments are finite, waiting for the device; raises NonFiniteError naming one."""
    tensors = {**trainee.model.state_dict(), **trainee.optimizer_tensors()}
    # The largest magnitude is NaN or infinite if any value is, and finding it makes no copy.
    largest = torch.stack([torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors.values()])
    for name, value in zip(tensors, largest.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"global step {step}: {name} is not finite, so no checkpoint is written")


def require_room(folder: RunFolder, parameters: int) -> None:
    """Check that the disk has room for one checkpoint of a model; raises StorageError with both sizes in bytes."""
    needed = parameters * CHECKPOINT_BYTES_PER_PARAMETER
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise StorageError(f"{folder.path}: found {free:,} bytes free, wanted {needed:,} for a checkpoint")


def _room(folder: RunFolder, snapshot: Snapshot) -> str:
    weights = sum(tensor.numel() for tensor in snapshot.tensors[MODEL_FILE].values())
    needed = weights * CHECKPOINT_BYTES_PER_PARAMETER
    return f"it needs {needed:,} bytes, {shutil.disk_usage(folder.path).free:,} are free; older checkpoints stand"


def link_best(folder: RunFolder, step: int) -> None:
    """Point `best` at the checkpoint of global step `step`."""
    replace_link(folder.checkpoints / "best", folder.checkpoint(step).name)
    faults.reach("ckpt.best", step)


def prune(folder: RunFolder, keep: int | None, state: TrainState) -> None:
    """Delete all but the newest `keep` checkpoints and the best; None keeps all. Only warns where it cannot.

    A checkpoint's manifest goes first, so that one half deleted is never taken for a whole one.
    """
    for step in folder.checkpoint_steps()[:-keep] if keep is not None else []:
        if step == state.best_step:
            continue
        try:
            (folder.checkpoint(step) / MANIFEST_FILE).unlink(missing_ok=True)
            faults.reach("ckpt.prune", state.next_step - 1)
            shutil.rmtree(folder.checkpoint(step))
        except OSError as error:
            print(f"warning: {folder.checkpoint(step)} cannot be deleted ({error.strerror})", file=sys.stderr)


def _write_files(temporary: Path, snapshot: Snapshot) -> None:
    documents = asdict(snapshot.contents)
    with ThreadPoolExecutor() as pool:  # one file is hashed while the next is written
        hashes = {}
        for name in FILES:
            if name in snapshot.tensors:
                save_tensors(snapshot.tensors[name], temporary / name)
            else:
                document = {"train_state": documents["state"], "scaler": documents["scaler"], **documents["basis"]}
                write_json(temporary / name, document)
            faults.reach(f"ckpt.file:{name}", snapshot.step)
            hashes[name] = pool.submit(file_sha256, temporary / name)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": found.result()}
            for name, found in hashes.items()
        }
    write_json(temporary / MANIFEST_FILE, {"step": snapshot.step, "files": files})
    faults.reach("ckpt.manifest", snapshot.step)


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest, byte for byte; raises CheckpointError with the reason."""
    if not (path / MANIFEST_FILE).exists():
        raise CheckpointError(f"{path}: found no {MANIFEST_FILE}, wanted a complete checkpoint")
    for name in (MANIFEST_FILE, *FILES):
        if (path / name).is_symlink() or not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing, or not a regular file")
    try:
        manifest = read_strict_json(path / MANIFEST_FILE)
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        is_ours = manifest.keys() == {"step", "files"} and STEP_FOLDER.fullmatch(path.name)
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE}: cannot be read ({error})") from None
    if set(files) != set(FILES):
        raise CheckpointError(f"{path / MANIFEST_FILE}: found files {sorted(files)}, wanted a checkpoint's three")
    if not is_ours or manifest["step"] != int(is_ours[1]):
        raise CheckpointError(
            f"{path / MANIFEST_FILE}: found step {manifest.get('step')!r}, wanted that of the folder"
        )
    if (path / MANIFEST_FILE).read_text(encoding="utf-8") != json_text(manifest):
        # No hash vouches for the manifest, so it must be as `save` writes it, to the last byte.
        raise CheckpointError(f"{path / MANIFEST_FILE}: found other bytes than were written for what it says")
    for name, (size, sha256) in files.items():
        file = path / name
        found_size, found = file.stat().st_size, file_sha256(file)
        if (found_size, found) != (size, sha256):
            raise CheckpointError(
                f"{file}: found {found_size:,} bytes with SHA-256 {found}, wanted {size:,} with {sha256}"
            )


def imported_weights(folder: RunFolder, sha256: str) -> Path:
    """Give the file of a run's imported weights; raises CheckpointError unless it is the one train.json names."""
    path = folder.imported / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, wanted the weights of train.json (initial_weights)")
    if (found := file_sha256(path)) != sha256:
        raise CheckpointError(f"{path}: found SHA-256 {found}, wanted {sha256} (train.json: initial_weights)")
    return path


def read_contents(path: Path) -> Contents:
    """Read a verified checkpoint's state.json; raises CheckpointError."""
    try:
        document = read_strict_json(path / STATE_FILE)
        basis = Basis(dict(document["identity"]), dict(document.get("data", {})), dict(document.get("split", {})))
        return Contents(TrainState(**document["train_state"]), dict(document["scaler"]), basis)
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error!r})") from None


def load(path: Path, trainee: Trainee) -> None:
    """Copy a verified checkpoint's tensors into a model and its optimizer, in place; raises CheckpointError."""
    targets = {MODEL_FILE: trainee.model.state_dict(), OPTIMIZER_FILE: trainee.optimizer_tensors()}
    for name, wanted in targets.items():
        try:
            found = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name}: cannot be read as safetensors ({error})") from None
        different = [
            key
            for key in found.keys() | wanted.keys()
            if key not in found or key not in wanted or found[key].shape != wanted[key].shape
        ]
        if different:
            raise CheckpointError(f"{path / name}: {min(different)} does not fit this model")
        with torch.no_grad():
            for key, tensor in wanted.items():
                tensor.copy_(found[key])


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as float32 safetensors and flush them to disk; raises OSError."""
    try:
        path.touch()
        mode = path.stat().st_mode  # the library would leave a file that its owner alone can read
        values = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(values, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    with path.open("rb+") as file:
        os.fsync(file.fileno())
