"""Getting a dataset, checking it, and which micro-batch goes where.

A split is read anew for every micro-batch, so no process holds more of it than that, however long the file. Which
tokens a rank sees at a step is a pure function of the plan and the seeds: there is no iterator to save and none to
restore.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from numpy.typing import NDArray
from torch import Tensor

from harness.engine.failpoints import failpoint
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import DataError, hub_errors
from harness.run.plan import Plan, make_plan, validation_sequences
from harness.tokens.randomness import Permutation, order_permutation
from harness.tokens.token_files import SPLITS, TokenFile, open_split, split_files

CHECK_CHUNK_TOKENS = 2**24
FINGERPRINT_TOKENS = 2**20


@dataclass(frozen=True)
class TokenCheck:
    """What one pass over a split's used tokens found."""

    start: int
    count: int
    highest_id: int
    sha256: str


def check_tokens(file: TokenFile, start: int, count: int, vocab_size: int) -> TokenCheck:
    """Check that every id in [start, start + count) is below vocab_size, and fingerprint those tokens.

    One pass in chunks. The result is kept beside the file until its size or time changes, so that resuming does
    not read gigabytes again. Raises DataError with the place of the first id that does not fit.
    """
    size, mtime_ns = file.size_and_time()
    kept = file.path.with_name(f".{file.path.stem}-{start}-{count}.check.json")
    key = {"size": size, "mtime_ns": mtime_ns}
    result = _kept_check(kept, key)
    if result is None or result.highest_id >= vocab_size:
        result = _read_and_check(file, start, count, vocab_size)
        try:
            temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({**key, **asdict(result)}))
            temporary.replace(kept)
        except OSError:
            pass  # a read-only dataset folder only costs the pass again
    return result


def _kept_check(path: Path, key: dict[str, int]) -> TokenCheck | None:
    try:
        kept = json.loads(path.read_text())
        if all(kept[name] == value for name, value in key.items()):
            return TokenCheck(int(kept["start"]), int(kept["count"]), int(kept["highest_id"]), str(kept["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _read_and_check(file: TokenFile, start: int, count: int, vocab_size: int) -> TokenCheck:
    digest = hashlib.sha256(file.dtype.encode())
    highest = 0
    for chunk_start in range(start, start + count, CHECK_CHUNK_TOKENS):
        tokens = file.read(chunk_start, min(CHECK_CHUNK_TOKENS, start + count - chunk_start))
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if wrong.size:
            raise DataError(
                f"{file.path}: found id {tokens[wrong[0]]} at token {chunk_start + int(wrong[0]):,}, "
                f"wanted ids from 0 to {vocab_size - 1} (model.json: vocab_size)"
            )
        highest = max(highest, int(tokens.max()))
        digest.update(tokens.astype("<u4").tobytes())
    return TokenCheck(start, count, highest, digest.hexdigest())


def ensure_dataset(datasets_dir: Path, config: TrainConfig) -> None:
    """Download a run's two files from the Hub if they are not on disk; raises DataError.

    Must be called before the process group exists: a collective that waited for a download would time out.
    """
    # A folder of one's own needs no validation split unless the run validates.
    is_own = bool(split_files(datasets_dir / config.dataset, "train")) and config.validation_interval is None
    download_missing(datasets_dir, config.dataset, config.dataset_revision, SPLITS[:1] if is_own else SPLITS)


def download_missing(datasets_dir: Path, dataset: str, revision: str | None, splits: Sequence[str]) -> None:
    """Download those of a dataset's `splits` that are not on disk; raises DataError.

    Every process may call it: a lock lets one download while the others wait for its files.
    """
    folder = datasets_dir / dataset

    def missing() -> list[str]:
        return [f"{split}.safetensors" for split in splits if not split_files(folder, split)]

    if not missing():
        return
    with hub_errors(f"dataset {dataset}: not in {datasets_dir}, and it could not be downloaded", DataError):
        failpoint("download")
        datasets_dir.mkdir(parents=True, exist_ok=True)
        # Beside the folder, because the Hub client takes a folder that is there for a finished download.
        with FileLock(datasets_dir / f".{dataset.replace('/', '--')}.lock"):
            if names := missing():
                commit = HfApi().dataset_info(dataset, revision=revision).sha
                snapshot_download(
                    dataset, repo_type="dataset", revision=commit, allow_patterns=names, local_dir=folder
                )
    if absent := missing():
        raise DataError(f"dataset {dataset}: the Hub has no {' and no '.join(absent)} in it")


@dataclass(frozen=True)
class TrainData:
    """The train split as the plan cuts it: sequence s is tokens [start + s*T, start + s*T + T + 1)."""

    file: TokenFile
    start_token: int
    plan: Plan
    order: Permutation | None

    def microbatch(self, global_step: int, accumulation_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Give tokens and targets, each (B, T) int64 on the CPU, of one rank's micro-batch."""
        size, length = self.plan.microbatch_size, self.plan.context_length
        first = self.plan.microbatch_index(global_step, accumulation_step, rank) * size
        if self.order is None:
            tokens = self.file.read(self.start_token + first * length, size * length + 1)
            return as_sequences(tokens, length)
        rows = [
            self.file.read(self.start_token + self.order[sequence] * length, length + 1)
            for sequence in range(first, first + size)
        ]
        block = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return block[:, :-1], block[:, 1:]

    def fingerprint(self) -> str:
        """Give a SHA-256 (hex) that tells other data apart at little cost, so that no run resumes on it.

        Over the file's length and type, and the first and last stretches of at most 2^20 tokens from the run's start.
        """
        digest = hashlib.sha256(f"{self.file.dtype} {self.file.length} {self.start_token}".encode())
        count = min(FINGERPRINT_TOKENS, self.file.length - self.start_token)
        for start in (self.start_token, self.file.length - count):
            digest.update(self.file.read(start, count).astype("<u4").tobytes())
        return digest.hexdigest()


class SyntheticData:
    """Random tokens in place of a dataset, the same for every step: for trials and benchmarks."""

    def __init__(self, plan: Plan, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (plan.accumulation_steps, plan.microbatch_size, plan.context_length + 1)
        self._blocks = torch.randint(0, vocab_size, size, generator=generator)

    def microbatch(self, global_step: int, accumulation_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Give tokens and targets, each (B, T) int64 on the CPU, of an accumulation step."""
        block = self._blocks[accumulation_step]  # (B, T + 1)
        return block[:, :-1], block[:, 1:]


def as_sequences(tokens: NDArray[np.int64], context_length: int) -> tuple[Tensor, Tensor]:
    """Cut B*T + 1 consecutive tokens into inputs and targets, each (B, T); targets are one token later."""
    flat = torch.from_numpy(tokens)
    return flat[:-1].view(-1, context_length), flat[1:].view(-1, context_length)


def train_data(file: TokenFile, config: TrainConfig, plan: Plan) -> TrainData:
    """Prepare a plan's data; with `shuffle`, over all whole sequences from start_train_token on."""
    sequences = (file.length - config.start_train_token - 1) // plan.context_length
    order = order_permutation(config.seed_of("order"), 0, sequences) if config.shuffle else None
    return TrainData(file, config.start_train_token, plan, order)


@dataclass(frozen=True)
class Splits:
    """The data of a run, cut by its plan; `checks` are those of the process that read through it."""

    plan: Plan
    train: TrainData | SyntheticData
    validation: TokenFile | None
    checks: list[TokenCheck]
    fingerprint: str
    """SHA-256 that tells other train data apart; see TrainData.fingerprint."""

    def describe(self) -> list[dict[str, object]]:
        """Give what was read through, for run.json."""
        return [asdict(check) for check in self.checks]

    def checked(self) -> dict[str, str]:
        """Give the SHA-256 of the tokens that this process read through, by their place."""
        names = ("train", "validation")
        return {
            f"{name} tokens {check.start} to {check.start + check.count}": check.sha256
            for name, check in zip(names, self.checks, strict=False)
        }


def open_splits(
    datasets_dir: Path, model: ModelConfig, config: TrainConfig, world_size: int, reads_through: bool
) -> Splits:
    """Open a run's data and work out its plan; raises DataError and ConfigError.

    With `reads_through`, every token that will be used is checked; one process a machine is enough for that.
    """
    file = open_split(datasets_dir, config.dataset, "train")
    plan = make_plan(model, config, world_size, file.length - config.start_train_token)
    used = [(file, config.start_train_token, plan.tokens_needed)]
    validation = None
    if config.validation_batches is not None:
        validation = open_split(datasets_dir, config.dataset, "validation")
        needed = validation_sequences(config, plan) * plan.context_length + 1
        if validation.length - config.start_val_token < needed:
            raise DataError(
                f"{validation.path}: found {validation.length:,} tokens, wanted {needed:,} from token "
                f"{config.start_val_token:,} on (validation_batches x global batch x context_length + 1)"
            )
        used.append((validation, config.start_val_token, needed))
    checks = [check_tokens(*span, model.vocab_size) for span in used] if reads_through else []
    train = train_data(file, config, plan)
    return Splits(plan, train, validation, checks, train.fingerprint())


def evaluation_batches(
    file: TokenFile, start_token: int, sequences: range, context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give tokens and targets, each (up to batch_size, T), of `sequences` counted from start_token."""
    for first in range(sequences.start, sequences.stop, batch_size):
        count = min(batch_size, sequences.stop - first)
        yield as_sequences(
            file.read(start_token + first * context_length, count * context_length + 1), context_length
        )
