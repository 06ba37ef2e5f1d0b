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
from torch.optim import Optimizer

from harness.engine.failpoints import failpoint
from harness.engine.identity import ResumeIdentity
from harness.engine.optimizer_state import named_state, restore_state
from harness.run.errors import CheckpointError, ConfigError, NonFiniteError, StorageError
from harness.run.files import file_sha256, fsync_folder, json_text, replace_link, write_json
from harness.run.run_folder import MODEL_FILE, STATE_FILE, STEP_FOLDER, TEMPORARY_PREFIX, RunFolder
from harness.run.strict_json import read_strict_json
from harness.run.train_state import TrainState

OPTIMIZER_FILE = "optimizer.safetensors"
MANIFEST_FILE = "manifest.json"
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
MAX_STATE_BYTES = 2**20


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint's state.json holds."""

    state: TrainState
    scaler: dict[str, float]
    identity: ResumeIdentity
    optimizer_numbers: dict[str, float] = field(default_factory=dict)
    """What the optimizer keeps besides tensors, by "KIND.PARAMETER"."""

    @classmethod
    def read(cls, path: Path) -> "CheckpointMetadata":
        """Read the state.json of a verified checkpoint's folder; raises CheckpointError."""
        try:
            document = read_strict_json(path / STATE_FILE, MAX_STATE_BYTES)
            identity = ResumeIdentity(
                dict(document["identity"]), dict(document.get("data", {})), dict(document.get("split", {}))
            )
            state, scaler = TrainState(**document["train_state"]), dict(document["scaler"])
            return cls(state, scaler, identity, dict(document.get("optimizer_numbers", {})))
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error!r})") from None

    def write(self, path: Path) -> None:
        """Write the file."""
        document = {
            "train_state": asdict(self.state),
            "scaler": self.scaler,
            "identity": self.identity.must_match,
            "data": self.identity.data,
            "split": self.identity.batch_split,
        }
        if self.optimizer_numbers:
            document["optimizer_numbers"] = self.optimizer_numbers
        write_json(path, document)


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
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler, state: TrainState, identity: ResumeIdentity
) -> Snapshot:
    """Copy what a checkpoint of the last completed global step holds; waits for the device.

    `model` is the one without wrappers. Raises NonFiniteError where weights or optimizer state are not finite.
    """
    weights = model.state_dict()
    kept, numbers = named_state(optimizer, model)
    require_finite({**weights, **kept}, state.next_step - 1)
    tensors = {
        MODEL_FILE: {name: _copied(tensor.float()) for name, tensor in weights.items()},
        OPTIMIZER_FILE: {name: _copied(tensor) for name, tensor in kept.items()},
    }
    return Snapshot(CheckpointMetadata(replace(state), scaler.state_dict(), identity, numbers), tensors)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save(folder: RunFolder, taken: Snapshot, keep: int | None, is_best: bool) -> None:
    """Write a checkpoint, point the links at it and delete those that are no longer kept; errors as for `write`."""
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
            (folder.checkpoint(step) / MANIFEST_FILE).unlink(missing_ok=True)
            failpoint("ckpt.prune", state.next_step - 1)
            shutil.rmtree(folder.checkpoint(step))
        except OSError as error:
            print(f"warning: {folder.checkpoint(step)} cannot be deleted ({error.strerror})", file=sys.stderr)


def _write_files(temporary: Path, taken: Snapshot) -> None:
    with ThreadPoolExecutor() as pool:  # one file is hashed while the next is written
        hashes = {}
        for name in FILES:
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
    """Return the file of a run's imported weights; raises CheckpointError unless it is the one train.json names."""
    path = folder.imported / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, wanted the weights of train.json (initial_weights)")
    if (found := file_sha256(path)) != sha256:
        raise CheckpointError(f"{path}: found SHA-256 {found}, wanted {sha256} (train.json: initial_weights)")
    return path


def load(path: Path, model: nn.Module, optimizer: Optimizer, numbers: Mapping[str, float]) -> None:
    """Copy a verified checkpoint into a model and give the optimizer its state; raises CheckpointError.

    `numbers` are those of the checkpoint's metadata. The optimizer must be new.
    """
    weights, kept = (read_tensors(path / name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    wanted = model.state_dict()
    different = [
        key
        for key in weights.keys() | wanted.keys()
        if key not in weights or key not in wanted or weights[key].shape != wanted[key].shape
    ]
    if different:
        raise CheckpointError(f"{path / MODEL_FILE}: {min(different)} does not fit this model")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(weights[key])
    try:
        restore_state(optimizer, model, kept, numbers)
    except KeyError as error:
        raise CheckpointError(f"{path / OPTIMIZER_FILE}: {error.args[0]} does not fit this model") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; raises CheckpointError."""
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder, wanted the {MODEL_FILE} in it")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None


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
