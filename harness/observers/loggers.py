"""Hands a run's metrics on to TensorBoard, Weights & Biases or trackio.

Each logger is a process of its own (`python -m harness.observers.loggers NAME RUN_FOLDER FROM_STEP`) that follows
metrics.jsonl. Training waits for none of them: a network that hangs, a full disk or a defect costs a logger, never a
step. A logger ends when the trainer closes its standard input, which the system does should the trainer be killed.
"""

import hashlib
import json
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

from harness.run.errors import ConfigError, first_line, fit_to_print
from harness.run.files import ROOT
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.status import Status

PROJECT = "gpt2-harness"
POLL_SECONDS = 1.0
# How long a trainer that ends waits for its loggers; then they have longer to finish by themselves.
CLOSE_SECONDS = 10.0
FINISH_SECONDS = 120
Line = dict[str, Any]


class Loggers:
    """The loggers that a run asked for; as a context, they are closed, and briefly waited for, at its end."""

    def __init__(self, names: Sequence[str], folder: RunFolder, environment: Mapping[str, str]) -> None:
        """Raises ConfigError where a logger's package is missing. `environment` is that of the processes."""
        lines = [
            f"{folder.train_json}: loggers: found {name}, wanted its package: pip install -e '.[{name}]'"
            for name in names
            if find_spec(name) is None
        ]
        if lines:
            raise ConfigError(*lines)
        self._names = names
        self._folder = folder
        # trackio takes its folder from the environment alone; a user who has set it compares runs there.
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
                print(f"warning: {name} is not done yet; it goes on for {FINISH_SECONDS} seconds", file=sys.stderr)
            else:
                if status < 0:  # otherwise it has said itself what was wrong
                    print(f"warning: {name} was ended by signal {-status}", file=sys.stderr)

    def start(self, from_step: int) -> None:
        """Start the loggers for the lines from global step `from_step` on; run.json must be written."""
        place = str(self._folder.path.resolve())
        for name in self._names:
            command = [sys.executable, "-m", "harness.observers.loggers", name, place, str(from_step)]
            try:
                # In a session of its own: neither Ctrl-C nor torchrun, when it ends all ranks, cuts a logger off.
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
class Run:
    """What a logger needs to know of a run."""

    folder: RunFolder
    from_step: int
    """First global step that this start trains; what an earlier start logged from there on is void."""

    @property
    def id(self) -> str:
        """A name that is the same for every start of the run, on whatever machine, and another one after --fresh."""
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
        """A name that replicates share: runs of one recipe with other seeds."""
        return str(self.record.recipe_hash)[:12]

    def place(self, name: str) -> Path:
        """Return the folder of a logger, made if need be."""
        path = self.folder.loggers / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Logger(Protocol):
    """Where lines go."""

    def log(self, step: int, values: Line) -> None:
        """Take the values of a global step, with the keys of metrics.jsonl; numbers, truth values or text."""

    def close(self, exit_code: int) -> None:
        """Finish; `exit_code` is that of the run."""


class TensorBoard:
    """Event files in runs/RUN/loggers/tensorboard."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # From purge_step on, TensorBoard drops what an earlier start has logged.
        self._writer = SummaryWriter(str(run.place("tensorboard")), purge_step=run.from_step, flush_secs=10)
        for name in ("model", "train"):
            text = "".join(f"    {line}\n" for line in json.dumps(getattr(run.record, name), indent=2).splitlines())
            self._writer.add_text(f"{name}.json", text, run.from_step)

    def log(self, step: int, values: Line) -> None:
        """Add a scalar for each number and a text for each string."""
        for key, value in values.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(key, value, step)

    def close(self, exit_code: int) -> None:
        """Write out what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, resumed under the same id; kept in runs/RUN/loggers/wandb alone where W&B cannot be reached."""

    def __init__(self, run: Run) -> None:
        import wandb

        def open_run(mode: Literal["offline"] | None) -> Any:
            settings = wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS / 2)
            return wandb.init(
                id=run.id,
                name=run.folder.path.name,
                # WANDB_PROJECT goes before.
                project=wandb.setup().settings.project or PROJECT,
                group=run.group,
                dir=str(run.place("wandb").parent),  # it adds its own name
                config={name: getattr(run.record, name) for name in ("model", "train", "plan")},
                resume="allow",
                mode=mode,
                settings=settings,
            )

        try:
            self._run = open_run(None)  # as WANDB_MODE and the login have it
        except wandb.Error as error:
            print(
                f"warning: wandb: {fit_to_print(first_line(error))} The run is kept offline: "
                f"wandb sync {run.place('wandb')}/offline-run-*",
                file=sys.stderr,
            )
            wandb.teardown()  # else the attempt goes on and holds the id
            self._run = open_run("offline")

    def log(self, step: int, values: Line) -> None:
        """Log a row; W&B keeps the first of two rows for a step, and a resumed run repeats the same."""
        self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Mark the run as finished or failed, and upload what is left."""
        self._run.finish(exit_code=exit_code)


class Trackio:
    """A run in a SQLite database, in runs/RUN/loggers/trackio or TRACKIO_DIR."""

    def __init__(self, run: Run) -> None:
        import trackio

        config = {name: getattr(run.record, name) for name in ("model", "train", "plan")}
        self._run: Any = trackio.init(PROJECT, run.id, run.group, config=config, resume="allow")
        # trackio would show a repeated step twice, and has no public name for the first step that it lacks.
        self._next_step = int(getattr(self._run, "_next_step", 0))

    def log(self, step: int, values: Line) -> None:
        """Log a row, unless an earlier start has."""
        if step >= self._next_step:
            self._run.log(values, step=step)

    def close(self, exit_code: int) -> None:
        """Write out what is left."""
        self._run.finish()


LOGGERS: dict[str, Callable[[Run], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def follow(run: Run, poll_seconds: float = POLL_SECONDS) -> Iterator[Line]:
    """Yield the lines of metrics.jsonl from the run's first step on as they come, until the trainer is gone."""
    place, next_step, is_over = 0, run.from_step, False
    while not is_over:
        # Only its end can be read from the pipe to the trainer; what was written until then is read below.
        is_over = bool(select.select([sys.stdin], [], [], poll_seconds)[0])
        if not run.folder.metrics.path.exists():
            continue
        with run.folder.metrics.path.open("rb") as file:
            file.seek(place)
            whole, newline, _ = file.read().rpartition(b"\n")
        place += len(whole) + len(newline)
        for text in whole.splitlines():
            line = json.loads(text)
            if line["step"] >= next_step:
                next_step = line["step"] + 1
                yield line


def main() -> None:
    """Follow one run for one logger; what goes wrong is said in one line, and nobody waits for it."""
    name, folder, from_step = sys.argv[1:]
    run = Run(RunFolder(Path(folder)), int(from_step))
    try:
        logger = LOGGERS[name](run)
        for line in follow(run):
            values = {key: value for key, value in line.items() if key != "step" and value is not None}
            logger.log(line["step"], values)
        signal.alarm(FINISH_SECONDS)  # a network may never answer
        exit_code = Status.read(run.folder.status_json).exit_code
        logger.close(1 if exit_code is None else exit_code)  # None: the trainer was killed
    except Exception as error:
        reason = fit_to_print(f"{type(error).__name__}: {first_line(error)}")
        print(f"warning: {name} gets no more metrics ({reason}); metrics.jsonl has them all", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
