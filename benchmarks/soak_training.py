"""The soak's kills of two-process runs at random, and its races of pairs of trainers for one run.

Kills strike at moments drawn by the seed, at any time of a start. Most strike two workers that were forked from a
process with torch in memory, which makes a start quick, and hit rank 0, rank 1 or both; the launcher kills strike
runs under `torchrun --max-restarts 3`, and hit a rank, both, the launcher or everything. Whatever has died is started
again with the same command until the run is complete; then its model, optimizer, state and losses must equal those of
an untouched run to the bit. A run has lost something if they do not, or if a start went further back than
the newest checkpoint that was complete before the kill.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.run.files import ROOT
from tests.helpers import final_bits, status, workers, write_run, write_toy_dataset

STEPS = 80
INTERVAL = 5
# All that could make a resumed run differ: dropout, accumulation, float16 with its scaler, a schedule, shuffling.
TRAIN = {
    "min_train_tokens": STEPS * 8 * 16,
    "microbatch_size": 2,
    "gradient_accumulation_steps": 2,
    "checkpoint_interval": INTERVAL,
    "checkpoints_to_keep": 3,
    "use_amp": True,
    "schedule_learning_rate": True,
    "warmup_period_percent": 10,
    "clipping_max_norm": 0.5,
    "shuffle": True,
}
RANKS = ("rank 0", "rank 1", "both ranks")
VICTIMS = (*RANKS, "launcher", "everything")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
Part = Callable[[Path, random.Random, int, list[str]], str]
"""A part of the soak, given an empty folder, moments, how often, and a list of problems; returns a line."""


@dataclass
class Tally:
    """What the soak has seen."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    during_start: int = 0
    runs: int = 0
    equal_runs: int = 0
    steps_back: int = 0
    problems: list[str] = field(default_factory=list)
    pending: tuple[str, int | None, int] | None = None
    """Of the last kill: the run, the newest complete checkpoint, and the starts until then."""

    def count(self, victim: str, is_early: bool) -> None:
        """Count a kill; an early one struck before its start had begun to train."""
        self.kills[victim] += 1
        self.during_start += is_early

    @property
    def kill_count(self) -> int:
        """Kills so far."""
        return sum(self.kills.values())


def kill_runs(launcher_kills: int) -> Part:
    """Return the part of the soak that kills workers, and so many times a run under torchrun."""

    def part(base: Path, draw: random.Random, fork_kills: int, problems: list[str]) -> str:
        write_toy_dataset(base)
        tally = Tally(problems=problems)
        reference = write_run(base / "runs" / "reference", {}, TRAIN)
        untouched_seconds = run_untouched(base, reference)
        for kills, kill_one in ((fork_kills, kill_forks), (launcher_kills, kill_launch)):
            wanted = tally.kill_count + kills
            while tally.kill_count < wanted:
                folder = write_run(base / "runs" / f"killed-{tally.runs}", {}, TRAIN)
                while not is_complete(folder):
                    kill_one(base, folder, draw, tally, tally.kill_count < wanted)
                    wait_for_workers_to_leave(folder, tally)
                tally.runs += 1
                if final_bits(folder) == final_bits(reference):
                    tally.equal_runs += 1
                else:
                    tally.problems.append(f"{folder.name}: not the bits of the untouched run")
                print(f"{tally.kill_count} kills, {tally.equal_runs} of {tally.runs} runs equal", flush=True)
        return describe_kills(tally, untouched_seconds)

    return part


def race_pairs(base: Path, draw: random.Random, races: int, problems: list[str]) -> str:
    """Start pairs of trainers on one run each."""
    del draw
    write_toy_dataset(base)
    won_once, slowest_refusal = 0, 0.0
    for number in range(races):
        folder = write_run(base / "runs" / f"race-{number}", {}, TRAIN)
        refusal = race(base, folder, problems)
        won_once += refusal is not None
        slowest_refusal = max(slowest_refusal, refusal or 0.0)
        print(f"{number + 1} races, {won_once} with exactly one trainer", flush=True)
    return (
        f"Races for one run: {races}, exactly one trained: {won_once} "
        f"(slowest refusal {slowest_refusal:.1f} seconds after both were started)"
    )


def command(base: Path, folder: Path) -> list[str]:
    """Return the command that a user would repeat."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"),
        *("ddp_train.py", folder.name, str(base), "--runs-dir", str(folder.parent), "--device", "cpu"),
    ]


def launch(words: list[str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, silently."""
    silent = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=silent, stderr=silent, start_new_session=True)


def run_untouched(base: Path, folder: Path) -> float:
    """Train the reference and give the seconds that it took."""
    began = time.monotonic()
    if launch(command(base, folder)).wait() != 0:
        raise RuntimeError(f"the untouched run failed: {status(folder)}")
    return time.monotonic() - began


def kill_forks(base: Path, folder: Path, draw: random.Random, tally: Tally, kills: bool) -> None:
    """Start two workers once, kill one or both of them at a random moment, and see that the other leaves."""
    recorded = len(starts_of(folder))
    with workers(folder, base, count=2) as ranks:
        if kills:
            wait_for_the_moment(lambda: ranks[0].process.is_alive(), folder, draw, longest=1.0)
            victim = draw.choice(RANKS)
            newest = newest_complete(folder)
            before = len(starts_of(folder))
            for pid in [ranks[0].pid, ranks[1].pid] if victim == "both ranks" else [ranks[int(victim[-1])].pid]:
                send_kill(pid)
            tally.count(victim, before == recorded)
            tally.pending = (folder.name, newest, before)
            time.sleep(0.1)
            for rank in ranks:
                if rank.process.is_alive():
                    rank.send(signal.SIGTERM)  # as torchrun asks the others to leave
        for rank in ranks:
            rank.process.join(60)
            if rank.process.is_alive():
                tally.problems.append(f"{folder.name}: a worker hung for a minute after the other was killed")
    check_no_step_back(folder, tally)


def kill_launch(base: Path, folder: Path, draw: random.Random, tally: Tally, kills: bool) -> None:
    """Start the run under torchrun and kill parts of it until nothing is left to kill or it has ended."""
    recorded = len(starts_of(folder))
    process = launch(command(base, folder))
    while kills and process.poll() is None:
        wait_for_the_moment(lambda: process.poll() is None, folder, draw, longest=6.0)
        if process.poll() is not None:
            break
        victim = draw.choice(VICTIMS)
        found = workers_of(folder)
        chosen = {
            "rank 0": [pid for pid, rank in found.items() if rank == "0"],
            "rank 1": [pid for pid, rank in found.items() if rank == "1"],
            "both ranks": list(found),
            "launcher": [process.pid],
            "everything": [process.pid, *found],
        }[victim] or [process.pid]  # no worker yet: the launcher is all there is
        newest, before = newest_complete(folder), len(starts_of(folder))
        for pid in chosen:
            send_kill(pid)
        tally.count(victim, before == recorded)
        tally.pending = (folder.name, newest, before)
        if process.pid in chosen:
            process.wait()
        deadline = time.monotonic() + 60
        while process.poll() is None and len(starts_of(folder)) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        check_no_step_back(folder, tally)
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        tally.problems.append(f"{folder.name}: hung for two minutes; {status(folder)}")
        process.kill()
    check_no_step_back(folder, tally)


def check_no_step_back(folder: Path, tally: Tally) -> None:
    """See whether the first start after the last kill began after the newest checkpoint that stood then."""
    if tally.pending is None or tally.pending[0] != folder.name:
        return
    _, newest, before = tally.pending
    later = starts_of(folder)[before:]
    if not later:
        return
    tally.pending = None
    if newest is not None and int(str(later[0]["from_step"])) <= newest:
        tally.steps_back += 1
        tally.problems.append(f"{folder.name}: resumed from {later[0]['from_step']} though {newest} was complete")


def wait_for_the_moment(is_alive: Callable[[], bool], folder: Path, draw: random.Random, longest: float) -> None:
    """Wait for the moment of a kill: in one of four at any time of a start, else while the run is training."""
    deadline = time.monotonic()
    if draw.random() < 0.25:
        deadline += draw.uniform(0.0, longest)
    else:
        lines = folder / "metrics.jsonl"
        before = lines.stat().st_mtime_ns if lines.exists() else 0
        while is_alive() and (not lines.exists() or lines.stat().st_mtime_ns == before):
            time.sleep(0.002)
        deadline = time.monotonic() + draw.uniform(0.0, 1.0)
    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)


def send_kill(pid: int) -> None:
    """Send SIGKILL to a process that may have ended in the meantime."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers_of(folder: Path) -> dict[int, str]:
    """Return process numbers and ranks of the run's workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"ddp_train.py" not in words or folder.name.encode() not in words or b"torch.distributed.run" in words:
                continue
            environment = dict(pair.partition(b"=")[::2] for pair in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue  # it has just ended
        found[int(entry.name)] = environment.get(b"RANK", b"").decode()
    return found


def wait_for_workers_to_leave(folder: Path, tally: Tally) -> None:
    """Wait for orphans to notice that their launcher is gone."""
    deadline = time.monotonic() + 30
    while workers_of(folder):
        if time.monotonic() > deadline:
            tally.problems.append(f"{folder.name}: workers outlived their launcher by half a minute")
            for pid in workers_of(folder):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def newest_complete(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that has a manifest, which is written last."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(steps, default=None)


def starts_of(folder: Path) -> list[dict[str, object]]:
    """Return what run.json says of the run's starts."""
    try:
        starts: list[dict[str, object]] = json.loads((folder / "run.json").read_text())["starts"]
    except OSError:
        return []
    return starts


def is_complete(folder: Path) -> bool:
    """Say whether the run says that it is complete."""
    return (folder / "status.json").exists() and status(folder)["state"] == "complete"


def race(base: Path, folder: Path, problems: list[str]) -> float | None:
    """Start two trainers on one run at once: one must train it to its end, the other be refused.

    Returns the seconds until it was, None where that is not what happened.
    """
    began = time.monotonic()
    place = ["--runs-dir", str(folder.parent), "--device", "cpu"]
    words = [sys.executable, "ddp_train.py", folder.name, str(base), *place]
    pair = [launch(words), launch(words)]
    ends: dict[int, float] = {}
    while len(ends) < 2:
        for number, process in enumerate(pair):
            if process.poll() is not None:
                ends.setdefault(number, time.monotonic() - began)
        time.sleep(0.01)
    statuses = sorted(process.returncode for process in pair)
    if statuses == [0, 5] and is_complete(folder):
        return min(ends.values())
    problems.append(f"{folder.name}: exit statuses {statuses}, {status(folder)['state']}")
    return None


def describe_kills(tally: Tally, untouched_seconds: float) -> str:
    """Return what came of the kills, as it is printed."""
    kills = ", ".join(f"{name} {count}" for name, count in tally.kills.items())
    return "\n".join([
        f"A run: {STEPS} global steps, a checkpoint every {INTERVAL}, {untouched_seconds:.0f} seconds if untouched",
        f"Kills: {tally.kill_count} ({kills}), {tally.during_start} of them before the start had begun to train",
        f"Runs: {tally.runs}, completed with the bits of the untouched run: {tally.equal_runs}",
        f"Starts that went back beyond the newest complete checkpoint: {tally.steps_back}",
    ])  # fmt: skip
