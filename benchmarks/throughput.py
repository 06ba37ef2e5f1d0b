"""How fast is a training step, and what is each technique worth? Arrangements side by side in one process.

  python -m benchmarks.throughput                                       # the device's own shape, ours only
  python -m benchmarks.throughput --contender other.py --rounds 12      # and somebody else's model, in the same run

Every round times one step of every arrangement, in a new order, so that a noisy machine is noisy for all; medians,
ranges, and ratios within a round are printed, and go to benchmarks/results/throughput-DEVICE.json and .png. A
contender is a Python file with `build(shape, device)`, which gives a function that trains one global step on
`shape.microbatches()`; `shape.model` holds vocab_size, context_length, emb_dim, n_heads, n_layers and drop_rate.

Model FLOPs utilisation is tokens/s x FLOPs per token / peak; FLOPs per token are 6 per weight of a matrix product and
12 x layers x width x context for attention, counted in full (PaLM, appendix B). The peak is the GPU's dense
half-precision one from its data sheet; a CPU's is the fastest float32 matrix product measured in the same run.
"""

import argparse
import importlib.util
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.arrangements import Shape, Step, Techniques, build_arrangement, build_default, keep_freed_memory
from harness.engine import distributed
from harness.engine.costs import GIB
from harness.engine.gpu_peaks import peak_flops_per_second
from harness.run.config import ModelConfig
from harness.run.files import write_json
from harness.run.model_size import count_parameters, flops_per_token

RESULTS = Path(__file__).parent / "results"
GPT2 = ModelConfig(
    vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.0, qkv_bias=False
)
SMALL = replace(GPT2, context_length=256, emb_dim=384, n_heads=6, n_layers=6)
Builder = Callable[[Shape, torch.device], Step]


def arrangements(device: torch.device) -> dict[str, Builder]:
    """Return the arrangements, each with one technique more than the one before; the default is last, also tied."""
    rows: list[tuple[str, dict[str, bool]]] = [
        ("published", {}),
        ("+ fused attention (SDPA)", {"fused_attention": True}),
        ("+ fused LayerNorm", {"fused_layer_norm": True}),
        ("+ fused AdamW, no host sync", {"device_side_step": True}),
    ]
    if device.type == "cuda":
        rows += [("+ bfloat16", {"bfloat16": True}), ("+ torch.compile", {"compiled": True})]
    else:
        rows += [("+ memory kept", {"kept_memory": True})]
    rows += [("+ memory-lean loss", {"lean_loss": True})]
    built: dict[str, Builder] = {}
    techniques: dict[str, bool] = {}
    for name, added in rows:
        techniques = techniques | added
        chosen = Techniques(**techniques)
        built[name] = lambda shape, place, chosen=chosen: build_arrangement(shape, place, chosen)  # type: ignore[misc]
    return built | {
        "default (ddp_train.py)": build_default,
        "default, tied": lambda shape, place: build_default(shape.tied(), place),
    }


def main() -> None:
    """Time, print, store and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="sequences per micro-batch (default: 4 on a CPU, 12 on a GPU)")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--contender", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="arrangements with this in the name"
    )
    arguments = parser.parse_args()
    device = distributed.choose_device(arguments.device, distributed.launch_from_environment())
    torch.set_float32_matmul_precision("high")
    model = replace(GPT2 if device.type == "cuda" else SMALL, drop_rate=arguments.dropout)
    shape = Shape(model, arguments.batch or (12 if device.type == "cuda" else 4), arguments.accumulation)
    builders = arrangements(device) | {path.stem: load_contender(path) for path in arguments.contender}
    chosen = {
        name: builder
        for name, builder in builders.items()
        if not arguments.only or any(word in name for word in (*arguments.only, "published"))
    }
    peak = peak_flops_per_second(distributed.device_name(device), use_amp=True) or measured_peak(device)
    seconds, memory = measure(chosen, shape, device, arguments.rounds)
    rows = summarise(seconds, memory, shape, peak)
    text = table(rows, shape, device, peak)
    print(text)
    store(rows, text, device, arguments)


def load_contender(path: Path) -> Builder:
    """Load `build` from a Python file; its steps run under the allocator's defaults, as they would elsewhere."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(shape: Shape, device: torch.device) -> Step:
        train: Step = module.build(shape, device)

        def step() -> None:
            keep_freed_memory(False)  # what the process's allocator does for others is ours
            train()

        return step

    return build


def measured_peak(device: torch.device) -> float:
    """Return the FLOP/s of the fastest of a few float32 matrix products of 1024 x 1024."""
    left, right = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    best = min(timed(lambda: left @ right, device) for _ in range(20))
    return 2 * 1024**3 / best


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `action` takes, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    builders: dict[str, Builder], shape: Shape, device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Time one step of every arrangement in every round; peak memory (GiB, GPU only) is that of one arrangement."""
    steps: dict[str, Step] = {}
    memory: dict[str, float | None] = dict.fromkeys(builders)
    for name, builder in builders.items():
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steps[name] = builder(shape, device)
        for _ in range(3):  # kernels are chosen, code is compiled
            timed(steps[name], device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            timed(steps[name], device)
            memory[name] = (torch.cuda.max_memory_allocated() - held) / GIB
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    order = random.Random(0)
    for _ in range(rounds):
        names = list(builders)
        order.shuffle(names)
        for name in names:
            seconds[name].append(timed(steps[name], device))
    return seconds, memory


@dataclass(frozen=True)
class Row:
    """What was measured of one arrangement; ratios are to the published one in the same round."""

    arrangement: str
    tokens_per_second: float
    lowest: float
    highest: float
    ratio: float
    ratio_low: float
    ratio_high: float
    utilisation: float
    peak_memory_gib: float | None
    seconds: list[float]


def summarise(
    seconds: dict[str, list[float]], memory: dict[str, float | None], shape: Shape, peak: float
) -> list[Row]:
    """Return a row for each arrangement: tokens/s, utilisation, memory, and ratios to the published arrangement."""
    flops = flops_per_token(shape.model)
    rows = []
    for name, values in seconds.items():
        speeds = sorted(shape.tokens_per_step / value for value in values)
        ratios = sorted(first / value for first, value in zip(seconds["published"], values, strict=True))
        rows.append(
            Row(
                arrangement=name,
                tokens_per_second=median(speeds),
                lowest=speeds[0],
                highest=speeds[-1],
                ratio=median(ratios),
                ratio_low=ratios[len(ratios) // 4],
                ratio_high=ratios[(3 * len(ratios)) // 4],
                utilisation=median(speeds) * flops / peak,
                peak_memory_gib=memory[name],
                seconds=values,
            )
        )
    return rows


def table(rows: list[Row], shape: Shape, device: torch.device, peak: float) -> str:
    """Return the results as a Markdown table with what it was measured on."""
    model = shape.model
    lines = [
        f"{distributed.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{count_parameters(model).total / 1e6:.1f}M parameters, {model.n_layers} layers of {model.emb_dim}, "
        f"vocabulary {model.vocab_size}, {shape.accumulation_steps} x {shape.microbatch_size} x "
        f"{model.context_length} tokens a step, dropout {model.drop_rate}",
        f"MFU = tokens/s x {flops_per_token(model) / 1e6:.1f} MFLOP / {peak / 1e12:.3f} TFLOP/s",
        "",
        "| arrangement | tokens/s | range | times published (quartiles) | MFU | peak GiB |",
        "|---|---:|---|---|---:|---:|",
    ]
    for row in rows:
        gib = "-" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.1f}"
        lines.append(
            f"| {row.arrangement} | {row.tokens_per_second:,.0f} | {row.lowest:,.0f} to {row.highest:,.0f} | "
            f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f}) | {row.utilisation:.1%} | {gib} |"
        )
    return "\n".join(lines)


def store(rows: list[Row], text: str, device: torch.device, arguments: argparse.Namespace) -> None:
    """Write JSON, Markdown and a plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    name = "throughput-" + distributed.device_name(device).lower().replace(" ", "-")
    machine = {"device": distributed.device_name(device), "torch": torch.__version__, "platform": platform.platform()}
    options = vars(arguments) | {"contender": [path.name for path in arguments.contender]}
    write_json(
        RESULTS / f"{name}.json", {"machine": machine, "options": options, "rows": [asdict(row) for row in rows]}
    )
    (RESULTS / f"{name}.md").write_text(text + "\n")
    with plt.style.context(Path(__file__).parent.parent / "assets" / "chart.mplstyle"):
        figure, axes = plt.subplots()
        axes.barh([row.arrangement for row in rows], [row.tokens_per_second for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel="tokens per second", title=f"Training step on {distributed.device_name(device)}")
        figure.savefig(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
