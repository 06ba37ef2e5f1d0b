"""The arithmetic of a run: batches, steps, parameters, FLOPs, the checkpoint schedule, what a resume must share."""

from dataclasses import replace
from typing import Any

import pytest

from harness.engine.costs import GIB, cost_of, describe, microbatch_gib
from harness.engine.gpu_peaks import peak_flops_per_second
from harness.engine.identity import identity_of
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError, DataError
from harness.run.keys import Part, part_of
from harness.run.model_size import count_parameters, flops_per_token
from harness.run.plan import Plan, make_plan, validation_sequences
from model import GPTModel
from tests.key_table import MODEL_ROWS, TRAIN_ROWS
from tests.test_model import STACKS

GPT2_SMALL = ModelConfig(
    vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1, qkv_bias=False
)
TINY = ModelConfig(vocab_size=97, context_length=16, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0, qkv_bias=False)
PUBLISHED = TrainConfig(
    dataset="gpjt/fineweb-gpt2-tokens",
    min_train_tokens=3_260_190_720,
    start_train_token=0,
    start_val_token=0,
    microbatch_size=12,
    checkpoint_interval=617,
)
# 4 sequences of 16 tokens on one process.
SMALL = replace(PUBLISHED, dataset="toy", min_train_tokens=640, microbatch_size=2, gradient_accumulation_steps=2)
BATCH_TOKENS = 64


# --- steps and tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "microbatch", "accumulation"), [(8, 12, 1), (1, 6, 16), (4, 12, 2)])
def test_published_budget(world_size: int, microbatch: int, accumulation: int) -> None:
    train = replace(PUBLISHED, microbatch_size=microbatch, gradient_accumulation_steps=accumulation)
    plan = make_plan(GPT2_SMALL, train, world_size)
    assert plan.global_batch == 96
    assert plan.tokens_per_global_step == 98_304
    assert plan.global_steps == 33_165
    assert plan.train_tokens == 3_260_252_160


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        (1, 1),
        (BATCH_TOKENS - 1, 1),
        (BATCH_TOKENS, 1),
        (BATCH_TOKENS + 1, 2),
        (10 * BATCH_TOKENS, 10),
        (10**15, 15_625 * 10**9),
    ],
)
def test_token_budget_is_rounded_up_to_whole_global_batches(tokens: int, steps: int) -> None:
    assert make_plan(TINY, replace(SMALL, min_train_tokens=tokens), 1).global_steps == steps


@pytest.mark.fault("F47")
@pytest.mark.parametrize(
    ("available", "steps"),
    [
        (BATCH_TOKENS + 1, 1),
        (2 * BATCH_TOKENS, 1),
        (2 * BATCH_TOKENS + 1, 2),
        (2 * BATCH_TOKENS + 2, 2),
        (10 * BATCH_TOKENS - 1, 9),
        (10 * BATCH_TOKENS, 9),
        (10 * BATCH_TOKENS + 1, 10),
    ],
)
def test_minus_one_takes_every_global_batch_whose_last_target_exists(available: int, steps: int) -> None:
    plan = make_plan(TINY, replace(SMALL, min_train_tokens=-1), 1, available)
    assert plan.global_steps == steps
    assert plan.train_tokens < available  # the last target is one token more


@pytest.mark.parametrize("available", [BATCH_TOKENS, 1, 0, -5])
@pytest.mark.parametrize("tokens", [-1, 1])
def test_less_than_one_global_batch_is_refused(available: int, tokens: int) -> None:
    with pytest.raises(DataError, match=f"toy.* wanted {BATCH_TOKENS + 1}"):
        make_plan(TINY, replace(SMALL, min_train_tokens=tokens), 1, available)


@pytest.mark.fault("F47")
def test_split_that_is_one_token_short_is_refused() -> None:
    needed = 10 * BATCH_TOKENS + 1
    assert make_plan(TINY, SMALL, 1, needed).global_steps == 10
    with pytest.raises(DataError, match="found 640 tokens from token 0 on, wanted 641"):
        make_plan(TINY, SMALL, 1, needed - 1)


def test_minus_one_needs_the_dataset() -> None:
    with pytest.raises(DataError, match="min_train_tokens"):
        make_plan(TINY, replace(SMALL, min_train_tokens=-1), 1)


# --- how a global batch is made ------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_global_batch_size_gives_the_accumulation(world_size: int, accumulation: int) -> None:
    plan = make_plan(GPT2_SMALL, replace(PUBLISHED, global_batch_size=96), world_size)
    assert plan.accumulation_steps == accumulation
    assert plan.global_batch == 96


@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_global_batch_size_must_divide(world_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(GPT2_SMALL, replace(PUBLISHED, global_batch_size=96), world_size)
    (line,) = caught.value.lines
    assert "global_batch_size: found 96, wanted a multiple of" in line
    assert str(12 * world_size) in line


def test_microbatch_index_is_the_published_formula() -> None:
    plan = Plan(world_size=8, microbatch_size=12, accumulation_steps=3, context_length=1024, global_steps=5)
    assert plan.microbatch_index(0, 0, 0) == 0
    assert plan.microbatch_index(2, 1, 5) == ((2 * 3) + 1) * 8 + 5


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_microbatch_indices_count_every_place_once(world_size: int, accumulation: int) -> None:
    plan = Plan(
        world_size=world_size, microbatch_size=2, accumulation_steps=accumulation, context_length=16, global_steps=6
    )
    places = [
        plan.microbatch_index(step, a, rank)
        for step in range(plan.global_steps)
        for a in range(accumulation)
        for rank in range(world_size)
    ]
    assert places == list(range(6 * world_size * accumulation))


def test_validation_is_in_batches_of_the_global_size() -> None:
    train = replace(PUBLISHED, validation_interval=617, validation_batches=300)
    assert validation_sequences(train, make_plan(GPT2_SMALL, train, 8)) == 28_800
    assert validation_sequences(PUBLISHED, make_plan(GPT2_SMALL, PUBLISHED, 8)) == 0


# --- size and cost -------------------------------------------------------------------------------------------


MODEL_CHANGES = [{}, *({key: row.value} for key, row in MODEL_ROWS.items()), *STACKS]


@pytest.mark.parametrize("change", [*MODEL_CHANGES, {"qkv_bias": True, "tie_weights": True, "n_layers": 3}], ids=str)
def test_parameter_count_is_that_of_the_model(change: dict[str, Any]) -> None:
    config = replace(TINY, **{"emb_dim": 16, "n_heads": 2, **change})
    parameters = dict(GPTModel(config).named_parameters())
    embeddings = ("tok_emb.weight", "pos_emb.weight", "out_head.weight")
    count = count_parameters(config)
    assert count.total == sum(value.numel() for value in parameters.values())
    assert count.without_embeddings == sum(p.numel() for name, p in parameters.items() if name not in embeddings)


def test_parameter_counts_of_gpt2_small() -> None:
    assert count_parameters(GPT2_SMALL).total == 163_009_536
    # The released GPT-2 small: tied, with biases.
    assert count_parameters(replace(GPT2_SMALL, qkv_bias=True, tie_weights=True)).total == 124_439_808


def test_flops_per_token_of_gpt2_small() -> None:
    assert flops_per_token(GPT2_SMALL) == 854_438_400
    # Sharing the head saves parameters, not work.
    assert flops_per_token(replace(GPT2_SMALL, tie_weights=True)) == 854_438_400


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312), ("A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA A30", 165), ("NVIDIA A40", 149.7),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H800", 989),
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 3080 Ti", 68.2),
        ("NVIDIA GeForce RTX 4090 D", 147.1), ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
        ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla T4", 65),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70),
    ],
)  # fmt: skip
def test_peak_of_known_gpus(device_name: str, tflops: float) -> None:
    assert peak_flops_per_second(device_name, use_amp=True) == tflops * 1e12


def test_peak_in_float32_is_that_without_tensor_cores() -> None:
    assert peak_flops_per_second("NVIDIA A100-SXM4-40GB", use_amp=False) == 19.5e12


@pytest.mark.parametrize(
    "device_name",
    ["cpu", "", "NVIDIA GeForce GTX 1660", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA T400",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
     "NVIDIA A100-SXM-64GB"],
)  # fmt: skip
def test_peak_of_an_unknown_device_is_not_guessed(device_name: str) -> None:
    assert peak_flops_per_second(device_name, use_amp=True) is None


def test_description_of_the_published_run() -> None:
    priced = replace(PUBLISHED, price_per_hour=15.92, currency="US$", expected_tokens_per_second=266_284)
    rows = dict(describe(cost_of(GPT2_SMALL, priced, make_plan(GPT2_SMALL, priced, 8)), priced))
    assert rows["Parameters"].startswith("163,009,536 (85,")
    assert rows["Tokens"] == "3,260,252,160"
    assert rows["Global steps"] == "33,165"
    assert rows["Global batch"] == "96 sequences, 98,304 tokens"
    assert rows["FLOPs per token"] == "854.4 million"
    assert rows["FLOPs in total"] == "2.786e+18"
    assert rows["Time"].startswith("3.40 hours")
    assert rows["Cost"] == "54.14 US$"
    assert rows["Checkpoints"].startswith("55 of 1.82 GiB")


def test_memory_is_that_of_what_the_device_runs() -> None:
    """A CPU compiles only where it is told to, and holds fewer rows of logits than a GPU."""
    model = replace(GPT2_SMALL, logit_softcap=30.0)
    train = replace(PUBLISHED, use_amp=False, microbatch_size=2)
    plain = replace(train, compile=False)
    assert microbatch_gib(model, train, "cpu") == microbatch_gib(model, plain, "cpu") > microbatch_gib(model, train)
    large = replace(train, microbatch_size=8)
    assert microbatch_gib(GPT2_SMALL, large, "cpu") < microbatch_gib(GPT2_SMALL, large, "cuda")


def test_memory_estimate_counts_what_a_block_keeps() -> None:
    """As benchmarks/results/cuda-check.md counts it in generated code: bytes a position, channel and block."""

    def per_channel(**train: Any) -> float:
        large, small = (
            microbatch_gib(GPT2_SMALL, replace(PUBLISHED, microbatch_size=size, **train)) for size in (96, 48)
        )
        return (large - small) * GIB / (48 * 1024 * 768 * 12)

    ends = 14 / 12
    assert per_channel() == pytest.approx(38 + ends)  # with dropout
    assert per_channel(activation_checkpointing=True) == pytest.approx(4 + (38 + 14) / 12)
    assert per_channel(use_amp=False) == pytest.approx(66 + 20 / 12)


def test_memory_estimate_counts_cuda_and_nccl() -> None:
    one, eight = (cost_of(GPT2_SMALL, PUBLISHED, make_plan(GPT2_SMALL, PUBLISHED, size)) for size in (1, 8))
    assert 0.5 <= one.runtime_gib < eight.runtime_gib <= 1.5
    assert one.peak_gib == one.state_gib + one.microbatch_gib + one.runtime_gib


def test_description_without_prices_has_no_time_and_no_cost() -> None:
    rows = dict(describe(cost_of(GPT2_SMALL, PUBLISHED, make_plan(GPT2_SMALL, PUBLISHED, 8)), PUBLISHED))
    assert not {"Time", "Cost"} & rows.keys()


# --- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [
        (1, 5, [0]),
        (2, 5, [0, 1]),
        (5, 5, [0, 4]),
        (6, 5, [0, 5]),
        (7, 5, [0, 5, 6]),
        (20, 5, [0, 5, 10, 15, 19]),
        (3, 1, [0, 1, 2]),
        (3, 2**40, [0, 2]),
    ],
)
def test_checkpoints_follow_step_0_every_interval_and_the_last(
    steps: int, interval: int, expected: list[int]
) -> None:
    plan = Plan(world_size=1, microbatch_size=1, accumulation_steps=1, context_length=8, global_steps=steps)
    assert [step for step in range(steps) if plan.is_checkpoint_step(step, interval)] == expected
    assert plan.checkpoints(interval) == len(expected)


# --- identity ------------------------------------------------------------------------------------------------


def identity(
    model: ModelConfig = GPT2_SMALL, train: TrainConfig = PUBLISHED, world_size: int = 8
) -> dict[str, object]:
    return identity_of(model, train, make_plan(model, train, world_size), "data", {}).must_match


def test_split_of_the_global_batch_is_free() -> None:
    local = replace(PUBLISHED, microbatch_size=6, gradient_accumulation_steps=16)
    by_size = replace(PUBLISHED, microbatch_size=3, global_batch_size=96)
    assert identity() == identity(train=local, world_size=1) == identity(train=by_size, world_size=4)


def test_size_of_the_global_batch_is_not_free() -> None:
    assert identity(world_size=4) != identity()


def test_number_of_tokens_is_free_unless_a_schedule_depends_on_it() -> None:
    longer: dict[str, Any] = {"min_train_tokens": 2 * PUBLISHED.min_train_tokens}
    scheduled = replace(PUBLISHED, schedule_learning_rate=True)
    assert identity(train=replace(PUBLISHED, **longer)) == identity()
    assert identity(train=replace(scheduled, **longer)) != identity(train=scheduled)
    # The same number of steps said in other words is the same run.
    assert identity(train=replace(scheduled, min_train_tokens=3_260_252_160)) == identity(train=scheduled)


# How the global batch is split, and how many tokens there are, is in the identity by value: see above.
BY_VALUE = {"min_train_tokens", "microbatch_size", "gradient_accumulation_steps", "global_batch_size"}


@pytest.mark.parametrize("key", [key for key in TRAIN_ROWS if key not in BY_VALUE])
def test_a_resume_shares_what_decides_the_numbers(key: str) -> None:
    value = TRAIN_ROWS[key].value
    changed = replace(PUBLISHED, **{key: tuple(value) if isinstance(value, list) else value})
    decides = part_of(TrainConfig, key) in (Part.RECIPE, Part.SEED)
    assert (identity(train=changed) != identity()) == (decides and changed != PUBLISHED)


@pytest.mark.parametrize("key", MODEL_ROWS)
def test_a_resume_shares_the_model(key: str) -> None:
    model = replace(TINY, drop_rate=0.1)
    assert identity(model=replace(model, **{key: MODEL_ROWS[key].value})) != identity(model=model)


def test_a_seed_said_in_other_words_is_the_same_run() -> None:
    spelled = replace(PUBLISHED, random_seed=9, init_seed=42, order_seed=42, dropout_seed=42)
    assert identity(train=spelled) == identity()
