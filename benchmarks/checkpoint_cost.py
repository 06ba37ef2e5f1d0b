"""What does a checkpoint cost? Saves the 163M-parameter model with its optimizer (2 GB) and verifies it, repeatedly.

  python -m benchmarks.checkpoint_cost --rounds 5 --device auto

Training waits while a snapshot is taken; writing, flushing and hashing go on beside it. The fraction of time that
training waits follows for an interval of 617 global steps of 98,304 tokens, at throughputs
that were published for this model and at any given with --tokens-per-second. Results, with the machine's
description, go to benchmarks/results/checkpoint_cost.json.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.amp.grad_scaler import GradScaler

from harness.engine import checkpoint, distributed
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import open_checkpoint
from harness.engine.optimizers import make_optimizer
from harness.run.config import ModelConfig, TrainConfig
from harness.run.files import RUNS, write_json
from harness.run.run_folder import RunFolder
from harness.run.train_state import TrainState
from model import initialise, uninitialized_model

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"
RUN = RunFolder(RUNS / "8xa100m40-baseline")
INTERVAL_STEPS, TOKENS_PER_STEP = 617, 98_304
TAKE, WRITE, VERIFY = "take (training waits)", "write, flush and hash (beside training)", "verify (at a resume)"
PUBLISHED = {"8x A100 40 GB, published": 285_420, "RTX 3090, published": 22_285}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--tokens-per-second", type=float, action="append", default=[])
    arguments = parser.parse_args()
    device = distributed.choose_device(arguments.device, distributed.launch_from_environment())
    seconds, size = measure(*RUN.read_configs(), device, arguments.rounds, arguments.folder)
    typical = {name: median(values) for name, values in seconds.items()}
    speeds = PUBLISHED | {f"{value:,.0f} tokens/s": value for value in arguments.tokens_per_second}
    fractions = {name: fraction(typical[TAKE], speed) for name, speed in speeds.items()}
    print(f"{size / 1e9:.2f} GB a checkpoint, {arguments.rounds} rounds on {distributed.device_name(device)}")
    for name, value in typical.items():
        print(f"{name:<{len(WRITE)}} {value:6.2f} s (from {min(seconds[name]):.2f} to {max(seconds[name]):.2f})")
    for name, value in fractions.items():
        print(f"{value:6.2%} of the time in checkpoints every {INTERVAL_STEPS} steps ({name})")
    machine = {"device": distributed.device_name(device), "torch": torch.__version__, "platform": platform.platform()}
    write_json(RESULTS, {"machine": machine, "bytes": size, "seconds": seconds, "fraction_of_time": fractions})


def measure(
    model_config: ModelConfig, config: TrainConfig, device: torch.device, rounds: int, place: Path | None = None
) -> tuple[dict[str, list[float]], int]:
    """Save and verify a model with its optimizer; return the seconds of every part, and a checkpoint's bytes."""
    model = uninitialized_model(model_config).to(device)
    initialise(model, 42)
    optimizer, scaler = make_optimizer(model, config, device), GradScaler(device.type, enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now it has its state
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = RunFolder(Path(name))
        seconds: dict[str, list[float]] = {TAKE: [], WRITE: [], VERIFY: []}
        state = TrainState()
        for step in range(rounds):
            state.count(TOKENS_PER_STEP, 0.0, was_skipped=False)
            snapshots: list[checkpoint.Snapshot] = []
            actions: dict[str, Callable[[], object]] = {
                TAKE: lambda taken=snapshots: taken.append(
                    checkpoint.snapshot(model, optimizer, scaler, state, ResumeIdentity({}))
                ),
                WRITE: lambda taken=snapshots: checkpoint.save(folder, taken[0], 2, False),
                VERIFY: partial(open_checkpoint, folder.checkpoint(step)),
            }
            for name, action in actions.items():
                seconds[name].append(timed(action))
        size = sum(path.stat().st_size for path in folder.checkpoint(rounds - 1).iterdir())
    return seconds, size


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def fraction(save_seconds: float, tokens_per_second: float) -> float:
    """Return the share of all time that training waits."""
    training = INTERVAL_STEPS * TOKENS_PER_STEP / tokens_per_second
    return save_seconds / (save_seconds + training)


if __name__ == "__main__":
    main()
