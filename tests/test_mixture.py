"""Datasets mixed by weight: exact shares, each dataset in its own order, exact resumption, and what is refused."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data import TrainData, open_splits
from harness.engine.identity import ResumeIdentity, identity_of
from harness.run.config import ModelConfig, TrainConfig, load_train_config
from harness.run.errors import ConfigError, DataError
from harness.run.recipe import recipe_hash
from harness.tokens.mixture import Mixture
from tests.helpers import TINY_MODEL, TINY_TRAIN, final_bits, train_in_fork, write

LENGTH = 16
MODEL = ModelConfig(**{**TINY_MODEL, "vocab_size": 60_000})
WEIGHTS = [{"name": "toy", "weight": 3}, {"name": "code", "weight": 1.5}, {"name": "chat", "weight": 0.5}]


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [1, 1e-6], [1e9, 3, 7, 0.001], [0.1] * 10])
def test_every_beginning_has_the_shares_and_each_dataset_in_order(weights: list[float]) -> None:
    mixture = Mixture.of(weights)
    seen = [0] * len(weights)
    for index in range(2000):
        assert mixture.counts(index) == seen
        dataset, number = mixture.place(index)
        assert number == seen[dataset]
        seen[dataset] += 1
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - (index + 1) * weight / sum(weights)) < len(weights)


def test_the_longest_mixture_uses_up_one_dataset() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        weights = generator.integers(1, 9, 3).tolist()
        available = generator.integers(0, 60, 3).tolist()
        mixture = Mixture.of(weights)
        most = mixture.fitting(available)
        fits = [all(np.less_equal(mixture.counts(n), available)) for n in range(sum(available) + 2)]
        assert most == fits.index(False) - 1


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A folder with three datasets, whose tokens count from 0, 20,000 and 40,000."""
    for number, (name, sequences) in enumerate([("toy", 600), ("code", 300), ("chat", 100)]):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            tokens = np.arange(sequences * LENGTH + 1) + 20_000 * number
            metadata = {"tokenizer": "gpt2"}
            save_file({"tokens": tokens.astype(np.uint16)}, tmp_path / name / f"{split}.safetensors", metadata)
    return tmp_path


def config(folder: Path, **changes: Any) -> TrainConfig:
    written = {**TINY_TRAIN, "dataset": WEIGHTS, **changes}
    return load_train_config(write(folder / "train.json", {k: v for k, v in written.items() if v is not None}))


def sequences_trained(datasets: Path, train: TrainConfig, world_size: int) -> list[tuple[int, int]]:
    """Dataset and number of each sequence in the order of training."""
    splits = open_splits(datasets, MODEL, train, world_size, reads_through=True)
    splits = splits.bound_to(splits.checks)
    plan = splits.plan
    rows = torch.cat(
        [
            splits.train.microbatch(step, accumulation, rank)[0]
            for step in range(plan.global_steps)
            for accumulation in range(plan.accumulation_steps)
            for rank in range(world_size)
        ]
    )
    assert torch.equal(rows, rows[:, :1] + torch.arange(LENGTH))
    return [(first // 20_000, first % 20_000 // LENGTH) for first in rows[:, 0].tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_mixture_is_the_same_however_the_batch_is_split(counting: Path, shuffle: bool) -> None:
    whole = sequences_trained(counting, config(counting, shuffle=shuffle), 1)
    split = config(counting, shuffle=shuffle, microbatch_size=1, gradient_accumulation_steps=2)
    assert sequences_trained(counting, split, 4) == whole
    counts = [sum(dataset == number for dataset, _ in whole) for number in range(3)]
    assert counts == [96, 48, 16]
    for number, sequences in enumerate([600, 300, 100]):
        order = [place for dataset, place in whole if dataset == number]
        assert len(set(order)) == len(order)
        assert (order == list(range(len(order)))) != shuffle
        assert max(order) < sequences


def test_all_that_fits_ends_where_a_dataset_does(counting: Path) -> None:
    train = config(counting, min_train_tokens=-1, microbatch_size=1, gradient_accumulation_steps=1)
    places = sequences_trained(counting, train, 1)
    counts = [sum(dataset == number for dataset, _ in places) for number in range(3)]
    assert counts == [600, 300, 100]
    short = replace(train, min_train_tokens=1001 * LENGTH)
    with pytest.raises(DataError, match=r"train split of toy \(60%\) \+ code \(30%\) \+ chat \(10%\): found 16,001 "):
        open_splits(counting, MODEL, short, 1, reads_through=True)


def test_a_dataset_that_is_used_up_comes_again_in_another_order(counting: Path) -> None:
    train = config(counting, epochs=2, shuffle=True, min_train_tokens=1500 * LENGTH, microbatch_size=1)
    places = sequences_trained(counting, train, 1)
    toy = [sequence for dataset, sequence in places if dataset == 0]
    assert len(toy) == 900
    assert Counter(Counter(toy).values()) == {2: 300, 1: 300}
    assert toy[:300] != toy[600:]
    splits = open_splits(counting, MODEL, train, 1, reads_through=False)
    assert isinstance(splits.train, TrainData)
    assert splits.train.epochs() == [1.5, 1.5, 1.5]
    with pytest.raises(DataError, match="until one of them is used up"):
        open_splits(counting, MODEL, replace(train, epochs=1), 1, reads_through=True)


def test_datasets_of_two_tokenizers_are_refused(counting: Path) -> None:
    save_file(
        {"tokens": np.arange(5000, dtype=np.uint16)}, counting / "chat" / "train.safetensors", {"tokenizer": "x"}
    )
    with pytest.raises(DataError, match=r"chat/train\.safetensors: found x in its metadata, wanted gpt2"):
        open_splits(counting, MODEL, config(counting), 1, reads_through=True)


def test_validation_is_that_of_the_first_dataset(counting: Path) -> None:
    train = config(counting, validation_interval=1, validation_batches=1)
    splits = open_splits(counting, MODEL, train, 1, reads_through=True)
    assert splits.validation is not None
    assert splits.validation.path.parent.name == train.scored_dataset == "toy"
    assert list(splits.checks) == ["train toy", "train code", "train chat", "validation"]


def test_weights_and_data_are_in_the_identity(counting: Path) -> None:
    def identity(train: TrainConfig) -> ResumeIdentity:
        splits = open_splits(counting, MODEL, train, 1, reads_through=True)
        return identity_of(MODEL, train, splits.plan, splits.fingerprint, splits.checked())

    train = config(counting)
    first = identity(train)
    assert list(identity(config(counting)).differences_from(first)) == []
    heavier = config(counting, dataset=[{**WEIGHTS[0], "weight": 4}, *WEIGHTS[1:]])
    assert {found.key for found in identity(heavier).differences_from(first)} >= {"dataset"}
    assert recipe_hash(MODEL, heavier) != recipe_hash(MODEL, train)
    path = counting / "chat" / "train.safetensors"
    save_file({"tokens": np.arange(1, 1602, dtype=np.uint16)}, path, {"tokenizer": "gpt2"})
    assert {found.key for found in identity(train).differences_from(first)} >= {"data_fingerprint"}


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([{"name": "toy", "weight": 1}], "wanted NAME or OWNER/NAME"),
        ([{"name": "toy", "weight": 1}, {"name": "toy", "weight": 2}], "a list of at least two different"),
        ([{"name": "toy", "weight": 1}, {"name": "b", "weight": 0}], "above 0"),
        ([{"name": "toy", "weight": 1}, {"name": "../b", "weight": 1}], "a list of at least two"),
        ([{"name": "toy"}, {"name": "b"}], "a list of at least two"),
        (["toy", "b"], "a list of at least two"),
        (7, "a list of at least two"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path: Path, dataset: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, dataset=dataset)
    assert len(caught.value.lines) == 1
    assert "train.json: dataset: found" in caught.value.lines[0]
    assert words in caught.value.lines[0]


def test_a_mistyped_key_of_a_dataset_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, dataset=[{"name": "toy", "weight": 1}, {"name": "b", "weigh": 1}])
    (line,) = caught.value.lines
    assert "dataset[1].weigh: found an unknown key, wanted a known one; the nearest is weight" in line


@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (5, 3)])
def test_no_dataset_of_a_mixture_is_gone_through_more_often_than_epochs(
    tmp_path: Path, epochs: int, weights: tuple[int, int]
) -> None:
    for name, sequences in (("a", 1), ("b", 3)):
        tokens = np.arange(sequences * LENGTH + 1, dtype=np.uint16)
        (tmp_path / name).mkdir()
        save_file({"tokens": tokens}, tmp_path / name / "train.safetensors", {"tokenizer": "gpt2"})
    one_by_one: dict[str, Any] = {"microbatch_size": 1, "gradient_accumulation_steps": 1}
    mixed = [{"name": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    train = config(tmp_path, dataset=mixed, epochs=epochs, min_train_tokens=-1, **one_by_one)
    splits = open_splits(tmp_path, MODEL, train, 1, reads_through=True)
    assert isinstance(splits.train, TrainData)
    assert max(splits.train.epochs()) <= epochs


def test_a_pinned_revision_belongs_to_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset_revision: found with a list of datasets"):
        config(tmp_path, dataset_revision="main")
    pinned = config(tmp_path, dataset=[{**part, "revision": "abc"} for part in WEIGHTS])
    assert [part.revision for part in pinned.datasets] == ["abc"] * 3


def test_a_mixture_resumes_to_the_bit(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    """Stopped by --max-steps amid a checkpoint interval and resumed with another split of the batch."""
    for name in ("code", "chat"):
        folder = datasets_dir / name
        folder.mkdir(exist_ok=True)
        tokens = np.random.default_rng(len(name)).integers(0, 97, 9000).astype(np.uint16)
        save_file({"tokens": tokens}, folder / "train.safetensors")
    mixed = {"dataset": WEIGHTS, "shuffle": True, "min_train_tokens": 12 * 8 * LENGTH}
    whole, stopped = make_run("whole", {}, mixed), make_run("stopped", {}, mixed)
    train_in_fork(whole, datasets_dir)
    train_in_fork(stopped, datasets_dir, "--max-steps", "7")
    train_in_fork(stopped, datasets_dir)
    assert final_bits(stopped) == final_bits(whole)
