"""Streams keyed by purpose: nothing that is drawn may depend on what was drawn before it."""

import itertools
import math

import numpy as np
import pytest
import torch

from harness.tokens.randomness import Permutation, initial_normal, order_permutation, seed_dropout, stream_seed

# --- keys ----------------------------------------------------------------------------------------------------


def test_seeds_of_all_keys_differ() -> None:
    keys: list[tuple[str, tuple[int | str, ...]]] = [("init", (seed, "a", 2, 3)) for seed in range(50)]
    keys += [("dropout", key) for key in itertools.product((0, 1, 12), (0, 1, 2, 21), (0, 1, 11), (0, 1))]
    keys += [("order", key) for key in itertools.product(range(20), range(20))]
    keys += [("init", (1, name, 2)) for name in ("a", "b", "a.b", "ab")]
    seeds = {stream_seed(purpose, *key) for purpose, key in keys}
    assert len(seeds) == len(keys)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("order", 1, 23), ("order", 12, 3)),
        (("order", 1, 2), ("order", 2, 1)),
        (("init", "ab", "c"), ("init", "a", "bc")),
        (("init", 1), ("order", 1)),
        (("init", 1), ("init", 1, 0)),
        (("init", -1), ("init", 1)),
    ],
)
def test_keys_that_look_alike_are_not_the_same_stream(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert stream_seed(*one) != stream_seed(*other)


def test_a_stream_seed_is_the_same_on_every_machine_and_fits_64_bits() -> None:
    assert stream_seed("order", 42, 0) == 5233920870204793710
    assert all(0 <= stream_seed("order", n) < 2**64 for n in range(100))


# --- initial values ------------------------------------------------------------------------------------------


def test_initial_values_are_the_same_on_every_machine() -> None:
    values = initial_normal(42, "tok_emb.weight", (3, 4), 0.02)
    assert values.dtype == torch.float32
    assert values.shape == (3, 4)
    assert [value.hex() for value in values.flatten()[:4].tolist()] == [
        "-0x1.f634e60000000p-7",
        "0x1.a215660000000p-8",
        "-0x1.1cf9ae0000000p-9",
        "-0x1.f28d300000000p-8",
    ]


def test_initial_values_do_not_depend_on_what_was_drawn_before() -> None:
    first = initial_normal(1, "a", (5, 7), 1.0)
    torch.manual_seed(99)
    np.random.seed(99)
    initial_normal(1, "b", (1000, 3), 1.0)
    torch.randn(10)
    assert torch.equal(initial_normal(1, "a", (5, 7), 1.0), first)


def test_drawing_initial_values_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    initial_normal(1, "a", (100, 100), 1.0)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize(
    "changed", [(2, "a", (6, 4)), (1, "b", (6, 4)), (1, "a", (4, 6)), (1, "a", (24,)), (1, "a", (6, 5))]
)
def test_initial_values_depend_on_seed_name_and_shape(changed: tuple[int, str, tuple[int, ...]]) -> None:
    values = initial_normal(1, "a", (6, 4), 1.0).flatten()
    others = initial_normal(*changed, 1.0).flatten()
    assert not torch.isin(values, others).any()


def test_standard_deviation_only_scales() -> None:
    torch.testing.assert_close(
        initial_normal(1, "a", (50, 50), 0.02), 0.02 * initial_normal(1, "a", (50, 50), 1.0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
def test_initial_values_are_normal(seed: int) -> None:
    x = initial_normal(seed, "w", (1000, 1000), 0.02).double() / 0.02
    error = 1 / math.sqrt(x.numel())  # standard error of the mean
    assert abs(x.mean().item()) < 5 * error
    assert abs(x.std().item() - 1) < 5 * error
    assert abs((x**3).mean().item()) < 5 * error * math.sqrt(15)
    assert abs((x**4).mean().item() - 3) < 5 * error * math.sqrt(96)
    assert abs((x.abs() < 1).double().mean().item() - 0.682689) < 5 * error * 0.4655
    # Neighbours along both dimensions know nothing of each other.
    assert abs((x[:, 1:] * x[:, :-1]).mean().item()) < 5 * error
    assert abs((x[1:] * x[:-1]).mean().item()) < 5 * error


# --- dropout -------------------------------------------------------------------------------------------------


def mask(*key: int) -> torch.Tensor:
    seed_dropout(*key)
    return torch.nn.functional.dropout(torch.ones(4096), 0.5) > 0


def test_dropout_masks_repeat_exactly() -> None:
    first = mask(42, 3, 1, 2)
    torch.rand(17)
    assert torch.equal(mask(42, 3, 1, 2), first)


def test_dropout_masks_differ_by_seed_step_accumulation_step_and_rank() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)))
    masks = torch.stack([mask(*key) for key in keys]).float() * 2 - 1
    correlation = masks @ masks.T / masks.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max().item() < 6 / math.sqrt(masks.shape[1])


def test_dropout_masks_of_successive_layers_differ() -> None:
    seed_dropout(42, 0, 0, 0)
    one, other = (torch.nn.functional.dropout(torch.ones(4096), 0.5) for _ in range(2))
    assert not torch.equal(one, other)


# --- data order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100, 255, 256, 257, 1000, 1025]
)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_is_one(length: int, key: int) -> None:
    permutation = Permutation(length, key)
    assert sorted(permutation[i] for i in range(length)) == list(range(length))


def test_every_order_of_three_turns_up() -> None:
    orders = [tuple(Permutation(3, key)[i] for i in range(3)) for key in range(600)]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 6
    assert min(counts.values()) > 50  # 100 each, standard deviation 9


@pytest.mark.parametrize("length", [1000, 4096])
def test_permutation_looks_shuffled(length: int) -> None:
    order = np.array([Permutation(length, 7)[i] for i in range(length)])
    index = np.arange(length)
    error = 1 / math.sqrt(length)
    assert (order == index).sum() <= 8  # 1 is expected of a random order
    assert abs(np.corrcoef(order, index)[0, 1]) < 5 * error
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 * error
    assert abs(np.abs(order - index).mean() / length - 1 / 3) < 5 * error
    # Each eighth of the order draws from each eighth of the data.
    table = np.zeros((8, 8))
    np.add.at(table, (index * 8 // length, order * 8 // length), 1)
    assert ((table - length / 64) ** 2 / (length / 64)).sum() < 49 + 5 * math.sqrt(2 * 49)


def test_permutation_depends_on_its_key() -> None:
    orders = {tuple(Permutation(50, key)[i] for i in range(50)) for key in range(100)}
    assert len(orders) == 100


def test_permutation_of_a_large_dataset_needs_no_memory() -> None:
    length = 10**10
    permutation = Permutation(length, 3)
    images = [permutation[index] for index in (*range(1000), length - 1)]
    assert len(set(images)) == len(images)
    assert all(0 <= image < length for image in images)


def test_data_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        permutation = order_permutation(seed, epoch, 200)
        return [permutation[i] for i in range(200)]

    first = order(42, 0)
    torch.manual_seed(1)
    assert order(42, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (42, 43, 44) for epoch in (0, 1, 2)}) == 9


def test_data_order_is_the_same_on_every_machine() -> None:
    permutation = order_permutation(42, 0, 10)
    assert [permutation[i] for i in range(10)] == [0, 9, 4, 3, 5, 7, 2, 6, 1, 8]
