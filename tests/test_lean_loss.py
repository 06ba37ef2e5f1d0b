"""The memory-lean loss is the plain one, and so are its gradients, in every precision."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.engine import evaluate, loss
from harness.engine.evaluate import sequence_losses
from harness.engine.loss import Objective, chunked_next_token_loss, next_token_loss
from harness.run.config import load_model_config
from model import GPTModel, initialise, uninitialized_model
from tests.helpers import TINY_MODEL, write

Pair = tuple[Tensor, tuple[Tensor, ...]]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them not full."""
    monkeypatch.setattr(loss, "LOSS_CHUNK_ROWS", 100)


def both(amp_dtype: torch.dtype | None) -> tuple[Pair, Pair]:
    """Return loss and gradients of hidden states and head, scaled as a gradient scaler would, plain and lean."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 64, 32, generator=generator, requires_grad=True)
    head = torch.randn(501, 32, generator=generator).mul_(0.3).requires_grad_()
    targets = torch.randint(0, 501, (4, 64), generator=generator)
    results = []
    for function in (
        lambda: next_token_loss(F.linear(hidden, head), targets),
        lambda: chunked_next_token_loss(hidden, head, targets),
    ):
        with torch.autocast("cpu", amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            value = function()
        results.append((value, torch.autograd.grad(value * 65536, (hidden, head))))
    return results[0], results[1]


# bfloat16 has 8 bits of mantissa and float16 11; one rounding of a product's inputs and one of its result each.
@pytest.mark.parametrize(
    ("amp_dtype", "tolerance"), [(None, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
@pytest.mark.usefixtures("few_rows")
def test_loss_and_gradients_are_the_plain_ones(amp_dtype: torch.dtype | None, tolerance: float) -> None:
    (plain, plain_gradients), (lean, lean_gradients) = both(amp_dtype)
    assert lean.dtype == torch.float32
    torch.testing.assert_close(lean, plain, rtol=tolerance / 10, atol=0)
    for found, wanted in zip(lean_gradients, plain_gradients, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.usefixtures("few_rows")
def test_small_gradients_survive_float16() -> None:
    """A token's share of the mean's gradient is far below float16's smallest number; the scaler must still see it."""
    _, (_, gradients) = both(torch.float16)
    assert all((gradient != 0).float().mean() > 0.99 for gradient in gradients)


def make_objective(tmp_path: Path, seed: int = 1) -> tuple[GPTModel, Objective]:
    model = uninitialized_model(load_model_config(write(tmp_path / "model.json", {**TINY_MODEL, "drop_rate": 0.0})))
    initialise(model, seed)
    return model, Objective(model)


@pytest.mark.parametrize("tied", [False, True])
def test_objective_is_the_plain_loss_of_the_logits(tmp_path: Path, tied: bool) -> None:
    model, objective = make_objective(tmp_path)
    if tied:
        model.out_head = None
    tokens = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(0))
    plain_value = next_token_loss(model(tokens), tokens)
    plain_gradients = torch.autograd.grad(plain_value, list(model.parameters()))
    lean_value = objective(tokens, tokens)
    lean_gradients = torch.autograd.grad(lean_value, list(model.parameters()))
    torch.testing.assert_close(lean_value, plain_value, rtol=1e-6, atol=0)
    for found, wanted in zip(lean_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_evaluation_cuts_batches_with_large_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_objective(tmp_path)
    tokens = torch.randint(0, 97, (7, 16), generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = sequence_losses(model, [(tokens, tokens)], torch.device("cpu"))
    monkeypatch.setattr(evaluate, "MOST_LOGITS_BYTES", 3 * 16 * 97 * 4)
    cut = sequence_losses(model, [(tokens, tokens)], torch.device("cpu"))
    assert sizes == [7, 3, 3, 1]
    assert cut == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_compiler_takes_it_whole() -> None:
    hidden, head = torch.randn(2, 64, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 97, (2, 64))
    compiled = torch.compile(chunked_next_token_loss, fullgraph=True)
    value = compiled(hidden, head, targets)
    wanted = chunked_next_token_loss(hidden, head, targets)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    found = torch.autograd.grad(value, (hidden, head))
    for gradient, plain in zip(found, torch.autograd.grad(wanted, (hidden, head)), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-7)
