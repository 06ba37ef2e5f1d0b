"""The one way to open a checkpoint, for every command: nothing of it is used that was not checked.

A checkpoint is a folder of three files, or four with an average of the weights, and a manifest with their sizes and
SHA-256. It is opened as a whole: links, sizes, hashes, the types and relations of what state.json says, and the
headers of the tensors, all of it before anything is loaded or moved. What cannot be read, for whatever reason, is
damaged.
"""

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.engine.identity import ResumeIdentity
from harness.engine.optimizer_state import is_state_of
from harness.run.errors import CheckpointError, ConfigError
from harness.run.files import file_sha256, json_text, open_regular, sha256_of, write_json
from harness.run.run_folder import (
    AVERAGED_FILE,
    IMPORTED_STEP,
    MODEL_FILE,
    STATE_FILE,
    STEP_FOLDER,
    RunFolder,
    run_of_model_file,
)
from harness.run.strict_json import on_one_line, read_strict_json
from harness.run.train_state import TrainState

OPTIMIZER_FILE = "optimizer.safetensors"
MANIFEST_FILE = "manifest.json"
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
ALL_FILES = (*FILES, AVERAGED_FILE)
MAX_STATE_BYTES = 2**20
FLOATING = {"F64", "F32", "F16", "BF16"}
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}

Header = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and type of every tensor of a file, by name; the type as safetensors has it, "F32"."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint's state.json holds."""

    state: TrainState
    scaler: dict[str, float]
    identity: ResumeIdentity
    optimizer_numbers: dict[str, float] = field(default_factory=dict)
    """What the optimizer keeps besides tensors, by "KIND.PARAMETER"."""

    @classmethod
    def read(cls, path: Path, step: int) -> "CheckpointMetadata":
        """Read the state.json in the folder of the checkpoint of global step `step`; raises CheckpointError."""
        file = path / STATE_FILE
        try:
            document = STATE_DOCUMENT.validate_json(json.dumps(read_strict_json(file, MAX_STATE_BYTES)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{file}: cannot be read ({on_one_line(place)}: {first['msg']})") from None
        except ConfigError as error:
            raise CheckpointError(f"{file}: cannot be read ({str(error).removeprefix(f'{file}: ')})") from None
        if (wrong := document.contradiction(step)) is not None:
            raise CheckpointError(f"{file}: {wrong}")
        identity = ResumeIdentity(document.identity, document.data, document.split)
        return cls(document.train_state, document.scaler, identity, document.optimizer_numbers)

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


@validated(config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class _StateDocument:
    """state.json as it lies on disk, with the type of every value."""

    train_state: TrainState
    scaler: dict[str, int | float]
    identity: dict[str, Any]
    data: dict[str, str] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    optimizer_numbers: dict[str, int | float] = field(default_factory=dict)

    def contradiction(self, step: int) -> str | None:
        """Return what cannot be true of a checkpoint of global step `step`, or None."""
        if self.scaler and (self.scaler.keys() != SCALER_KEYS or min(self.scaler.values()) < 0):
            return f"found a scaler with {sorted(self.scaler)}, wanted the values of a gradient scaler"
        batch, length = self.identity.get("global_batch"), self.identity.get("context_length")
        tokens = batch * length if type(batch) is int and type(length) is int else None
        return self.train_state.contradiction(step, tokens)


STATE_DOCUMENT = TypeAdapter(_StateDocument)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files are what its manifest says, and whose contents agree with each other."""

    path: Path
    step: int
    """The last completed global step."""
    metadata: CheckpointMetadata
    sha256: Mapping[str, str]
    """Of each file (hex), by name."""
    headers: Mapping[str, Header]
    """Of the files of tensors, by name."""


def open_checkpoint(path: Path, reads: Collection[str] = ALL_FILES) -> VerifiedCheckpoint:
    """Check a checkpoint's folder; raises CheckpointError with the reason.

    Files in `reads` are read through and hashed; of the others only the sizes are compared, which takes no time.
    """
    with _unreadable_is_damaged(path):
        _require_regular_files(path, (MANIFEST_FILE, *FILES))
        step, files = _read_manifest(path)
        _require_regular_files(path, files)
        for name, (size, sha256) in files.items():
            file = path / name
            found_size = file.stat().st_size
            found = file_sha256(file) if name in reads else sha256
            if (found_size, found) != (size, sha256):
                raise CheckpointError(
                    f"{file}: found {found_size:,} bytes with SHA-256 {found}, wanted {size:,} with {sha256}"
                )
        metadata = CheckpointMetadata.read(path, step)
        headers = {name: _header(path / name) for name in files if name != STATE_FILE}
    for name, header in headers.items():
        for tensor, (shape, dtype) in header.items():
            if dtype not in FLOATING and (name != OPTIMIZER_FILE or shape):
                raise CheckpointError(f"{path / name}: {tensor}: found type {dtype}, wanted floating point")
    return VerifiedCheckpoint(path, step, metadata, {name: sha256 for name, (_, sha256) in files.items()}, headers)


def require_fit(found: VerifiedCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint's tensors are those of a model with parameters of these shapes; raises CheckpointError.

    An optimizer's tensor belongs to a parameter, by its name "KIND.PARAMETER".
    """
    for file in (MODEL_FILE, AVERAGED_FILE) if AVERAGED_FILE in found.headers else (MODEL_FILE,):
        weights = {name: shape for name, (shape, _) in found.headers[file].items()}
        different = [name for name in weights.keys() | shapes.keys() if weights.get(name) != shapes.get(name)]
        if different:
            raise CheckpointError(f"{found.path / file}: {min(different)} does not fit this model")
    kept = {name: shape for name, (shape, _) in found.headers[OPTIMIZER_FILE].items()}
    kept |= dict.fromkeys(found.metadata.optimizer_numbers, ())
    parameters = {key: shapes.get(key.partition(".")[2]) for key in kept}
    strange = [key for key, shape in parameters.items() if shape is None or not is_state_of(kept[key], shape)]
    if strange:
        raise CheckpointError(f"{found.path / OPTIMIZER_FILE}: {min(strange)} does not fit this model")


@dataclass(frozen=True)
class Weights:
    """The weights in one file, and what is known of exactly those bytes."""

    path: Path
    """Without links, which may lead elsewhere a moment later."""
    sha256: str
    tensors: dict[str, Tensor]
    """On the CPU."""


def open_weights(path: Path) -> Weights:
    """Open a file of weights: in a run, as part of a verified checkpoint; raises CheckpointError.

    Links are followed once. A file outside a run is read as it is, and one line on stderr says so.
    """
    with _unreadable_is_damaged(path):
        if path.is_dir():
            raise CheckpointError(f"{path}: found a folder, wanted the {MODEL_FILE} in it")
        path = path.resolve(strict=True)
        with open_regular(path) as file:
            sha256 = sha256_of(file)
            _require_vouched_for(path, sha256)
            # Through the open file, so that what was hashed is what is loaded.
            tensors = read_tensors(Path(f"/dev/fd/{file.fileno()}"), path)
    return Weights(path, sha256, tensors)


def imported_weights(folder: RunFolder, sha256: str) -> Path:
    """Return the file of a run's imported weights; raises CheckpointError unless it is the one train.json names."""
    path = folder.weights(IMPORTED_STEP)
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, wanted the weights of train.json (initial_weights)")
    with _unreadable_is_damaged(path):
        _require_named(path, file_sha256(path), sha256)
    return path


def read_tensors(path: Path, name: Path | None = None) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; raises CheckpointError, which calls it `name` where that is given."""
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder, wanted the {MODEL_FILE} in it")
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise CheckpointError(f"{name or path}: not a regular file")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name or path}: cannot be read as safetensors ({error})") from None


def require_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Raise CheckpointError naming up to three tensors that are missing, unknown, of another shape or no floats."""
    problems = [f"{source}: missing tensor {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"{source}: unknown tensor {name[:80]}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{source}: {name}: found shape {tuple(tensors[name].shape)}, wanted {wanted[name]}"
        for name in wanted.keys() & tensors.keys()
        if tuple(tensors[name].shape) != wanted[name]
    ]
    problems += [
        f"{source}: {name[:80]}: found type {str(value.dtype).removeprefix('torch.')}, wanted floating point"
        for name, value in tensors.items()
        if not value.is_floating_point()
    ]
    if problems:
        more = [f"{source}: {len(problems) - 3} more like these"] if len(problems) > 3 else []
        raise CheckpointError(*sorted(problems)[:3], *more)


def _require_vouched_for(path: Path, sha256: str) -> None:
    owner = run_of_model_file(path)
    if owner is not None and owner[1] != IMPORTED_STEP:
        found = open_checkpoint(path.parent, reads=(STATE_FILE,)).sha256.get(path.name)
        if sha256 != found:
            raise CheckpointError(f"{path}: found SHA-256 {sha256}, wanted {found} ({MANIFEST_FILE})")
    elif owner is not None and (named := initial_weights(owner[0])) is not None:
        _require_named(path, sha256, named)
    else:
        print(f"warning: {path}: nothing vouches for a file outside a run's checkpoints", file=sys.stderr)


def initial_weights(folder: RunFolder) -> str | None:
    """Return the SHA-256 that train.json names, of the weights a run starts from; None where it names none."""
    try:
        return folder.read_configs()[1].initial_weights
    except ConfigError:
        return None


def _require_named(path: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise CheckpointError(f"{path}: found SHA-256 {found}, wanted {sha256} (train.json: initial_weights)")


def _require_regular_files(path: Path, names: Iterable[str]) -> None:
    if path.is_symlink():
        raise CheckpointError(f"{path}: found a link, wanted a folder")
    if not os.path.lexists(path / MANIFEST_FILE):
        raise CheckpointError(f"{path}: found no {MANIFEST_FILE}, wanted a complete checkpoint")
    for name in names:
        if (path / name).is_symlink() or not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing, or not a regular file")


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Return a checkpoint's step, and the size and SHA-256 of each of its files."""
    file = path / MANIFEST_FILE
    try:
        manifest = read_strict_json(file)
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        is_ours = manifest.keys() == {"step", "files"} and STEP_FOLDER.fullmatch(path.name)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error).removeprefix(f'{file}: ')})") from None
    if not set(FILES) <= set(files) <= set(ALL_FILES):
        raise CheckpointError(f"{file}: found files {sorted(files)}, wanted a checkpoint's three or four")
    if not is_ours or manifest["step"] != int(is_ours[1]):
        raise CheckpointError(f"{file}: found step {manifest.get('step')!r}, wanted that of the folder")
    if file.read_text(encoding="utf-8") != json_text(manifest):
        # No hash vouches for the manifest, so it must be as it was written, to the last byte.
        raise CheckpointError(f"{file}: found other bytes than were written for what it says")
    return int(is_ours[1]), files


def _header(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return {name: (tuple(found.get_shape()), str(found.get_dtype())) for name, found in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None


@contextmanager
def _unreadable_is_damaged(path: Path) -> Iterator[None]:
    """Turn a bad sector, or a file that may not be read, into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
