"""The memory-lean loss is the plain one, and so are its gradients, in every precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from harness.engine import evaluate, loss
from harness.engine.evaluate import sequence_losses
from harness.engine.loss import Objective, capped, chunked_next_token_loss, next_token_loss
from harness.run.config import load_model_config
from model import GPTModel, initialise, uninitialized_model
from tests.helpers import TINY_MODEL, write

Pair = tuple[Tensor, tuple[Tensor, ...]]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them not full."""
    monkeypatch.setattr(loss, "loss_chunk_rows", lambda _: 100)


def both(amp_dtype: torch.dtype | None, loss_scale: float = 65536, softcap: float | None = None) -> tuple[Pair, Pair]:
    """Return loss and gradients of hidden states and head, scaled as a gradient scaler would, plain and lean."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 64, 32, generator=generator, requires_grad=True)
    head = torch.randn(501, 32, generator=generator).mul_(0.3).requires_grad_()
    targets = torch.randint(0, 501, (4, 64), generator=generator)
    results = []

    def plain() -> Tensor:
        logits = F.linear(hidden, head)
        return next_token_loss(logits if softcap is None else capped(logits.float(), softcap), targets)

    for function in (
        plain,
        lambda: chunked_next_token_loss(hidden, head, targets, softcap),
    ):
        with torch.autocast("cpu", amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            value = function()
        results.append((value, torch.autograd.grad(value * loss_scale, (hidden, head))))
    return results[0], results[1]


# bfloat16 has 8 bits of mantissa and float16 11; one rounding of a product's inputs and one of its result each.
@pytest.mark.parametrize(
    ("amp_dtype", "tolerance"), [(None, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.usefixtures("few_rows")
def test_loss_and_gradients_are_the_plain_ones(
    amp_dtype: torch.dtype | None, tolerance: float, softcap: float | None
) -> None:
    (plain, plain_gradients), (lean, lean_gradients) = both(amp_dtype, softcap=softcap)
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


@pytest.mark.parametrize(
    ("amp_dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
@pytest.mark.usefixtures("few_rows")
def test_z_loss_is_in_the_gradients_and_not_in_the_loss(amp_dtype: torch.dtype | None, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 64, 32, generator=generator, requires_grad=True)
    head = torch.randn(501, 32, generator=generator).mul_(0.3).requires_grad_()
    targets = torch.randint(0, 501, (4, 64), generator=generator)
    with torch.autocast("cpu", amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
        logits = F.linear(hidden, head)
        plain = next_token_loss(logits, targets)
        lean = chunked_next_token_loss(hidden, head, targets, z_loss=0.02)
    torch.testing.assert_close(lean, plain, rtol=tolerance / 10, atol=0)
    whole = plain + 0.02 * logits.float().logsumexp(dim=-1).square().mean()
    for found, wanted, without in zip(
        *(torch.autograd.grad(value, (hidden, head), retain_graph=True) for value in (lean, whole, plain)),
        strict=True,
    ):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert (without - wanted).abs().max() > 0.05 * wanted.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_objective_is_the_plain_loss_of_the_logits(tmp_path: Path, tied: bool) -> None:
    model, objective = make_objective(tmp_path)
    if tied:
        model.out_head = None
    tokens = torch.randint(0, 97, (6, 16), generator=torch.Generator().manual_seed(0))
    plain_value = next_token_loss(model(tokens), tokens)
    plain_gradients = torch.autograd.grad(plain_value, list(model.parameters()))
    lean_value, _ = objective(tokens, tokens)
    lean_gradients = torch.autograd.grad(lean_value, list(model.parameters()))
    torch.testing.assert_close(lean_value, plain_value, rtol=1e-6, atol=0)
    for found, wanted in zip(lean_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("few_rows")
def test_evaluation_takes_the_softmax_of_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 50, 97, dtype=torch.bfloat16)
    targets = torch.randint(0, 97, (5, 50))
    wanted = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(5, 50)
    rows: list[int] = []
    entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a, **k: rows.append(len(x)) or entropy(x, *a, **k))
    assert torch.equal(loss.token_losses(logits, targets), wanted)
    assert rows == [100, 100, 50]


def test_evaluation_on_mps_has_no_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[torch.dtype] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mean.dim:
                computed.append(found.dtype)
            return found

    losses = torch.rand(3, 5)
    monkeypatch.setattr(evaluate, "token_loss_batches", lambda *_: [losses])
    with Record():
        found = sequence_losses(torch.nn.Identity(), [], torch.device("mps"))
    assert found == pytest.approx(losses.mean(dim=1).numpy())
    assert computed == [torch.float32]


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


@pytest.mark.usefixtures("few_rows")
def test_loss_scale_does_not_overflow_float16() -> None:
    _, (_, gradients) = both(torch.float16, loss_scale=2.0**24)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("few_rows")
def test_compiler_sees_one_operator_and_compiles_at_most_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unrolled, the chunks' logits and weight gradients would be alive at once."""
    graphs: list[torch.fx.GraphModule] = []
    chunks: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def recorded(logits: Tensor, targets: Tensor, softcap: float, z_loss: float) -> tuple[Tensor, Tensor]:
        chunks.append(len(logits))
        return loss.softmax_gradient(logits, targets, softcap, z_loss)

    monkeypatch.setattr(loss, "compiled_softmax_gradient", lambda: recorded)
    compiled = torch.compile(chunked_next_token_loss, backend=keep, fullgraph=True)
    hidden, head = torch.randn(5, 211, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    for _ in range(2):
        targets = torch.randint(0, 97, (5, 211))
        torch.testing.assert_close(
            compiled(hidden, head, targets), next_token_loss(F.linear(hidden, head), targets), rtol=1e-5, atol=0
        )
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("chunked_linear_cross_entropy" in call for call in calls) == 1
    assert len(graph.graph.nodes) < 20
    assert (len(chunks), sum(chunks)) == (2 * 11, 2 * 5 * 211)
    assert len(set(chunks)) <= 2


def compare_compiled(device: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 64, 16, generator=generator).to(device).requires_grad_()
    head = torch.randn(97, 16, generator=generator).to(device).requires_grad_()
    targets = torch.randint(0, 97, (2, 64), generator=generator).to(device)
    results = []
    for function in (torch.compile(chunked_next_token_loss, fullgraph=True), chunked_next_token_loss):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = function(hidden, head, targets)
        results.append((value, *torch.autograd.grad(value * 65536, (hidden, head))))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_compiled_loss_is_the_loss() -> None:
    compare_compiled("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_compiled_loss_is_the_loss_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    compare_compiled("cuda", dtype, tolerance)
