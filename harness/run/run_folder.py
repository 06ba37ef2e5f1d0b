"""The layout of a run's folder: its paths, its lock, and how old files are moved aside.

Only rank 0 writes into the folder. Every file but metrics.jsonl is replaced atomically, so readers never see half of
one. The content of each file is defined in the module of its format.
"""

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.run.config import ModelConfig, TrainConfig, load_run_configs
from harness.run.errors import ConfigError, nearest_hint
from harness.run.files import remove, remove_abandoned
from harness.run.locks import locked
from harness.run.metrics_file import MetricsFile

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STEP_FOLDER = re.compile(r"step-(\d{8,})")
TEMPORARY_PREFIX = ".tmp-"
MODEL_FILE = "model.safetensors"
AVERAGED_FILE = "averaged.safetensors"
"""The average of the weights, beside them where the run keeps one."""
STATE_FILE = "state.json"
IMPORTED = "imported"
IMPORTED_STEP = -1
"""Imported weights count as a checkpoint before global step 0."""


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
        """The record of what ran; see `provenance`."""
        return self.path / "run.json"

    @property
    def status_json(self) -> Path:
        """State, step, exit code and reason."""
        return self.path / "status.json"

    @property
    def metrics(self) -> MetricsFile:
        """One line per global step."""
        return MetricsFile(self.path / "metrics.jsonl")

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
        """Folder of the files of TensorBoard, W&B and trackio."""
        return self.path / "loggers"

    @property
    def tokenizer_json(self) -> Path:
        """The tokenizer of the run's data; not there for GPT-2's."""
        return self.path / "tokenizer.json"

    @property
    def imported(self) -> Path:
        """Folder of imported weights, from which the run starts."""
        return self.path / IMPORTED

    @property
    def imported_source(self) -> Path:
        """Where the imported weights came from."""
        return self.imported / "source.json"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after global step `step`, or of the imported weights."""
        return self.imported if step == IMPORTED_STEP else self.checkpoints / f"step-{step:08d}"

    def weights(self, step: int) -> Path:
        """Return the weights file of that checkpoint."""
        return self.checkpoint(step) / MODEL_FILE

    def state_json(self, step: int) -> Path:
        """Return the file of that checkpoint that holds everything but tensors."""
        return self.checkpoint(step) / STATE_FILE

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all checkpoint folders, valid or not, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        matches = (STEP_FOLDER.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def model_steps(self) -> list[int]:
        """Return the steps of all models that can be sampled or scored: imported weights, then checkpoints."""
        return [IMPORTED_STEP] * self.imported.is_dir() + self.checkpoint_steps()

    def remove_unfinished(self) -> list[str]:
        """Delete what killed processes left half written; return the names of unfinished checkpoints."""
        unfinished = list(self.checkpoints.glob(f"{TEMPORARY_PREFIX}*"))
        places = (self.path, self.checkpoints, self.charts)
        for path in [*unfinished, *(path for place in places for path in place.glob(".*.tmp"))]:
            remove(path)
        remove_abandoned(self.evals)  # where scoring may go on, whoever trains
        return sorted(path.name.removeprefix(TEMPORARY_PREFIX) for path in unfinished)

    def read_configs(self) -> tuple[ModelConfig, TrainConfig]:
        """Read both configuration files; raises ConfigError with all errors of both."""
        return load_run_configs(self.model_json, self.train_json)

    def set_aside(self, *paths: Path) -> Path | None:
        """Move those of `paths` that exist into a new folder `aside-N` and return it; deletes nothing."""
        existing = [path for path in paths if path.exists() or path.is_symlink()]
        if not existing:
            return None
        number = 1 + sum(1 for _ in self.path.glob("aside-*"))
        while os.path.lexists(aside := self.path / f"aside-{number}"):
            number += 1
        for path in existing:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; the operating system releases the lock when the process dies.

        Raises RunLockedError, naming the holder, if another process holds it.
        """
        if self.path.stat().st_mode & stat.S_IWOTH:
            print(f"warning: {self.path}: every user of this machine may write here (chmod o-w)", file=sys.stderr)
        with locked(self.path, "another trainer holds this run"):
            yield


def open_run(runs_dir: Path, name: str) -> RunFolder:
    """Find the folder of run `name`, which must lie in `runs_dir`; raises ConfigError."""
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"RUN: found {name[:80]!r}, wanted the name of a folder in {runs_dir} (letters, digits, '.', '_' and '-')"
        )
    path = runs_dir / name
    if not path.is_dir():
        names = [item.parent.name for item in runs_dir.glob("*/model.json")]
        hint = nearest_hint(name, names)
        raise ConfigError(f"RUN: found no folder {path}, wanted one with model.json and train.json{hint}")
    if path.resolve().parent != runs_dir.resolve():
        raise ConfigError(f"RUN: found {path}, which leads outside {runs_dir}, wanted a folder inside it")
    return RunFolder(path)


def run_of_model_file(path: Path) -> tuple[RunFolder, int] | None:
    """Return the run and global step of the checkpoint that a model file belongs to; None for a loose file."""
    checkpoint = path.resolve().parent
    if checkpoint.name == IMPORTED and RunFolder(checkpoint.parent).model_json.is_file():
        return RunFolder(checkpoint.parent), IMPORTED_STEP
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    if match is None or checkpoint.parent.name != "checkpoints":
        return None
    return RunFolder(checkpoint.parent.parent), int(match[1])
