"""Running the commands as a user does, and reading what they leave."""

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from harness.engine import checkpoint
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import CheckpointMetadata, open_checkpoint, open_weights
from harness.run.config import load_model_config
from harness.run.errors import exit_status_of
from harness.run.run_folder import MODEL_FILE, RunFolder
from harness.run.train_state import TrainState
from model import GPTModel, model_of

ROOT = Path(__file__).parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1"}
STARTS = itertools.count()
# One process imports torch, once, and every worker is a fork of it: a start takes a tenth of a second, not seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ddp_train", "torch._dynamo"])  # the optimizer would import the second each time

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
TINY_TRAIN: dict[str, Any] = {
    "dataset": "toy",
    "min_train_tokens": 20 * 8 * 16,  # 20 global steps of 8 sequences
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 2,
    "gradient_accumulation_steps": 4,
    "checkpoint_interval": 5,
    "learning_rate": 0.01,
    "use_amp": False,
}
# What could make a resumed run differ: dropout, accumulation, float16 and its scaler, a schedule, shuffling.
DEMANDING: dict[str, Any] = {
    "min_train_tokens": 30 * 4 * 16,  # 30 global steps of 4 sequences, saved after 0, 3, 6, ... 27 and 29
    "microbatch_size": 1,
    "gradient_accumulation_steps": None,
    "global_batch_size": 4,
    "checkpoint_interval": 3,
    "use_amp": True,
    "schedule_learning_rate": True,
    "warmup_period_percent": 10,
    "clipping_max_norm": 0.5,
    "shuffle": True,
    "validation_interval": 7,
    "validation_batches": 1,
}
LAST_STEP = 29

# The keys that have no default, and no other.
REQUIRED_TRAIN: dict[str, Any] = {
    "dataset": "toy",
    "min_train_tokens": 2560,
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 6,
    "checkpoint_interval": 5,
}


def load_model(model_json: Path, safetensors_file: Path) -> GPTModel:
    """Load a model for evaluation on the CPU."""
    return model_of(load_model_config(model_json), open_weights(safetensors_file), torch.device("cpu"))


def write(path: Path, value: object) -> Path:
    """Write a JSON file and give its path."""
    path.write_text(json.dumps(value))
    return path


def write_toy_dataset(datasets_dir: Path) -> None:
    """Write dataset `toy`: ids below 97 with a pattern that a tiny model can learn."""
    (datasets_dir / "toy").mkdir()
    generator = np.random.default_rng(0)
    tokens = (np.cumsum(generator.integers(0, 3, 30_000)) % 97).astype(np.uint16)
    save_file({"tokens": tokens[:25_000]}, datasets_dir / "toy" / "train.safetensors")
    save_file({"tokens": tokens[25_000:]}, datasets_dir / "toy" / "validation.safetensors")


def write_run(folder: Path, model: dict[str, Any], train: dict[str, Any]) -> Path:
    """Write a run folder with the tiny configuration, changed as asked, and give it; None leaves a key out."""
    folder.mkdir(parents=True)
    for name, values in (("model.json", {**TINY_MODEL, **model}), ("train.json", {**TINY_TRAIN, **train})):
        write(folder / name, {key: value for key, value in values.items() if value is not None})
    return folder


def write_demanding(folder: Path, **train: Any) -> Path:
    """Write a run folder with the tiny model and everything that could make a resumed run differ, and give it."""
    return write_run(folder, {"n_layers": 1}, {**DEMANDING, **train})


def command(script: str, *words: object, processes: int | None = None, restarts: int = 0) -> list[str]:
    """Return the command line of a script, under torchrun where `processes` is given."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max-restarts={restarts}"]
    return [*launcher, script, *map(str, words)]


def run(
    script: str, *words: object, processes: int | None = None, check: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and assert its exit status, unless `check` is None."""
    done = subprocess.run(
        command(script, *words, processes=processes),
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert check is None or done.returncode == check, done.stderr
    return done


def train(folder: Path, datasets_dir: Path, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train a run on the CPU, by its folder."""
    place = ("--runs-dir", folder.parent, "--device", "cpu")
    return run("ddp_train.py", folder.name, datasets_dir, *words, *place, **options)


def start_process(
    script: str, *words: object, processes: int | None = None, restarts: int = 0, **environment: str
) -> subprocess.Popen[str]:
    """Start a script in a process group of its own, and do not wait."""
    return subprocess.Popen(
        command(script, *words, processes=processes, restarts=restarts),
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_training(
    folder: Path, datasets_dir: Path, processes: int | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start training a run on the CPU, as `start_process` does."""
    place = ("--runs-dir", folder.parent, "--device", "cpu")
    return start_process("ddp_train.py", folder.name, datasets_dir, *place, processes=processes, **options)


class Worker:
    """A process that does as `python ddp_train.py` does, and may be killed as that may; a fork, to start at once.

    `module` is another command. What it prints goes to a file. `before`, a function at the top of a module, is called
    in it first and given `arguments`. Charts are not drawn. With `launched`, the process believes that torchrun
    started it.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        environment: dict[str, str],
        launched: bool = False,
        before: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
        module: str = "ddp_train",
    ) -> None:
        self.log = log
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()  # it may be killed before it gets that far
        job = (words, log, environment, launched, before, arguments, module)
        self.process = FORKS.Process(target=_be_the_command, args=job, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        """Its process number."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 90) -> int:
        """Wait for its end, at most so long, and give its exit status; minus the signal's number if one killed it."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"still runs after {seconds} seconds: {self.stderr}"
        return status

    def end(self) -> None:
        """Kill it if it still runs, even if it was stopped."""
        self.process.kill()
        self.process.join()

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self.log.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        """What it has complained about."""
        return self.log.with_suffix(".err").read_text()


def _be_the_command(
    words: list[str],
    log: Path,
    environment: dict[str, str],
    launched: bool,
    before: Callable[..., None] | None,
    arguments: tuple[Any, ...],
    module: str,
) -> None:
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what was printed outlives a kill
    os.environ.update({**OFFLINE, **environment})
    import ddp_train
    from harness.observers.charts import ChartPainter

    ddp_train.launcher = os.getppid()  # the fork's, not that of the process that imported it
    if launched:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
    ChartPainter._start = lambda _: None  # type: ignore[method-assign]
    sys.argv = [f"{module}.py", *words]
    if before is not None:
        before(*arguments)
    main = importlib.import_module(module).main
    sys.exit(exit_status_of(main, speaks=environment.get("RANK", "0") == "0"))


@contextmanager
def workers(
    folder: Path, datasets_dir: Path, *more: object, count: int = 1, restart: int = 0, **options: Any
) -> Iterator[list[Worker]]:
    """Start `count` ranks that train a run together, as torchrun would; whatever still runs at the end is killed.

    `fault` is the TRAIN_FAULT of all of them; other options are those of Worker.
    """
    words = [folder.name, str(datasets_dir), *map(str, more), "--runs-dir", str(folder.parent), "--device", "cpu"]
    environment = {"TRAIN_FAULT": options.pop("fault")} if "fault" in options else {}
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {name: str(value) for name, value in shared.items()}
        options.setdefault("launched", True)
    environment["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    started: list[Worker] = []
    number = next(STARTS)
    try:
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            log = folder.parent / f"{folder.name}-start-{number}-rank-{rank}"
            started.append(Worker(words, log, {**environment, **place}, **options))
        yield started
    finally:
        for worker in started:
            worker.end()


def train_in_fork(folder: Path, datasets_dir: Path, *more: object, check: int = 0, **options: Any) -> list[Worker]:
    """Train as `workers` does, to the end; assert every rank's exit status."""
    with workers(folder, datasets_dir, *more, **options) as started:
        deadline = time.monotonic() + 600
        for worker in started:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        statuses = [worker.process.exitcode for worker in started]
    assert statuses == [check] * len(started), [worker.stderr for worker in started]
    return started


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict[str, Any]:
    """Read a run's status."""
    value: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return value


def final_bits(folder: Path) -> dict[str, Any]:
    """Return what must be equal to the bit between two runs: the last model, optimizer and scaler, and every loss."""
    last = folder / "checkpoints" / "latest"
    state = json.loads((last / "state.json").read_text())
    del state["train_state"]["elapsed_seconds"]
    hashes = {
        name: hashlib.sha256((last / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    losses = [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in metrics(folder)]
    return {**hashes, "state": state, "losses": losses}


def save_weights(folder: Path, step: int, weights: dict[str, torch.Tensor], **state: Any) -> None:
    """Write a checkpoint of given weights into a run's folder, as the trainer would after global step `step`."""
    done = TrainState(**{"next_step": step + 1, "optimizer_steps": step + 1, **state})
    metadata = CheckpointMetadata(done, {}, ResumeIdentity({}))
    tensors = {MODEL_FILE: weights, "optimizer.safetensors": {}}
    checkpoint.write(RunFolder(folder), checkpoint.Snapshot(metadata, tensors))


def strict_json(text: str) -> Any:
    """Read JSON as its standard has it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_tidy(folder: Path) -> None:
    """Assert that nothing unfinished lies about, that links lead somewhere, and that every JSON file is strict."""
    assert not list(folder.rglob(".tmp-*"))
    assert not list(folder.rglob(".*.tmp"))
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict_json(text)
    for link in ("latest", "best"):
        open_checkpoint((folder / "checkpoints" / link).resolve())


def assert_same_run(folder: Path, reference: Path) -> None:
    """Assert that a run is complete, tidy, and to the bit what a run is that nothing befell."""
    assert status(folder)["state"] == "complete", status(folder)
    assert_tidy(folder)
    assert final_bits(folder) == final_bits(reference)
