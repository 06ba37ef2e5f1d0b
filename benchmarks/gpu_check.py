"""The first ten minutes on any GPU machine: what works there, how fast, and what was foretold. `make gpu-check`

  python -m benchmarks.gpu_check                     # all steps, on all GPUs of this machine
  python -m benchmarks.gpu_check --only training     # one of them
  python -m benchmarks.gpu_check --device cpu        # the same steps on a CPU, with a tiny model

Every step is a process of its own; one that fails is reported, and the others go on. Written to
benchmarks/results/gpu-CARD.md and .json, ready to be sent in; exit status 1 where a step failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

import ddp_train
from benchmarks import checkpoint_cost, throughput
from benchmarks.arrangements import Shape, train_config
from benchmarks.throughput import GPT2, RESULTS
from harness.engine import distributed
from harness.engine.costs import CONTEXT_GIB, GIB, cost_of
from harness.engine.gpu_peaks import peak_flops_per_second
from harness.engine.step import guarded_step
from harness.run.config import ModelConfig, TrainConfig
from harness.run.files import write_json
from harness.run.plan import Plan
from harness.run.run_folder import RunFolder
from model import fingerprint
from training.arguments import RunRequest, parse_arguments
from training.context import TrainContext, synthetic_context

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    vocab_size=997, context_length=64, emb_dim=64, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=False
)
STEP_SECONDS = 600
Found = dict[str, Any]


def main() -> int:
    """Run the steps, print, store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", action="append", default=[], choices=list(STEPS))
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=[*STEPS, "reduce"], help=argparse.SUPPRESS)  # one step, in its process
    arguments = parser.parse_args()
    launch = distributed.launch_from_environment()
    device = distributed.choose_device(arguments.device, launch)
    if arguments.step:
        step = all_reduce_rank if arguments.step == "reduce" else STEPS[arguments.step]
        found = step(device)
        if launch.is_main:  # lines of several ranks may run into each other
            print(json.dumps(found))
        return 0
    card = distributed.device_name(device)
    rows = {name: run_step(name, arguments.device) for name in arguments.only or STEPS}
    lines = [
        f"{card} x {count_of(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.platform()}",
        "",
        "| step | seconds | found |",
        "|---|---:|---|",
        *(f"| {name} | {row['seconds']:.0f} | {describe(row)} |" for name, row in rows.items()),
    ]
    machine = {"device": card, "count": count_of(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    place = arguments.results / f"gpu-{card.lower().replace(' ', '-')}"
    place.with_name(f"{place.name}.md").write_text("\n".join(lines) + "\n")
    write_json(place.with_name(f"{place.name}.json"), {"machine": machine, "steps": rows})
    return int(any("error" in row for row in rows.values()))


def run_step(name: str, device: str) -> Found:
    """Run one step in a process of its own and return what it found, or its error."""
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", device, "--step", name]
    found = last_line_of(command)
    row = {**found, "seconds": round(time.monotonic() - began, 1)}
    print(f"{name}: {describe(row)}", flush=True)
    return row


def last_line_of(command: list[str], **environment: str) -> Found:
    """Run a command and read the JSON of its last line, or return its error."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=STEP_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took over {STEP_SECONDS} seconds"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    errors = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return {"error": f"status {done.returncode}: {errors[-1]}", "output": errors[-40:]}


def describe(row: Found) -> str:
    """Return what a step found in one line."""
    if "error" in row:
        return f"FAILED: {row['error']}"
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key != "seconds")


def count_of(device: torch.device) -> int:
    """Return how many such devices this machine has; a CPU counts as two, so that ranks can speak to each other."""
    return torch.cuda.device_count() if device.type == "cuda" else 2


def shape_of(device: torch.device) -> Shape:
    """Return what is trained: GPT-2 small in the published micro-batch, or on a CPU a tiny model."""
    return Shape(GPT2, 12, 8) if device.type == "cuda" else Shape(TINY, 2, 2)


def tests(device: torch.device) -> Found:
    """Run the tests that need a GPU; on a CPU, those of the loss."""
    chosen = ["-m", "gpu", "tests"] if device.type == "cuda" else ["tests/test_lean_loss.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("; ".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) or lines[-1])
    return {"tests": lines[-1].strip("= ")}


def arrangements(device: torch.device) -> Found:
    """Time the published arrangement, each technique, and the default side by side."""
    shape = shape_of(device)
    seconds, memory = throughput.measure(throughput.arrangements(device), shape, device, rounds=5)
    peak = peak_flops_per_second(distributed.device_name(device), use_amp=True) or throughput.measured_peak(device)
    rows = throughput.summarise(seconds, memory, shape, peak)
    return {
        row.arrangement: f"{row.tokens_per_second:,.0f} tokens/s ({row.ratio:.2f} x, MFU {row.utilisation:.1%})"
        for row in rows
    }


def training(device: torch.device) -> Found:
    """Train for some steps with ddp_train.py itself, on one device and on all."""
    shape, found = shape_of(device), {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_dataset(place / "datasets" / "made-up", shape)
        for count in sorted({1, count_of(device)}):
            folder = place / "runs" / f"on-{count}"
            config = replace(train_config(shape), min_train_tokens=20 * count * shape.tokens_per_step)
            write_run(folder, shape.model, config)
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            words = [folder.name, place / "datasets", "--runs-dir", place / "runs", "--device", device.type]
            command = [sys.executable, *launcher, "ddp_train.py", *map(str, words)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"on {count}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
            lines = RunFolder(folder).metrics.read()[5:]
            found[f"on_{count}"] = (
                f"{median(line['train/tok_per_sec'] for line in lines):,.0f} tokens/s, "
                f"MFU {lines[-1]['train/mfu']}, {lines[-1]['mem/peak_gib']:.1f} GiB"
            )
    return found


def microbatch(device: torch.device) -> Found:
    """Try the largest micro-batch that the plan's estimate says fits, and others until the truth is bracketed."""
    shape, found = shape_of(device), {}
    config = train_config(shape)
    is_cuda = device.type == "cuda"
    free = torch.cuda.get_device_properties(device).total_memory / GIB if is_cuda else 2.0

    def estimate(size: int) -> float:
        plan = Plan(1, size, 1, shape.model.context_length, 1)
        return cost_of(shape.model, replace(config, microbatch_size=size), plan).peak_gib

    size = foretold = max(
        size for size in range(1, 2049) if size == 1 or estimate(size) < free - (0 if is_cuda else 1)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "trial"
        write_run(folder, shape.model, config)
        for _ in range(4):
            words = [folder.name, name, "--runs-dir", name, "--device", device.type, "--try-microbatch-size", size]
            done = subprocess.run(
                [sys.executable, "ddp_train.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
            )
            found[size] = done.returncode == 0
            if len(set(found.values())) == 2 or not is_cuda:
                break
            size = max(1, round(size * (1.1 if found[size] else 0.9)))
    words_for = {True: "trains", False: "does not fit"}
    return {"foretold": foretold, **{str(size): words_for[fits] for size, fits in found.items()}}


def determinism(device: torch.device) -> Found:
    """Train twice from the same start, by default and with deterministic kernels: are bits the same, at what cost?"""
    shape, found, seconds = shape_of(device), {}, {}
    for is_deterministic in (False, True):
        fingerprints = []
        for _ in range(2):
            torch._dynamo.reset()
            config = replace(train_config(shape), deterministic=is_deterministic)
            context = context_of(shape, config, device)
            losses_of(context, 3)
            took = [throughput.timed(lambda context=context: losses_of(context, 1), device) for _ in range(5)]  # type: ignore[misc]
            fingerprints.append(fingerprint(context.model))
        seconds[is_deterministic] = median(took)
        found["deterministic" if is_deterministic else "by_default"] = (
            "the same bits" if fingerprints[0] == fingerprints[1] else "other bits"
        )
    if found["deterministic"] != "the same bits":
        raise RuntimeError('with "deterministic": true two runs from the same start have other bits')
    return {**found, "cost_of_deterministic": f"{seconds[True] / seconds[False] - 1:.1%} of the time"}


def checkpoints(device: torch.device) -> Found:
    """Save and verify a checkpoint: how long training waits, and what goes on beside it."""
    shape = shape_of(device)
    seconds, size = checkpoint_cost.measure(shape.model, train_config(shape), device, rounds=2)
    return {"size": f"{size / 1e9:.2f} GB", **{name: f"{min(values):.2f} s" for name, values in seconds.items()}}


def curve(device: torch.device) -> Found:
    """Train a small model for 100 steps here and on the CPU, in float32: the loss curves must be one."""
    shape = Shape(TINY, 4, 1)
    config = replace(train_config(shape), use_amp=False, compile=False)
    here, there = (losses_of(context_of(shape, config, place), 100) for place in (device, torch.device("cpu")))
    largest = float(np.abs(here - there).max())
    if largest > 0.01:
        raise RuntimeError(f"losses of 100 steps differ by up to {largest:.4f} nats from the CPU's")
    found = {"float32": f"within {largest:.1e} nats of the CPU's, from {here[0]:.2f} to {here[-1]:.2f}"}
    if device.type == "cuda":
        compiled = losses_of(context_of(shape, replace(config, use_amp=True, compile=True), device), 100)
        largest = float(np.abs(compiled - there).max())
        if largest > 0.1:
            raise RuntimeError(f"compiled in bfloat16, losses differ by up to {largest:.3f} nats from the CPU's")
        found["bfloat16_compiled"] = f"within {largest:.1e} nats"
    return found


def all_reduce(device: torch.device) -> Found:
    """Add up as many bytes as the gradients have on all devices together, and give the bus bandwidth."""
    if count_of(device) == 1:
        return {"skipped": "one device"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count_of(device)}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu_check", "--device", device.type, "--step", "reduce"]
    found = last_line_of(command)
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def all_reduce_rank(device: torch.device) -> Found:
    """Be one rank of it."""
    launch = distributed.launch_from_environment()
    distributed.set_up_kernels(device, use_tf32=True, deterministic=False)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    values = torch.ones(163_009_536 if device.type == "cuda" else 100_000, device=device)
    took = [throughput.timed(lambda: dist.all_reduce(values), device) for _ in range(10)]
    dist.destroy_process_group()
    size = values.nbytes
    # A ring moves 2 (W - 1) / W times the bytes over every link.
    bandwidth = 2 * (launch.world_size - 1) / launch.world_size * size / min(took)
    return {"all_reduce": f"{size / 1e6:.0f} MB in {min(took) * 1e3:.1f} ms, bus {bandwidth / 1e9:.1f} GB/s"}


def advice(device: torch.device) -> Found:
    """Say what docs/performance.md would: peak, precision, and how to split the published global batch."""
    name = distributed.device_name(device)
    peak = peak_flops_per_second(name, use_amp=True)
    has_bfloat16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "peak": "unknown, so no MFU" if peak is None else f"{peak / 1e12:g} TFLOP/s",
        "amp_dtype": "bfloat16" if has_bfloat16 else "float16",
        "context": f"{CONTEXT_GIB} GiB counted for CUDA",
    }


STEPS: dict[str, Callable[[torch.device], Found]] = {
    "advice": advice,
    "curve": curve,
    "training": training,
    "arrangements": arrangements,
    "microbatch": microbatch,
    "determinism": determinism,
    "checkpoints": checkpoints,
    "all_reduce": all_reduce,
    "tests": tests,
}


def context_of(shape: Shape, config: TrainConfig, device: torch.device) -> TrainContext:
    """Return what ddp_train.py trains with, on made-up tokens."""
    distributed.set_up_kernels(device, use_tf32=config.use_amp, deterministic=config.deterministic)
    if not config.deterministic:
        torch.use_deterministic_algorithms(False)
    plan = Plan(1, shape.microbatch_size, shape.accumulation_steps, shape.model.context_length, 10**6)
    request = RunRequest(
        parse_arguments(None, ["made-up", "datasets"]), RunFolder(Path(os.devnull)), shape.model, config
    )
    return synthetic_context(request, plan, device)


def losses_of(context: TrainContext, steps: int) -> np.ndarray[Any, Any]:
    """Train some global steps and return their losses, float64 (steps,)."""
    losses = []
    for step in range(steps):
        losses.append(ddp_train.accumulate_gradients(context, step)[0].mean())
        guarded_step(
            context.optimizer, context.scaler, context.config.learning_rate, context.config.clipping_max_norm
        )
    return torch.stack(losses).cpu().double().numpy()


def write_dataset(folder: Path, shape: Shape) -> None:
    """Write random tokens, enough for what is trained on all devices."""
    folder.mkdir(parents=True)
    count = 25 * 8 * shape.tokens_per_step + 1
    tokens = np.random.default_rng(0).integers(0, shape.model.vocab_size, count).astype(np.uint16)
    save_file({"tokens": tokens}, folder / "train.safetensors")


def write_run(folder: Path, model: ModelConfig, config: TrainConfig) -> None:
    """Write a run's two files."""
    folder.mkdir(parents=True)
    for name, values in (("model", model), ("train", config)):
        shown = {key: value for key, value in vars(values).items() if value is not None and value != ()}
        write_json(folder / f"{name}.json", shown)


if __name__ == "__main__":
    sys.exit(main())
