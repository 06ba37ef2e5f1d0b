"""Fine-tuning on instructions: the loss of response tokens alone, in an order that depends on the seed alone."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from harness.engine.loss import token_losses
from harness.engine.optimizers import make_optimizer
from harness.engine.schedules import learning_rate_at
from harness.engine.step import guarded_step
from harness.run.errors import NonFiniteError
from harness.tokens.randomness import order_permutation, seed_dropout
from instruction.examples import Example
from instruction.recipe import Recipe


def response_losses(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return each example's summed cross-entropy of its response tokens in nats, float32 (B,), on the model's device.

    Prompt tokens are read and not scored. Rows are padded on the right, where a causal model does not look.
    """
    device = next(model.parameters()).device
    width = max(len(example.tokens) for example in examples)
    rows = torch.zeros(len(examples), width, dtype=torch.int64)
    is_response = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        rows[row, : len(example.tokens)] = torch.tensor(example.tokens)
        is_response[row, len(example.prompt) : len(example.tokens)] = True
    rows, is_response = rows.to(device), is_response.to(device)
    losses = token_losses(model(rows[:, :-1]), rows[:, 1:])  # (B, T)
    return (losses * is_response[:, 1:]).sum(dim=1)


def steps_of(examples: int, recipe: Recipe) -> int:
    """Return the optimiser steps of a fine-tuning; the last of an epoch may hold fewer items."""
    return recipe.epochs * -(-examples // recipe.batch_items)


def batch_at(examples: Sequence[Example], recipe: Recipe, seed: int, step: int) -> list[Example]:
    """Return the examples of one step, a pure function of the seed and the step."""
    epoch, place = divmod(step, -(-len(examples) // recipe.batch_items))
    order = order_permutation(seed, epoch, len(examples))
    first = place * recipe.batch_items
    return [examples[order[index]] for index in range(first, min(len(examples), first + recipe.batch_items))]


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    recipe: Recipe,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Fine-tune the model in place, in float32; `progress` wraps the iterator over steps.

    The same seed gives the same bits on the same machine, whatever happened before. Raises NonFiniteError if a
    gradient was not finite; the device is waited for once, at the end.
    """
    device = next(model.parameters()).device
    config, steps = recipe.optimization(), steps_of(len(examples), recipe)
    optimizer, scaler = make_optimizer(model, config, device), GradScaler(device.type, enabled=False)
    finite_steps = torch.zeros((), device=device)
    model.train()
    for step in progress(range(steps)):
        chosen = batch_at(examples, recipe, seed, step)
        seed_dropout(seed, step, 0, 0)
        losses = response_losses(model, chosen)
        loss = losses.sum() / sum(len(example.response) for example in chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = learning_rate_at(config, step, steps)
        finite_steps += guarded_step(optimizer, scaler, rate, config.clipping_max_norm).is_finite
    model.eval()
    if (skipped := steps - int(finite_steps)) > 0:
        raise NonFiniteError(f"{skipped} of {steps} steps had gradients that are not finite; lower learning_rate")
