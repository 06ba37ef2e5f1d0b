"""Sends a run's metrics to TensorBoard, Weights & Biases or trackio.

Each logger is a separate process (`python -m harness.observers.loggers NAME RUN_FOLDER FROM_STEP`) that follows
metrics.jsonl. Training never waits for it: a network that hangs, a full disk or a defect can only end the logger. A
logger exits when its standard input is closed, which happens even if the trainer is killed.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from harness.run.errors import ConfigError, first_line
from harness.run.files import ROOT, open_regular
from harness.run.json_lines import parse_json_lines
from harness.run.metrics_file import is_metrics
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from harness.run.streams import fit_to_print

PROJECT = "gpt2-harness"
POLL_SECONDS = 1.0
# At its end the trainer waits CLOSE_SECONDS for its loggers; they have FINISH_SECONDS to finish in the background.
CLOSE_SECONDS = 10.0
FINISH_SECONDS = 120
Line = dict[str, Any]


class Loggers:
    """The loggers that a run's configuration names; leaving the context closes them and waits briefly."""

    def __init__(self, names: Sequence[str], folder: RunFolder, environment: Mapping[str, str]) -> None:
        """Raise ConfigError if a logger's package is missing; `environment` is that of the logger processes."""
        lines = [
            f"{folder.train_json}: loggers: found {name}, wanted its package: pip install '.[{name}]'"
            for name in names
            if find_spec(name) is None
        ]
        if lines:
            raise ConfigError(*lines)
        self._names = names
        self._folder = folder
        # trackio reads its folder only from the environment; a user's own setting has precedence.
        self._environment = {"TRACKIO_DIR": str((folder.loggers / "trackio").resolve()), **environment}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for name, process in self._processes.items():
            try:
                status = process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                print(
                    f"warning: {name} is not done yet; it has {FINISH_SECONDS} more seconds",
                    file=sys.stderr,
                )
            else:
                if status < 0:  # a logger that failed by itself has printed the reason
                    print(f"warning: {name} was ended by signal {-status}", file=sys.stderr)

    def start(self, from_step: int) -> None:
        """Start the loggers for the lines from global step `from_step` on; reads run.json."""
        place = str(self._folder.path.resolve())
        for name in self._names:
            command = [sys.executable, "-m", "harness.observers.loggers", name, place, str(from_step)]
            try:
                # In a new session, so that Ctrl-C, or torchrun ending all ranks, does not kill it.
                self._processes[name] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                print(f"warning: {name} could not be started ({error})", file=sys.stderr)


@dataclass(frozen=True)
class LoggedRun:
    """What a logger needs to know about a run."""

    folder: RunFolder
    from_step: int
    """First global step of this start; what an earlier start logged from there on is outdated."""

    @property
    def id(self) -> str:
        """The same name for every start of the run, on any machine; --fresh changes it."""
        record = self.record
        first_start = f"{record.starts[0]['time']} {record.recipe_hash}"
        unique = hashlib.sha256(first_start.encode()).hexdigest()[:8]
        return f"{self.folder.path.name[:100]}-{unique}"

    @property
    def record(self) -> RunRecord:
        """What run.json holds."""
        return RunRecord.read(self.folder.run_json)

    @property
    def group(self) -> str:
        """A name that replicates share."""
        return str(self.record.recipe_hash)[:12]

    def place(self, name: str) -> Path:
        """Return a logger's folder, creating it if it is missing."""
        path = self.folder.loggers / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Logger(Protocol):
    """A destination for metrics."""

    def log(self, step: int, values: Line) -> None:
        """Log the values of a global step: numbers, booleans or text, by their keys in metrics.jsonl."""

    def close(self, exit_code: int) -> None:
        """Finish; `exit_code` is the run's."""


class TensorBoard:
    """Event files in runs/RUN/loggers/tensorboard."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        os.chdir(run.place("tensorboard"))  # TensorBoard's own code takes only paths that are UTF-8, which "." is
        # It drops what earlier starts logged from purge_step on.
        self._writer = SummaryWriter(".", purge_step=run.from_step, flush_secs=10)
        for name in ("model", "train"):
            text = "".join(f"    {line}\n" for line in json.dumps(getattr(run.record, name), indent=2).splitlines())
            self._writer.add_text(f"{name}.json", text, run.from_step)

    def log(self, step: int, values: Line) -> None:
        """Add a scalar for each number and a text for each string."""
        for key, value in values.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(key, value, step)

    def close(self, exit_code: int) -> None:
        """Flush what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, resumed under the same id; offline in runs/RUN/loggers/wandb if W&B cannot be reached."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        def open_run(mode: Literal["offline"] | None) -> Any:
            settings = wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS / 2)
            return wandb.init(
                id=run.id,
                name=run.folder.path.name,
                project=wandb.setup().settings.project or PROJECT,  # WANDB_PROJECT has precedence
                group=run.group,
                dir=str(run.place("wandb").parent),  # wandb appends "wandb"
                config={name: getattr(run.record, name) for name in ("model", "train", "plan")},
                resume="allow",
                mode=mode,
                settings=settings,
            )

        try:
            self._run = open_run(None)  # online or offline, by WANDB_MODE and the login
        except wandb.Error as error:
            print(
                f"warning: wandb: {fit_to_print(first_line(error))} The run is kept offline: "
                f"wandb sync {run.place('wandb')}/offline-run-*",
                file=sys.stderr,
            )
            wandb.teardown()  # ends the failed attempt, which would keep the id
            self._run = open_run("offline")

    def log(self, step: int, values: Line) -> None:
        """Log a row; W&B ignores a second row for a step, and a resumed run repeats the same values."""
        self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Mark the run as finished or failed, and upload what is buffered."""
        self._run.finish(exit_code=exit_code)


class Trackio:
    """A run in a SQLite database, in runs/RUN/loggers/trackio or TRACKIO_DIR."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        config = {name: getattr(run.record, name) for name in ("model", "train", "plan")}
        self._run: Any = trackio.init(PROJECT, run.id, run.group, config=config, resume="allow")
        # trackio would show a repeated step twice; the first step that it lacks has no public name.
        self._next_step = int(getattr(self._run, "_next_step", 0))

    def log(self, step: int, values: Line) -> None:
        """Log a row unless an earlier start did."""
        if step >= self._next_step:
            self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Flush what is buffered."""
        self._run.finish()


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def follow(run: LoggedRun, poll_seconds: float = POLL_SECONDS) -> Iterator[Line]:
    """Yield lines of metrics.jsonl from the run's first step on as they are written, until the trainer exits."""
    offset, next_step, is_over = 0, run.from_step, False
    while not is_over:
        # The trainer never writes to this pipe, so it is readable once the trainer has exited; its last lines follow.
        is_over = bool(select.select([sys.stdin], [], [], poll_seconds)[0])
        if not run.folder.metrics.path.exists():
            continue
        with open_regular(run.folder.metrics.path) as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        offset += len(whole) + len(newline)
        for _, line in parse_json_lines(whole + newline):
            if line is not None and is_metrics(line) and line["step"] >= next_step:
                next_step = line["step"] + 1
                yield line


def main() -> None:
    """Follow one run for one logger; prints one warning and exits if it fails."""
    name, folder, from_step = sys.argv[1:]
    run = LoggedRun(RunFolder(Path(folder)), int(from_step))
    try:
        logger = LOGGERS[name](run)
        for line in follow(run):
            values = {key: value for key, value in line.items() if key != "step" and value is not None}
            logger.log(line["step"], values)
        signal.alarm(FINISH_SECONDS)  # kills this process if a network never answers
        exit_code = Status.read(run.folder.status_json).exit_code
        logger.close(1 if exit_code is None else exit_code)  # None: the trainer was killed
    except Exception as error:
        reason = fit_to_print(f"{type(error).__name__}: {first_line(error)}")
        print(f"warning: {name} gets no more metrics ({reason}); metrics.jsonl has them all", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
