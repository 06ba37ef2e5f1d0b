"""The soak's copies of runs that train, and its long run, whose memory, descriptors and threads are watched."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.soak_training import ENVIRONMENT, TRAIN
from harness.run.files import ROOT
from tests.helpers import final_bits, metrics, status, train_in_fork, workers, write_run, write_toy_dataset

WARM_UP = 0.2  # of the long run, before which caches still fill
KIB_A_STEP = 1.0  # the trainer may keep numbers of each step for its charts, and nothing bigger
REFUSALS = {2, 3, 4, 6}


def copy_live_runs(base: Path, draw: random.Random, copies: int, problems: list[str]) -> str:
    """Copy a run's folder again and again while it trains, and train every copy to its end."""
    write_toy_dataset(base)
    untouched = write_run(base / "untouched" / "run", {}, TRAIN)
    train_in_fork(untouched, base)
    wanted, equal, refused, from_start = final_bits(untouched), 0, 0, 0
    made: list[Path] = []
    while len(made) < copies:
        live = write_run(base / f"live-{len(made)}" / "run", {}, TRAIN)
        with workers(live, base) as (worker,):
            while worker.process.is_alive() and len(made) < copies:
                time.sleep(draw.uniform(0, 2))
                made.append(copy_slowly(live, base / f"copy-{len(made)}" / "run", draw))
    for number, copy in enumerate(made):
        from_start += not any(copy.glob("checkpoints/step-*/manifest.json"))
        with workers(copy, base) as (worker,):
            code, said = worker.wait(), worker.stderr
        if code == 0 and final_bits(copy) == wanted:
            equal += 1
        elif code in REFUSALS and "Traceback" not in said:
            refused += 1
        else:
            problems.append(f"copy {number} of a live run: status {code}, other bits or no refusal: {said[-300:]}")
        shutil.rmtree(copy.parent)
        print(f"{number + 1} copies, {equal} with the bits of the untouched run, {refused} refused", flush=True)
    return (
        f"Copies of folders of runs that trained: {copies} ({from_start} before a checkpoint was complete), trained "
        f"on to the bits of the untouched run: {equal}, refused in a line: {refused}"
    )


def copy_slowly(folder: Path, copy: Path, draw: random.Random) -> Path:
    """Copy a folder file by file, as a slow disk would; what vanishes meanwhile is left out. Returns the copy."""

    def copy_later(source: str, target: str) -> None:
        time.sleep(draw.uniform(0, 0.02))
        shutil.copy2(source, target, follow_symlinks=False)

    with suppress(shutil.Error, FileNotFoundError):  # of files that were deleted, after all others were copied
        shutil.copytree(folder, copy, symlinks=True, copy_function=copy_later)
    return copy


@dataclass(frozen=True)
class Sample:
    """What the trainer uses after some global steps."""

    steps: int
    kib: int
    """Memory of their own, without files that are mapped."""
    descriptors: int
    threads: int


def train_long(base: Path, draw: random.Random, steps: int, problems: list[str]) -> str:
    """Train for many short global steps, sample /proc, and see that nothing grows."""
    del draw
    (base / "toy").mkdir()
    tokens = (np.cumsum(np.random.default_rng(0).integers(0, 3, steps * 32 + 1000)) % 97).astype(np.uint16)
    for split in ("train", "validation"):
        save_file({"tokens": tokens}, base / "toy" / f"{split}.safetensors")
    changes = {
        "min_train_tokens": steps * 32, "gradient_accumulation_steps": 1, "checkpoint_interval": 100,
        "checkpoints_to_keep": 2, "shuffle": True, "validation_interval": 500, "validation_batches": 2,
    }  # fmt: skip
    folder = write_run(base / "runs" / "long", {"n_layers": 1}, changes)
    words = [sys.executable, "ddp_train.py", "long", str(base), "--runs-dir", str(folder.parent), "--device", "cpu"]
    samples: list[Sample] = []
    log = base / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
        while process.poll() is None:
            time.sleep(0.2)
            with suppress(OSError, ValueError, KeyError):  # not begun, or just ended
                samples.append(sample(process.pid, folder))
    if process.returncode or status(folder)["state"] != "complete" or len(metrics(folder)) != steps:
        problems.append(f"long run: status {process.returncode}: {log.read_text()[-300:]}")
    later = [found for found in samples if found.steps >= WARM_UP * steps]
    at = [found.steps for found in later]
    slopes = {
        name: float(np.polyfit(at, [getattr(found, name) for found in later], 1)[0]) if len(later) > 10 else np.nan
        for name in ("kib", "descriptors", "threads")
    }
    if not slopes["kib"] <= KIB_A_STEP:
        problems.append(f"long run: memory grows by {slopes['kib']:.2f} KiB a step")
    for name in ("descriptors", "threads"):
        if not slopes[name] * steps <= 1:
            problems.append(f"long run: {name} grow by {slopes[name] * steps:.1f} in {steps:,} steps")
    seen = {name: [getattr(found, name) for found in later] for name in slopes}
    return (
        f"A run of {steps:,} global steps and {steps // 100} checkpoints, {len(later)} samples of /proc from step "
        f"{WARM_UP * steps:,.0f} on, with slopes: memory {min(seen['kib']) / 1024:.0f} to "
        f"{max(seen['kib']) / 1024:.0f} MiB, {slopes['kib'] * 1000:+.0f} KiB in 1,000 steps (may be "
        f"{KIB_A_STEP * 1000:.0f}); "
        + "; ".join(
            f"{min(seen[name])} to {max(seen[name])} {name}, {slopes[name] * steps:+.2f} in all (may be 1)"
            for name in ("descriptors", "threads")
        )
    )


def sample(pid: int, folder: Path) -> Sample:
    """Sample a trainer; raises OSError where it has ended, ValueError before its first step."""
    with (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        steps=json.loads(whole)["step"] + 1,
        kib=int(fields["RssAnon"].split()[0]),
        descriptors=len(os.listdir(process / "fd")),
        threads=int(fields["Threads"]),
    )
