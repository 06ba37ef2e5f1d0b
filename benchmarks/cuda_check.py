"""What does training compile to on CUDA? Generated code is read, on a machine that needs no GPU: `make cuda-check`.

  python -m benchmarks.cuda_check                    # all cases on all architectures
  python -m benchmarks.cuda_check --only sm_90 --only bfloat16

Every case is the objective that ddp_train.py trains, GPT-2 small at 1024 tokens, traced and lowered by Inductor
(`generated_code.py`), with flash attention as an operator that nothing looks into. Checked: the graph is whole, and a
second micro-batch compiles nothing; no buffer of float32 logits; no atomic addition in deterministic mode; and the
loss holds at most 1.6 GiB. Buffers are counted as the program allocates them, without the
allocator's rounding. Written to benchmarks/results/cuda-check.md and .json; exit status 1 where a check fails.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.generated_code import BYTES, CARDS, FakeTensorMode, Program, generate, read_program
from benchmarks.memory import PeakTracker
from benchmarks.throughput import GPT2, RESULTS
from harness.engine import loss
from harness.engine.costs import CONTEXT_GIB, FLOAT32_BYTES, GIB, loss_chunk_rows
from harness.engine.loss import VOCAB_MULTIPLE, Objective
from harness.engine.optimizers import OPTIMIZERS
from harness.run.config import ExpertsConfig, ModelConfig
from harness.run.files import read_json, write_json
from harness.run.model_size import count_parameters
from model import GPTModel

MOST_LOSS_BYTES = 1.6 * GIB
CARDS_GIB = (24, 40, 80)


def _like_flash(query: Tensor) -> Tensor:
    batch, heads, length, size = query.shape
    return query.new_empty((batch, length, heads, size)).transpose(1, 2)


@torch.library.custom_op("cuda_check::flash", mutates_args=())
def flash(query: Tensor, key: Tensor, value: Tensor, drop_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for flash attention: output in its layout, one number a row, and the state of the random generator."""
    raise NotImplementedError


@flash.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, drop_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    state = query.new_empty((2,), dtype=torch.int64)
    return _like_flash(query), query.new_empty(query.shape[:3], dtype=torch.float32), state


@torch.library.custom_op("cuda_check::flash_backward", mutates_args=())
def flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, rows: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for its backward pass."""
    raise NotImplementedError


@flash_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, rows: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_flash(query), _like_flash(query), _like_flash(query)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*flash_backward(gradient, *ctx.saved_tensors), None)


flash.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class Case:
    """What is compiled."""

    architecture: str
    sequences: int = 12
    dtype: str = "bfloat16"
    drop_rate: float = 0.0
    variant: str = ""
    """One of "qkv_bias", "tie_weights", "activation_checkpointing", "deterministic" and "moe", the last two also as
    "deterministic moe", or none."""
    n_layers: int = 12

    @property
    def name(self) -> str:
        """For people, and for --only."""
        parts = [self.architecture, f"{self.sequences} x 1024", self.dtype]
        parts += ["dropout 0.1"] if self.drop_rate else []
        parts += [self.variant] if self.variant else []
        parts += [f"{self.n_layers} layers"] if self.n_layers != 12 else []
        return ", ".join(parts)

    @property
    def model(self) -> ModelConfig:
        """Its model.json."""
        switches: dict[str, Any] = {self.variant: True} if self.variant in ("qkv_bias", "tie_weights") else {}
        if "moe" in self.variant:
            switches = {"moe": ExpertsConfig(num_experts=6, num_active_experts=2)}
        return replace(GPT2, drop_rate=self.drop_rate, n_layers=self.n_layers, **switches)


@dataclass(frozen=True)
class Row:
    """What was found of a case."""

    case: str
    kept_mib: float
    """What the forward pass leaves for the backward pass."""
    peak_mib: float
    """Activations and gradients at their most, with what is inside the loss's operator."""
    loss_mib: float
    kernels: dict[str, int]
    """Launches of forward and backward pass: Inductor's, cuBLAS's, and opaque operators."""
    problems: list[str]


def main() -> int:
    """Check, print, store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="cases with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time (default: one a core)")
    arguments = parser.parse_args()
    if not torch.version.cuda:
        print(
            f"torch: found {torch.__version__}, wanted a build for CUDA (make cuda-check installs one)",
            file=sys.stderr,
        )
        return 2
    chosen = [case for case in cases() if all(word in case.name for word in arguments.only)]
    rows: list[Row] = []
    kept = stored_rows() if arguments.only else {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(check, chosen):
            rows.append(row)
            print(_line(row), flush=True)
            kept[row.case] = row
            store(kept)
    return int(any(row.problems for row in rows))


def cases() -> list[Case]:
    """Return all cases: those of the memory table whole, the others with two blocks, since one is like the other."""
    sizes = (12, 64)
    dropped: dict[str, Any] = {"dtype": "float16", "drop_rate": 0.1}
    return [
        *(Case("sm_90", size) for size in sizes),
        *(Case("sm_90", size, **dropped) for size in sizes),
        *(Case("sm_90", size, variant="activation_checkpointing") for size in sizes),
        *(Case(architecture, size, n_layers=2) for architecture in ("sm_80", "sm_90", "sm_120") for size in sizes),
        *(
            Case(architecture, size, **dropped, n_layers=2)
            for architecture in ("sm_80", "sm_90", "sm_120")
            for size in sizes
        ),
        *(Case("sm_90", variant=name, n_layers=2) for name in ("qkv_bias", "tie_weights", "deterministic")),
        Case("sm_90", 64, **dropped, variant="deterministic", n_layers=2),
        Case("sm_90", variant="moe"),
        Case("sm_80", dtype="float16", variant="deterministic moe", n_layers=2),
    ]


def programs(case: Case) -> tuple[dict[str, Program], dict[str, str]]:
    """Return the programs of a case's forward and backward pass, and all generated sources by name."""
    is_deterministic = "deterministic" in case.variant
    torch.use_deterministic_algorithms(is_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    dtype, attention = getattr(torch, case.dtype), F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, dropout_p=0.0, **_: flash(
        query, key, value, dropout_p
    )[0]
    try:
        with FakeTensorMode():
            objective = Objective(GPTModel(case.model, case.variant == "activation_checkpointing"))
            tokens, targets = (torch.empty(case.sequences, 1024, dtype=torch.int64) for _ in range(2))

            def step(tokens: Tensor, targets: Tensor) -> Tensor:
                with torch.autocast("cpu", dtype):
                    value, _ = objective(tokens, targets)
                return cast(Tensor, value)

            sources = generate(case.architecture, step, tokens, targets)
            rows = min(case.sequences * 1024, loss_chunk_rows("cuda"))
            logits = torch.empty(rows, _padded(case.model.vocab_size), dtype=dtype)
            gradient_of = partial(loss.softmax_gradient, softcap=math.inf, z_loss=0.0)
            chunk = generate(case.architecture, gradient_of, logits, targets.flatten()[:rows])
            sources["chunk of the loss"] = chunk["forward"]
    finally:
        F.scaled_dot_product_attention = attention
        torch.use_deterministic_algorithms(False)
    types = {
        "cuda_check.flash": (case.dtype, "float32", "int64"),
        "cuda_check.flash_backward": (case.dtype,) * 3,
        "harness.chunked_linear_cross_entropy": ("float32", case.dtype, "float32"),
        "aten.topk": ("float32", "int64"),
        "aten.sort": ("int64", "int64"),
        "harness.grouped_product": (case.dtype,),
        "harness.products_within_groups": (case.dtype,),
    }
    return {kind: read_program(source, types, kind == "backward") for kind, source in sources.items()}, sources


def _padded(vocab_size: int) -> int:
    return vocab_size + -vocab_size % VOCAB_MULTIPLE


def loss_bytes(case: Case) -> int:
    """Return the most bytes that the loss holds, its results among them, its chunks as generated code has them."""

    def gradient_of(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)

    compiled = loss.compiled_softmax_gradient
    loss.compiled_softmax_gradient = lambda: gradient_of  # type: ignore[assignment]
    try:
        with torch.device("meta"):
            tokens = case.sequences * 1024
            hidden, weight = torch.empty(tokens, GPT2.emb_dim), torch.empty(GPT2.vocab_size, GPT2.emb_dim)
            targets = torch.empty(tokens, dtype=torch.int64)
        with PeakTracker([hidden, weight, targets]) as tracker:
            results = loss.loss_and_gradients(
                hidden, weight, targets, (math.inf, 0.0), getattr(torch, case.dtype), True
            )
        del results
    finally:
        loss.compiled_softmax_gradient = compiled  # type: ignore[assignment]
    return tracker.peak


def check(case: Case) -> Row:
    """Generate the code of a case and look for what must not be there."""
    found, sources = programs(case)
    forward, backward, chunk = (found[kind] for kind in ("forward", "backward", "chunk of the loss"))
    held = loss_bytes(case)
    problems = []
    padded, rows = _padded(case.model.vocab_size), min(case.sequences * 1024, loss_chunk_rows("cuda"))
    if chunk.peak_bytes > rows * padded * BYTES[case.dtype] + 2**20:
        problems.append(f"a chunk of the loss holds {chunk.peak_bytes / 2**20:,.0f} MiB besides its logits")
    if held > MOST_LOSS_BYTES:
        problems.append(f"the loss holds {held / GIB:.2f} GiB, wanted at most {MOST_LOSS_BYTES / GIB:.1f}")
    for kind, source in sources.items():
        wide = re.findall(
            rf"empty_strided_cuda\(\((\d{{3,}}), (?:{GPT2.vocab_size}|{padded})\), [^)]*\), torch.float32", source
        )
        problems += [f"{kind}: float32 logits of {count} rows" for count in wide]
        if "deterministic" in case.variant and "tl.atomic_add" in source:
            problems.append(f"{kind}: an atomic addition in deterministic mode")
    results = (
        case.sequences * 1024 * GPT2.emb_dim * BYTES[case.dtype] + GPT2.vocab_size * GPT2.emb_dim * FLOAT32_BYTES
    )
    # At the end of the forward pass the loss's own buffers lie on top of all that is kept, its results among both.
    peak = max(forward.kept_bytes + held - results, backward.peak_bytes)
    passes = (forward, backward)
    kernels = {
        "generated": sum(len(program.launches) for program in passes),
        "products": sum(program.products for program in passes),
        "operators": sum(program.operators for program in passes),
    }
    return Row(case.name, forward.kept_bytes / 2**20, peak / 2**20, held / 2**20, kernels, problems)


def _line(row: Row) -> str:
    kernels = " + ".join(str(count) for count in row.kernels.values())
    return (
        f"| {row.case} | {row.kept_mib:,.0f} | {row.peak_mib:,.0f} | {row.loss_mib:,.0f} | {kernels} | "
        f"{'; '.join(row.problems) or 'passed'} |"
    )


def memory_table(rows: dict[str, Row]) -> list[str]:
    """Return how many sequences fit a card, from two sizes of each arrangement."""
    lines = [
        "| compiled | MiB per sequence | MiB besides | " + " | ".join(f"fits {card} GB" for card in CARDS_GIB) + " |",
        "|---|---:|---:|" + "---:|" * len(CARDS_GIB),
    ]
    parameters = count_parameters(GPT2)
    state = 2 * FLOAT32_BYTES * parameters.total + OPTIMIZERS["adamw"].state_bytes(parameters)
    for name, words in (
        ("the default, bfloat16", "bfloat16"), ("with dropout 0.1, float16", "float16, dropout 0.1"),
        ("with activation_checkpointing", "bfloat16, activation_checkpointing"),
    ):  # fmt: skip
        pair = [rows.get(f"sm_90, {size} x 1024, {words}") for size in (12, 64)]
        if None in pair:
            continue
        few, many = (row.peak_mib for row in pair if row)
        sequence = (many - few) / 52
        besides = few - 12 * sequence
        free = [card * 1024 - state / 2**20 - besides - CONTEXT_GIB * 1024 for card in CARDS_GIB]
        fits = " | ".join(str(math.floor(mib / sequence)) for mib in free)
        lines.append(f"| {name} | {sequence:,.0f} | {besides:,.0f} | {fits} |")
    return lines


def stored_rows() -> dict[str, Row]:
    """Return by their cases the rows that are stored, which --only leaves as they are; none of another torch's."""
    stored = read_json(RESULTS / "cuda-check.json")
    return {row["case"]: Row(**row) for row in stored["rows"]} if stored["torch"] == torch.__version__ else {}


def store(found: dict[str, Row]) -> None:
    """Write JSON and Markdown of the cases that are done, by their names."""
    names = [case.name for case in cases()]
    rows = [found[name] for name in names if name in found]
    whole, short = (found.get(f"sm_90, 12 x 1024, bfloat16{layers}") for layers in ("", ", 2 layers"))
    blocks = []
    if whole and short:
        each = {kind: (whole.kernels[kind] - short.kernels[kind]) / 10 for kind in whole.kernels}
        blocks = [
            "A block launches, forward and backward, " + ", ".join(f"{each[kind]:g} {kind}" for kind in each) + "."
        ]
    cards = ", ".join(f"{name} as {card}" for name, (card, *_) in CARDS.items())
    lines = [
        f"torch {torch.__version__}; {len(rows)} of {len(names)} cases; GPT-2 small, {cards}",
        "",
        "| case | MiB kept for the backward pass | MiB at the peak | MiB inside the loss | "
        "launches: generated + cuBLAS + attention and loss | checks |",
        "|---|---:|---:|---:|---|---|",
        *map(_line, rows),
        "",
        *blocks,
        "",
        *memory_table(found),
    ]
    (RESULTS / "cuda-check.md").write_text("\n".join(lines) + "\n")
    write_json(RESULTS / "cuda-check.json", {"torch": torch.__version__, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    sys.exit(main())
