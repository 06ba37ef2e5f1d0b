"""Feed every command what nobody would, for a while, and count what it may not do.

  python -m benchmarks.fuzz --minutes 10 --seed 1

Hypothesis draws command lines of every command and verb, and damage to the files that they read: bytes and JSON
values of configurations, checkpoints (with a manifest that agrees, half of the time), metrics, scores and token files
of a small trained run, and texts, JSON lines and Parquet to prepare. Each example runs in a fork of one process. It
may end with any documented status. It may not end with a traceback, use more than SECONDS of processor time, wait for
longer than WAIT_SECONDS, grow by more than MEBIBYTES, or print a line of over CHARACTERS.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimizer would import it in every fork
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import convert
import ddp_train
import experiment
import instruct
import prepare_dataset
import test_loss
import test_smoke
from harness.observers.charts import ChartPainter, draw
from harness.run.errors import exit_status_of
from harness.run.files import file_sha256, utc_now, write_json
from harness.run.run_folder import RunFolder
from tests.helpers import write, write_run, write_toy_dataset

SECONDS = 10  # of the processor
WAIT_SECONDS = 180  # on a busy machine, more than the seconds above
MEBIBYTES = 1024
CHARACTERS = 2100  # fit_on_a_line's 2,000, and the name of the program
STATUSES = {0, 2, 3, 4, 5, 6, 7, 8, 75}
ALLOWED_DEFECT = "training ended with status"  # of an experiment's run, whose status was documented
COMMANDS: dict[str, Callable[[], None]] = {
    "ddp_train": ddp_train.main,
    "test_loss": test_loss.main,
    "test_smoke": test_smoke.main,
    "prepare_dataset": prepare_dataset.main,
    "experiment": experiment.main,
    "convert": convert.main,
    "instruct": instruct.main,
}
VERBS = {
    "experiment": ["plan", "run", "compare", "report", "noise"],
    "convert": ["import", "export"],
    "instruct": ["respond", "judge"],
}
TEXT = st.one_of(
    # No path that leads out of the project, which the commands may write to.
    st.text(st.characters(exclude_characters="\0/~", exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["", " ", ".", "-", "--", "-1", "0", "1e-300", "1e999", "nan", "9" * 30, "x" * 5000,
                     "\x1b[31m\r\n", "\u202e", "tiny", "toy", "latest", "hf:", "hf:a/b", "/dev/null", "/dev/zero"]),
)  # fmt: skip
NUMBER = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -0.0, 1e308, 5e-324]),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)


@dataclass
class Outcome:
    """What came of one example."""

    status: int
    output: str
    seconds: float
    grown_mib: float

    def complaints(self) -> list[str]:
        """Return what it did that it may not."""
        found = []
        if "Traceback" in self.output or self.status not in STATUSES:
            last = [line for line in self.output.splitlines() if line.strip()][-1:] or [""]
            if not (self.status == 1 and ALLOWED_DEFECT in self.output):
                found.append(f"status {self.status}: {last[0][:300]}")
        if self.grown_mib > MEBIBYTES:
            found.append(f"grew by {self.grown_mib:,.0f} MiB")
        longest = max(map(len, re.split(r"[\r\n]", self.output)), default=0)
        if longest > CHARACTERS:
            found.append(f"a line of {longest:,} characters")
        return found


@dataclass
class Tally:
    """What the fuzzer has seen."""

    examples: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    """By complaint, with numbers left out, the first example that showed it."""
    most_seconds: float = 0.0
    most_mib: float = 0.0


class Fuzzer:
    """Runs examples in forks, in a copy of a small project."""

    def __init__(self, base: Path, tally: Tally) -> None:
        self.base, self.tally = base, tally
        self._place = base.with_name("example")

    def fresh(self) -> Path:
        """Return a new copy of the project: runs/tiny, datasets/toy, and texts to prepare."""
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self.base, self._place, symlinks=True)
        return self._place

    def run(self, name: str, words: list[str], shown: str) -> None:
        """Run one command; raises AssertionError with what it did that it may not."""
        outcome = in_fork(COMMANDS.get(name) or (lambda: draw(RunFolder(Path(words[0])))), words, self._place)
        tally = self.tally
        tally.examples[name] += 1
        tally.statuses[outcome.status] += 1
        tally.most_seconds = max(tally.most_seconds, outcome.seconds)
        tally.most_mib = max(tally.most_mib, outcome.grown_mib)
        for complaint in outcome.complaints():
            key = f"{name}: {re.sub(r'[0-9]+|/[^ ]*', '#', complaint)[:200]}"
            if key not in tally.findings:
                tally.findings[key] = f"{complaint}\n    {name} {words} after {shown}"[:3000]
                print(f"found: {tally.findings[key]}", flush=True)


def in_fork(main: Callable[[], object], words: list[str], place: Path) -> Outcome:
    """Run a command's main in a fork, with limits, and return what came of it."""
    log = place.with_suffix(".log")
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_command(main, words, place, log)
    status = None
    while status is None and time.monotonic() < began + WAIT_SECONDS:
        found, code, usage = os.wait4(child, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)
        status = -signal.SIGALRM
    output = log.read_text(encoding="utf-8", errors="replace")
    growth = usage.ru_maxrss / 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Outcome(status, output, usage.ru_utime + usage.ru_stime, growth)


def _be_the_command(main: Callable[[], object], words: list[str], place: Path, log: Path) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 2, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        os.chdir(place)
        sys.argv = ["command", *words]
        status = exit_status_of(main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        with contextlib.suppress(OSError):
            print(f"Traceback past every command: {error!r}", file=sys.stderr, flush=True)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def make_project(place: Path) -> None:
    """Write a run of 8 steps with its checkpoints, metrics and scores, its data, an experiment, and texts."""
    (place / "datasets").mkdir(parents=True)
    write_toy_dataset(place / "datasets")
    settings = {"min_train_tokens": 8 * 8 * 16, "checkpoint_interval": 3}
    write_run(place / "runs" / "tiny", {}, settings)
    write_run(place / "runs" / "base", {}, settings)
    write(
        place / "changes.json", {"drop": {"model": {"drop_rate": 0.0}}, "clip": {"train": {"clipping_max_norm": 1.0}}}
    )
    texts = place / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("One text.\n" * 50)
    (texts / "b.jsonl").write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(50)))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 50}), texts / "c.parquet")
    (place / "losses.csv").write_text(
        "run,recipe,init_seed,train_seed,test_loss\na,x,1,1,3.5\nb,x,2,2,3.6\nc,y,1,1,3.4\n"
    )
    steps: list[tuple[str, list[str]]] = [
        ("ddp_train", ["tiny", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
        ("test_loss", score_words("latest")),
        ("experiment", ["plan", "base", "changes.json", "--name", "study", "--runs-dir", "runs"]),
    ]
    for name, words in steps:
        done = in_fork(COMMANDS[name], words, place)
        if done.status:
            sys.exit(f"the project to damage cannot be made: {name} ended with {done.status}: {done.output}")


def score_words(name: str) -> list[str]:
    """The command line that scores a checkpoint of the run."""
    model = ["runs/tiny/model.json", f"runs/tiny/checkpoints/{name}/model.safetensors"]
    return ["datasets", *model, "--dataset", "toy", "--start-token", "0", "--batches", "1", "--device", "cpu"]


READERS: list[tuple[str, list[str]]] = [
    ("ddp_train", ["tiny", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "step-00000003", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "--dry-run", "--runs-dir", "runs", "--device", "cpu"]),
    ("test_loss", score_words("latest")),
    ("test_smoke", ["--timeline", "tiny", "--runs-dir", "runs", "--device", "cpu"]),
    ("convert", ["export", "tiny", "out", "--runs-dir", "runs", "--no-check"]),
    ("convert", ["import", "runs/tiny/checkpoints/latest/model.safetensors", "mine", "--runs-dir", "runs"]),
    ("experiment", ["plan", "tiny", "changes.json", "--name", "other", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--baseline", "tiny", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--losses", "losses.csv", "--baseline", "x", "y"]),
    ("experiment", ["compare", "--experiment", "study", "--runs-dir", "runs"]),
    ("experiment", ["report", "--baseline", "tiny", "--runs-dir", "runs"]),
    ("prepare_dataset", ["texts", "made", "--workers", "1"]),
    ("draw", ["runs/tiny"]),
]


def damage_bytes(draw_value: Callable[[Any], Any], path: Path) -> str:
    """Flip, cut, insert, zero or repeat some bytes of a file."""
    raw = path.read_bytes()
    at = draw_value(st.integers(0, max(0, len(raw) - 1)))
    kind = draw_value(st.sampled_from(["flip", "cut", "insert", "zero", "empty", "repeat"]))
    if kind == "flip" and raw:
        changed = raw[:at] + bytes([raw[at] ^ (1 << draw_value(st.integers(0, 7)))]) + raw[at + 1 :]
    elif kind == "insert":
        changed = raw[:at] + draw_value(st.binary(min_size=1, max_size=20)) + raw[at:]
    elif kind == "zero":
        length = draw_value(st.integers(1, 64))
        changed = raw[:at] + bytes(length) + raw[at + length :]
    else:
        changed = {"cut": raw[:at], "empty": b"", "repeat": raw * 2}.get(kind, raw)
    path.write_bytes(changed)
    return f"{kind} at {at} of {path.name}"


def damage_json(draw_value: Callable[[Any], Any], path: Path) -> str:
    """Replace, remove or add a value at any depth of a JSON file, or of one of its lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw_value(st.integers(0, len(lines) - 1))
    document = json.loads(lines[number])
    place, key = document, None
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw_value(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key]) or draw_value(st.booleans()):
            break
        place = place[key]
    value = draw_value(VALUE)
    if key is None or draw_value(st.integers(0, 9)) == 0:
        document = value
    elif isinstance(place, dict) and draw_value(st.integers(0, 4)) == 0:
        place.pop(key)
    else:
        place[key] = value
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return f"{key!r} = {str(value)[:200]!r} in {path.name}"


def damage_kind(draw_value: Callable[[Any], Any], path: Path) -> str:
    """Put something in place of a file that is no file."""
    kind = draw_value(st.sampled_from(["pipe", "folder", "link to itself", "link to nowhere", "device", "missing"]))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to({"link to itself": path.name, "device": "/dev/zero"}.get(kind, "nowhere"))
    return f"{kind} for {path.name}"


def reseal(checkpoint: Path) -> None:
    """Make a manifest agree with its files, as a stranger would."""
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    with contextlib.suppress(OSError):
        files = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": file_sha256(checkpoint / name)}
                 for name in names}  # fmt: skip
        write_json(checkpoint / "manifest.json", {"step": int(checkpoint.name[5:]), "files": files})


def damaged_tensors(draw_value: Callable[[Any], Any], path: Path) -> str:
    """Write a token file or a checkpoint's tensors with other names, types, shapes or values."""
    dtype = draw_value(st.sampled_from(["uint16", "int32", "uint32", "int64", "float32", "float16", "bool", "uint8"]))
    shape = draw_value(st.sampled_from([(0,), (1,), (17,), (2000,), (4, 5), ()]))
    name = draw_value(st.sampled_from(["tokens", "tok_emb.weight", "other", ""]))
    values = np.full(shape, draw_value(st.integers(-5, 200))).astype(dtype)
    save_file({name: values}, path, metadata=draw_value(st.dictionaries(TEXT, TEXT, max_size=3)) or None)
    return f"{dtype} {shape} as {name!r} in {path.name}"


def fuzz_files(fuzzer: Fuzzer, draw_value: Callable[[Any], Any]) -> None:
    """Damage files of the project, and run a command that reads them."""
    place = fuzzer.fresh()
    done = []
    for _ in range(draw_value(st.integers(1, 2))):
        files = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        path = draw_value(st.sampled_from(files))
        hows = [damage_bytes, damage_kind]
        if path.suffix in (".json", ".jsonl"):
            hows = [damage_json, damage_json, damage_json, *hows]
        if path.suffix == ".safetensors":
            hows = [damaged_tensors, *hows]
        try:
            done.append(f"{path.parent.name}: {draw_value(st.sampled_from(hows))(draw_value, path)}")
        except (ValueError, OverflowError):
            continue  # no JSON any more
        if path.parent.name.startswith("step-") and draw_value(st.booleans()):
            reseal(path.parent)
    name, words = draw_value(st.sampled_from(READERS))
    fuzzer.run(name, words, "; ".join(done))


def options_of(name: str, verb: str | None) -> list[str]:
    """Return the options that a command's --help names."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        sys.argv = ["command", *([verb] if verb else []), "--help"]
        COMMANDS[name]()
    return sorted(set(re.findall(r"--[a-z][a-z-]+", output.getvalue())) - {"--follow", "--push", "--interactive"})


def fuzz_words(fuzzer: Fuzzer, draw_value: Callable[[Any], Any]) -> None:
    """Run a command with words and options that nobody would type."""
    fuzzer.fresh()
    if draw_value(st.booleans()):
        name, words = draw_value(st.sampled_from([reader for reader in READERS if reader[0] in COMMANDS]))
        words = list(words)
        verb = words[0] if name in VERBS else None
    else:
        name = draw_value(st.sampled_from(sorted(COMMANDS)))
        verb = draw_value(st.sampled_from(VERBS[name])) if name in VERBS else None
        words = [*([verb] if verb else []), *draw_value(st.lists(TEXT, max_size=3))]
    options = OPTIONS[name, verb]
    for _ in range(draw_value(st.integers(0, 3))):
        words.append(draw_value(st.sampled_from(options)))
        if draw_value(st.booleans()):
            words.append(draw_value(st.one_of(TEXT, NUMBER.map(str)))[:100_000])
    if words and draw_value(st.integers(0, 3)) == 0:
        words[draw_value(st.integers(0, len(words) - 1))] = draw_value(TEXT)
    fuzzer.run(name, words, "nothing")


OPTIONS: dict[tuple[str, str | None], list[str]] = {}


def fuzz(minutes: float, first_seed: int, tally: Tally) -> None:
    """Draw examples until the time is over."""
    ChartPainter._start = lambda _: None  # type: ignore[method-assign]
    for name in COMMANDS:
        for verb in VERBS.get(name, [None]):  # type: ignore[list-item]
            OPTIONS[name, verb] = options_of(name, verb) or ["--help"]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        make_project(base)
        fuzzer, end, number = Fuzzer(base, tally), time.monotonic() + 60 * minutes, first_seed
        while time.monotonic() < end:
            for target in (fuzz_files, fuzz_words):
                draw_and_run(target, fuzzer, number)
            number += 1


def draw_and_run(target: Callable[..., None], fuzzer: Fuzzer, number: int) -> None:
    """Run a few dozen examples of one seed."""

    @seed(number)
    @settings(
        max_examples=5, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def example(data: Any) -> None:
        target(fuzzer, data.draw)

    example()


def report(tally: Tally, arguments: argparse.Namespace, minutes: float) -> str:
    """Return what was done and found, for people."""
    lines = [
        f"python -m benchmarks.fuzz --minutes {arguments.minutes:g} --seed {arguments.seed}",
        f"{utc_now()}, torch {torch.__version__}, Python {platform.python_version()}, {minutes:.0f} minutes",
        f"{sum(tally.examples.values()):,} examples: "
        + ", ".join(f"{name} {count:,}" for name, count in tally.examples.most_common()),
        "exit status: " + ", ".join(f"{status}: {count:,}" for status, count in sorted(tally.statuses.items())),
        f"most processor time {tally.most_seconds:.1f} s, most memory beyond the start {tally.most_mib:,.0f} MiB",
        f"findings: {len(tally.findings)}",
        *(f"- {found}" for found in tally.findings.values()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fuzz, print and store what was found; exits with status 1 where that is something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    tally, began = Tally(), time.monotonic()
    fuzz(arguments.minutes if math.isfinite(arguments.minutes) else 10, arguments.seed, tally)
    text = report(tally, arguments, (time.monotonic() - began) / 60)
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)
    sys.exit(bool(tally.findings))


if __name__ == "__main__":
    main()
