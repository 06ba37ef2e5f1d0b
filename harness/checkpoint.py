"""Write, verify, find, resume and prune checkpoints: safetensors for tensors, JSON for the rest, never pickle.

A checkpoint is a folder that appears whole or not at all: it is written under a temporary name, its manifest (sizes
and SHA-256 of every file) last, everything is flushed to disk, and one rename makes it visible. The links `latest`
and `best` are hints for people; the truth is the newest folder whose manifest holds. Only rank 0 reads or writes.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

from harness.errors import CheckpointError, ConfigError, StorageError
from harness.run_folder import RunFolder, fsync_folder, replace_link, write_json

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
ADAMW_TENSORS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainState:
    """Everything about a run's progress that changes; it goes into state.json whole.

    An interval is the global steps since the last scheduled checkpoint. Losses are in nats per token.
    """

    next_step: int = 0
    """Global steps completed, and so the index of the next."""
    optimizer_steps: int = 0
    """Global steps that changed the weights."""
    skipped_steps: int = 0
    """Global steps skipped for non-finite gradients."""
    consecutive_skips: int = 0
    """Skipped steps up to now without one in between that was not."""
    tokens: int = 0
    """Tokens trained on."""
    elapsed_seconds: float = 0.0
    """Training time over all starts of the run."""
    interval_loss_sum: float = 0.0
    interval_steps: int = 0
    last_interval_loss: float | None = None
    """Mean train loss of the interval before this one; null where it was not finite."""
    best_loss: float | None = None
    """Lowest mean train loss of an interval, or validation loss where the run validates."""
    best_step: int | None = None
    best_is_validation: bool = False
    """Whether best_loss is a validation loss."""

    def count(self, tokens: int, loss: float, was_skipped: bool) -> None:
        """Count one completed global step; a loss that is not finite stays out of the interval's mean."""
        self.next_step += 1
        self.tokens += tokens
        self.optimizer_steps += not was_skipped
        self.skipped_steps += was_skipped
        self.consecutive_skips = self.consecutive_skips + 1 if was_skipped else 0
        if math.isfinite(loss):
            self.interval_loss_sum += loss
            self.interval_steps += 1

    @property
    def interval_loss(self) -> float:
        """Mean train loss of the interval so far; NaN before its first step."""
        return self.interval_loss_sum / self.interval_steps if self.interval_steps else math.nan

    def close_interval(self, validation_loss: float | None) -> bool:
        """End the interval at a scheduled checkpoint and say whether that checkpoint is the best so far."""
        loss = self.interval_loss if validation_loss is None else validation_loss
        self.last_interval_loss = self.interval_loss if self.interval_steps else None
        is_validation = validation_loss is not None
        # A run that begins or ceases to validate starts its comparison anew.
        best = self.best_loss if self.best_is_validation == is_validation else None
        is_best = math.isfinite(loss) and (best is None or loss < best)
        if is_best:
            self.best_loss, self.best_step, self.best_is_validation = loss, self.next_step - 1, is_validation
        self.interval_loss_sum, self.interval_steps = 0.0, 0
        return is_best


@dataclass(frozen=True)
class Start:
    """Where training begins: a checkpoint's folder and what its state.json holds, or nothing yet."""

    path: Path | None
    state: TrainState
    scaler: dict[str, float]


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


def save(folder: RunFolder, trainee: Trainee, state: TrainState, identity: Mapping[str, object]) -> Path:
    """Write the checkpoint of the last completed global step and point `latest` at it.

    `identity` is what a later start must share to resume from here. Waits for the device. Raises OSError, leaving
    the older checkpoints and links untouched.
    """
    step = state.next_step - 1
    target = folder.checkpoint(step)
    folder.checkpoints.mkdir(exist_ok=True)
    remove_unfinished(folder)
    temporary = folder.checkpoints / f"{TEMPORARY_PREFIX}{target.name}"
    temporary.mkdir()
    try:
        save_tensors(trainee.model.state_dict(), temporary / MODEL_FILE)
        save_tensors(trainee.optimizer_tensors(), temporary / OPTIMIZER_FILE)
        document = {"train_state": asdict(state), "scaler": trainee.scaler.state_dict(), "identity": identity}
        write_json(temporary / STATE_FILE, document)
        names = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names
        }
        write_json(temporary / MANIFEST_FILE, {"step": step, "files": files})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(target)
    fsync_folder(folder.checkpoints)
    replace_link(folder.checkpoints / "latest", target.name)
    return target


def link_best(folder: RunFolder, step: int) -> None:
    """Point `best` at the checkpoint of global step `step`."""
    replace_link(folder.checkpoints / "best", folder.checkpoint(step).name)


def prune(folder: RunFolder, keep: int | None, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best; None keeps all.

    A checkpoint's manifest goes first, so that one half deleted is never taken for a whole one.
    """
    if keep is None:
        return
    for step in folder.checkpoint_steps()[:-keep]:
        if step != best_step:
            (folder.checkpoint(step) / MANIFEST_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder.checkpoint(step))


def remove_unfinished(folder: RunFolder) -> int:
    """Delete what an interrupted save left under a temporary name; give how many there were."""
    unfinished = list(folder.checkpoints.glob(f"{TEMPORARY_PREFIX}*"))
    for path in unfinished:
        shutil.rmtree(path)
    return len(unfinished)


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest, byte for byte; raises CheckpointError with the reason."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: found no {MANIFEST_FILE}, wanted a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE}: cannot be read ({error!r})") from None
    if set(files) != {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE}:
        raise CheckpointError(f"{path / MANIFEST_FILE}: found files {sorted(files)}, wanted a checkpoint's three")
    for name, (size, sha256) in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing, or not a regular file")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: found {file.stat().st_size} bytes, wanted {size}")
        if (found := _sha256(file)) != sha256:
            raise CheckpointError(f"{file}: found SHA-256 {found}, wanted {sha256}")


def find(folder: RunFolder, name: str | None) -> Path | None:
    """Find the checkpoint to resume from, verified; only warns about damaged ones that it passes over.

    A `name` (a folder's, `latest` or `best`) must be valid. Without one: the newest valid checkpoint by step, None
    where none was ever written. Raises CheckpointError, also where some were written and none is valid.
    """
    if name is not None:
        path = (folder.checkpoints / name).resolve()
        if path.parent != folder.checkpoints.resolve() or not path.is_dir():
            raise CheckpointError(f"{folder.checkpoints}: found no checkpoint {name[:80]!r}")
        verify(path)
        return path
    reasons: list[str] = []
    for step in reversed(folder.checkpoint_steps()):
        try:
            verify(folder.checkpoint(step))
        except CheckpointError as error:
            reasons.extend(error.lines)
            continue
        for reason in reasons:
            print(f"warning: passing over a damaged checkpoint: {reason}", file=sys.stderr)
        return folder.checkpoint(step)
    if reasons:
        raise CheckpointError(
            *reasons, f"{folder.checkpoints}: no checkpoint is valid (start over with --fresh, which deletes nothing)"
        )
    return None


def choose_start(folder: RunFolder, name: str | None, identity: Mapping[str, object]) -> Start:
    """Decide where to begin, and tidy the folder for it: newer checkpoints aside, later metrics dropped.

    `name` and errors are as for `find`; raises ConfigError, naming the keys, where the checkpoint was made with
    another `identity`.
    """
    path = find(folder, name)
    if path is None:
        folder.drop_metrics_from(0)
        return Start(None, TrainState(), {})
    state, scaler, saved = read_state(path)
    differences = [key for key in identity.keys() | saved.keys() if identity.get(key) != saved.get(key)]
    if differences:
        raise ConfigError(
            *(
                f"{folder.path}: {key}: found {identity.get(key)}, wanted {saved.get(key)} as in {path.name} "
                "(or --fresh to start over)"
                for key in sorted(differences)
            )
        )
    newer = [folder.checkpoint(step) for step in folder.checkpoint_steps() if step >= state.next_step]
    aside = folder.set_aside(*newer)
    if aside:
        print(f"Newer checkpoints are moved to {aside}")
    # The links may lead to what was moved, or be older than the folder if a save was cut off before them.
    replace_link(folder.checkpoints / "latest", path.name)
    if state.best_step is not None and folder.checkpoint(state.best_step).is_dir():
        link_best(folder, state.best_step)
    else:
        (folder.checkpoints / "best").unlink(missing_ok=True)
    folder.drop_metrics_from(state.next_step)
    print(f"Resuming from {path.name}: {state.next_step:,} global steps are done")
    return Start(path, state, scaler)


def read_state(path: Path) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """Read a verified checkpoint's train state, scaler state and identity."""
    try:
        document = json.loads((path / STATE_FILE).read_bytes())
        return TrainState(**document["train_state"]), dict(document["scaler"]), dict(document["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as float32 safetensors and flush them to disk; raises StorageError."""
    try:
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from None
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
