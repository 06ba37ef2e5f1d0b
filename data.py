"""Downloads and checks datasets, and reads the micro-batch of a rank at a global step.

Every micro-batch is read from disk when it is needed, so memory does not grow with the file. Which tokens a rank sees
at a step is a pure function of the plan and the seeds, so there is no iterator state to save or restore.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from harness.run.plan import Plan, epoch_sequences, make_plan, validation_sequences
from harness.tokens.checked_tokens import CheckedTokens, TokenCheck, check_tokens
from harness.tokens.mixture import Mixture
from harness.tokens.randomness import order_permutation
from harness.tokens.token_files import SPLITS, TokenFile, open_split, split_files
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, require_room, tokenizer_of_tokens

FINGERPRINT_TOKENS = 2**20


def ensure_dataset(datasets_dir: Path, config: TrainConfig) -> None:
    """Download a run's files from the Hub if they are not on disk; raises DataError.

    Must be called before the process group exists, because collectives waiting for a download would time out.
    """
    for part in config.datasets:
        # A local folder needs no validation split unless the run validates.
        is_local = bool(split_files(datasets_dir / part.name, "train")) and config.validation_interval is None
        is_enough = is_local or part.name != config.scored_dataset
        download_missing(datasets_dir, part.name, part.revision, SPLITS[:1] if is_enough else SPLITS)


def download_missing(datasets_dir: Path, dataset: str, revision: str | None, splits: Sequence[str]) -> None:
    """Download those of a dataset's `splits` that are not on disk; raises DataError.

    A name without an owner is not looked for on the Hub; what it lacks is named where it is opened. Every process may
    call it: a file lock lets one download while the others wait.
    """
    folder = datasets_dir / dataset

    def missing() -> list[str]:
        return [f"{split}.safetensors" for split in splits if not split_files(folder, split)]

    if "/" not in dataset or not missing():
        return
    with hub_errors(f"dataset {dataset}: not in {datasets_dir}, and it could not be downloaded", DataError):
        failpoint("download")
        datasets_dir.mkdir(parents=True, exist_ok=True)
        # The lock is beside the folder, because the Hub client takes an existing folder for a finished download.
        with FileLock(datasets_dir / f".{dataset.replace('/', '--')}.lock"):
            if names := missing():
                names.append(TOKENIZER_FILE)  # where there is one
                commit = HfApi().dataset_info(dataset, revision=revision).sha
                snapshot_download(
                    dataset, repo_type="dataset", revision=commit, allow_patterns=names, local_dir=folder
                )
    if absent := missing():
        raise DataError(f"dataset {dataset}: the Hub has no {' and no '.join(absent)} in it")


@dataclass(frozen=True)
class SequenceFile:
    """A dataset's train split cut into sequences: sequence s is tokens [start + s*T, start + s*T + T + 1).

    After the last one begins a new epoch, in which shuffled sequences have an order of their own.
    """

    file: TokenFile | CheckedTokens
    start_token: int
    length: int
    """T, of a sequence in tokens."""
    sequences: int
    """Of an epoch."""
    order_seed: int | None
    """Of the orders of the epochs; None reads the file in order."""

    def read(self, index: int) -> NDArray[np.int64]:
        """Return the tokens of one of all epochs' sequences, (T + 1,)."""
        epoch, sequence = divmod(index, self.sequences)
        if self.order_seed is not None:
            sequence = order_permutation(self.order_seed, epoch, self.sequences)[sequence]
        return self.file.read(self.start_token + sequence * self.length, self.length + 1)

    def holds(self, first: int, count: int) -> bool:
        """Return whether sequences [first, first + count) are consecutive in the file."""
        return self.order_seed is None and first % self.sequences + count <= self.sequences


def fingerprint_of(files: Sequence[TokenFile], start_token: int) -> str:
    """Return the fingerprint of a run's only train split, or a SHA-256 (hex) over those of all."""
    each = [fingerprint(file, start_token) for file in files]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def fingerprint(file: TokenFile, start_token: int) -> str:
    """Return a SHA-256 (hex) that is cheap to compute and prevents a run from resuming on other data.

    It covers the file's length and type, start_token, and up to 2^20 tokens from there and at the file's end.
    """
    digest = hashlib.sha256(f"{file.dtype} {file.length} {start_token}".encode())
    count = min(FINGERPRINT_TOKENS, file.length - start_token)
    for start in (start_token, file.length - count):
        digest.update(file.read(start, count).astype("<u4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TrainData:
    """The train splits of a run's datasets, mixed by weight."""

    parts: tuple[SequenceFile, ...]
    mixture: Mixture
    plan: Plan

    def microbatch(self, global_step: int, accumulation_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of one rank's micro-batch, each (B, T) int64 on the CPU."""
        size, length = self.plan.microbatch_size, self.plan.context_length
        first = self.plan.microbatch_index(global_step, accumulation_step, rank) * size
        if len(self.parts) == 1 and self.parts[0].holds(first, size):  # consecutive on disk too
            (part,) = self.parts
            first %= part.sequences
            return as_sequences(part.file.read(part.start_token + first * length, size * length + 1), length)
        places = map(self.mixture.place, range(first, first + size))
        block = torch.from_numpy(np.stack([self.parts[part].read(index) for part, index in places]))  # (B, T + 1)
        return block[:, :-1], block[:, 1:]

    def epochs(self) -> list[float]:
        """Return how often the plan goes through each dataset."""
        counts = self.mixture.counts(self.plan.global_steps * self.plan.global_batch)
        return [count / part.sequences for part, count in zip(self.parts, counts, strict=True)]

    def spans(self) -> list[tuple[int, int]]:
        """Return the first token and the number of tokens that the plan may read of each file.

        A shuffled run draws its sequences from the whole split, and one of several epochs comes to its end.
        """
        counts = self.mixture.counts(self.plan.global_steps * self.plan.global_batch)
        return [
            (
                part.start_token,
                (min(count, part.sequences) if part.order_seed is None else part.sequences) * part.length + 1,
            )
            for part, count in zip(self.parts, counts, strict=True)
        ]


class SyntheticData:
    """Random tokens instead of a dataset, the same at every step; for trials and benchmarks."""

    def __init__(self, plan: Plan, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (plan.accumulation_steps, plan.microbatch_size, plan.context_length + 1)
        self._blocks = torch.randint(0, vocab_size, size, generator=generator)

    def microbatch(self, global_step: int, accumulation_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of an accumulation step, each (B, T) int64 on the CPU."""
        block = self._blocks[accumulation_step]  # (B, T + 1)
        return block[:, :-1], block[:, 1:]


def as_sequences(tokens: NDArray[np.int64], context_length: int) -> tuple[Tensor, Tensor]:
    """Return B*T + 1 consecutive tokens as inputs and targets, each (B, T); targets are shifted by one token."""
    flat = torch.from_numpy(tokens)
    return flat[:-1].view(-1, context_length), flat[1:].view(-1, context_length)


def open_train_files(datasets_dir: Path, config: TrainConfig) -> list[TokenFile]:
    """Open the train splits of a run's datasets; raises DataError, also where their tokenizers are not one."""
    files = [open_split(datasets_dir, part.name, "train") for part in config.datasets]
    for file in files[1:]:
        first, other = (
            found.metadata.get("tokenizer_sha256", found.metadata.get("tokenizer", "no tokenizer"))
            for found in (files[0], file)
        )
        if other != first:
            raise DataError(f"{file.path}: found {other} in its metadata, wanted {first} as in {files[0].path}")
    return files


def tokens_available(files: Sequence[TokenFile], model: ModelConfig, config: TrainConfig) -> int:
    """Return the tokens from start_train_token on, of a mixture a share for each of config.epochs.

    No dataset of a mixture is gone through more often than that.
    """
    lengths = [file.length - config.start_train_token for file in files]
    if len(lengths) == 1:
        return lengths[0]
    sequences = [config.epochs * epoch_sequences(length, model.context_length) for length in lengths]
    return _mixture(config).fitting(sequences) // config.epochs * model.context_length + 1


def _mixture(config: TrainConfig) -> Mixture:
    return Mixture.of([part.weight for part in config.datasets])


def train_data(files: Sequence[TokenFile], config: TrainConfig, plan: Plan) -> TrainData:
    """Return a plan's train data; `shuffle` permutes all complete sequences of a file from start_train_token on."""

    def cut(file: TokenFile) -> SequenceFile:
        start, length = config.start_train_token, plan.context_length
        order_seed = config.seed_of("order") if config.shuffle else None
        return SequenceFile(file, start, length, epoch_sequences(file.length - start, length), order_seed)

    return TrainData(tuple(map(cut, files)), _mixture(config), plan)


@dataclass(frozen=True)
class Splits:
    """A run's plan and its open data."""

    plan: Plan
    train: TrainData | SyntheticData
    validation: TokenFile | CheckedTokens | None
    tokenizer: Tokenizer | None
    """With which the tokens were made; None where that is not known."""
    checks: dict[str, TokenCheck]
    """Of the train split of each dataset and then the validation split, by name; empty in a process that did not
    check."""
    fingerprint: str
    """Of the train data; see `fingerprint_of`."""

    def describe(self) -> list[dict[str, object]]:
        """Return the checks as run.json holds them."""
        return [check.describe() for check in self.checks.values()]

    def bound_to(self, checks: dict[str, TokenCheck]) -> "Splits":
        """Return the same data, of which no token is read that one process's checks did not see."""
        assert isinstance(self.train, TrainData)
        files = [file for file in (*(part.file for part in self.train.parts), self.validation) if file is not None]
        bound = [
            CheckedTokens(file, check)
            for file, check in zip(files, checks.values(), strict=True)
            if isinstance(file, TokenFile)
        ]
        parts = tuple(replace(part, file=bound.pop(0)) for part in self.train.parts)
        return replace(self, train=replace(self.train, parts=parts), validation=bound.pop() if bound else None)

    def checked(self) -> dict[str, str]:
        """Return the SHA-256 of the tokens that this process checked, by split and range."""
        return {
            f"{name} tokens {check.start} to {check.start + check.count}": check.sha256
            for name, check in self.checks.items()
        }


def open_splits(
    datasets_dir: Path, model: ModelConfig, config: TrainConfig, world_size: int, reads_through: bool
) -> Splits:
    """Open a run's data and make its plan; raises DataError and ConfigError.

    With `reads_through`, every token that will be used is checked; one process per machine should do so.
    """
    files = open_train_files(datasets_dir, config)
    plan = make_plan(model, config, world_size, tokens_available(files, model, config))
    train = train_data(files, config, plan)
    names = ["train"] if len(files) == 1 else [f"train {part.name}" for part in config.datasets]
    used = {name: (file, *span) for name, file, span in zip(names, files, train.spans(), strict=True)}
    validation = None
    if config.validation_batches is not None:
        validation = open_split(datasets_dir, config.scored_dataset, "validation")
        needed = validation_sequences(config, plan) * plan.context_length + 1
        if validation.length - config.start_val_token < needed:
            raise DataError(
                f"{validation.path}: found {validation.length:,} tokens, wanted {needed:,} from token "
                f"{config.start_val_token:,} on (validation_batches x global batch x context_length + 1)"
            )
        used["validation"] = (validation, config.start_val_token, needed)
    if (tokenizer := tokenizer_of_tokens(files[0])) is not None:
        require_room(tokenizer, model.vocab_size)
    checks = {name: check_tokens(*span, model.vocab_size) for name, span in used.items()} if reads_through else {}
    return Splits(plan, train, validation, tokenizer, checks, fingerprint_of(files, config.start_train_token))


def evaluation_batches(
    file: TokenFile | CheckedTokens, start_token: int, sequences: range, context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets, each (up to batch_size, T), of `sequences` counted from start_token."""
    for first in range(sequences.start, sequences.stop, batch_size):
        count = min(batch_size, sequences.stop - first)
        yield as_sequences(
            file.read(start_token + first * context_length, count * context_length + 1), context_length
        )
