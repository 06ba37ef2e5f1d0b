"""Score a model on held-back tokens: the mean cross-entropy in nats per token, and one loss for every sequence.

  python test_loss.py datasets runs/NAME/model.json runs/NAME/checkpoints/best/model.safetensors

Without options this is the published test set: 19,660,800 tokens of FineWeb from token 50,000,000 on.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import data
from harness.engine.distributed import Launch, choose_device, set_up_kernels
from harness.engine.evaluate import Bucket, LossTally, token_loss_batches
from harness.run.arguments import add_device, parse_into, parser_of, whole_number
from harness.run.config import ModelConfig, load_model_config
from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError, StorageError, exit_status_of
from harness.run.files import file_sha256, json_number, utc_now
from harness.run.run_folder import run_of_model_file
from harness.run.score import Score, describe_model, perplexity_of, score_path
from harness.tokens.token_files import SPLITS, TokenFile, open_split, split_files
from harness.tokens.gpt2 import END_OF_TEXT_ID, VOCAB_SIZE, bytes_per_token
from model import load_model

FREQUENCY_TOKENS = 2**27  # of the train split, enough to know how often an id occurs
SEQUENCES_PER_BATCH = 6  # of the published test set, whatever --batch-size the machine can hold


@dataclass(frozen=True)
class ScoreArguments:
    """The command line."""

    datasets_dir: Path
    model_json: Path
    model_safetensors: Path
    dataset: str
    split: str
    start_token: int
    batches: int
    batch_size: int
    device: str
    dtype: str
    output: Path | None


def main() -> None:
    """Load, score, print, store."""
    arguments = parse_arguments()
    device = choose_device(arguments.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=False)
    output = output_file(arguments)
    model = load_model(arguments.model_json, arguments.model_safetensors, device)
    file, check = open_test_tokens(arguments, model.config)
    length, sequences = model.config.context_length, arguments.batches * SEQUENCES_PER_BATCH

    batches = data.evaluation_batches(file, arguments.start_token, range(sequences), length, arguments.batch_size)
    tally = LossTally(length, model.config.vocab_size)
    dtype = getattr(torch, arguments.dtype)
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        tally_losses(model, with_progress(batches, sequences), device, tally)
    losses = tally.sequence_losses()
    loss = float(losses.mean())
    text_bytes = target_bytes(file, arguments.start_token + 1, check.count - 1)
    bits_per_byte = json_number(loss * sequences * length / math.log(2) / text_bytes) if text_bytes else None
    score = Score(
        dataset=arguments.dataset,
        split=arguments.split,
        start_token=arguments.start_token,
        tokens=sequences * length,
        sequences=sequences,
        tokens_sha256=check.sha256,
        loss=json_number(loss),
        perplexity=perplexity_of(loss),
        bits_per_byte=bits_per_byte,
        by_position=described(tally.by_position()),
        by_training_frequency_per_million=by_frequency(arguments, tally, model.config.vocab_size),
        dtype=arguments.dtype,
        device=device.type,
        time=utc_now(),
        model=describe_model(arguments.model_safetensors, file_sha256(arguments.model_safetensors)),
        path=output,
    )
    print(f"Scored {sequences:,} sequences of {length:,} tokens; one loss for each goes to {output}")
    for name, value in (("Perplexity", score.perplexity), ("Bits per byte", bits_per_byte)):
        if value is not None:
            print(f"{name}: {value:.6f}")
    print(f"Loss against our test dataset: {loss:.6f}", flush=True)  # even if it cannot be stored
    documents = first_documents(file, arguments.start_token, sequences, length)
    score.write(losses, np.arange(sequences) if documents is None else documents)  # each its own where unknown


def parse_arguments() -> ScoreArguments:
    """Read the command line; bad usage exits with status 2."""
    parser = parser_of(__doc__)
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path)
    parser.add_argument("model_json", metavar="MODEL_JSON", type=Path)
    parser.add_argument("model_safetensors", metavar="MODEL_SAFETENSORS", type=Path)
    parser.add_argument("--dataset", default="gpjt/fineweb-gpt2-tokens", help="folder in DATASETS_DIR, or Hub id")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--start-token", type=whole_number(0), default=50_000_000, help="default 50,000,000")
    parser.add_argument(
        "--batches", type=whole_number(), default=3200, help=f"of {SEQUENCES_PER_BATCH} sequences (default 3200)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(), default=6, help="sequences at a time; changes memory, not the loss"
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON result goes (and .npz beside it)")
    return parse_into(ScoreArguments, parser)


def open_test_tokens(arguments: ScoreArguments, model: ModelConfig) -> tuple[TokenFile, data.TokenCheck]:
    """Find the test tokens, downloading them if need be, and check all of them; raises DataError."""
    data.download_missing(arguments.datasets_dir, arguments.dataset, None, [arguments.split])
    file = open_split(arguments.datasets_dir, arguments.dataset, arguments.split)
    needed = arguments.batches * SEQUENCES_PER_BATCH * model.context_length + 1
    found = max(0, file.length - arguments.start_token)
    if found < needed:
        raise DataError(
            f"{file.path}: found {found:,} tokens from token {arguments.start_token:,} on, wanted {needed:,} "
            f"(--batches {arguments.batches} x {SEQUENCES_PER_BATCH} sequences x {model.context_length} tokens + 1); "
            "choose --start-token and --batches"
        )
    return file, data.check_tokens(file, arguments.start_token, needed, model.vocab_size)


def tally_losses(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, tally: LossTally
) -> None:
    """Add every batch's token losses to the tally; waits for the device once a batch."""
    seen: deque[Tensor] = deque()  # targets of the batches whose losses are still to come

    def noting_targets() -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, targets in batches:
            seen.append(targets)
            yield tokens, targets

    for losses in token_loss_batches(model, noting_targets(), device):
        tally.add(losses.cpu().double().numpy(), seen.popleft().numpy())


def with_progress(batches: Iterator[tuple[Tensor, Tensor]], sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Show a progress bar over sequences on stderr; a log file gets few lines."""
    with progress_bar(sequences, "sequence") as bar:
        for tokens, targets in batches:
            yield tokens, targets
            bar.update(len(tokens))


def target_bytes(file: TokenFile, start: int, count: int) -> int | None:
    """Return the UTF-8 bytes that tokens [start, start + count) stand for; None where they are not GPT-2's."""
    if file.metadata.get("tokenizer", "gpt2") != "gpt2":
        return None
    lengths = np.array(bytes_per_token())
    total = 0
    for first in range(start, start + count, data.CHECK_CHUNK_TOKENS):
        tokens = file.read(first, min(data.CHECK_CHUNK_TOKENS, start + count - first))
        if tokens.max() >= VOCAB_SIZE:
            return None
        total += int(lengths[tokens].sum())
    return total


def first_documents(file: TokenFile, start: int, sequences: int, length: int) -> NDArray[np.int64] | None:
    """Return for each sequence the number of the document that its first token belongs to, counted from the first.

    Sequences that begin in one document are not independent of each other, so they form a cluster. None where
    document ends are not known.
    """
    if file.metadata.get("tokenizer", "gpt2") != "gpt2":
        return None
    ends: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for first in range(0, sequences * length, data.CHECK_CHUNK_TOKENS):
        tokens = file.read(start + first, min(data.CHECK_CHUNK_TOKENS, sequences * length - first))
        ends.append(np.flatnonzero(tokens == END_OF_TEXT_ID) + first)
    return np.searchsorted(np.concatenate(ends), np.arange(sequences) * length).astype(np.int64)


def by_frequency(arguments: ScoreArguments, tally: LossTally, vocab_size: int) -> list[dict[str, object]] | None:
    """Return losses by how often the target occurs in the dataset's train split; None where that is not on disk."""
    if not split_files(arguments.datasets_dir / arguments.dataset, "train"):
        return None
    file = open_split(arguments.datasets_dir, arguments.dataset, "train")
    count = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, min(file.length, FREQUENCY_TOKENS), data.CHECK_CHUNK_TOKENS):
        tokens = file.read(first, min(data.CHECK_CHUNK_TOKENS, file.length - first))
        count += np.bincount(tokens[tokens < vocab_size], minlength=vocab_size)
    return described(tally.by_frequency(count))


def described(buckets: list[Bucket]) -> list[dict[str, object]]:
    """Return buckets as JSON; the last has no upper bound where that is infinite."""
    return [
        {"from": item.low, "below": json_number(item.high), "tokens": item.tokens, "loss": json_number(item.loss)}
        for item in buckets
    ]


def output_file(arguments: ScoreArguments) -> Path:
    """Return where the result goes: as asked, into the run's evals folder, or beside a loose model file.

    Makes the folder, so that one that cannot be written is known before the work is done.
    """
    path = arguments.output
    if path is None:
        owner = run_of_model_file(arguments.model_safetensors)
        place = owner[0].evals if owner else arguments.model_safetensors.parent / "evals"
        model = owner[0].checkpoint(owner[1]).name if owner else arguments.model_safetensors.stem
        sequences = arguments.batches * SEQUENCES_PER_BATCH
        length = load_model_config(arguments.model_json).context_length
        path = score_path(place, arguments.split, arguments.start_token, sequences * length, model)
    elif path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"--output: found {path}, wanted the name of a .json file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path.parent}: cannot be written; --output FILE stores the result elsewhere")
    return path


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
