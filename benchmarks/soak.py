"""Kill a two-process run at random, many times, and race pairs of trainers for one run; count what was lost.

  python -m benchmarks.soak --kills 200 --races 50 --seed 1

Every kill strikes a run under `torchrun --max-restarts 3` at a moment drawn by the seed, somewhere between its launch
and its end, and hits one rank, both, the launcher, or everything. Whatever has died is started again with the same
command until the run is complete; then its model, optimizer, state and losses must equal those of an untouched run to
the bit. A run counts as having lost something if they do not, or if a start went further back than the
newest checkpoint that was complete before the kill.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.helpers import final_bits, status, write_run, write_toy_dataset

ROOT = Path(__file__).parent.parent
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
VICTIMS = ("rank 0", "rank 1", "both ranks", "launcher", "everything")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Tally:
    """What the soak has seen."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    during_start: int = 0
    runs: int = 0
    equal_runs: int = 0
    steps_back: int = 0
    races: int = 0
    won_once: int = 0
    slowest_refusal: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def kill_count(self) -> int:
        """Kills so far."""
        return sum(self.kills.values())


def main() -> None:
    """Soak, print the tally, and exit with status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--races", type=int, default=50, help="pairs of trainers started together on one run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the printed result here too")
    arguments = parser.parse_args()
    draw, tally, began = random.Random(arguments.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        base = Path(place)
        write_toy_dataset(base)
        reference = write_run(base / "runs" / "reference", {}, TRAIN)
        untouched_seconds = run_untouched(base, reference)
        while tally.kill_count < arguments.kills:
            folder = write_run(base / "runs" / f"killed-{tally.runs}", {}, TRAIN)
            kill_until_complete(base, folder, draw, tally, arguments.kills)
            tally.runs += 1
            if final_bits(folder) == final_bits(reference):
                tally.equal_runs += 1
            else:
                tally.problems.append(f"{folder.name}: not the bits of the untouched run")
            print(f"{tally.kill_count} kills, {tally.equal_runs} of {tally.runs} runs equal", flush=True)
        for number in range(arguments.races):
            race(base, write_run(base / "runs" / f"race-{number}", {}, TRAIN), tally)
    text = describe(tally, arguments.seed, untouched_seconds, time.monotonic() - began)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.exit(1 if tally.problems else 0)


def command(base: Path, folder: Path) -> list[str]:
    """Give the command that a user would repeat."""
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


def kill_until_complete(base: Path, folder: Path, draw: random.Random, tally: Tally, kills: int) -> None:
    """Train a run, killing it now and then until the tally has enough kills, and starting it again until complete."""
    while not is_complete(folder):
        process = launch(command(base, folder))
        while process.poll() is None and tally.kill_count < kills:
            wait_for_the_moment(process, folder, draw)
            if process.poll() is not None:
                break
            kill(process, folder, draw.choice(VICTIMS), tally)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            tally.problems.append(f"{folder.name}: hung for two minutes; {status(folder)}")
            process.kill()
        wait_for_workers_to_leave(folder, tally)


def wait_for_the_moment(process: subprocess.Popen[bytes], folder: Path, draw: random.Random) -> None:
    """Wait for the moment of the next kill: in one of four at any time of a start, else while the run is training."""
    if draw.random() < 0.25:
        sleep_while_alive(process, draw.uniform(0.0, 6.0))
        return
    lines = folder / "metrics.jsonl"
    before = lines.stat().st_mtime_ns if lines.exists() else 0
    while process.poll() is None and (not lines.exists() or lines.stat().st_mtime_ns == before):
        time.sleep(0.005)
    sleep_while_alive(process, draw.uniform(0.0, 1.0))


def sleep_while_alive(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Sleep, but not beyond the process's end."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes], folder: Path, victim: str, tally: Tally) -> None:
    """Send SIGKILL to a victim, and note what stood on disk."""
    workers = workers_of(folder)
    newest = newest_complete(folder)
    chosen = {
        "rank 0": [pid for pid, rank in workers.items() if rank == "0"],
        "rank 1": [pid for pid, rank in workers.items() if rank == "1"],
        "both ranks": list(workers),
        "launcher": [process.pid],
        "everything": [process.pid, *workers],
    }[victim]
    if not chosen:
        tally.during_start += 1  # no worker yet: the launcher is all there is to kill
        chosen = [process.pid]
    for pid in chosen:
        with suppress(ProcessLookupError):  # it ended by itself in the meantime
            os.kill(pid, signal.SIGKILL)
    tally.kills[victim] += 1
    starts_before = len(starts_of(folder))
    if process.pid in chosen:
        process.wait()
    else:
        deadline = time.monotonic() + 60
        while process.poll() is None and len(starts_of(folder)) == starts_before and time.monotonic() < deadline:
            time.sleep(0.02)
    later = starts_of(folder)[starts_before:]
    if later and newest is not None and int(str(later[0]["from_step"])) <= newest:
        tally.steps_back += 1
        tally.problems.append(f"{folder.name}: resumed from {later[0]['from_step']} though {newest} was complete")


def workers_of(folder: Path) -> dict[int, str]:
    """Give process numbers and ranks of the run's workers."""
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
    """Give the step of the newest checkpoint that has a manifest, which is written last."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(steps, default=None)


def starts_of(folder: Path) -> list[dict[str, object]]:
    """Give what run.json says of the run's starts."""
    try:
        starts: list[dict[str, object]] = json.loads((folder / "run.json").read_text())["starts"]
    except OSError:
        return []
    return starts


def is_complete(folder: Path) -> bool:
    """Say whether the run says that it is complete."""
    return (folder / "status.json").exists() and status(folder)["state"] == "complete"


def race(base: Path, folder: Path, tally: Tally) -> None:
    """Start two trainers on one run at once: one must train it to its end, the other be refused in seconds."""
    began = time.monotonic()
    words = [
        sys.executable,
        "ddp_train.py",
        folder.name,
        str(base),
        "--runs-dir",
        str(folder.parent),
        "--device",
        "cpu",
    ]
    pair = [launch(words), launch(words)]
    ends: dict[int, float] = {}
    while len(ends) < 2:
        for number, process in enumerate(pair):
            if process.poll() is not None:
                ends.setdefault(number, time.monotonic() - began)
        time.sleep(0.01)
    statuses = sorted(process.returncode for process in pair)
    tally.races += 1
    if statuses == [0, 5] and is_complete(folder):
        tally.won_once += 1
        tally.slowest_refusal = max(tally.slowest_refusal, min(ends.values()))
    else:
        tally.problems.append(f"{folder.name}: exit statuses {statuses}, {status(folder)['state']}")


def describe(tally: Tally, seed: int, untouched_seconds: float, seconds: float) -> str:
    """Give the result as it is printed."""
    kills = ", ".join(f"{name} {count}" for name, count in tally.kills.items())
    lines = [
        f"Soak of {datetime.now(UTC):%Y-%m-%d}, seed {seed}, {seconds / 60:.0f} minutes",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} CPUs",
        f"A run: {STEPS} global steps, a checkpoint every {INTERVAL}, {untouched_seconds:.0f} seconds if untouched",
        f"Kills: {tally.kill_count} ({kills}), {tally.during_start} of them before a worker existed",
        f"Runs: {tally.runs}, completed with the bits of the untouched run: {tally.equal_runs}",
        f"Starts that went back beyond the newest complete checkpoint: {tally.steps_back}",
        f"Races for one run: {tally.races}, exactly one trained: {tally.won_once} "
        f"(slowest refusal {tally.slowest_refusal:.1f} seconds after both were started)",
        f"Lost: {len(tally.problems)}",
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in tally.problems)])


if __name__ == "__main__":
    main()
