"""nanoGPT and llm.c token files, read as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from data import ensure_dataset, open_splits
from harness.run.config import load_run_configs
from harness.run.errors import DataError
from harness.tokens.checked_tokens import check_tokens
from harness.tokens.token_files import TokenFile, open_split
from tests.helpers import TINY_MODEL

TOKENS = (np.arange(5000) % 97).astype(np.uint16)


def write_raw(path: Path, tokens: NDArray[np.uint16]) -> None:
    """As nanoGPT's prepare.py does."""
    path.parent.mkdir(exist_ok=True)
    tokens.tofile(path)


def write_llmc(path: Path, tokens: NDArray[np.uint16], version: int = 1, count: int | None = None) -> None:
    """As llm.c's data_common.py does."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (20240520, version, len(tokens) if count is None else count)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def open_mine(folder: Path, split: str = "train") -> TokenFile:
    return open_split(folder, "mine", split)


@pytest.mark.parametrize("write", [write_raw, write_llmc])
@pytest.mark.parametrize(("split", "name"), [("train", "train.bin"), ("validation", "val.bin"),
                                             ("validation", "validation.bin"), ("train", "tiny_train.bin"),
                                             ("validation", "fineweb_val_000000.bin")])  # fmt: skip
def test_bin_files_read_as_token_files(tmp_path: Path, write: Callable[..., None], split: str, name: str) -> None:
    write(tmp_path / "mine" / name, TOKENS)
    file = open_mine(tmp_path, split)
    assert file.length == len(TOKENS)
    for start, count in ((0, 5000), (7, 11), (4990, 10), (4990, 50), (0, 0)):
        found = file.read(start, count)
        assert found.dtype == np.int64
        assert found.tolist() == TOKENS[start : start + count].tolist()


def test_shards_are_one_split_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, part in enumerate(np.array_split(TOKENS, 12), start=1):
        write_llmc(tmp_path / "mine" / f"fineweb_train_{number:06}.bin", part)
    file = open_mine(tmp_path)
    assert file.length == len(TOKENS)
    for start, count in ((0, 5000), (410, 10), (400, 2000), (4999, 1)):
        assert file.read(start, count).tolist() == TOKENS[start : start + count].tolist()
    check = check_tokens(file, 0, 5000, 97)
    save_file({"tokens": TOKENS}, tmp_path / "mine" / "validation.safetensors")
    assert check.sha256 == check_tokens(open_mine(tmp_path, "validation"), 0, 5000, 97).sha256


def test_a_run_trains_on_a_nanogpt_folder(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    write_raw(tmp_path / "mine" / "train.bin", TOKENS)
    write_raw(tmp_path / "mine" / "val.bin", TOKENS[:1000])
    validating = {"validation_interval": 5, "validation_batches": 1}
    folder = make_run(train={"dataset": "mine", **validating})
    model, train = load_run_configs(folder / "model.json", folder / "train.json")
    ensure_dataset(tmp_path, train)  # nothing is downloaded
    splits = open_splits(tmp_path, model, train, 1, reads_through=True)
    tokens, targets = splits.train.microbatch(3, 2, 0)
    first = (3 * 4 + 2) * 2 * TINY_MODEL["context_length"]
    assert tokens.flatten().tolist() == TOKENS[first : first + 32].tolist()
    assert targets.flatten().tolist() == TOKENS[first + 1 : first + 33].tolist()
    assert [check.highest_id for check in splits.checks.values()] == [96, 96]


def test_safetensors_come_first(tmp_path: Path) -> None:
    write_raw(tmp_path / "mine" / "train.bin", TOKENS[:10])
    save_file({"tokens": TOKENS}, tmp_path / "mine" / "train.safetensors")
    assert open_mine(tmp_path).length == 5000


def test_ids_of_something_else_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.bin").write_bytes(b"not tokens, but text" * 100)
    file = open_mine(tmp_path)
    with pytest.raises(DataError, match=r"train\.bin: found id 28526 at token 0"):
        check_tokens(file, 0, file.length, 97)


def test_a_changed_shard_is_checked_again(tmp_path: Path) -> None:
    names = [tmp_path / "mine" / f"a_train_{number}.bin" for number in (1, 2)]
    for path in names:
        write_llmc(path, TOKENS)
    before = check_tokens(open_mine(tmp_path), 0, 10_000, 97)
    write_llmc(names[1], TOKENS[::-1])
    assert check_tokens(open_mine(tmp_path), 0, 10_000, 97).sha256 != before.sha256


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "found 0 bytes"),
        (lambda path: path.write_bytes(b"\1\0\2"), "found 3 bytes, wanted uint16 tokens"),
        (lambda path: write_llmc(path, TOKENS, version=7), "version 7, wanted 1"),
        (lambda path: write_llmc(path, TOKENS, count=5001), "wanted 11,026 for the 5,001 tokens"),
        (lambda path: write_llmc(path, TOKENS[:0]), "at least one"),
        (lambda path: write_llmc(path, TOKENS, count=-1), "-1 tokens"),
        (lambda path: path.write_bytes(np.array([20240520, 1, 5], np.int32).tobytes()), "found 12 bytes"),
    ],
)
def test_damaged_bin_is_one_line(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "train.bin"
    damage(path)
    with pytest.raises(DataError) as caught:
        open_mine(tmp_path)
    (line,) = caught.value.lines
    assert str(path) in line
    assert words in line


def test_a_missing_shard_and_a_second_dataset_are_refused(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        write_llmc(tmp_path / "mine" / f"a_train_{number:06}.bin", TOKENS)
    with pytest.raises(DataError, match="shard 2 and then shard 4"):
        open_mine(tmp_path)
    (tmp_path / "mine" / "a_train_000004.bin").unlink()
    write_llmc(tmp_path / "mine" / "b_train_000003.bin", TOKENS)
    with pytest.raises(DataError, match="shards of one dataset"):
        open_mine(tmp_path)
