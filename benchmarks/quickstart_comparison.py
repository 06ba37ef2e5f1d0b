"""Compare the quickstart's recipe with nanoGPT's example for a CPU: bits per byte, in no more CPU seconds.

  python -m benchmarks.quickstart_comparison --output benchmarks/results/quickstart-comparison

Both learn the same text and are scored on the same held-out bytes, on one thread. The example's public settings are
written anew here: 4 layers, 4 heads, width 128, no biases, a tied head, single characters (here bytes, since held-out
text has characters that training never saw), 12 random crops of 64 a step, 2,000 steps, AdamW at 0.001. The
quickstart then trains as it ships, or for fewer steps where it would take more CPU seconds than these did, start and
checkpoints of its process included.
"""

import argparse
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.report.text import markdown_table
from harness.run.files import ROOT, write_text
from harness.run.run_folder import RunFolder
from harness.tokens.token_files import open_split

LAYERS, HEADS, WIDTH, BLOCK, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
PEAK_RATE, LAST_RATE, WARMUP_STEPS, WEIGHT_DECAY, BETAS, CLIPPING = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99), 1.0
VOCABULARY = 257  # bytes, and the end of a document
SEEDS = (1, 2, 3)
FILES = ("model.json", "train.json")
TRIAL_STEPS = (40, 140)  # two short trainings tell what a step costs and what a start costs


@dataclass(frozen=True)
class Result:
    """One training: its CPU seconds in user and system mode, and what it scored."""

    recipe: str
    seed: int
    steps: int
    cpu_seconds: float
    bits_per_byte: float


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) to (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions; (B, T, C)."""
        parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inputs(x).chunk(3, dim=-1))
        return self.output(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a four times wider GELU layer, each on a residual branch after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH, bias=False), Attention())
        wider, back = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.feed_forward = nn.Sequential(nn.LayerNorm(WIDTH, bias=False), wider, nn.GELU(), back)
        for module in (self.attention[1].inputs, wider):
            nn.init.normal_(module.weight, std=0.02)
        for module in (self.attention[1].output, back):  # GPT-2's: smaller where residuals add up
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches; (B, T, C)."""
        x = x + self.attention(x)
        out: Tensor = x + self.feed_forward(x)
        return out


class Example(nn.Module):
    """The example's model: ids (B, T) to logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits for the id after each position."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.blocks(x), self.tokens.weight)


def rate_at(step: int) -> float:
    """Return the example's learning rate: linear warm-up, then a cosine."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / (WARMUP_STEPS + 1)
    done = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def train_example(tokens: Tensor, seed: int) -> tuple[Example, float]:
    """Train the example's model; return it and its CPU seconds."""
    torch.manual_seed(seed)
    began, model = time.process_time(), Example()
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        at = torch.randint(len(tokens) - BLOCK, (BATCH, 1)) + torch.arange(BLOCK + 1)
        crops = tokens[at]
        logits = model(crops[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    return model, time.process_time() - began


@torch.no_grad()
def bits_per_byte(model: Example, tokens: Tensor, text_bytes: int) -> float:
    """Return the bits for each byte of the first `text_bytes` bytes that are predicted, blocks side by side."""
    ends = torch.nonzero((tokens[1:] < 256).cumsum(0) == text_bytes)[0, 0] + 2
    tokens, nats = tokens[:ends], 0.0
    for start in range(0, len(tokens) - 1, BLOCK):
        part = tokens[start : start + BLOCK + 1]
        nats += float(F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum"))
    return nats / math.log(2) / text_bytes


def train_quickstart(runs: Path, datasets: Path, seed: int, steps: int) -> float:
    """Train the quickstart's recipe for so many steps in a process of its own; return its CPU seconds."""
    model, train = (json.loads((ROOT / "runs" / "quickstart" / name).read_text()) for name in FILES)
    tokens = steps * train["microbatch_size"] * model["context_length"]
    train |= {"min_train_tokens": tokens, "random_seed": seed, "checkpoint_interval": steps}
    folder = runs / f"s{seed}-{steps}"
    folder.mkdir(parents=True)
    for name, content in zip(FILES, (model, train), strict=True):
        (folder / name).write_text(json.dumps(content))
    return train_run(runs, datasets, folder.name)


def train_run(runs: Path, datasets: Path, name: str) -> float:
    """Train a run in a process of its own; return its CPU seconds, with those of the processes it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command(["ddp_train.py", name, datasets, "--runs-dir", runs, "--device", "cpu"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command(words: list[object]) -> str:
    """Run one of the project's commands and return what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def score_run(runs: Path, datasets: Path, name: str, *options: object) -> tuple[float, int]:
    """Score a run, by default on the whole validation split; return bits per byte and how many bytes it predicted."""
    said = command(["test_loss.py", datasets, "--run", name, "--runs-dir", runs, "--device", "cpu", *options])
    bits, loss = (float(re.search(rf"{label}: ([\d.]+)", said)[1]) for label in ("Bits per byte", "dataset"))  # type: ignore[index]
    sequences, length = re.search(r"Scored ([\d,]+) sequences of ([\d,]+)", said).groups()  # type: ignore[union-attr]
    tokens = int(sequences.replace(",", "")) * int(length.replace(",", ""))
    return bits, round(tokens * loss / math.log(2) / bits)


def prepare(datasets: Path) -> tuple[Tensor, Tensor]:
    """Make both datasets of the same text, and return the bytes of both splits as ids."""
    for name, tokenizer in (("python-reference", "train:2048"), ("python-reference-bytes", "bytes")):
        words = ["python-reference", datasets / name, "--tokenizer", tokenizer, "--validation-fraction", 0.1]
        command(["prepare_dataset.py", *words])
    files = [open_split(datasets, "python-reference-bytes", split) for split in ("train", "validation")]
    train, validation = (torch.tensor(file.read(0, file.length).astype("int64")) for file in files)
    return train, validation


def compare(place: Path) -> Iterator[list[Result]]:
    """Train and score both recipes for every seed; yield all results so far after each."""
    runs, datasets, results = place / "runs", place / "datasets", list[Result]()
    train, validation = prepare(datasets)
    model_config, train_config = RunFolder(ROOT / "runs" / "quickstart").read_configs()
    shipped_steps = train_config.min_train_tokens // (train_config.microbatch_size * model_config.context_length)
    short, long = (train_quickstart(runs, datasets, 0, steps) for steps in TRIAL_STEPS)
    step_seconds = (long - short) / (TRIAL_STEPS[1] - TRIAL_STEPS[0])
    start_seconds = short - TRIAL_STEPS[0] * step_seconds
    for seed in SEEDS:
        model, seconds = train_example(train, seed)
        steps = min(shipped_steps, int((seconds - start_seconds) / step_seconds))
        own_seconds = train_quickstart(runs, datasets, seed, steps)
        bits, text_bytes = score_run(runs, datasets, f"s{seed}-{steps}")
        results.append(
            Result("nanoGPT's example", seed, STEPS, seconds, bits_per_byte(model, validation, text_bytes))
        )
        results.append(Result("quickstart", seed, steps, own_seconds, bits))
        yield results


def describe(results: list[Result]) -> str:
    """Return the results as a page."""
    rows = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        own = [result for result in results if result.recipe == recipe]
        bits = [result.bits_per_byte for result in own]
        steps = ", ".join(f"{result.steps:,}" for result in own)
        seconds = ", ".join(f"{result.cpu_seconds:.0f}" for result in own)
        each = ", ".join(f"{value:.3f}" for value in bits)
        spread = f" ± {stdev(bits):.3f}" if len(bits) > 1 else ""
        rows.append([recipe, steps, seconds, each, f"{fmean(bits):.3f}{spread}"])
    theirs, ours = (fmean(r.bits_per_byte for r in results if r.recipe == row[0]) for row in rows)
    table = markdown_table(["recipe", "steps", "CPU seconds", "bits per byte, each seed", "mean ± sd"], rows)
    summary = (
        f"The quickstart's are {1 - ours / theirs:.0%} lower, on the same bytes, in no more seconds of one thread."
    )
    return "\n".join([*table, "", summary, ""])


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="FILE.json and FILE.md are written")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for results in compare(Path(place)):
            page = describe(results)
            print(page, flush=True)
            if arguments.output is not None:
                facts = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
                document = {**facts, "results": [asdict(result) for result in results]}
                write_text(arguments.output.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
                write_text(arguments.output.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
