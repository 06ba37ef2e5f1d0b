"""The only module that knows how a run's folder is laid out.

Paths, the lock, status.json, run.json and atomic writes live here. Only rank 0 writes into the folder, and every
file but metrics.jsonl is replaced whole: a reader sees the old file or the new one, never a part.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.config import ModelConfig, TrainConfig, load_run_configs, recipe_hash, run_hash
from harness.errors import (
    DEFECT_STATUS,
    INTERRUPTED_STATUS,
    ConfigError,
    RunLockedError,
    StopRequestedError,
    as_harness_error,
    fit_to_print,
)

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STEP_FOLDER = re.compile(r"step-(\d{8,})")
TEMPORARY_PREFIX = ".tmp-"
IMPORTED = "imported"
IMPORTED_STEP = -1
"""Imported weights stand where a checkpoint before global step 0 would."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def model_json(self) -> Path:
        """The model's configuration."""
        return self.path / "model.json"

    @property
    def train_json(self) -> Path:
        """The training configuration."""
        return self.path / "train.json"

    @property
    def run_json(self) -> Path:
        """What really ran."""
        return self.path / "run.json"

    @property
    def status_json(self) -> Path:
        """State, step, exit code and reason."""
        return self.path / "status.json"

    @property
    def metrics_jsonl(self) -> Path:
        """One line a global step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def charts(self) -> Path:
        """Folder of PNG charts."""
        return self.path / "charts"

    @property
    def page(self) -> Path:
        """The run's HTML page."""
        return self.path / "training-run-chart.html"

    @property
    def evals(self) -> Path:
        """Folder of evaluation results."""
        return self.path / "evals"

    @property
    def loggers(self) -> Path:
        """Folder of what TensorBoard, W&B and trackio keep of the run."""
        return self.path / "loggers"

    @property
    def imported(self) -> Path:
        """Folder of the weights that were made elsewhere, from which the run starts."""
        return self.path / IMPORTED

    def checkpoint(self, step: int) -> Path:
        """Give the folder of the checkpoint written after global step `step`, or of the imported weights."""
        return self.imported if step == IMPORTED_STEP else self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Give the steps of all checkpoint folders, oldest first, valid or not."""
        if not self.checkpoints.is_dir():
            return []
        matches = (STEP_FOLDER.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def model_steps(self) -> list[int]:
        """Give the steps of all that can be sampled or scored: imported weights first, then every checkpoint."""
        return [IMPORTED_STEP] * self.imported.is_dir() + self.checkpoint_steps()

    def remove_unfinished(self) -> list[str]:
        """Delete what a killed process was still writing; give the names of unfinished checkpoints among it."""
        unfinished = list(self.checkpoints.glob(f"{TEMPORARY_PREFIX}*"))
        for path in unfinished:
            shutil.rmtree(path)
        for place in (self.path, self.checkpoints, self.charts, self.evals):
            for path in place.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        return sorted(path.name.removeprefix(TEMPORARY_PREFIX) for path in unfinished)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line that was being written when the process died is left out."""
        if not self.metrics_jsonl.is_file():
            return []
        lines = []
        for text in self.metrics_jsonl.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def drop_metrics_from(self, step: int) -> None:
        """Drop the lines of global steps from `step` on, which a resumed run is about to train again."""
        lines = self.read_metrics()
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] < step)
        if self.metrics_jsonl.is_file() and kept != self.metrics_jsonl.read_text(encoding="utf-8"):
            write_text(self.metrics_jsonl, kept)

    def read_configs(self) -> tuple[ModelConfig, TrainConfig]:
        """Read both configuration files; raises ConfigError with all errors of both."""
        return load_run_configs(self.model_json, self.train_json)

    def write_status(self, state: str, step: int | None, exit_code: int | None = None, reason: str = "") -> None:
        """Replace status.json; `step` is the last completed global step, None before the first."""
        self._write_status(state=state, step=step, exit_code=exit_code, reason=reason)

    def write_failure(self, error: BaseException) -> None:
        """Replace status.json with how a start ended badly, and the traceback where there is one to learn from."""
        known = as_harness_error(error)
        state, exit_code = "failed", known.exit_status if known else DEFECT_STATUS
        if isinstance(known, StopRequestedError):
            state = "stopped"
        elif isinstance(error, KeyboardInterrupt):
            state, exit_code = "stopped", INTERRUPTED_STATUS
        details = known.details if known else "".join(traceback.format_exception(error))
        reason = fit_to_print(str(known or repr(error)))
        self._write_status(
            state=state, step=self.status_step(), exit_code=exit_code, reason=reason, traceback=fit_to_print(details)
        )

    def _write_status(self, **values: object) -> None:
        write_json(self.status_json, {**values, "host": socket.gethostname(), "pid": os.getpid(), "time": utc_now()})

    def set_aside(self, *paths: Path) -> Path | None:
        """Move what exists of `paths` into a new folder `aside-N`, deleting nothing; give that folder."""
        existing = [path for path in paths if path.exists() or path.is_symlink()]
        if not existing:
            return None
        number = 1 + sum(1 for _ in self.path.glob("aside-*"))
        while (aside := self.path / f"aside-{number}").exists():
            number += 1
        for path in existing:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the operating system lets go when the process dies.

        Raises RunLockedError, naming the holder, if another process holds it.
        """
        if self.path.stat().st_mode & stat.S_IWOTH:
            print(f"warning: {self.path}: every user of this machine may write here (chmod o-w)", file=sys.stderr)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).strip() or "an unknown process"
                raise RunLockedError(f"{self.path}: another trainer holds this run ({holder})") from None
            file.truncate(0)
            file.write(f"{socket.gethostname()}:{os.getpid()}\n")
            file.flush()
            yield
            file.truncate(0)

    @contextmanager
    def reporting_failure(self) -> Iterator[None]:
        """Write into status.json how the block ended if it did not end well, and let the error go on."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # a full disk, say: then the error itself must get out
                self.write_failure(error)
            raise

    def evidence(self, step: int) -> dict[str, object]:
        """Say what a checkpoint stands for: its recipe, its run, the tokens it has seen; null where unknown."""
        state = read_json(self.checkpoint(step) / "state.json").get("train_state", {})
        found: dict[str, object] = {
            "tokens_seen": state.get("tokens"),
            "global_steps": read_json(self.run_json).get("plan", {}).get("global_steps"),
        }
        try:
            model, train = self.read_configs()
        except ConfigError:
            return {**found, "recipe_hash": None, "run_hash": None}
        return {**found, "recipe_hash": recipe_hash(model, train), "run_hash": run_hash(model, train)}

    def read_starts(self) -> list[dict[str, Any]]:
        """Give what run.json says of earlier starts of the run."""
        starts = read_json(self.run_json).get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    def read_status(self) -> dict[str, Any]:
        """Give what status.json says, nothing where it cannot be read."""
        return read_json(self.status_json)

    def status_step(self) -> int | None:
        """Give the last completed global step that status.json names, None where there is none."""
        step = self.read_status().get("step")
        return step if isinstance(step, int) else None


def open_run(runs_dir: Path, name: str) -> RunFolder:
    """Find the folder of run `name`, which must lie in `runs_dir`; raises ConfigError."""
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"RUN: found {name[:80]!r}, wanted the name of a folder in {runs_dir} (letters, digits, '.', '_' and '-')"
        )
    path = runs_dir / name
    if not path.is_dir():
        raise ConfigError(f"RUN: found no folder {path}, wanted one with model.json and train.json")
    if path.resolve().parent != runs_dir.resolve():
        raise ConfigError(f"RUN: found {path}, which leads outside {runs_dir}, wanted a folder inside it")
    return RunFolder(path)


def run_of_model_file(path: Path) -> tuple[RunFolder, int] | None:
    """Give the run and global step whose checkpoint a model file belongs to, or None for a loose file."""
    checkpoint = path.resolve().parent
    if checkpoint.name == IMPORTED and RunFolder(checkpoint.parent).model_json.is_file():
        return RunFolder(checkpoint.parent), IMPORTED_STEP
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    if match is None or checkpoint.parent.name != "checkpoints":
        return None
    return RunFolder(checkpoint.parent.parent), int(match[1])


def utc_now() -> str:
    """Give the time in UTC, for people; durations are measured with a monotonic clock elsewhere."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Give the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Make folder `target`, new or empty until now, so that it appears whole or not at all.

    Yields the folder beside it in which to write; what an interrupted attempt left there is deleted first.
    """
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.unfinished")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably: a reader, or a power cut, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that the harness wrote; nothing where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_number(value: float) -> float | None:
    """Give a number as strict JSON can hold it: null where it is not finite."""
    return value if math.isfinite(value) else None


def json_text(value: object) -> str:
    """Give a value as `write_json` writes it; NaN and Infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically; NaN and Infinity are refused."""
    write_text(path, json_text(value))


def replace_link(link: Path, target: str) -> None:
    """Point the relative symbolic link at `target` without a moment in which it is missing."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def describe_start(from_step: int, restart: int, device_names: list[str], code: Path) -> dict[str, object]:
    """Describe one start of a run for run.json: when, from where, on what, with which code and versions."""
    packages = ("torch", "numpy", "safetensors", "tiktoken", "huggingface_hub", "pydantic")
    return {
        "time": utc_now(),
        "from_step": from_step,
        "restart": restart,
        "world_size": len(device_names),
        "devices": device_names,
        "code": git_state(code),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
    }


def git_state(folder: Path) -> dict[str, object]:
    """Give the commit of the code and whether it was changed since; None where git cannot say."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": None if changed is None else changed.splitlines(),
    }
