"""The dataset changes while a run trains, or between two starts: no other tokens are trained on, nothing is lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import data
from harness.run.errors import DataError
from harness.run.run_folder import RunFolder
from harness.tokens import checked_tokens
from harness.tokens.checked_tokens import CheckedTokens, check_tokens
from harness.tokens.token_files import TokenFile, open_split
from tests.helpers import LAST_STEP, assert_same_run, status, train_in_fork, write_demanding

IDS = 97
STEP = 12  # of 30: what happens, happens when the rank reads for this global step
SMALL = {"shuffle": False, "validation_interval": None, "validation_batches": None}


@pytest.fixture
def own_datasets(tmp_path: Path, datasets_dir: Path) -> Path:
    """A copy of the datasets, to be changed."""
    return shutil.copytree(datasets_dir, tmp_path / "datasets")


def replaced(path: Path) -> None:
    """As `prepare_dataset.py --fresh` does: a rename."""
    tokens = load_file(path)["tokens"]
    save_file({"tokens": tokens[::-1].copy()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def replaced_with_its_time(path: Path) -> None:
    stat = path.stat()
    replaced(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def deleted(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def read_in_small() -> None:
    """Have a small file be what large ones are: of many stretches, and hardly covered by its fingerprint."""
    checked_tokens.STRETCH_TOKENS = 64
    data.FINGERPRINT_TOKENS = 16


def when_read_at(split: str, how: Callable[[Path], None], datasets: Path) -> None:
    """Change the file in the worker, just before it reads for STEP, or validates then."""
    read_in_small()
    path, original, is_done = datasets / "toy" / f"{split}.safetensors", data.TrainData.microbatch, []

    def microbatch(self: data.TrainData, step: int, *more: int) -> Any:
        if step == STEP and not is_done and os.environ.get("RANK", "0") == "0":
            how(path)
            is_done.append(True)
        return original(self, step, *more)

    data.TrainData.microbatch = microbatch  # type: ignore[method-assign]


@pytest.mark.fault("F61")
@pytest.mark.parametrize(
    ("how", "count"),
    [(replaced, 2), (replaced_with_its_time, 1), (cut, 1), (deleted, 1), (deleted, 2), (a_folder, 1)],
)
def test_a_dataset_that_changes_under_a_run_ends_it_saved(
    tmp_path: Path, own_datasets: Path, datasets_dir: Path, how: Callable[[Path], None], count: int
) -> None:
    folder = write_demanding(tmp_path / "runs" / "run", **SMALL)
    file = own_datasets / "toy" / "train.safetensors"
    ranks = train_in_fork(
        folder, own_datasets, count=count, before=when_read_at, arguments=("train", how, own_datasets), check=3
    )
    line, saved = ranks[0].stderr.replace("\r", "\n").splitlines()[-2:]
    assert line.startswith(str(file))
    assert f"saved after global step {STEP - 1}" in saved
    assert status(folder)["exit_code"] == 3
    assert max(RunFolder(folder).checkpoint_steps()) == STEP - 1
    assert not any("Traceback" in rank.stderr for rank in ranks)
    if count == 2 and how is replaced:  # with the data as they were, the run ends as one that nothing befell
        reference = write_demanding(tmp_path / "runs" / "reference", **SMALL)
        for each in (folder, reference):
            train_in_fork(each, datasets_dir, count=count, before=read_in_small)
        assert_same_run(folder, reference)


@pytest.mark.fault("F61")
def test_validation_tokens_that_change_end_the_run_saved(tmp_path: Path, own_datasets: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "run", shuffle=False)
    arguments = ("validation", replaced, own_datasets)
    ranks = train_in_fork(folder, own_datasets, count=2, before=when_read_at, arguments=arguments, check=3)
    assert str(own_datasets / "toy" / "validation.safetensors") in ranks[0].stderr
    assert "saved after global step" in ranks[0].stderr
    assert max(RunFolder(folder).checkpoint_steps()) < LAST_STEP


def read_in_small_and_see_no_change() -> None:
    """Have no time of a file tell that it was written to."""
    read_in_small()
    original = TokenFile.size_and_times
    TokenFile.size_and_times = lambda file: (original(file)[0], 0, 0)  # type: ignore[method-assign]


def flip(path: Path, token: int) -> None:
    """Change one bit of one token; size and time stay, as when a disk forgets."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-2 * (25_000 - token), os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.fault("F62")
def test_bit_rot_between_two_starts_is_found_before_it_is_trained_on(tmp_path: Path, own_datasets: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "run", **SMALL)
    train_in_fork(folder, own_datasets, "--max-steps", 5, before=read_in_small_and_see_no_change)
    file = own_datasets / "toy" / "train.safetensors"
    flip(file, 20 * 64)
    (done,) = train_in_fork(folder, own_datasets, before=read_in_small_and_see_no_change, check=3)
    assert "are not those that were checked: the file was replaced, or its disk is damaged" in done.stderr
    # The file is read through at the next start, which says what it is now.
    (done,) = train_in_fork(folder, own_datasets, before=read_in_small_and_see_no_change, check=3)
    assert "SHA-256 of train tokens" in done.stderr
    flip(file, 20 * 64)
    train_in_fork(folder, own_datasets, before=read_in_small)  # the time at which the inode changed tells


@pytest.fixture
def span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CheckedTokens, NDArray[np.int64]]:
    """Tokens 50 to 850 of a file, checked in stretches of 64, and all tokens of the file."""
    monkeypatch.setattr(checked_tokens, "STRETCH_TOKENS", 64)
    tokens = np.random.default_rng(3).integers(0, IDS, 1000).astype(np.uint16)
    (tmp_path / "mine").mkdir()
    save_file({"tokens": tokens}, tmp_path / "mine" / "train.safetensors")
    file = open_split(tmp_path, "mine", "train")
    return CheckedTokens(file, check_tokens(file, 50, 800, IDS)), tokens.astype(np.int64)


def test_checked_tokens_are_the_file_s(span: tuple[CheckedTokens, NDArray[np.int64]]) -> None:
    reader, tokens = span
    generator = np.random.default_rng(0)
    for _ in range(300):
        start = int(generator.integers(50, 851))
        count = int(generator.integers(0, 851 - start))
        assert np.array_equal(reader.read(start, count), tokens[start : start + count])
    for start, count in ((49, 2), (850, 1), (0, 10)):
        with pytest.raises(ValueError, match="were not checked"):
            reader.read(start, count)


def test_every_flipped_bit_is_seen_where_it_is_read(
    span: tuple[CheckedTokens, NDArray[np.int64]], tmp_path: Path
) -> None:
    reader, tokens = span
    path = tmp_path / "mine" / "train.safetensors"
    raw = path.read_bytes()
    for place in range(60, 850, 13):
        for known in (False, True):  # read before, in this process
            path.write_bytes(raw)
            if known:
                reader.read(50, 800)
            changed = bytearray(raw)
            changed[len(raw) - 2 * (1000 - place)] ^= 1
            path.write_bytes(changed)
            with pytest.raises(DataError, match="are not those that were checked"):
                reader.read(place, 1)
            stretch = 50 + (place - 50) // 64 * 64
            assert np.array_equal(reader.read(50, stretch - 50), tokens[50:stretch])  # the others are as they were
