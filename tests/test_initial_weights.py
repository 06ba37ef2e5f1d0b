"""Initial values depend on (init_seed, parameter name, shape) alone, and the first loss is near ln(V)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.engine.loss import Objective, first_loss_warning, next_token_loss, token_losses
from harness.run.config import ModelConfig, TrainConfig
from model import GPTModel, initialise
from tests.test_model import INTERVENTIONS

BASE = ModelConfig(vocab_size=61, context_length=12, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.1, qkv_bias=False)
TRAIN = TrainConfig(
    dataset="toy",
    min_train_tokens=-1,
    start_train_token=0,
    start_val_token=0,
    microbatch_size=2,
    checkpoint_interval=5,
)


def initial(config: ModelConfig = BASE, train: TrainConfig = TRAIN) -> dict[str, Tensor]:
    """The untrained weights of a run."""
    model = GPTModel(config, train.activation_checkpointing)
    initialise(model, train.seed_of("init"))
    return dict(model.state_dict())


def assert_shared_bits_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    shared = one.keys() & other.keys()
    assert len(shared) >= 16
    for name in shared:
        assert torch.equal(one[name], other[name]), name


# --- interventions leave every other value alone -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "added", "removed"),
    [
        ({"qkv_bias": True}, 6, 0),
        ({"drop_rate": 0.0}, 0, 0),
        ({"tie_weights": True}, 0, 1),
        ({"qkv_bias": True, "tie_weights": True, "drop_rate": 0.0}, 6, 1),
        ({"n_layers": 3}, 13, 0),
        ({"n_layers": 20}, 18 * 13, 0),
        ({"n_heads": 4}, 0, 0),
        ({"positions": "rotary"}, 0, 1),
        ({"norm": "rms"}, 0, 5),
        ({"feed_forward": "relu_squared"}, 0, 0),
        ({"qk_norm": True}, 0, 0),
        ({"bias": False}, 0, 6 + 5),
        ({"embedding_norm": True}, 0, 0),
        ({"value_residual": True}, 1, 0),
        ({"logit_softcap": 15.0}, 0, 0),
    ],
)
def test_model_intervention_leaves_shared_values_bit_identical(
    change: dict[str, Any], added: int, removed: int
) -> None:
    base, changed = initial(), initial(replace(BASE, **change))
    assert (len(changed.keys() - base.keys()), len(base.keys() - changed.keys())) == (added, removed)
    assert_shared_bits_equal(base, changed)


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "other"}, {"min_train_tokens": 100}, {"start_train_token": 7}, {"microbatch_size": 4},
        {"gradient_accumulation_steps": 3}, {"global_batch_size": 8}, {"learning_rate": 0.1},
        {"schedule_learning_rate": True, "warmup_period_percent": 5.0}, {"weight_decay": 0.01},
        {"clipping_max_norm": 3.5}, {"use_amp": False}, {"amp_dtype": "bfloat16"}, {"shuffle": True},
        {"order_seed": 1}, {"dropout_seed": 1}, {"random_seed": 1, "init_seed": 42}, {"compile": True},
        {"activation_checkpointing": True}, {"deterministic": True}, {"checkpoint_interval": 1},
    ],
    ids=lambda change: "+".join(change),
)  # fmt: skip
def test_training_intervention_leaves_all_values_bit_identical(change: dict[str, Any]) -> None:
    base, changed = initial(), initial(train=replace(TRAIN, **change))
    assert base.keys() == changed.keys()
    assert_shared_bits_equal(base, changed)


@pytest.mark.parametrize("change", [{"init_seed": 1}, {"random_seed": 1}])
def test_init_seed_changes_every_matrix(change: dict[str, Any]) -> None:
    base, changed = initial(), initial(train=replace(TRAIN, **change))
    for name in base:
        assert torch.equal(base[name], changed[name]) == (base[name].ndim == 1), name


def test_no_two_matrices_share_values() -> None:
    matrices = {name: value for name, value in initial().items() if value.ndim == 2}
    first_values = {
        (value / value.std()).flatten()[:8].mul(1e4).round().int().tolist()[0] for value in matrices.values()
    }
    assert len(first_values) == len(matrices)


def test_order_of_construction_does_not_matter() -> None:
    base = initial()
    torch.manual_seed(9)
    first, second = GPTModel(replace(BASE, qkv_bias=True)), GPTModel(BASE)
    torch.randn(100)
    initialise(second, 42)
    initialise(first, 42)
    assert_shared_bits_equal(base, dict(second.state_dict()))
    assert_shared_bits_equal(base, dict(first.state_dict()))
    initialise(first, 7)
    initialise(first, 42)
    assert_shared_bits_equal(base, dict(first.state_dict()))


def test_initialising_leaves_the_global_generator_alone() -> None:
    model = GPTModel(BASE)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    initialise(model, 42)
    assert torch.equal(torch.rand(3), expected)


# --- the values ----------------------------------------------------------------------------------------------


def test_values_are_those_of_gpt2() -> None:
    config = replace(BASE, vocab_size=4000, emb_dim=240, n_layers=3, qkv_bias=True)
    for name, value in initial(config).items():
        if name.endswith((".bias", ".shift")):
            assert (value == 0).all(), name
        elif name.endswith(".scale"):
            assert (value == 1).all(), name
        else:
            std = 0.02
            if name.endswith(("out_proj.weight", "ff.layers.2.weight")):
                std /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
            error = 5 / math.sqrt(value.numel())
            assert value.std().item() == pytest.approx(std, rel=error), name
            assert abs(value.mean().item()) < std * error, name


def test_values_are_those_of_pytorch() -> None:
    """Against modules that PyTorch made: the same largest value, spread and mean, layer by layer."""
    config = replace(BASE, vocab_size=4000, emb_dim=240, n_layers=3, qkv_bias=True, init="torch")
    values = initial(config)
    for name, theirs in GPTModel(config).state_dict().items():  # not a line of `initialise` has run
        ours = values[name]
        if name.endswith((".scale", ".shift")):
            assert torch.equal(ours, theirs), name
            continue
        error = 5 / math.sqrt(theirs.numel())
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=2 * error), name
        assert abs(ours.mean().item()) < theirs.std().item() * error, name
        if "emb" not in name:
            assert theirs.abs().max() * (1 - error) < ours.abs().max() < theirs.abs().max() * (1 + error), name


@pytest.mark.parametrize("tie_weights", [False, True])
def test_zero_projections_are_zero_and_the_rest_is_gpt2s(tie_weights: bool) -> None:
    plain, zeroed = (
        initial(replace(BASE, tie_weights=tie_weights, feed_forward="swiglu", init=init))
        for init in ("gpt2", "zero_projections")
    )
    changed = {name for name in plain if not torch.equal(plain[name], zeroed[name])}
    projections = ("att.out_proj", "ff.layers.2")
    wanted = {f"trf_blocks.{block}.{layer}.weight" for block in range(2) for layer in projections}
    assert changed == wanted | (set() if tie_weights else {"out_head.weight"})
    assert not any(zeroed[name].any() for name in changed)


def test_parameter_without_a_rule_is_an_error_that_names_it() -> None:
    model = GPTModel(BASE)
    model.gate = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="gate"):
        initialise(model, 42)


# --- the loss ------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_of_minus_log_probabilities() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = [
        -math.log(math.exp(logits[b, t, targets[b, t]]) / sum(math.exp(x) for x in logits[b, t]))
        for b in range(2)
        for t in range(5)
    ]
    losses = token_losses(logits, targets)
    assert losses.shape == (2, 5)
    torch.testing.assert_close(losses.flatten(), torch.tensor(expected))
    assert next_token_loss(logits, targets).item() == pytest.approx(sum(expected) / 10, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(2, 5, 1000) * 10).to(dtype), torch.randint(1000, (2, 5))
    for loss in (next_token_loss, token_losses):
        assert loss(logits, targets).dtype == torch.float32
        torch.testing.assert_close(loss(logits, targets), loss(logits.float(), targets))


def test_objective_is_the_loss_of_the_model() -> None:
    model = GPTModel(replace(BASE, drop_rate=0.0))
    initialise(model, 42)
    tokens = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(0))
    loss, _ = Objective(model)(tokens[:, :-1], tokens[:, 1:])
    assert loss.shape == ()
    expected = F.cross_entropy(model(tokens[:, :-1]).reshape(-1, 61), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)


# --- the first loss ------------------------------------------------------------------------------------------

WIDE = ModelConfig(
    vocab_size=50257, context_length=64, emb_dim=64, n_heads=4, n_layers=4, drop_rate=0.0, qkv_bias=False
)


def first_loss(model: GPTModel) -> float:
    tokens = torch.randint(50257, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(Objective(model)(tokens[:, :-1], tokens[:, 1:])[0])


@pytest.mark.parametrize(
    ("change", "init_seed"),
    [
        ({}, 42), ({}, 7), ({"tie_weights": True}, 42), ({"tie_weights": True}, 7), ({"init": "torch"}, 42),
        ({"init": "zero_projections"}, 42), *((change, 42) for change in INTERVENTIONS),
    ],
    ids=str,
)  # fmt: skip
def test_first_loss_is_near_that_of_knowing_nothing(change: dict[str, Any], init_seed: int) -> None:
    model = GPTModel(replace(WIDE, **change))
    initialise(model, init_seed)
    loss = first_loss(model)
    assert abs(loss - math.log(50257)) < 0.2
    assert first_loss_warning(loss, model, 50257) is None


@pytest.mark.parametrize(("tie_weights", "words"), [(True, "token embedding"), (False, "output head")])
def test_first_loss_warning_names_the_head_that_starts_too_large(tie_weights: bool, words: str) -> None:
    model = GPTModel(replace(WIDE, tie_weights=tie_weights))
    initialise(model, 42)
    with torch.no_grad():
        head = model.tok_emb if model.out_head is None else model.out_head
        torch.nn.init.normal_(head.weight, 0, 1, generator=torch.Generator().manual_seed(0))
    loss = first_loss(model)
    assert loss > math.log(50257) + 1
    warning = first_loss_warning(loss, model, 50257)
    assert warning is not None
    assert "\n" not in warning
    assert words in warning
    assert f"{loss:.2f}" in warning
    assert "10.82" in warning


@pytest.mark.parametrize(
    ("loss", "warns"),
    [
        (10.82, False),
        (11.8, False),
        (9.9, False),
        (11.9, True),
        (9.7, True),
        (float("nan"), True),
        (float("inf"), True),
    ],
)
def test_first_loss_warning_starts_a_nat_away(loss: float, warns: bool) -> None:
    model = GPTModel(BASE)
    assert (first_loss_warning(loss, model, 50257) is not None) == warns


def test_low_first_loss_is_told_from_a_high_one() -> None:
    warning = first_loss_warning(3.5, GPTModel(BASE), 50257)
    assert warning is not None
    assert "trained before" in warning
