"""The schedule and the guarded step, held against torch's own schedulers, clipping and AdamW."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from harness.engine import distributed
from harness.engine.muon import hidden_matrices, orthogonalised
from harness.engine.optimizers import make_optimizer
from harness.engine.schedules import learning_rate_at
from harness.engine.step import StepOutcome, guarded_step, require_gradients
from harness.run.config import ModelConfig, TrainConfig
from model import GPTModel

CPU = torch.device("cpu")
# The one device whose optimizer is not fused, so that a step is skipped in Python; the weights stay on the CPU.
NOT_FUSED = torch.device("mps")


def config(**values: Any) -> TrainConfig:
    return TrainConfig(
        dataset="toy",
        min_train_tokens=-1,
        start_train_token=0,
        start_val_token=0,
        microbatch_size=1,
        checkpoint_interval=1,
        **values,
    )


# --- learning rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_steps", "warmup_percent", "warmup_steps"),
    [
        (100, 5.0, 5), (100, 10.0, 10), (33, 50.0, 16), (7, 5.0, 0), (20, 0.0, 0), (1, 5.0, 0), (50, 99.0, 49),
        (2, 50.0, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("peak", [0.0014, 1.0])
def test_schedule_is_that_of_torch(global_steps: int, warmup_percent: float, warmup_steps: int, peak: float) -> None:
    scheduled = config(learning_rate=peak, schedule_learning_rate=True, warmup_period_percent=warmup_percent)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = CosineAnnealingLR(optimizer, T_max=global_steps - warmup_steps, eta_min=peak / 10)
    scheduler: Any = cosine
    if warmup_steps:
        for group in optimizer.param_groups:
            group["lr"] = peak
        warmup = LinearLR(optimizer, start_factor=1e-5, total_iters=warmup_steps)
        scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
    for step in range(global_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(scheduled, step, global_steps) == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_landmarks_of_the_published_schedule() -> None:
    published = config(learning_rate=0.0014, schedule_learning_rate=True, warmup_period_percent=5)
    rates = [learning_rate_at(published, step, 33_165) for step in range(33_165)]
    assert rates[0] == pytest.approx(0.0014e-5)
    assert max(rates) == rates[1658] == pytest.approx(0.0014)
    assert rates[:1659] == sorted(rates[:1659])
    assert rates[1658:] == sorted(rates[1658:], reverse=True)
    assert rates[829] == pytest.approx(0.0007, rel=1e-3)
    assert rates[1658 + (33_165 - 1658) // 2] == pytest.approx((0.0014 + 0.00014) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(0.00014, rel=1e-3)
    assert min(rates[1658:]) > 0.00014


@pytest.mark.parametrize("warmup_percent", [0.0, 5.0])
def test_rate_is_constant_without_a_schedule(warmup_percent: float) -> None:
    constant = config(learning_rate=0.0004, warmup_period_percent=warmup_percent)
    assert {learning_rate_at(constant, step, 50) for step in range(50)} == {0.0004}


@pytest.mark.parametrize(
    ("schedule", "final", "landmarks"),
    [
        ("linear", 0.1, {0: 1e-5, 10: 0.5, 20: 1.0, 110: 0.55, 199: 0.105}),
        ("linear", 0.0, {0: 1e-5, 20: 1.0, 110: 0.5, 199: 1 / 180}),
        ("wsd", 0.1, {0: 1e-5, 20: 1.0, 119: 1.0, 120: 1.0, 160: 0.55, 199: 0.1 + 0.9 / 80}),
        ("wsd", 0.0, {20: 1.0, 120: 1.0, 121: 79 / 80, 199: 1 / 80}),
        ("cosine", 0.0, {20: 1.0, 110: 0.5, 199: (1 - math.cos(math.pi / 180)) / 2}),
    ],
)
def test_landmarks_of_the_other_schedules(schedule: str, final: float, landmarks: dict[int, float]) -> None:
    cooldown = {"cooldown_percent": 40.0} if schedule == "wsd" else {}
    shaped = config(
        learning_rate=0.002, schedule=schedule, final_rate_fraction=final, warmup_period_percent=10, **cooldown
    )
    for step, height in landmarks.items():
        assert learning_rate_at(shaped, step, 200) == pytest.approx(0.002 * height, abs=2e-7), step


# --- parameter groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("device", [CPU, NOT_FUSED], ids=["fused", "not fused"])
def test_groups_hold_every_parameter_once_and_decay_what_multiplies(device: torch.device, tie_weights: bool) -> None:
    model = GPTModel(
        ModelConfig(
            vocab_size=31, context_length=8, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True,
            tie_weights=tie_weights,
        )
    )  # fmt: skip
    optimizer = make_optimizer(model, config(weight_decay=0.33724, learning_rate=0.002), device)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_vector = name.endswith((".bias", ".scale", ".shift"))
        assert decay_of[id(parameter)] == (0.0 if is_vector else 0.33724), name
    assert {group["lr"] for group in optimizer.param_groups} == {0.002}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_decay_all_decays_vectors_too() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = make_optimizer(model, config(weight_decay=0.3, decay_all=True), CPU).param_groups
    assert {group["weight_decay"] for group in groups} == {0.3}


def test_adamw_has_the_configured_constants() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), config(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6), CPU)
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.8, 0.95, 1e-6)}


@pytest.mark.parametrize("tie_weights", [False, True])
def test_muon_has_the_matrices_of_the_blocks_at_its_own_rate(tie_weights: bool) -> None:
    shape = {"vocab_size": 31, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2, "qkv_bias": True}
    model = GPTModel(ModelConfig(**shape, drop_rate=0.0, tie_weights=tie_weights))
    chosen = {id(parameter) for parameter in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    layers = ("att.W_query", "att.W_key", "att.W_value", "att.out_proj", "ff.layers.0", "ff.layers.2")
    assert names == {f"trf_blocks.{number}.{layer}.weight" for number in (0, 1) for layer in layers}
    optimizer = make_optimizer(model, config(optimizer="muon", muon_learning_rate=0.05, learning_rate=0.002), CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guarded_step(optimizer, GradScaler("cpu", enabled=False), 0.001, None)  # half of the peak
    grouped = [(id(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert dict(grouped)[id(parameter)] == pytest.approx(0.025 if id(parameter) in chosen else 0.001)


def test_parameter_without_a_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"idle\.weight, idle\.bias"):
        require_gradients(model)
    model["idle"](torch.ones(1, 2)).sum().backward()
    require_gradients(model)


# --- the guarded step ----------------------------------------------------------------------------------------


class Toy:
    """Two layers with an optimizer and a scaler, stepped with gradients that the test chooses."""

    def __init__(self, scaler: str, device: torch.device = CPU, **values: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        self.optimizer = make_optimizer(self.model, config(**values), device)
        self.scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaler == "scaler")

    def step(
        self, gradients: list[Tensor], learning_rate: float = 0.01, max_norm: float | None = None
    ) -> StepOutcome:
        """Step as if a backward pass had left these gradients, scaled where there is a scaler."""
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = self.scaler.scale(gradient.clone())
        return guarded_step(self.optimizer, self.scaler, learning_rate, max_norm)

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step counts, by name."""
        values = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            values |= {f"{name} {key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return values


def random_gradients(seed: int, norm: float = 2.0) -> list[Tensor]:
    """Gradients for `Toy`, of the given global norm."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) for shape in ((5, 6), (5,), (2, 5), (2,))]
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    return [gradient * (norm / total) for gradient in gradients]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def toy_of(words: str) -> Toy:
    optimizer = {"optimizer": "muon"} if "muon" in words else {}
    return Toy("no scaler" if "scaler" not in words else "scaler", NOT_FUSED if "not" in words else CPU, **optimizer)


ADAMW = ("fused", "fused, scaler", "not fused", "not fused, scaler")


@pytest.fixture(params=ADAMW)
def toy(request: pytest.FixtureRequest) -> Toy:
    return toy_of(request.param)


@pytest.fixture(params=[*ADAMW, *(f"muon, {words}" for words in ADAMW)])
def any_toy(request: pytest.FixtureRequest) -> Toy:
    return toy_of(request.param)


def test_steps_are_those_of_plain_adamw_with_clipping(toy: Toy) -> None:
    """Twenty steps, of which about half are clipped, with a rate that changes."""
    model = copy.deepcopy(toy.model)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = AdamW(groups, foreach=False, fused=False)
    for number in range(20):
        gradients = random_gradients(number, norm=0.5 + 0.3 * number)
        rate = 0.01 / (1 + number)
        outcome = toy.step(gradients, rate, max_norm=3.5)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 3.5)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        assert bool(outcome.is_finite)
        torch.testing.assert_close(outcome.grad_norm, norm)
    for ours, theirs in zip(toy.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_muons_steps_are_those_of_torch() -> None:
    """Twenty steps beside torch's Muon, which computes in bfloat16, and AdamW; about half are clipped."""
    toy = Toy("no scaler", optimizer="muon", muon_learning_rate=0.05, learning_rate=0.01)
    model = copy.deepcopy(toy.model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1),
        AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.01, weight_decay=0.0),
    ]
    start = [p.detach().clone() for p in matrices]
    for number in range(20):
        gradients = random_gradients(number, norm=0.5 + 0.3 * number)
        toy.step(gradients, 0.01, max_norm=3.5)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(model.parameters(), 3.5)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(toy.model.parameters(), model.parameters(), strict=True):
        exact = {"rtol": 1e-5, "atol": 1e-7} if ours.ndim == 1 else {"rtol": 0.0, "atol": 0.02}
        torch.testing.assert_close(ours, theirs, **exact)
    assert min((p - q).abs().max().item() for p, q in zip(matrices, start, strict=True)) > 0.2


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_orthogonalised_matrices_are_nearly_orthogonal_and_keep_their_directions(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrices)
    assert found.shape == shape
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    singular = u.mT @ found @ v.mT  # in the matrices' own bases: diagonal
    diagonal = singular.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(singular, torch.diag_embed(diagonal), rtol=0.0, atol=1e-3)
    assert diagonal.min() > 0.3
    assert diagonal.max() < 1.3


@pytest.mark.parametrize("entries", [1, 3, 4, 5])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_have_all_of_the_result(
    monkeypatch: pytest.MonkeyPatch, entries: int, world_size: int
) -> None:
    """One process plays every rank in turn; what it would send is put where the others would receive it."""
    stack = torch.arange(entries * 6.0).view(entries, 2, 3)
    sent: list[Tensor] = []
    worked: list[int] = []

    def double(part: Tensor) -> Tensor:
        worked.append(len(part))
        return 2 * part

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: world_size)
    for gathers in (lambda _, part: sent.append(part), lambda whole, _: whole.copy_(torch.cat(sent))):
        monkeypatch.setattr(distributed.dist, "all_gather_into_tensor", gathers)
        for rank in range(world_size):
            monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
            found = distributed.in_shares(double, stack)
    torch.testing.assert_close(found, 2 * stack)
    assert sum(worked) == 2 * entries
    assert max(worked) == math.ceil(entries / world_size)


@pytest.mark.parametrize(
    ("norm", "max_norm", "expected"), [(7.0, 3.5, 3.5), (2.0, 3.5, 2.0), (7.0, None, 7.0), (500.0, 3.5, 3.5)]
)
def test_clipping_acts_on_unscaled_gradients(toy: Toy, norm: float, max_norm: float | None, expected: float) -> None:
    gradients = random_gradients(1, norm)
    outcome = toy.step(gradients, max_norm=max_norm)
    assert outcome.grad_norm.item() == pytest.approx(norm, rel=1e-5)  # before clipping, without the scale
    # The first moment after one step is a tenth of the gradient that arrived.
    for parameter, gradient in zip(toy.model.parameters(), gradients, strict=True):
        arrived = toy.optimizer.state[parameter]["exp_avg"] * 10
        torch.testing.assert_close(arrived, gradient * (expected / norm), rtol=1e-5, atol=1e-7)


@pytest.mark.fault("F40")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("max_norm", [None, 3.5])
def test_one_non_finite_gradient_skips_every_parameter(
    any_toy: Toy, value: float, place: int, max_norm: float | None
) -> None:
    any_toy.step(random_gradients(1))
    before, scale = any_toy.state(), any_toy.scaler.get_scale()
    gradients = random_gradients(2)
    gradients[place].view(-1)[-1] = value
    outcome = any_toy.step(gradients, learning_rate=0.5, max_norm=max_norm)
    assert not bool(outcome.is_finite)
    assert not math.isfinite(outcome.grad_norm.item())
    assert_same(any_toy.state(), before)
    assert any_toy.scaler.get_scale() == (scale / 2 if any_toy.scaler.is_enabled() else scale)


def test_first_step_can_be_the_skipped_one(any_toy: Toy, request: pytest.FixtureRequest) -> None:
    weights = [parameter.detach().clone() for parameter in any_toy.model.parameters()]
    broken = random_gradients(1)
    broken[0][0, 0] = float("nan")
    assert not bool(any_toy.step(broken).is_finite)
    assert all(torch.equal(a, b) for a, b in zip(weights, any_toy.model.parameters(), strict=True))
    # What follows is as if it had never been.
    other = toy_of(request.node.callspec.params["any_toy"])
    for seed in (2, 3):
        assert bool(any_toy.step(random_gradients(seed)).is_finite)
        other.step(random_gradients(seed))
    assert_same(any_toy.state(), other.state())


def test_skipped_step_leaves_no_trace_in_the_steps_after_it(any_toy: Toy) -> None:
    other = copy.deepcopy(any_toy)
    broken = random_gradients(9)
    broken[2][0, 0] = float("inf")
    for seed in (1, 2, 3):
        any_toy.step(random_gradients(seed), max_norm=1.0)
        other.step(random_gradients(seed), max_norm=1.0)
        other.step(broken, max_norm=1.0)
    assert_same(any_toy.state(), other.state())


def test_gradients_whose_norm_overflows_are_skipped(any_toy: Toy) -> None:
    """Each is finite, their norm is not: the step says so and must do as it says."""
    any_toy.step(random_gradients(1))
    before = any_toy.state()
    outcome = any_toy.step([gradient * 1e30 for gradient in random_gradients(2)], max_norm=3.5)
    assert not bool(outcome.is_finite)
    assert_same(any_toy.state(), before)


def test_learning_rate_is_the_one_given(toy: Toy) -> None:
    for rate in (0.0, 0.25):
        before = [parameter.detach().clone() for parameter in toy.model.parameters()]
        toy.step(random_gradients(1), learning_rate=rate)
        moved = max((a - b).abs().max().item() for a, b in zip(before, toy.model.parameters(), strict=True))
        # AdamW's first steps along one direction are as long as the rate, and the decay adds a tenth of it.
        assert moved == pytest.approx(rate, rel=0.15, abs=1e-9)


def test_vectors_are_not_decayed(any_toy: Toy) -> None:
    before = [parameter.detach().clone() for parameter in any_toy.model.parameters()]
    any_toy.step([torch.zeros_like(parameter) for parameter in any_toy.model.parameters()], learning_rate=0.5)
    for old, new in zip(before, any_toy.model.parameters(), strict=True):
        rate = 0.5 * (0.02 / 0.0004 if "momentum_buffer" in any_toy.optimizer.state[new] else 1)
        torch.testing.assert_close(new, old * (1 - rate * 0.1) if old.ndim == 2 else old)


def test_gradients_are_gone_after_the_step(any_toy: Toy) -> None:
    any_toy.step(random_gradients(1))
    assert all(parameter.grad is None for parameter in any_toy.model.parameters())


def test_result_stays_on_the_device_as_scalars(toy: Toy) -> None:
    outcome = toy.step(random_gradients(1))
    assert outcome.grad_norm.shape == outcome.is_finite.shape == ()
    assert outcome.is_finite.dtype == torch.bool


def test_scale_grows_again_after_finite_steps() -> None:
    toy = Toy("scaler")
    toy.scaler.set_growth_interval(3)
    scales = []
    for seed in range(6):
        toy.step(random_gradients(seed))
        scales.append(toy.scaler.get_scale())
    assert scales == [1024, 1024, 2048, 2048, 2048, 4096]


def test_float16_gradients_that_overflow_under_the_scale_are_skipped() -> None:
    """A real backward pass in float16: the scaled loss is finite, its gradient is not."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False)
    optimizer = make_optimizer(model, config(), CPU)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    before = model.weight.detach().clone()
    scales = []
    for _ in range(30):
        with torch.autocast("cpu", torch.float16):
            loss = (model(torch.ones(1, 8)) * 8).float().sum()
        scaler.scale(loss).backward()
        outcome = guarded_step(optimizer, scaler, 0.01, 1.0)
        scales.append(scaler.get_scale())
        if bool(outcome.is_finite):
            break
        assert torch.equal(model.weight, before)
    assert bool(outcome.is_finite)
    assert scales[0] == 2.0**15  # the first was skipped
    assert not torch.equal(model.weight, before)
    assert outcome.grad_norm.item() == pytest.approx(8 * math.sqrt(8), rel=1e-3)
