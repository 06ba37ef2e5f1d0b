"""Continue a text with a model: temperature and top-k, repeatable with a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.run.config import ModelConfig
from harness.run.errors import CheckpointError
from harness.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleSettings:
    """How to sample: temperature 0 takes the likeliest token, top_k None considers all."""

    num_tokens: int = 20
    temperature: float = 1.0
    top_k: int | None = 25
    seed: int | None = None


def continue_text(
    model: nn.Module, config: ModelConfig, tokenizer: Tokenizer, prompt: str, settings: SampleSettings
) -> str:
    """Return the prompt followed by its sampled continuation; see `sample_tokens`."""
    tokens = tokenizer.encode(prompt)
    drawn = list(sample_tokens(model, config, tokenizer, tokens, settings))
    return tokenizer.decode([*(tokens or [tokenizer.end_of_text_id]), *drawn])


@torch.no_grad()
def sample_tokens(
    model: nn.Module, config: ModelConfig, tokenizer: Tokenizer, prompt: Sequence[int], settings: SampleSettings
) -> Iterator[int]:
    """Yield the tokens that a model writes after a prompt; an empty prompt begins a document.

    `model` maps ids (1, T) to logits (1, T, V) and is in evaluation mode while this generator runs. Draws come from a
    CPU generator of their own, so sampling is the same on every device up to rounding and disturbs no other
    randomness; every token waits for the device once.
    """
    device = next(model.parameters()).device
    generator = torch.Generator()
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)
    was_training = model.training
    model.eval()
    tokens = list(prompt) or [tokenizer.end_of_text_id]
    try:
        for _ in range(settings.num_tokens):
            visible = torch.tensor([tokens[-config.context_length :]], device=device)
            # Ids beyond the tokenizer's (a padded vocabulary) cannot be written as text.
            logits = model(visible)[0, -1, : tokenizer.vocab_size].float().cpu()  # (V,)
            tokens.append(_draw(logits, settings, generator))
            yield tokens[-1]
    finally:
        model.train(was_training)


def _draw(logits: torch.Tensor, settings: SampleSettings, generator: torch.Generator) -> int:
    if settings.temperature < torch.finfo(torch.float32).tiny:  # no smaller one divides
        return int(logits.argmax())
    if settings.top_k is not None and settings.top_k < logits.numel():
        values, ids = logits.topk(settings.top_k)
    else:
        values, ids = logits, torch.arange(logits.numel())
    if values.isnan().any():
        raise CheckpointError("the model's logits are not numbers: its weights or its precision are broken")
    # Differences first: a tiny temperature then gives zeros and minus infinities, which softmax can take.
    probabilities = torch.softmax((values - values.max()) / settings.temperature, dim=-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
