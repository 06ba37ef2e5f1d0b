"""Mixtures of experts: who gets which token, what is dropped, the router loss, and products over groups of rows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.experts import DROPPED, ROUTER_LOSS, grouped_product, route, routing_metrics
from harness.engine.loss import Objective
from harness.run.config import ExpertsConfig, load_model_config, load_run_configs
from harness.run.errors import ConfigError
from harness.run.model_size import count_parameters, flops_per_token
from model import GPTModel
from tests.helpers import REQUIRED_TRAIN, ROOT, TINY_MODEL, write
from tests.test_model import TINY, random_model, random_tokens

SPARSE = replace(TINY, moe=ExpertsConfig(num_experts=4, num_active_experts=2))


def test_the_published_models_have_the_published_sizes() -> None:
    for name in ("1xrtx3090-moe-no-balancing", "1xrtx3090-moe-first-proper-run"):
        model, _ = load_run_configs(*(ROOT / "runs" / name / file for file in ("model.json", "train.json")))
        parameters = count_parameters(model)
        assert parameters.total == 446_410_752
        # Published as 219,697,152, which leaves out the rows of the router for the experts that were not chosen.
        assert parameters.active == 219_697_152 + 12 * 4 * 768
        # Less than three times the dense model's matrices act on a token, and so much is computed.
        dense = replace(model, moe=None)
        assert flops_per_token(model) - flops_per_token(dense) == 6 * 12 * 768 * (8 * 768 + 6)


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"feed_forward": "swiglu"}], ids=str)
def test_parameters_are_counted(change: dict[str, Any]) -> None:
    config = replace(SPARSE, **change)
    model = GPTModel(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parameters = count_parameters(config)
    assert parameters.total == sum(sizes.values())
    assert parameters.active == sum(size for name, size in sizes.items() if not name.count("experts.2.")
                                    and not name.count("experts.3."))  # fmt: skip


def test_a_router_that_is_even_costs_as_much_as_experts_are_active() -> None:
    """Each of four experts is the first or second choice of as many tokens, by a hair."""
    scores = torch.zeros(2, 8, 4)
    for place in range(8):
        scores[:, place, [place % 4, (place + 1) % 4]] = 1e-6
    _, told = route(scores, 2, None)
    torch.testing.assert_close(told[:4], torch.full((4,), 0.25))
    assert told[ROUTER_LOSS].item() == pytest.approx(2)
    assert told[DROPPED] == 0


def test_a_router_that_sends_all_to_two_experts_costs_most() -> None:
    scores = torch.full((3, 8, 4), -50.0)
    scores[..., 1], scores[..., 2] = 50.0, 50.0
    _, told = route(scores, 2, None)
    torch.testing.assert_close(told, torch.tensor([0.0, 0.5, 0.5, 0.0, 4.0, 0.0]))


def test_the_router_loss_is_a_mean_over_sequences() -> None:
    """So that it does not matter how the global batch is split."""
    scores = torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(0))
    whole = route(scores, 2, None)[1]
    parts = torch.stack([route(part, 2, None)[1] for part in scores.split(2)]).mean(dim=0)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("factor", [0.25, 0.6, 1.0, 10.0])
def test_an_expert_takes_the_first_tokens_of_a_sequence_and_drops_the_rest(factor: float) -> None:
    scores = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    routing, told = route(scores, 2, factor)
    room = math.ceil(factor * 2 * 8 / 4)
    kept = 0
    for row in range(3):
        taken = [0] * 4
        for place in range(8):
            chosen = scores[row, place].topk(2).indices.tolist()
            shares = scores[row, place, chosen].softmax(0)
            for choice, expert in enumerate(chosen):
                taken[expert] += 1
                has_room = taken[expert] <= room
                kept += has_room
                expected = shares[choice] if has_room else torch.zeros(())
                torch.testing.assert_close(routing.weights[row, place, choice], expected)
    assert told[DROPPED].item() == pytest.approx(1 - kept / 48)
    assert int(routing.ends[-1]) == kept
    assert bool(told[DROPPED] > 0) == (factor < 2)


def test_capacity_is_for_training_and_leaves_the_past_alone() -> None:
    """Dropped tokens keep what came before them; in evaluation nothing is dropped."""
    tight = replace(SPARSE, moe=replace(SPARSE.moe, capacity_factor=0.5))
    tokens = random_tokens(SPARSE)
    full, model = random_model(SPARSE), random_model(tight)
    assert torch.equal(full(tokens), model(tokens))
    model.train()
    dropping = model(tokens)
    assert not torch.allclose(dropping, full(tokens))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SPARSE.vocab_size
    torch.testing.assert_close(model(changed)[:, :7], dropping[:, :7], atol=1e-5, rtol=1e-5)
    model(tokens).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_router_loss_is_in_the_gradients_and_not_in_the_loss() -> None:
    model, tokens = random_model(SPARSE).train(), random_tokens(SPARSE)
    losses, gradients = [], []
    for scale in (0.0, 0.5):
        loss, routing = Objective(model, router_loss_scale=scale)(tokens, tokens)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert routing is not None
        assert not routing.requires_grad
    assert losses[0] == losses[1]
    _, routing = model.hidden_states(tokens)
    assert routing is not None
    expected = torch.autograd.grad(0.5 * routing[:, ROUTER_LOSS].sum(), list(model.parameters()), allow_unused=True)
    for without, found, added in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(found - without, torch.zeros_like(found) if added is None else added,
                                   atol=1e-5, rtol=1e-3)  # fmt: skip
    assert sum(added is not None and bool(added.abs().max() > 1e-3) for added in expected) > 2


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    """And not none, which the reduction over ranks would wait for."""
    model = random_model(SPARSE).train()
    with torch.no_grad():
        for block in model.trf_blocks:
            block.ff.router.weight.zero_()  # all scores are equal, so that the same two experts get all tokens
    model(random_tokens(SPARSE)).square().mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if "experts" in name}
    idle = {
        name.split(".layers")[0]
        for name, gradient in gradients.items()
        if gradient is not None and not gradient.any()
    }
    assert len(idle) == 2 * 2
    assert None not in gradients.values()


def grouped_by_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    product = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype)
    for row in range(int(ends[-1])):
        expert = int((ends <= row).sum())
        product[row] = weight[expert] @ rows[row]
    return product


@pytest.mark.parametrize("ends", [[3, 3, 10, 12], [0, 0, 0, 12], [2, 5, 6, 9], [0, 0, 0, 0]], ids=str)
def test_rows_are_multiplied_with_their_expert_s_matrix(ends: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    places, outer = torch.tensor(ends, dtype=torch.int32), torch.randn(12, 5, dtype=torch.float64)
    results = []
    for product in (grouped_product(rows, weight, places, ends[-1] == 12), grouped_by_loop(rows, weight, places)):
        gradients = (
            torch.autograd.grad((product * outer).sum(), (rows, weight))
            if product.requires_grad
            else (torch.zeros_like(rows), torch.zeros_like(weight))
        )
        results.append((product, *gradients))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_compiled_kernels_compute_the_same() -> None:
    """With the kernels that Inductor makes, for which tracing alone would not be enough."""
    torch._dynamo.reset()
    model, tokens = random_model(SPARSE).train(), random_tokens(SPARSE)
    results = []
    for objective in (Objective(model, 0.0, 0.01), torch.compile(Objective(model, 0.0, 0.01), fullgraph=True)):
        loss, routing = objective(tokens, tokens.clone())
        results.append([loss, routing, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_computes_what_a_cpu_does(dtype: torch.dtype, capacity_factor: float | None) -> None:
    """With the kernel for all experts where there is one (bfloat16 from compute capability 9), else one by one."""
    config = replace(SPARSE, emb_dim=48, moe=replace(SPARSE.moe, capacity_factor=capacity_factor))
    tokens = random_tokens(config)
    results = []
    for device in ("cpu", "cuda"):
        model = random_model(config).train().to(device)
        with torch.autocast(device, dtype):
            loss, routing = Objective(model, router_loss_scale=0.01)(tokens.to(device), tokens.to(device))
        loss.backward()
        assert routing is not None
        results.append(
            (loss.item(), routing[:, DROPPED].tolist(), [p.grad.float().cpu() for p in model.parameters()])
        )
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert results[1][1] == pytest.approx(results[0][1], abs=0.05)
    for found, wanted in zip(results[1][2], results[0][2], strict=True):
        assert (found - wanted).norm() <= 0.1 * wanted.norm() + 1e-3


def test_metrics_are_taken_over_all_blocks() -> None:
    rows = [0.5, 0.25, 0.25, 0.0, 2.5, 0.0, 0.25, 0.25, 0.4, 0.1, 2.25, 0.5]
    assert routing_metrics(rows, 2) == {
        "moe/router_loss": 4.75, "moe/dropped": 0.25, "moe/busiest_expert": 2.0, "moe/idlest_expert": 0.0,
    }  # fmt: skip
    assert routing_metrics([], 0) == {}
    assert routing_metrics([0.5, 0.5, math.nan, 0.0], 1)["moe/router_loss"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    ("moe", "found"),
    [
        ({"num_experts": 3, "num_active_experts": 4}, '{"num_experts": 3, "num_active_experts": 4}'),
        ({"num_experts": 3}, '{"num_experts": 3}'),
        ({"num_experts": 3, "num_active_experts": 1}, "1"),
        ({"num_experts": 3.5, "num_active_experts": 2}, "3.5"),
        ({"num_experts": 3, "num_active_experts": 2, "capacity_factor": 0}, "0"),
        (True, "true"),
        ([6, 2], "[6, 2]"),
    ],
    ids=str,
)
def test_a_wrong_mixture_is_one_line(tmp_path: Path, moe: object, found: str) -> None:
    model = write(tmp_path / "model.json", {**TINY_MODEL, "moe": moe})
    with pytest.raises(ConfigError) as caught:
        load_run_configs(model, write(tmp_path / "train.json", REQUIRED_TRAIN))
    (line,) = caught.value.lines
    assert line.startswith(f"{model}: moe: found {found}, wanted null or")


def test_a_mistyped_key_of_a_mixture_is_named_with_the_nearest(tmp_path: Path) -> None:
    moe = {"num_experts": 3, "num_active_experts": 2}
    model = write(tmp_path / "model.json", {**TINY_MODEL, "moe": {**moe, "capacity_facter": 1}})
    with pytest.raises(ConfigError) as caught:
        load_model_config(model)
    (line,) = caught.value.lines
    wanted = "moe.capacity_facter: found an unknown key, wanted a known one; the nearest is capacity_factor"
    assert line == f"{model}: {wanted}"
    # The published series' harness logs to a file what metrics.jsonl has here.
    write(model, {**TINY_MODEL, "moe": {**moe, "log_moe_balance_file": "runs/sparse/routing.jsonl"}})
    assert load_model_config(model).moe == ExpertsConfig(**moe)


def test_a_router_loss_without_a_router_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", TINY_MODEL)
    train = write(tmp_path / "train.json", {**REQUIRED_TRAIN, "moe_router_loss_scale": 0.005})
    with pytest.raises(ConfigError, match=r"moe_router_loss_scale: found 0\.005, which acts only with moe") as caught:
        load_run_configs(model, train)
    assert len(caught.value.lines) == 1


def test_a_mixture_too_large_for_any_machine_is_refused(tmp_path: Path) -> None:
    moe = {"num_experts": 1024, "num_active_experts": 2}
    model = write(tmp_path / "model.json", {**TINY_MODEL, "emb_dim": 2048, "moe": moe})
    with pytest.raises(ConfigError, match=r"over 6\d,\d{3},\d{3},\d{3} parameters"):
        load_run_configs(model, write(tmp_path / "train.json", REQUIRED_TRAIN))
