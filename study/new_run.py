"""A run folder for a dataset and a machine: the size of the model and all that follows from it, each with its reason.

| what | rule | source |
|---|---|---|
| parameters | 20 tokens trained on for each, embeddings included | Hoffmann et al. 2022, arXiv:2203.15556 |
| more of them | 20 (U / 10^8)^(2/3) where text is short, of U tokens | runs/quickstart, below |
| epochs | 4 where text is short: it teaches nearly as much as new text | Muennighoff et al. 2023, arXiv:2305.16264 |
| shape | 64 channels a layer and a head (small: 4 layers, heads of 32) | Kaplan et al. 2020, arXiv:2001.08361 |
| what a block computes | the modern stack, as in runs/1xrtx3090-modern | docs/recipes.md, studies/modern |
| global batch, tokens | 0.292 C^0.327, C the run's FLOPs | DeepSeek-AI 2024, arXiv:2401.02954, section 3.1 |
| learning rate | 0.3118 C^-0.125; 0.02 for Muon's matrices | the same; Jordan et al. 2024 |
| schedule | 2% warm-up, linear to zero over the last half | Hägele et al. 2024, arXiv:2405.18392 |
| time | FLOPs at 40% of the device's best | Chowdhery et al. 2022, arXiv:2204.02311, table 3 |

Twenty tokens for each parameter are best where new text costs nothing but time. Of a short text every model of the
ladder trains in minutes, and one with too few parameters does not learn all that it says; the exponent joins the
quickstart's size to that rule. The fits of batch and learning rate were made from 1e17 to 2e19 FLOPs. Below, the
batch goes on and the rate stops at MOST_RATE; small runs also get at least LEAST_STEPS steps. All are starting
points, to be judged like any change.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.engine.costs import Hardware, cost_of, describe, loss_chunk_rows
from harness.run.config import ModelConfig, TrainConfig, config_from
from harness.run.errors import ConfigError, DataError
from harness.run.files import write_json
from harness.run.model_size import count_parameters, flops_per_token
from harness.run.plan import epoch_sequences, make_plan
from harness.run.run_folder import RUN_NAME, RunFolder
from harness.tokens.token_files import open_split, split_files
from harness.tokens.tokenizer import Tokenizer, tokenizer_of_tokens

TOKENS_PER_PARAMETER = 20.0
SHORT_TEXT, SHORT_TEXT_EXPONENT, MOST_EPOCHS = 100_000_000, 2 / 3, 4
UTILISATION = 0.4
MOST_RATE = 3e-3
LEAST_STEPS = 300
SHORTEST_CONTEXT = 8
MEMORY_SHARE = 0.8
"""Of a GPU's memory, by estimate; the rest is for what the estimate misses."""
CPU_TOKENS = loss_chunk_rows("cpu")
"""In a micro-batch on a CPU."""
STARTS = {"start_train_token": 0, "start_val_token": 0}
STACK = {
    "drop_rate": 0.0,
    "qkv_bias": False,
    "positions": "rotary",
    "norm": "rms",
    "feed_forward": "relu_squared",
    "qk_norm": True,
    "bias": False,
    "embedding_norm": True,
    "init": "zero_projections",
}
RECIPE = {
    "optimizer": "muon",
    "muon_learning_rate": 0.02,
    "schedule": "wsd",
    "warmup_period_percent": 2.0,
    "cooldown_percent": 50.0,
    "final_rate_fraction": 0.0,
    "adam_beta2": 0.95,
    "shuffle": True,
}
MOST_TOKENS = 2**60
MOST_SAVES, SECONDS_BETWEEN_SAVES = 20, 1800


@dataclass(frozen=True)
class NewRunRequest:
    """What the user asks for."""

    name: str
    data: str
    datasets_dir: Path
    runs_dir: Path
    tokens_per_parameter: float | None
    """None follows from the length of the text."""
    epochs: int | None
    hours: float
    dry_run: bool


@dataclass(frozen=True)
class Text:
    """What a dataset is like."""

    name: str
    train_tokens: int
    validation_tokens: int
    """0 where there is no validation split."""
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Shape:
    """A size of model, and how many tokens it is trained on."""

    document: dict[str, Any]
    """Its model.json."""
    model: ModelConfig
    tokens: int

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return float(flops_per_token(self.model) * self.tokens)


@dataclass(frozen=True)
class Draft:
    """Both files of a run, and why their keys are what they are."""

    model: dict[str, Any]
    train: dict[str, Any]
    reasons: dict[str, str]


def new_run(request: NewRunRequest, hardware: Hardware) -> None:
    """Print a run that follows from data and hardware, and write its folder unless it is a dry run.

    Raises ConfigError and DataError.
    """
    folder = RunFolder(request.runs_dir / request.name)
    if not RUN_NAME.fullmatch(request.name):
        raise ConfigError(f"NAME: found {request.name[:80]!r}, wanted letters, digits, '.', '_' and '-'")
    if folder.path.exists():
        raise ConfigError(f"{folder.path}: exists already, wanted a new NAME")
    text = text_of(request)
    draft = design(text, hardware, request)
    notes = "\n".join(f"{key}: {reason}." for key, reason in draft.reasons.items())
    model = config_from(ModelConfig, draft.model, folder.model_json)
    train = config_from(TrainConfig, {**draft.train, "notes": notes}, folder.train_json)
    plan = make_plan(model, train, hardware.count, text.train_tokens)
    show(draft, describe(cost_of(model, train, plan, device_type=hardware.kind), train, hardware.kind))
    if request.dry_run:
        return
    folder.path.mkdir(parents=True)
    write_json(folder.model_json, {"$schema": "../schema/model.schema.json", **draft.model})
    write_json(folder.train_json, {"$schema": "../schema/train.schema.json", **draft.train, "notes": notes})
    launch = "python" if hardware.count == 1 else f"torchrun --standalone --nproc_per_node={hardware.count}"
    print(f"\nWrote {folder.model_json} and {folder.train_json}")
    print(f"Train it: {launch} ddp_train.py {request.name} {request.datasets_dir}")


def text_of(request: NewRunRequest) -> Text:
    """Return what the dataset is like; raises ConfigError or DataError where it is not there or not known."""
    train = open_split(request.datasets_dir, request.data, "train")
    if train.length <= SHORTEST_CONTEXT:
        raise DataError(f"{train.path}: found {train.length} tokens, wanted at least {SHORTEST_CONTEXT + 1}")
    tokenizer = tokenizer_of_tokens(train)
    if tokenizer is None:
        raise ConfigError(
            f"--data: {train.path} does not say its tokenizer, so the vocabulary is not known; wanted one of "
            "prepare_dataset.py (or copy a run folder and set vocab_size)"
        )
    has_validation = bool(split_files(request.datasets_dir / request.data, "validation"))
    held_back = open_split(request.datasets_dir, request.data, "validation").length if has_validation else 0
    return Text(request.data, train.length, held_back, tokenizer)


def design(text: Text, hardware: Hardware, request: NewRunRequest) -> Draft:
    """Return a run for a text and a machine; raises ConfigError where nothing fits into its memory."""
    epochs = request.epochs or (MOST_EPOCHS if text.train_tokens < SHORT_TEXT else 1)
    speed = UTILISATION * hardware.flops_per_second * hardware.count
    shape, why = choose_shape(text, hardware, request, epochs)
    train, reasons = batches(shape, text, hardware, epochs)
    seconds = shape.flops / speed
    steps = max(1, shape.tokens // (train["global_batch_size"] * shape.model.context_length))
    interval = max(1, -(-steps // max(MOST_SAVES, math.ceil(seconds / SECONDS_BETWEEN_SAVES))))
    train |= {"checkpoint_interval": interval, "checkpoints_to_keep": 3}
    held_back = text.validation_tokens // (train["global_batch_size"] * shape.model.context_length + 1)
    if held_back:
        train |= {"validation_interval": interval, "validation_batches": min(held_back, max(1, interval // 20))}
        reasons["validation_batches"] = "a twentieth of the steps between two validations, as far as the split goes"
    train["expected_tokens_per_second"] = float(f"{shape.tokens / seconds:.3g}")
    first = {
        "n_layers": why,
        "vocab_size": f"the ids of the dataset's tokenizer ({text.tokenizer})",
        "context_length": "twice the width and at most GPT-2's 1024; less where the text is short",
        "positions": "this and the next are the modern stack (docs/recipes.md)",
    }
    last = {
        "checkpoint_interval": f"{MOST_SAVES} in a run, or one every half hour; the newest 3 and the best are kept",
        "expected_tokens_per_second": f"an estimate, {UTILISATION:.0%} of what {hardware.count} x {hardware.name} "
        "does in matrix products at best",
    }
    return Draft(shape.document, train, {**first, **reasons, **last})


def choose_shape(text: Text, hardware: Hardware, request: NewRunRequest, epochs: int) -> tuple[Shape, str]:
    """Return the largest model that the text, the time and the memory allow, and the reason for it.

    Where it is the text that ends the ladder, all of the text is trained on.
    """
    available = epochs * (text.train_tokens - 1)
    wanted = request.tokens_per_parameter or tokens_per_parameter(text.train_tokens)
    budget = request.hours * 3600 * UTILISATION * hardware.flops_per_second * hardware.count
    chosen, limit = None, "no larger one is on the ladder"
    for shape in shapes(text, wanted):
        too_much = {
            "the text is too short for a larger one": shape.tokens > available,
            f"{request.hours:g} hours here are too short for a larger one": shape.flops > budget,
            "a larger one does not fit into memory": largest_microbatch(shape.model, hardware, 1) == 0,
        }
        if any(too_much.values()):
            limit = next(reason for reason, holds in too_much.items() if holds)
            chosen = chosen or replace(shape, tokens=min(shape.tokens, available))
            break
        chosen = shape
    assert chosen is not None
    if "text" in limit and available * flops_per_token(chosen.model) <= budget:
        chosen = replace(chosen, tokens=available)
    parameters = count_parameters(chosen.model).total
    ratio = chosen.tokens / parameters
    why = f"{parameters:,} parameters, each trained by {ratio:.3g} tokens"
    if ratio < 0.99 * wanted:
        return chosen, (
            f"{why}: the smallest model, although {wanted:.2g} would be wanted; more text or "
            "time helps, or a smaller vocabulary (prepare_dataset.py --tokenizer train:N)"
        )
    return chosen, f"{why}, at least {wanted:.2g}; {limit}"


def tokens_per_parameter(train_tokens: int) -> float:
    """Return how many tokens each parameter is trained by: fewer of a short text, which repeats itself."""
    return float(TOKENS_PER_PARAMETER * min(1.0, train_tokens / SHORT_TEXT) ** SHORT_TEXT_EXPONENT)


def shapes(text: Text, wanted: float) -> Iterator[Shape]:
    """Yield models from small to large, each with the tokens it wants, `wanted` for each parameter."""
    small = [(width, 4, 32) for width in (64, 96, 128, 192)]
    for width, layers, head in small + [(64 * layers, layers, 64) for layers in range(4, 65)]:
        document = {
            "vocab_size": text.tokenizer.vocab_size,
            "context_length": min(1024, power_of_two_below(2 * width), _shortest(text)),
            "emb_dim": width,
            "n_heads": width // head,
            "n_layers": layers,
            **STACK,
        }
        model = config_from(ModelConfig, document, "model.json")
        tokens = min(max(wanted * count_parameters(model).total, 1.0), float(MOST_TOKENS))
        yield Shape(document, model, int(tokens))


def _shortest(text: Text) -> int:
    """Return the longest context of which a short text still holds some sequences."""
    fewest = min(text.train_tokens, text.validation_tokens or text.train_tokens)
    return max(SHORTEST_CONTEXT, power_of_two_below(fewest / 16))


def power_of_two_below(value: float) -> int:
    """Return the largest power of two that is at most `value`, and at least 1."""
    return 1 << max(0, math.frexp(value)[1] - 1)


def largest_microbatch(model: ModelConfig, hardware: Hardware, most: int) -> int:
    """Return the largest power of two of at most `most` sequences that fits, by estimate; 0 where none does."""
    size = most
    while hardware.kind == "cpu" and size > 1 and size * model.context_length > CPU_TOKENS:
        size //= 2
    while size:
        needed = {"dataset": "any", "min_train_tokens": 1, "checkpoint_interval": 1, "microbatch_size": size}
        train = config_from(TrainConfig, {**needed, **STARTS, **_precision(hardware)}, "train.json")
        cost = cost_of(model, train, make_plan(model, train, 1), device_type=hardware.kind)
        if cost.peak_gib <= MEMORY_SHARE * hardware.memory_gib:
            return size
        size //= 2
    return 0


def _precision(hardware: Hardware) -> dict[str, Any]:
    if hardware.kind != "cuda":
        return {"use_amp": False}
    return {"use_amp": True, "amp_dtype": "bfloat16" if hardware.has_bfloat16 else "float16"}


def batches(shape: Shape, text: Text, hardware: Hardware, epochs: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return train.json but for what depends on time, and reasons; raises ConfigError where nothing fits."""
    length = shape.model.context_length
    wanted = min(0.292 * shape.flops**0.3271, shape.tokens / LEAST_STEPS)
    per_device = power_of_two_below(wanted / length / hardware.count)
    if (microbatch := largest_microbatch(shape.model, hardware, per_device)) == 0:
        raise ConfigError(f"--data: not even the smallest model fits into {hardware.memory_gib:.1f} GiB of memory")
    per_step = per_device * hardware.count * length
    there_are = epochs * epoch_sequences(text.train_tokens, length) * length
    takes_all = shape.tokens == epochs * (text.train_tokens - 1)
    train = {
        "dataset": text.name,
        "min_train_tokens": max(1, min(shape.tokens, there_are) // per_step) * per_step,
        **({"epochs": epochs} if epochs > 1 else {}),
        **STARTS,
        "microbatch_size": microbatch,
        "global_batch_size": per_step // length,
        "learning_rate": min(MOST_RATE, float(f"{0.3118 * shape.flops**-0.125:.2g}")),
        **RECIPE,
        **_precision(hardware),
    }
    fits = f"about {CPU_TOKENS:,} tokens, beyond which a CPU gains little"
    if hardware.kind != "cpu":
        fits = f"fits into {MEMORY_SHARE:.0%} of {hardware.memory_gib:.1f} GiB by estimate; -f finds the largest"
    share = "all there are" + f", {epochs} times" * (epochs > 1)
    if not takes_all:
        share = f"what the size wants of {text.train_tokens:,}"
    return train, {
        "min_train_tokens": f"{shape.tokens:,} tokens, {share}",
        "epochs": f"up to {MOST_EPOCHS} of a short text teach nearly as much as new text (arXiv:2305.16264)",
        "global_batch_size": f"{per_step:,} tokens: 0.292 C^0.327, C = {shape.flops:.2g} FLOPs (arXiv:2401.02954), "
        f"at least {LEAST_STEPS} steps of a power of two",
        "microbatch_size": fits,
        "learning_rate": f"0.3118 C^-0.125 (arXiv:2401.02954), at most {MOST_RATE:g}; of embeddings and head",
        "muon_learning_rate": "its authors', for the blocks' matrices (docs/recipes.md)",
        "schedule": "a short warm-up, then a constant rate that falls to zero over the last half (arXiv:2405.18392)",
        "use_amp": "half precision, in bfloat16 where tensor cores take it, which needs no scaler"
        if hardware.kind == "cuda"
        else f"float32, since half precision gains nothing on {hardware.kind}",
    }


def show(draft: Draft, rows: list[tuple[str, str]]) -> None:
    """Print both files, the reasons and what the run takes."""
    for name, document in (("model.json", draft.model), ("train.json", draft.train)):
        print(name)
        for key, value in document.items():
            print(f"  {key}: {json.dumps(value)}")
    for title, lines in (("Why", list(draft.reasons.items())), ("What it takes", rows)):
        print(title)
        for label, value in lines:
            print(f"  {label}: {value}")
