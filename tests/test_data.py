"""Token files: what is refused, which tokens every rank reads, and the kept check."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from data import TokenFile, as_sequences, evaluation_batches, open_split, open_splits, train_data
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import DataError
from harness.run.plan import Plan, make_plan
from harness.tokens import checked_tokens
from harness.tokens.checked_tokens import check_tokens

LENGTH = 8  # tokens in a sequence
MODEL = ModelConfig(
    vocab_size=65536, context_length=LENGTH, emb_dim=4, n_heads=1, n_layers=1, drop_rate=0, qkv_bias=False
)
TRAIN = TrainConfig(
    dataset="mine",
    min_train_tokens=-1,
    start_train_token=0,
    start_val_token=0,
    microbatch_size=2,
    checkpoint_interval=5,
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes tensors as a split of dataset `mine`, and gives the file's path."""

    def write(split: str = "train", metadata: dict[str, str] | None = None, **tensors: NDArray[Any]) -> Path:
        path = tmp_path / "mine" / f"{split}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata)
        return path

    return write


def refused(tmp_path: Path) -> str:
    """Open a split that must be refused; give the error's one line, which must name the file."""
    with pytest.raises(DataError) as caught:
        open_split(tmp_path, "mine", "train")
    assert caught.value.exit_status == 3
    (line,) = caught.value.lines
    assert str(tmp_path / "mine" / "train.safetensors") in line
    assert "\n" not in line
    return line


# --- the form of a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32])
def test_token_types(tmp_path: Path, save: Callable[..., Path], dtype: type) -> None:
    tokens: NDArray[Any] = np.array([0, 1, 50256, 65535], dtype)
    path = save(tokens=tokens, metadata={"tokenizer": "gpt2"})
    file = open_split(tmp_path, "mine", "train")
    assert (file.path, file.length, file.metadata) == (path, 4, {"tokenizer": "gpt2"})
    found = file.read(1, 3)
    assert found.dtype == np.int64
    assert found.tolist() == [1, 50256, 65535]


@pytest.mark.fault("F45")
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, np.int64, np.uint64, np.int16, np.int8, np.uint8, np.bool_]
)
def test_other_types_are_refused(tmp_path: Path, save: Callable[..., Path], dtype: type) -> None:
    save(tokens=np.ones(100, dtype))
    assert "wanted U16, I32 or U32" in refused(tmp_path)


@pytest.mark.fault("F45")
@pytest.mark.parametrize("shape", [(4, 25), (1, 100), (100, 1), (), (0,), (0, 4)])
def test_other_shapes_are_refused(tmp_path: Path, save: Callable[..., Path], shape: tuple[int, ...]) -> None:
    save(tokens=np.ones(shape, np.uint16))
    assert "wanted one dimension and at least one token" in refused(tmp_path)


@pytest.mark.fault("F45")
@pytest.mark.parametrize("name", ["token", "input_ids", "Tokens"])
def test_missing_tensor_is_refused_with_the_names_that_were_found(
    tmp_path: Path, save: Callable[..., Path], name: str
) -> None:
    save(**{name: np.ones(100, np.uint16)})
    line = refused(tmp_path)
    assert repr(name) in line
    assert "wanted one named 'tokens'" in line


def test_other_tensors_beside_the_tokens_do_no_harm(tmp_path: Path, save: Callable[..., Path]) -> None:
    save(tokens=np.arange(5, dtype=np.uint16), documents=np.zeros(3, np.int64))
    assert open_split(tmp_path, "mine", "train").read(0, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.fault("F45")
@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "short header",
        "in the header",
        "one byte short",
        "half",
        "one byte more",
        "not safetensors",
        "huge header",
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, save: Callable[..., Path], damage: str) -> None:
    path = save(tokens=np.arange(1000, dtype=np.uint16))
    raw = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "short header": raw[:4],
            "in the header": raw[:40],
            "one byte short": raw[:-1],
            "half": raw[: len(raw) // 2],
            "one byte more": raw + b"\0",
            "not safetensors": b"version https://git-lfs.github.com/spec/v1\n" * 20,
            "huge header": struct.pack("<Q", 2**62) + raw[8:],
        }[damage]
    )
    assert "cannot be read as safetensors" in refused(tmp_path)


def test_missing_file_and_a_folder_in_its_place_are_refused(tmp_path: Path) -> None:
    assert "found no such file" in refused(tmp_path)
    (tmp_path / "mine" / "train.safetensors").mkdir(parents=True)
    assert "found no such file" in refused(tmp_path)


# --- ids -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("F46")
@pytest.mark.parametrize(
    ("dtype", "place", "value", "vocab_size"),
    [
        (np.uint16, 999, 97, 97),  # the last token
        (np.uint16, 0, 65535, 97),
        (np.int32, 500, -1, 97),
        (np.int32, 999, -(2**31), 97),
        (np.int32, 3, 2**31 - 1, 65536),
        (np.uint32, 700, 2**32 - 1, 65536),
        (np.uint16, 400, 50256, 50256),
    ],
)
def test_id_out_of_range_is_named_with_its_place(
    tmp_path: Path, save: Callable[..., Path], dtype: type, place: int, value: int, vocab_size: int
) -> None:
    tokens: NDArray[Any] = np.arange(1000).astype(dtype) % dtype(90)
    tokens[place] = value
    path = save(tokens=tokens)
    with pytest.raises(DataError) as caught:
        check_tokens(open_split(tmp_path, "mine", "train"), 0, 1000, vocab_size)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: found id {value} at token {place}, wanted ids from 0 to {vocab_size - 1} ")
    assert "vocab_size" in line


def test_ids_outside_the_used_span_are_not_looked_at(tmp_path: Path, save: Callable[..., Path]) -> None:
    tokens = np.arange(1000, dtype=np.uint16) % 97
    tokens[[99, 900]] = 97
    save(tokens=tokens)
    file = open_split(tmp_path, "mine", "train")
    assert check_tokens(file, 100, 800, 97).highest_id == 96
    for start, count in ((99, 10), (100, 801)):
        with pytest.raises(DataError):
            check_tokens(file, start, count, 97)


def test_check_covers_every_chunk(tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_tokens, "CHECK_CHUNK_TOKENS", 64)
    monkeypatch.setattr(checked_tokens, "STRETCH_TOKENS", 64)
    tokens = np.arange(1000, dtype=np.uint16) % 97
    for place in (63, 64, 127, 128, 960, 999):
        wrong = tokens.copy()
        wrong[place] = 200
        save(tokens=wrong)
        with pytest.raises(DataError, match=f"at token {place},"):
            check_tokens(open_split(tmp_path, "mine", "train"), 0, 1000, 97)


def test_fingerprint_follows_the_tokens_used(
    tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(1000, dtype=np.uint16) % 97
    save("train", tokens=tokens)
    changed = tokens.copy()
    changed[500] = 3
    save("validation", tokens=changed)
    one, other = (open_split(tmp_path, "mine", split) for split in ("train", "validation"))
    assert check_tokens(one, 0, 1000, 97).sha256 != check_tokens(other, 0, 1000, 97).sha256
    assert check_tokens(one, 0, 500, 97).sha256 == check_tokens(other, 0, 500, 97).sha256
    whole = check_tokens(one, 0, 999, 97).sha256
    monkeypatch.setattr(checked_tokens, "CHECK_CHUNK_TOKENS", 64)
    monkeypatch.setattr(checked_tokens, "STRETCH_TOKENS", 64)
    (tmp_path / "mine" / ".train-0-999.check.json").unlink()
    assert check_tokens(one, 0, 999, 97).sha256 == whole  # how the file is cut does not matter


def rewrite(path: Path, place: int, value: int, keep_time: bool) -> None:
    """Change one uint16 token at the end of a file, in place."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END)
        file.write(struct.pack("<H", value))
    change = 0 if keep_time else 1_000_000_000
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + change))


def test_kept_check_is_used_again_until_the_file_changes(
    tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tokens=np.arange(1000, dtype=np.uint16) % 97)
    file = open_split(tmp_path, "mine", "train")
    first = check_tokens(file, 0, 1000, 97)
    with monkeypatch.context() as patch:
        patch.delattr(TokenFile, "read")  # the second check does not read
        assert check_tokens(file, 0, 1000, 97) == first
    rewrite(path, -2, 500, keep_time=True)  # as what restores a backup does
    with pytest.raises(DataError, match="found id 500 at token 999"):
        check_tokens(file, 0, 1000, 97)
    rewrite(path, -2, 1, keep_time=False)
    assert check_tokens(file, 0, 1000, 97).sha256 != first.sha256


def test_kept_check_does_not_serve_another_span_or_a_smaller_vocabulary(
    tmp_path: Path, save: Callable[..., Path]
) -> None:
    save(tokens=np.arange(1000, dtype=np.uint16) % 97)
    file = open_split(tmp_path, "mine", "train")
    whole = check_tokens(file, 0, 1000, 97)
    assert check_tokens(file, 1, 999, 97).sha256 != whole.sha256
    assert check_tokens(file, 0, 1000, 50_000) == whole
    with pytest.raises(DataError, match="found id 96"):
        check_tokens(file, 0, 1000, 96)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"size": 1}'])
def test_damaged_kept_check_is_made_again(tmp_path: Path, save: Callable[..., Path], text: str) -> None:
    save(tokens=np.arange(1000, dtype=np.uint16) % 97)
    file = open_split(tmp_path, "mine", "train")
    first = check_tokens(file, 0, 1000, 97)
    (kept,) = (tmp_path / "mine").glob(".*.check.json")
    kept.write_text(text)
    assert check_tokens(file, 0, 1000, 97) == first
    assert json.loads(kept.read_text())["sha256"] == first.sha256


# --- which tokens go where -----------------------------------------------------------------------------------


def counting_file(tmp_path: Path, save: Callable[..., Path], count: int) -> TokenFile:
    """A split whose every token is its own place in the file."""
    save(tokens=np.arange(count, dtype=np.uint32))
    return open_split(tmp_path, "mine", "train")


def sequences_of_step(file: TokenFile, train: TrainConfig, plan: Plan, step: int) -> torch.Tensor:
    """The global batch of one step, all ranks and accumulation steps together; (global batch, T)."""
    source = train_data([file], train, plan)
    return torch.cat(
        [
            source.microbatch(step, accumulation, rank)[0]
            for accumulation in range(plan.accumulation_steps)
            for rank in range(plan.world_size)
        ]
    )


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(("world_size", "microbatch", "accumulation"), [(1, 1, 1), (1, 6, 4), (3, 2, 4), (8, 3, 1)])
def test_ranks_together_read_the_file_in_order_exactly_once(
    tmp_path: Path, save: Callable[..., Path], world_size: int, microbatch: int, accumulation: int, start: int
) -> None:
    train = replace(
        TRAIN, start_train_token=start, microbatch_size=microbatch, gradient_accumulation_steps=accumulation
    )
    file = counting_file(tmp_path, save, start + 24 * 5 * LENGTH + 1)
    plan = make_plan(MODEL, train, world_size, file.length - start)
    read = torch.cat([sequences_of_step(file, train, plan, step) for step in range(plan.global_steps)])
    assert read.flatten().tolist() == list(range(start, start + plan.train_tokens))
    assert plan.train_tokens == 24 * 5 * LENGTH


@pytest.mark.parametrize("shuffle", [False, True])
def test_targets_are_one_token_later(tmp_path: Path, save: Callable[..., Path], shuffle: bool) -> None:
    train = replace(TRAIN, shuffle=shuffle, microbatch_size=3)
    file = counting_file(tmp_path, save, 9 * LENGTH + 1)
    source = train_data([file], train, make_plan(MODEL, train, 1, file.length))
    for step in range(3):
        tokens, targets = source.microbatch(step, 0, 0)
        assert tokens.shape == targets.shape == (3, LENGTH)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, tokens + 1)


def shuffled(tmp_path: Path, save: Callable[..., Path], count: int = 50 * LENGTH + 1, **changes: Any) -> list[int]:
    """Places of the sequences of all steps, in the order in which they are trained on."""
    train = replace(TRAIN, shuffle=True, **changes)
    file = counting_file(tmp_path, save, train.start_train_token + count)
    plan = make_plan(MODEL, train, 1, count)
    rows = torch.cat([sequences_of_step(file, train, plan, step) for step in range(plan.global_steps)])
    assert torch.equal(rows, rows[:, :1] + torch.arange(LENGTH))  # whole sequences
    starts = (rows[:, 0] - train.start_train_token).tolist()
    assert all(place % LENGTH == 0 for place in starts)
    return [place // LENGTH for place in starts]


def test_shuffle_permutes_whole_sequences(tmp_path: Path, save: Callable[..., Path]) -> None:
    order = shuffled(tmp_path, save)
    assert sorted(order) == list(range(50))
    assert order != sorted(order)
    assert shuffled(tmp_path, save) == order
    assert shuffled(tmp_path, save, start_train_token=5) == order


@pytest.mark.parametrize(("extra", "sequences"), [(0, 4), (1, 5), (LENGTH - 1, 5), (LENGTH, 5)])
def test_shuffle_leaves_out_a_sequence_without_its_last_target(
    tmp_path: Path, save: Callable[..., Path], extra: int, sequences: int
) -> None:
    assert sorted(shuffled(tmp_path, save, 5 * LENGTH + extra, microbatch_size=1)) == list(range(sequences))


def test_shuffle_follows_the_order_seed_alone(tmp_path: Path, save: Callable[..., Path]) -> None:
    order = shuffled(tmp_path, save)
    assert shuffled(tmp_path, save, order_seed=1) != order
    assert shuffled(tmp_path, save, init_seed=1, dropout_seed=1) == order
    assert shuffled(tmp_path, save, random_seed=1, order_seed=42) == order


def test_shuffle_of_a_part_draws_from_the_whole_file(tmp_path: Path, save: Callable[..., Path]) -> None:
    order = shuffled(tmp_path, save)
    assert shuffled(tmp_path, save, min_train_tokens=10 * LENGTH) == order[:10]
    assert max(order[:10]) >= 10


@pytest.mark.parametrize("shuffle", [False, True])
def test_global_batch_is_the_same_however_it_is_split(
    tmp_path: Path, save: Callable[..., Path], shuffle: bool
) -> None:
    file = counting_file(tmp_path, save, 24 * 4 * LENGTH + 1)
    steps = set()
    for world_size, microbatch in ((1, 24), (1, 3), (2, 6), (4, 2), (3, 4), (8, 3)):
        train = replace(TRAIN, shuffle=shuffle, microbatch_size=microbatch, global_batch_size=24)
        plan = make_plan(MODEL, train, world_size, file.length)
        assert plan.global_steps == 4
        batches = [sequences_of_step(file, train, plan, step) for step in range(4)]
        steps.add(tuple(tuple(batch[:, 0].tolist()) for batch in batches))
    assert len(steps) == 1


def test_as_sequences_cuts_without_gap_or_overlap() -> None:
    tokens, targets = as_sequences(np.arange(13), 4)
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 100])
def test_evaluation_reads_every_sequence_once(tmp_path: Path, save: Callable[..., Path], batch_size: int) -> None:
    file = counting_file(tmp_path, save, 100)
    batches = list(evaluation_batches(file, 7, range(1, 11), LENGTH, batch_size))
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert tokens.flatten().tolist() == list(range(7 + LENGTH, 7 + 11 * LENGTH))
    assert torch.equal(targets, tokens + 1)
    assert max(len(batch) for batch, _ in batches) <= batch_size


# --- opening the data of a run -------------------------------------------------------------------------------


@pytest.mark.fault("F47")
@pytest.mark.parametrize("start", [800, 801, 10**12])
def test_start_beyond_the_end_is_refused(tmp_path: Path, save: Callable[..., Path], start: int) -> None:
    save(tokens=np.zeros(800, np.uint16))
    for tokens in (-1, 1):
        with pytest.raises(DataError) as caught:
            open_splits(tmp_path, MODEL, replace(TRAIN, start_train_token=start, min_train_tokens=tokens), 1, True)
        (line,) = caught.value.lines
        assert f"found 0 tokens from token {start:,}" in line


VALIDATING: dict[str, Any] = {
    "validation_interval": 5,
    "validation_batches": 3,
}  # of 2 sequences of 8 tokens: 49 tokens


def test_validation_split_is_needed_only_to_validate(tmp_path: Path, save: Callable[..., Path]) -> None:
    save(tokens=np.zeros(800, np.uint16))
    splits = open_splits(tmp_path, MODEL, TRAIN, 1, True)
    assert splits.validation is None
    assert len(splits.checks) == 1
    with pytest.raises(DataError, match=r"validation\.safetensors"):
        open_splits(tmp_path, MODEL, replace(TRAIN, **VALIDATING), 1, True)


@pytest.mark.parametrize(
    ("length", "start", "is_enough"),
    [(49, 0, True), (48, 0, False), (60, 11, True), (60, 12, False), (60, 99, False)],
)
def test_validation_split_must_hold_the_validation_batches(
    tmp_path: Path, save: Callable[..., Path], length: int, start: int, is_enough: bool
) -> None:
    save(tokens=np.zeros(800, np.uint16))
    path = save("validation", tokens=np.zeros(length, np.uint16))
    train = replace(TRAIN, **VALIDATING, start_val_token=start)
    if is_enough:
        assert len(open_splits(tmp_path, MODEL, train, 1, True).checks) == 2
    else:
        with pytest.raises(DataError) as caught:
            open_splits(tmp_path, MODEL, train, 1, True)
        (line,) = caught.value.lines
        assert f"{path}: found " in line
        assert "wanted 49" in line


@pytest.mark.parametrize("split", ["train", "validation"])
def test_only_the_reading_process_checks_the_ids(tmp_path: Path, save: Callable[..., Path], split: str) -> None:
    tokens = np.zeros(800, np.uint16)
    for name in ("train", "validation"):
        save(name, tokens=tokens + (100 if name == split else 0))
    model, train = replace(MODEL, vocab_size=97), replace(TRAIN, **VALIDATING)
    assert open_splits(tmp_path, model, train, 1, reads_through=False).checks == {}
    with pytest.raises(DataError, match=rf"{split}\.safetensors: found id 100 at token 0"):
        open_splits(tmp_path, model, train, 1, reads_through=True)
