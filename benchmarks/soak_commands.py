"""The soak's kills of commands that score, export, prepare data and run experiments.

A command is a fork of a process with torch in memory, in a session of its own; what it starts in turn are real
processes. Half of the kills of an experiment strike all of its processes, the others the command or what it started.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak_training import Part, send_kill
from harness.run.errors import exit_status_of
from tests.helpers import FORKS, final_bits, status, write, write_run, write_toy_dataset

Found = dict[str, str]
"""By name, a SHA-256 of what lies in its place."""
SAVE_SECONDS = 0.01  # between saves of a preparation, which has ten seconds else: a kill is to find some work done
TRAIN = {"min_train_tokens": 10 * 8 * 16, "checkpoint_interval": 3}
CHANGES = {"clip": {"train": {"clipping_max_norm": 1.0}}}


@dataclass(frozen=True)
class Job:
    """A command that is killed, in a project that lies in the current folder."""

    name: str
    module: str
    words: list[str]
    found: Callable[[Path], Found]
    """What it has put in place so far."""
    at_once: bool = False
    """Whether all that it makes must appear together."""
    starts_processes: bool = False


def kill_commands(job: Job) -> Part:
    """Return the part of the soak that kills one kind of command."""
    return lambda base, draw, kills, problems: Killing(job, base, draw, problems).kill(kills)


class Killing:
    """Kills one kind of command."""

    def __init__(self, job: Job, base: Path, draw: random.Random, problems: list[str]) -> None:
        self.job, self.draw, self.problems = job, draw, problems
        self.project, self.place = base / "project", base / "place"
        make_project(self.project)
        self.renew()
        began = time.monotonic()
        if code := self.start().wait():
            raise RuntimeError(f"untouched {job.name} ended with {code}: {self.output()}")
        self.seconds = time.monotonic() - began
        self.wanted = job.found(self.place)

    def kill(self, kills: int) -> str:
        """Kill the command so many times, complete it after every few kills, and say in one line what came of it."""
        killed = completed = equal = unfinished = 0
        while killed < kills:
            self.renew()
            for _ in range(self.draw.randint(1, 5)):
                command = self.start()
                time.sleep(self.draw.uniform(0, self.seconds))
                if not command.kill(self.victims(command)):
                    break
                killed += 1
                found = self.job.found(self.place)
                unfinished += found != self.wanted
                if not found.items() <= self.wanted.items() or (self.job.at_once and found not in ({}, self.wanted)):
                    self.complain(f"after kill {killed} it had left {sorted(found.items() - self.wanted.items())}")
            completed += 1
            equal += self.complete()
            print(f"{self.job.name}: {killed} kills, {equal} of {completed} completed and equal", flush=True)
        return (
            f"Kills during {self.job.name}: {killed} ({unfinished} left it unfinished), completed afterwards by the "
            f"same command: {completed}, with the bits of the untouched one: {equal} ({self.seconds:.1f} seconds)"
        )

    def victims(self, command: "Command") -> list[int]:
        """Choose the processes to kill."""
        group = command.processes()
        if self.job.starts_processes and self.draw.random() < 0.5:
            started = [pid for pid in group if pid != command.pid]
            return [command.pid] if self.draw.random() < 0.5 or not started else started
        return group

    def complete(self) -> bool:
        """Repeat the command until it has made everything; return whether that is right to the bit."""
        if self.job.at_once and self.job.found(self.place) == self.wanted:
            return True  # and a second one would be refused
        for _ in range(30):  # orphans of a killed command go on with a run, which the command then leaves to them
            command = self.start()
            if (code := command.wait()) != 0:
                self.complain(f"the same command again ended with {code}: {self.output()}")
                return False
            if self.wanted.keys() <= (found := self.job.found(self.place)).keys():
                break
            time.sleep(1)
        if found != self.wanted:
            wrong = {name for name, _ in found.items() ^ self.wanted.items()}
            self.complain(f"not what the untouched command leaves: {sorted(wrong)}")
        return found == self.wanted

    def complain(self, what: str) -> None:
        """Note a problem."""
        self.problems.append(f"{self.job.name}: {what}")
        print(self.problems[-1], flush=True)

    def renew(self) -> None:
        """Put a new project in place, when the last one's processes have ended."""
        if self.place.exists():
            Command.end_all_in(self.place)
            shutil.rmtree(self.place)
        shutil.copytree(self.project, self.place, symlinks=True)

    def start(self) -> "Command":
        """Start the command."""
        return Command(self.job.module, self.job.words, self.place)

    def output(self) -> str:
        """Return the end of what the last command printed."""
        return self.place.with_suffix(".log").read_text(errors="replace")[-600:]


class Command:
    """A running command, in a session of its own."""

    def __init__(self, module: str, words: list[str], place: Path) -> None:
        self._process = FORKS.Process(target=_be_the_command, args=(module, words, place))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process number."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> int:
        """Wait for its end and return its exit status; it is killed after two minutes."""
        self._process.join(120)
        if self._process.is_alive():
            self.kill(self.processes())
        assert self._process.exitcode is not None
        return self._process.exitcode

    def processes(self) -> list[int]:
        """Return it and what it started."""
        return [self.pid, *(pid for pid in sessions().get(self.pid, []) if pid != self.pid)]

    def kill(self, victims: list[int]) -> bool:
        """Kill some of its processes and wait for its end; return False where it had ended before."""
        if not self._process.is_alive():
            return False
        for pid in victims:
            send_kill(pid)
        self._process.join()
        return self._process.exitcode != 0

    @staticmethod
    def end_all_in(place: Path) -> None:
        """Kill what killed commands had started and is still running in a folder."""
        for pid in [pid for group in sessions().values() for pid in group]:
            with suppress(OSError):
                if Path(f"/proc/{pid}/cwd").readlink().is_relative_to(place):
                    send_kill(pid)
                    while Path(f"/proc/{pid}/cwd").exists():
                        time.sleep(0.01)


def sessions() -> dict[int, list[int]]:
    """Return this user's running processes by session."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found.setdefault(os.getsid(int(entry.name)), []).append(int(entry.name))
    return found


def _be_the_command(module: str, words: list[str], place: Path) -> None:
    os.setsid()
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.chdir(place)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.argv = [f"{module}.py", *words]
    if module == "prepare_dataset":
        importlib.import_module("preparation.partial_dataset").SAVE_SECONDS = SAVE_SECONDS  # type: ignore[attr-defined]
    sys.exit(exit_status_of(importlib.import_module(module).main))


def make_project(place: Path) -> None:
    """Write a trained run, data, an experiment that is planned, and texts to prepare."""
    (place / "datasets").mkdir(parents=True)
    write_toy_dataset(place / "datasets")
    for name in ("trained", "base"):
        write_run(place / "runs" / name, {}, TRAIN)
    write(place / "changes.json", CHANGES)
    draw = random.Random(1)
    texts = place / "texts"
    texts.mkdir()
    for number in range(10):
        documents = [{"text": " ".join(draw.choices(["one", "two", "three", "four"], k=300))} for _ in range(40)]
        (texts / f"{number}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for module, words in (
        ("ddp_train", ["trained", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
        (
            "experiment",
            ["plan", "base", "changes.json", "--name", "study", "--seeds", "1", "--runs-dir", "runs",
             "--test-batches", "20"],
        ),
    ):  # fmt: skip
        if code := Command(module, words, place).wait():
            raise RuntimeError(f"the project cannot be made: {module} ended with {code}")


def whole_files(folder: Path) -> Found:
    """Return all files of a folder that no name marks as unfinished."""
    found = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            found[str(path.relative_to(folder))] = _sha256(path.read_bytes())
    return found


def scores(place: Path) -> Found:
    """Return the scores of all runs, without the time at which they were made."""
    found = {}
    for path in sorted(place.glob("runs/*/evals/loss-*")):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps({**json.loads(content), "time": None}).encode()
        found[str(path.relative_to(place))] = _sha256(content)
    return found


def results(place: Path) -> Found:
    """Return the scores of all runs, and the last bits of those that say that they are complete."""
    complete = {}
    for path in sorted(place.glob("runs/*/status.json")):
        if status(path.parent)["state"] == "complete":
            complete[path.parent.name] = _sha256(json.dumps(final_bits(path.parent)).encode())
    return {**scores(place), **complete}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SCORED = ["--run", "trained", "--runs-dir", "runs", "--batches", "40", "--device", "cpu"]
JOBS = (
    Job("scoring", "test_loss", ["datasets", *SCORED], scores),
    Job(
        "export", "convert", ["export", "trained", "out", "--runs-dir", "runs", "--no-check"],
        lambda place: whole_files(place / "out"), at_once=True,
    ),
    Job(
        "preparation", "prepare_dataset",
        ["texts", "datasets/new", "--tokenizer", "train:300", "--drop-duplicates", "--workers", "2"],
        lambda place: whole_files(place / "datasets" / "new"),
    ),
    Job(
        "experiment runs", "experiment", ["run", "study", "datasets", "--runs-dir", "runs"], results,
        starts_processes=True,
    ),
)  # fmt: skip
