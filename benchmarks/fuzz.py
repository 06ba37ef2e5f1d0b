"""Feed every command what nobody would, for a while, and count what it may not do.

  python -m benchmarks.fuzz --minutes 10 --seed 1

Hypothesis draws command lines of every command and verb, and damage to the files that they read: bytes and JSON
values of configurations, checkpoints (with a manifest that agrees, half of the time), metrics, scores, token files
and tokenizers of small trained runs, runs of the published harness, exported models, what is typed, and texts, JSON
lines and Parquet to prepare. Each example runs in a fork of one process. It may end with any documented status. It
may not end with a traceback, use more than SECONDS of processor time, wait for longer than WAIT_SECONDS, need over
MEBIBYTES more than at its start, or print a line of over CHARACTERS or a control character.
"""

import argparse
import contextlib
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
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # the optimizer would import it in every fork
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz_examples import PROJECT, DrawValue, Example, damaged_files, strange_words, write_project
from harness.observers.charts import ChartPainter
from harness.run.errors import exit_status_of
from harness.run.files import utc_now
from study import following

SECONDS = 10  # of the processor
WAIT_SECONDS = 180  # on a busy machine, more than the seconds above
MEBIBYTES = 1024
CHARACTERS = 2100  # fit_on_a_line's 2,000, and the name of the program
STATUSES = {0, 2, 3, 4, 5, 6, 7, 8, 75, 130}
CONTROL = re.compile("[\0\x1b\x9b\u202e]")
"""What a terminal obeys; a few of those that are never to be printed."""
ALLOWED_DEFECT = "training ended with status"  # of an experiment's run, whose status was documented


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
        if control := CONTROL.search(self.output):
            found.append(f"printed {control[0]!r}")
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
        write_project(base)
        for name, words in PROJECT:
            done = in_fork(Example(name, words, ""), base)
            if done.status:
                sys.exit(f"the project to damage cannot be made: {name} ended with {done.status}: {done.output}")

    def run(self, make: Callable[[Path, DrawValue], Example], draw_value: DrawValue) -> None:
        """Make an example in a new copy of the project, run it, and note what it did that it may not."""
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self.base, self._place, symlinks=True)
        example, tally = make(self._place, draw_value), self.tally
        outcome = in_fork(example, self._place)
        tally.examples[example.name] += 1
        tally.statuses[outcome.status] += 1
        tally.most_seconds = max(tally.most_seconds, outcome.seconds)
        tally.most_mib = max(tally.most_mib, outcome.grown_mib)
        for complaint in outcome.complaints():
            key = f"{example.name}: {re.sub(r'[0-9]+|/[^ ]*', '#', complaint)[:200]}"
            if key not in tally.findings:
                tally.findings[key] = f"{complaint}\n    {example.name} {example.words} after {example.damage}"[:3000]
                print(f"found: {tally.findings[key]}", flush=True)


def in_fork(example: Example, place: Path) -> Outcome:
    """Run an example in a fork, with limits, and return what came of it."""
    log = place.with_suffix(".log")
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, str(peak_kib()).encode())
        _be_the_command(example, place, log)
    kib_at_start = int(os.read(reading, 20))
    for end in (reading, writing):
        os.close(end)
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
    # The highest of the fork's and of what it started; pages of libraries that it touches anew are in it.
    growth = (usage.ru_maxrss - kib_at_start) / 1024
    return Outcome(status, output, usage.ru_utime + usage.ru_stime, growth)


def peak_kib() -> int:
    """Return the most memory that this process has had; that of its parent does not count."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _be_the_command(example: Example, place: Path, log: Path) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        typed = os.memfd_create("typed")
        os.write(typed, example.typed.encode())
        os.lseek(typed, 0, os.SEEK_SET)
        os.dup2(typed, 0)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 2, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        os.chdir(place)
        sys.argv = ["command", *example.words]
        status = exit_status_of(example.main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        with contextlib.suppress(OSError):
            print(f"Traceback past every command: {error!r}", file=sys.stderr, flush=True)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def fuzz(minutes: float, first_seed: int, tally: Tally) -> None:
    """Draw examples until the time is over."""
    ChartPainter._start = lambda _: None  # type: ignore[method-assign]
    following.time = SimpleNamespace(sleep=_interrupt)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as temporary:
        fuzzer, end, number = Fuzzer(Path(temporary) / "base", tally), time.monotonic() + 60 * minutes, first_seed
        while time.monotonic() < end:
            for make in (damaged_files, strange_words):
                draw_and_run(make, fuzzer, number)
            number += 1


def _interrupt(seconds: float) -> None:
    """Do as a user who has seen the first page of a report that goes on."""
    raise KeyboardInterrupt


def draw_and_run(make: Callable[[Path, DrawValue], Example], fuzzer: Fuzzer, number: int) -> None:
    """Run a few dozen examples of one seed."""

    @seed(number)
    @settings(
        max_examples=5, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def example(data: Any) -> None:
        fuzzer.run(make, data.draw)

    example()


def report(tally: Tally, arguments: argparse.Namespace, minutes: float) -> str:
    """Return what was done and found, for people."""
    lines = [
        f"python -m benchmarks.fuzz --minutes {arguments.minutes:g} --seed {arguments.seed}",
        f"{utc_now()}, torch {torch.__version__}, Python {platform.python_version()}, {minutes:.0f} minutes",
        f"{sum(tally.examples.values()):,} examples: "
        + ", ".join(f"{name} {count:,}" for name, count in tally.examples.most_common()),
        "exit status: " + ", ".join(f"{status}: {count:,}" for status, count in sorted(tally.statuses.items())),
        f"most processor time {tally.most_seconds:.1f} s, "
        f"most memory beyond what an example began with {tally.most_mib:,.0f} MiB",
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
