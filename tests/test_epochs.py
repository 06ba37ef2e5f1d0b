"""Several epochs: how often each token is trained on, in which order, and that a kill changes nothing."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data
import ddp_train
from harness.run.config import load_run_configs
from harness.run.errors import DataError
from harness.run.plan import make_plan
from harness.tokens.token_files import TokenFile, open_split
from tests.conftest import Called
from tests.helpers import assert_same_run, metrics, train_in_fork, workers, write_demanding, write_run


def opened(folder: Path, datasets_dir: Path) -> data.TrainData:
    model, config = load_run_configs(folder / "model.json", folder / "train.json")
    train = data.open_splits(datasets_dir, model, config, 1, reads_through=True).train
    assert isinstance(train, data.TrainData)
    return train


def places(train: data.TrainData, file: TokenFile) -> list[int]:
    """Return where in the file each sequence of the run is, found by its tokens."""
    length = train.plan.context_length
    start = {tuple(file.read(s * length, length)): s for s in range((file.length - 1) // length)}
    found = []
    for step in range(train.plan.global_steps):
        for accumulation_step in range(train.plan.accumulation_steps):
            tokens, targets = train.microbatch(step, accumulation_step, 0)
            assert (tokens[:, 1:] == targets[:, :-1]).all()
            found += [start[tuple(row)] for row in tokens.numpy()]
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A dataset of 37 sequences of 16 tokens, all different."""
    from safetensors.numpy import save_file

    tokens = np.random.default_rng(0).integers(0, 97, 37 * 16 + 9).astype(np.uint16)
    (tmp_path / "datasets" / "toy").mkdir(parents=True)
    save_file({"tokens": tokens}, tmp_path / "datasets" / "toy" / "train.safetensors")
    return tmp_path / "datasets"


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sequence_is_seen_once_an_epoch(small: Path, tmp_path: Path, shuffle: bool) -> None:
    folder = write_run(tmp_path / "runs" / "a", {}, {"epochs": 4, "min_train_tokens": -1, "shuffle": shuffle})
    train = opened(folder, small)
    assert train.parts[0].sequences == 37
    found = places(train, open_split(small, "toy", "train"))
    assert len(found) == 4 * 37 // train.plan.global_batch * train.plan.global_batch
    epochs = [found[start : start + 37] for start in range(0, len(found), 37)]
    for epoch in epochs[:3]:
        assert sorted(epoch) == list(range(37))
    assert max(Counter(epochs[3]).values()) == 1
    if shuffle:
        assert len({tuple(epoch) for epoch in epochs[:3]}) == 3
    else:
        assert epochs[0] == epochs[1] == list(range(37))


def test_the_first_epoch_is_that_of_a_run_of_one(small: Path, tmp_path: Path) -> None:
    file = open_split(small, "toy", "train")
    one = places(
        opened(write_run(tmp_path / "runs" / "a", {}, {"min_train_tokens": -1, "shuffle": True}), small), file
    )
    folder = write_run(tmp_path / "runs" / "b", {}, {"min_train_tokens": -1, "shuffle": True, "epochs": 2})
    assert places(opened(folder, small), file)[: len(one)] == one


def test_more_tokens_than_there_are_need_epochs(small: Path, tmp_path: Path, call: Callable[..., Called]) -> None:
    folder = write_run(tmp_path / "runs" / "a", {}, {"min_train_tokens": 37 * 16 * 3, "epochs": 2})
    model, config = load_run_configs(folder / "model.json", folder / "train.json")
    with pytest.raises(DataError, match="2 times"):
        make_plan(model, config, 1, 37 * 16 + 9)
    folder = write_run(tmp_path / "runs" / "b", {}, {"min_train_tokens": 37 * 16 * 2, "epochs": 3})
    done = call(ddp_train.main, "b", small, "--runs-dir", folder.parent, "--dry-run")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Epochs")]
    assert line.split()[1].startswith("2.")


def test_a_kill_in_a_later_epoch_changes_nothing(small: Path, tmp_path: Path) -> None:
    changes = {"epochs": 6, "min_train_tokens": -1, "shuffle": True, "checkpoint_interval": 3}
    changes |= {"validation_interval": None, "validation_batches": None}
    whole, killed = (write_demanding(tmp_path / "runs" / name, **changes) for name in ("whole", "killed"))
    train_in_fork(whole, small)
    steps = len(metrics(whole))
    with workers(killed, small, fault=f"step.start@{steps - 2}:kill9") as (worker,):
        assert worker.wait() == -9
    train_in_fork(killed, small)
    assert_same_run(killed, whole)
