"""Foretell tokens/s on cards that were not at hand, from generated code: what a measurement can prove wrong.

  python -m benchmarks.predict             # from the bytes counted in benchmarks/results/moved-bytes.json
  python -m benchmarks.predict --count     # counts them anew: takes a CUDA build of torch, no GPU

A micro-batch's time is the sum of its kernels' times. A kernel that Inductor wrote moves its tensors once, at the
memory's realistic bandwidth; a matrix product takes its FLOPs at a realistic rate, attention likewise, counting the
causal half; every launch costs 2.5 microseconds that nothing hides. AdamW, the gradient norm and clipping move 44
bytes a parameter once a global step of 96 sequences. Bytes are counted for 2 and 4 blocks and continued to 12. The
rates are assumptions (`CARDS`). Written to benchmarks/results/predicted.md and .json.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

import torch

from benchmarks.cuda_check import Case, programs
from benchmarks.generated_code import Program
from benchmarks.throughput import GPT2, RESULTS
from harness.engine.gpu_peaks import peak_flops_per_second
from harness.engine.loss import VOCAB_MULTIPLE
from harness.run.files import write_json
from harness.run.model_size import count_parameters, flops_per_token

LAUNCH_SECONDS = 2.5e-6
OPTIMIZER_BYTES = 44
STEP_TOKENS = 96 * 1024
COUNTED = RESULTS / "moved-bytes.json"


@dataclass(frozen=True)
class Card:
    """What a card is assumed to reach: products of these shapes, attention of head size 64, and memory."""

    name: str
    product_tflops: float
    attention_tflops: float
    gigabytes_per_second: float
    micro_batches: tuple[int, ...]
    goal: float
    """Tokens/s."""


# Products are taken to reach 77% of the data sheet's peak on an A100, 65% on an H100 and 71% on an H200, whose clocks
# fall under full load, and 75% on a 3090; attention, with heads of 64 and 1,024 tokens, 29%, 25% and 56%; memory 85%.
CARDS = (
    Card("NVIDIA A100-SXM4-40GB", 240, 90, 0.85 * 1555, (12, 64), 188_000),
    Card("NVIDIA H100 80GB HBM3", 640, 250, 0.85 * 3350, (12, 64), 446_000),
    Card("NVIDIA H200", 700, 250, 0.85 * 4800, (12, 64), 520_000),
    Card("NVIDIA GeForce RTX 3090", 53, 40, 0.85 * 936, (12, 32), 43_000),
)
KINDS = {"LayerNorm, residual, dropout": ("layer_norm",), "GELU": ("gelu",), "embedding": ("embedding",)}
OTHERS = "casts, sums and the rest"


def main() -> int:
    """Count, foretell, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count the bytes that generated code moves")
    if parser.parse_args().count:
        if not torch.version.cuda:
            print(f"--count: found torch {torch.__version__}, wanted a build for CUDA", file=sys.stderr)
            return 2
        sizes = sorted({size for card in CARDS for size in card.micro_batches})
        counted = {str(size): asdict(count_moved(size)) for size in sizes}
        write_json(COUNTED, {"torch": torch.__version__, "micro_batches": counted})
    counted = json.loads(COUNTED.read_text())["micro_batches"]
    lines = [
        "| card | micro-batch | products | attention | softmax of the loss | "
        + " | ".join((*KINDS, OTHERS))
        + " | launches | optimizer | ms a micro-batch | tokens/s | MFU | goal |",
        "|---|---:|" + "---:|" * (len(KINDS) + 10),
    ]
    rows = []
    for card in CARDS:
        for size in card.micro_batches:
            times = milliseconds(card, size, Moved(**counted[str(size)]))
            total = sum(times.values())
            speed = size * 1024 / total * 1e3
            peak = peak_flops_per_second(card.name, use_amp=True)
            assert peak is not None
            shown = " | ".join(f"{value:.1f}" for value in times.values())
            lines.append(
                f"| {card.name} | {size} | {shown} | {total:.1f} | {speed:,.0f} | "
                f"{speed * flops_per_token(GPT2) / peak:.0%} | {card.goal:,.0f} |"
            )
            rows.append({**asdict(card), "micro_batch": size, "milliseconds": times, "tokens_per_second": speed})
    print("\n".join(lines))
    (RESULTS / "predicted.md").write_text("\n".join(lines) + "\n")
    write_json(RESULTS / "predicted.json", {"rows": rows})
    return 0


@dataclass(frozen=True)
class Moved:
    """What a micro-batch's generated kernels do."""

    bytes: dict[str, float]
    """Read and written, by kind."""
    launches: float
    """Of all kernels, products and attention among them."""


def count_moved(sequences: int) -> Moved:
    """Count in generated code."""
    found = []
    for layers in (2, 4):
        passes, _ = programs(Case("sm_90", sequences, n_layers=layers))
        kinds = dict.fromkeys((*KINDS, OTHERS), 0.0)
        launches = 0.0
        for program in (passes["forward"], passes["backward"]):
            launches += len(program.launches) + program.products + 2 * program.operators
            for kind, moved in kinds_of(program, sequences).items():
                kinds[kind] += moved
        found.append((kinds, launches))
    (few, few_launches), (more, more_launches) = found
    kinds = {kind: few[kind] + (more[kind] - few[kind]) * 5 for kind in few}  # 2 blocks and 5 times 2 more
    return Moved(kinds, few_launches + (more_launches - few_launches) * 5)


def kinds_of(program: Program, sequences: int) -> dict[str, float]:
    """Return the bytes that a program's kernels move, by kind; of the embedding's table only the rows they read."""
    table = GPT2.vocab_size * GPT2.emb_dim * 4
    rows = sequences * 1024 * GPT2.emb_dim * 4
    kinds = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for launch in program.launches:
        kind = next((kind for kind, words in KINDS.items() if any(word in launch.kernel for word in words)), OTHERS)
        is_lookup = "embedding" in launch.kernel and len(launch.tensor_bytes) > 1
        kinds[kind] += sum(min(size, rows) if size == table and is_lookup else size for size in launch.tensor_bytes)
    return kinds


def milliseconds(card: Card, sequences: int, moved: Moved) -> dict[str, float]:
    """Return the time of every kind of work in a micro-batch, with its share of the optimizer's."""
    tokens, width, layers = sequences * 1024, GPT2.emb_dim, GPT2.n_layers
    padded = GPT2.vocab_size + -GPT2.vocab_size % VOCAB_MULTIPLE
    products = 6 * tokens * (12 * layers * width * width + padded * width)
    # Scores and weighted sums: 2 products of the causal half forward, 5 backward.
    attention = 7 * tokens * layers * width * GPT2.context_length
    softmax = 3 * 2 * tokens * padded  # logits read twice, their gradient written, in half precision
    seconds = {
        "products": products / card.product_tflops / 1e12,
        "attention": attention / card.attention_tflops / 1e12,
        "softmax of the loss": softmax / card.gigabytes_per_second / 1e9,
        **{kind: size / card.gigabytes_per_second / 1e9 for kind, size in moved.bytes.items()},
        "launches": moved.launches * LAUNCH_SECONDS,
        "optimizer": OPTIMIZER_BYTES
        * count_parameters(GPT2).total
        / card.gigabytes_per_second
        / 1e9
        * tokens
        / STEP_TOKENS,
    }
    return {kind: value * 1e3 for kind, value in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
