"""Check that a folder, loaded by transformers as a user would load it, computes what our model computes."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.run.errors import CheckpointError, ConfigError, first_line

SEED = 20260101
TOLERANCE = 1e-4
# Two orders of summing in float32 differ in proportion to the logits: 1e-5 of the largest is some 80 times the
# type's spacing. A tensor in the wrong place changes logits by as much as they are.
RELATIVE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """The largest difference of two models' logits, and the largest logit, on `tokens` random ids."""

    difference: float
    largest_logit: float
    tokens: int

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains."""
        return max(TOLERANCE, RELATIVE_TOLERANCE * self.largest_logit)

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2e} on {self.tokens:,} random tokens in float32 "
            f"(logits up to {self.largest_logit:.1f}, allowed {self.tolerance:.1e})"
        )


def is_available() -> bool:
    """Return whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def check_logits(model: nn.Module, folder: Path, vocab_size: int, context_length: int) -> Parity:
    """Compare `model`, which maps ids (1, T) to logits (1, T, V), with a folder's model on the CPU.

    One sequence over the whole context, so that every position counts; the folder's logits past V are left out.
    Raises CheckpointError where transformers cannot load the folder whole, or the logits differ.
    """
    other = _load(folder)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(vocab_size, (1, context_length), generator=generator)
    ours: Tensor = model(tokens)
    theirs: Tensor = other(tokens).logits[..., :vocab_size]
    parity = Parity(float((ours - theirs).abs().max()), float(theirs.abs().max()), tokens.numel())
    if not parity.difference <= parity.tolerance:  # also where a logit is not a number
        raise CheckpointError(f"{folder}: transformers computes something else: {parity}")
    return parity


def _transformers() -> Any:
    """Return the transformers module, its warnings and progress bars turned off; raises ConfigError."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"transformers is installed but cannot be imported ({first_line(error)})") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load(folder: Path) -> Any:
    """Return a folder's model on the CPU; raises CheckpointError for a missing or misfit tensor."""
    transformers = _transformers()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it ({first_line(error)})") from None
    problems = [f"{kind} {sorted(report[kind])[0]}" for kind in ("missing_keys", "mismatched_keys") if report[kind]]
    if problems:
        raise CheckpointError(f"{folder}: transformers finds {', '.join(problems)}, wanted every tensor in its place")
    return model.eval()


def check_encoding(folder: Path, samples: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Check that a folder's tokenizer encodes each text as the given ids and back; raises CheckpointError."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text, ids in samples:
        if tokenizer(text).input_ids != list(ids) or tokenizer.decode(ids) != text:
            raise CheckpointError(f"{folder}: its tokenizer in transformers encodes {text[:40]!r} otherwise")
