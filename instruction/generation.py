"""Greedy answers with a key/value cache, in batches; a batch's composition changes no answer but by rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.engine.key_value_cache import KeyValueCache
from harness.run.errors import CheckpointError
from harness.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt, without the document end; whether it ended by itself."""

    tokens: tuple[int, ...]
    ended: bool


@torch.no_grad()
def write_answers(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Completion]:
    """Return greedy completions, each up to a document end or to `max_tokens` tokens with its prompt.

    `model` takes ids (B, T) and a KeyValueCache. Every token waits for the device once. Raises CheckpointError
    where logits are not numbers.
    """
    if max(map(len, prompts)) >= max_tokens:
        raise ValueError(f"a prompt of {max(map(len, prompts))} tokens leaves no room below max_tokens {max_tokens}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows, lengths = _padded(prompts)
    rows, places = rows.to(device), lengths.to(device)  # places: the position that comes next, (B,)
    cache = KeyValueCache(max_tokens)
    logits = model(rows, cache.at(torch.arange(rows.shape[1], device=device).expand_as(rows)))
    logits = logits[torch.arange(len(prompts), device=device), places - 1]  # (B, V)
    is_done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    is_broken = torch.zeros((), dtype=torch.bool, device=device)
    columns = []
    for _ in range(max_tokens - int(lengths.min())):
        # Ids beyond the tokenizer's (a padded vocabulary) cannot be written as text.
        highest, column = logits[:, : tokenizer.vocab_size].max(dim=-1)
        columns.append(column)
        is_broken |= highest.isnan().any()
        is_done |= (column == tokenizer.end_of_text_id) | (places >= max_tokens - 1)
        if bool(is_done.all() | is_broken):  # waits for the device
            break
        # A finished row keeps writing to its last position, which no other row reads.
        logits = model(column.unsqueeze(1), cache.at(places.clamp(max=max_tokens - 1).unsqueeze(1)))[:, -1]
        places = places + 1
    model.train(was_training)
    if is_broken:
        raise CheckpointError("the model's logits are not numbers: its weights or its precision are broken")
    written = torch.stack(columns, dim=1).tolist()
    return [
        _cut(row, max_tokens - len(prompt), tokenizer.end_of_text_id)
        for row, prompt in zip(written, prompts, strict=True)
    ]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompts as rows (B, T), filled up where a causal model does not look, and their lengths (B,)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = torch.tensor(prompt)
    return rows, lengths


def _cut(tokens: list[int], room: int, end_of_text: int) -> Completion:
    """Return a row's tokens up to its first document end, or the first `room` of them."""
    tokens = tokens[:room]
    if end_of_text in tokens:
        return Completion(tuple(tokens[: tokens.index(end_of_text)]), True)
    return Completion(tuple(tokens), False)
