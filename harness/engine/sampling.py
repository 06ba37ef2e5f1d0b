"""Continue a text with a model: temperature and top-k, repeatable with a seed."""

from dataclasses import dataclass

import torch
from torch import nn

from harness.run.config import ModelConfig
from harness.run.errors import CheckpointError, ConfigError
from harness.tokens.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, gpt2_encoding


@dataclass(frozen=True)
class SampleSettings:
    """How to sample: temperature 0 takes the likeliest token, top_k None considers all."""

    num_tokens: int = 20
    temperature: float = 1.0
    top_k: int | None = 25
    seed: int | None = None


def encode_prompt(prompt: str, vocab_size: int) -> list[int]:
    """Encode a prompt with the GPT-2 encoding; raises ConfigError where the model cannot know its ids."""
    require_gpt2_ids(vocab_size)
    tokens = gpt2_encoding().encode_ordinary(prompt)
    return tokens or [END_OF_TEXT_ID]


def require_gpt2_ids(vocab_size: int) -> None:
    """Raise ConfigError where a model knows fewer ids than the GPT-2 encoding has."""
    if vocab_size < VOCAB_SIZE:
        raise ConfigError(
            f"model.json: vocab_size: found {vocab_size}, wanted at least {VOCAB_SIZE} to read and write text "
            "with the GPT-2 encoding"
        )


@torch.no_grad()
def continue_text(model: nn.Module, config: ModelConfig, prompt: str, settings: SampleSettings) -> str:
    """Return the prompt followed by its sampled continuation.

    `model` maps ids (1, T) to logits (1, T, V) and is put into evaluation mode for the time being. Draws come from
    a CPU generator of their own, so sampling is the same on every device up to rounding and disturbs no other
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
    try:
        tokens = encode_prompt(prompt, config.vocab_size)
        for _ in range(settings.num_tokens):
            visible = torch.tensor([tokens[-config.context_length :]], device=device)
            # Ids beyond the encoding (a padded vocabulary) cannot be written as text.
            logits = model(visible)[0, -1, :VOCAB_SIZE].float().cpu()  # (V,)
            tokens.append(_draw(logits, settings, generator))
    finally:
        model.train(was_training)
    return gpt2_encoding().decode(tokens)


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
