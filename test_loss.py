"""Score a model on held-back tokens: the mean cross-entropy in nats per token, and one loss for every sequence.

  python test_loss.py datasets --run NAME[/checkpoints/NAME]
  python test_loss.py datasets runs/NAME/model.json runs/NAME/checkpoints/best/model.safetensors

With --run, the run says what it is scored on: the validation split of its own
data. Two files are scored on the published test set, 19,660,800 tokens of
FineWeb from token 50,000,000 on, unless they are of a run on other data.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import data
from harness.engine.distributed import Launch, choose_device, set_up_kernels
from harness.engine.evaluate import Bucket, LossTally, token_loss_batches
from harness.engine.opening import open_weights
from harness.engine.resume import find_model
from harness.run.arguments import add_device, add_runs_dir, parse_into, parser_of, whole_number
from harness.run.config import ModelConfig, load_model_config
from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError, StorageError, exit_status_of
from harness.run.files import json_number, utc_now
from harness.run.run_folder import AVERAGED_FILE, run_of_model_file
from harness.run.score import (
    DocumentLosses,
    Score,
    ScoreArrays,
    describe_model,
    perplexity_of,
    score_path,
    scored_name,
)
from harness.run.streams import ignore_output_errors
from harness.tokens.checked_tokens import CHECK_CHUNK_TOKENS, CheckedTokens, check_tokens
from harness.tokens.documents import Documents, read_documents
from harness.tokens.token_files import SPLITS, open_split, split_files
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, tokenizer_of_model, tokenizer_of_tokens
from model import model_of

FREQUENCY_TOKENS = 2**27  # of the train split, enough to know how often an id occurs
MOST_BATCHES = 3200
PUBLISHED_TEST_SET = "gpjt/fineweb-gpt2-tokens"
SEQUENCES_PER_BATCH = 6  # of the published test set, whatever --batch-size the machine can hold


@dataclass(frozen=True)
class ScoreArguments:
    """The command line."""

    datasets_dir: Path
    model_json: Path | None
    model_safetensors: Path | None
    run: str | None
    runs_dir: Path
    dataset: str | None
    split: str
    start_token: int | None
    batches: int | None
    batch_size: int
    device: str
    dtype: str
    output: Path | None
    weights: Literal["last", "averaged"]


@dataclass(frozen=True)
class TestTokens:
    """Checked tokens to score a model on: whole sequences from `start_token` on."""

    file: CheckedTokens
    dataset: str
    start_token: int
    sequences: int
    tokenizer: Tokenizer | None
    """Of the tokens; None where it is not known, and then neither are bytes and documents."""


def main() -> None:
    """Load, score, print, store."""
    arguments = parse_arguments()
    ignore_output_errors()
    device = choose_device(arguments.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=False)
    model_json, file = find_scored(arguments)
    config, weights = load_model_config(model_json), open_weights(file)
    scored = describe_model(weights.path, weights.sha256)  # now: a live run may delete the checkpoint meanwhile
    test = open_test_tokens(
        arguments, config, weights.path, tokenizer_of_model(model_json.with_name(TOKENIZER_FILE), config.vocab_size)
    )
    output = output_file(arguments, test, config.context_length, weights.path)
    if arguments.run is None and arguments.dataset is None and test.dataset != PUBLISHED_TEST_SET:
        print(f"Scoring on the {arguments.split} split of {test.dataset}, the run's own data (--dataset for others)")
    model = model_of(config, weights, device)
    length, sequences = config.context_length, test.sequences

    batches = data.evaluation_batches(test.file, test.start_token, range(sequences), length, arguments.batch_size)
    documents = read_documents(test.file, test.tokenizer) if test.tokenizer else None
    tally = LossTally(length, config.vocab_size, test.tokenizer.end_of_text_id if test.tokenizer else None)
    dtype = getattr(torch, arguments.dtype)
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        tally_losses(model, with_progress(batches, sequences), device, tally)
    losses = tally.sequence_losses()
    loss = float(losses.mean())
    text_bytes = documents.target_bytes if documents else 0
    bits_per_byte = json_number(loss * sequences * length / math.log(2) / text_bytes) if text_bytes else None
    score = Score(
        dataset=test.dataset,
        split=arguments.split,
        start_token=test.start_token,
        tokens=sequences * length,
        sequences=sequences,
        tokens_sha256=test.file.check.sha256,
        tokenizer=test.tokenizer.identity if test.tokenizer else None,
        loss=json_number(loss),
        perplexity=perplexity_of(loss),
        bits_per_byte=bits_per_byte,
        by_position=described(tally.by_position()),
        by_training_frequency_per_million=by_frequency(arguments.datasets_dir, test, tally, config.vocab_size),
        dtype=arguments.dtype,
        device=device.type,
        time=utc_now(),
        model=scored,
        path=output,
    )
    amount = f"{sequences:,} sequences of {length:,} tokens"
    print(f"Scored {scored_name(weights.path)} on {amount}; one loss for each goes to {output}")
    for name, value in (("Perplexity", score.perplexity), ("Bits per byte", bits_per_byte)):
        if value is not None:
            print(f"{name}: {value:.6f}")
    print(f"Loss against our test dataset: {loss:.6f}", flush=True)  # even if it cannot be stored
    starts = np.arange(sequences)  # each sequence counts as its own document where ends are not known
    if documents is not None:
        starts = np.searchsorted(documents.ends, starts * length)
    score.write(ScoreArrays(losses, starts, document_losses(documents, tally)))


def parse_arguments() -> ScoreArguments:
    """Read the command line; bad usage exits with status 2."""
    parser = parser_of(__doc__)
    parser.add_argument("datasets_dir", metavar="DATASETS_DIR", type=Path)
    parser.add_argument("model_json", metavar="MODEL_JSON", type=Path, nargs="?")
    parser.add_argument("model_safetensors", metavar="MODEL_SAFETENSORS", type=Path, nargs="?")
    parser.add_argument(
        "--run", metavar="RUN", help="in place of both: a run's newest checkpoint, or RUN/checkpoints/NAME"
    )
    add_runs_dir(parser, "with --run (default: runs)")
    parser.add_argument(
        "--dataset", help=f"folder in DATASETS_DIR, or Hub id (default: the run's, or {PUBLISHED_TEST_SET})"
    )
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument(
        "--start-token", type=whole_number(0), metavar="N", help="(default: the run's, or 50,000,000)"
    )
    parser.add_argument(
        "--batches",
        type=whole_number(),
        metavar="N",
        help=f"of {SEQUENCES_PER_BATCH} sequences (default: what there is, at most {MOST_BATCHES})",
    )
    parser.add_argument(
        "--batch-size", type=whole_number(), default=6, help="sequences at a time; changes memory, not the loss"
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON result goes (and .npz beside it)")
    parser.add_argument(
        "--weights", choices=["last", "averaged"], default="last", help=f"averaged: {AVERAGED_FILE} beside the model"
    )
    arguments = parse_into(ScoreArguments, parser)
    if (arguments.run is None) == (arguments.model_safetensors is None) or (arguments.run and arguments.model_json):
        parser.error("found neither or both, wanted MODEL_JSON MODEL_SAFETENSORS, or --run RUN")
    return arguments


def find_scored(arguments: ScoreArguments) -> tuple[Path, Path]:
    """Return the files of the model and of its weights; raises ConfigError, also where there is no average."""
    files = arguments.model_json, arguments.model_safetensors
    model_json, last = find_model(arguments.runs_dir, arguments.run, files)
    path = last if arguments.weights == "last" else last.with_name(AVERAGED_FILE)
    if path != last and last.exists() and not path.exists():
        raise ConfigError(
            f"--weights: found no {path}, wanted a run that keeps one (train.json: weight_average_decay)"
        )
    return model_json, path


def open_test_tokens(
    arguments: ScoreArguments, model: ModelConfig, weights: Path, tokenizer: Tokenizer | None
) -> TestTokens:
    """Find the test tokens, downloading them if need be, and check all of them; raises DataError.

    What no option says comes from the run that the weights are of; where that has no data of its own, it is the
    published test set.
    """
    dataset, start, batches = PUBLISHED_TEST_SET, 50_000_000, arguments.batches or MOST_BATCHES
    revision = None
    owner = run_of_model_file(weights)
    train = owner[0].read_configs()[1] if owner and arguments.dataset is None else None
    is_own = train is not None and train.scored_dataset != dataset
    if train is not None and is_own:
        dataset, revision, start = train.scored_dataset, train.datasets[0].revision, train.start_val_token
    dataset = arguments.dataset or dataset
    start = start if arguments.start_token is None else arguments.start_token
    data.download_missing(arguments.datasets_dir, dataset, revision, [arguments.split])
    file = open_split(arguments.datasets_dir, dataset, arguments.split)
    of_tokens = tokenizer_of_tokens(file)
    if of_tokens and tokenizer and of_tokens.identity != tokenizer.identity:
        raise DataError(f"{file.path}: found tokens of the tokenizer {of_tokens}, wanted the model's ({tokenizer})")
    found = max(0, file.length - start)
    if is_own and arguments.batches is None:  # as much as there is
        batches = max(1, min(batches, (found - 1) // (SEQUENCES_PER_BATCH * model.context_length)))
    needed = batches * SEQUENCES_PER_BATCH * model.context_length + 1
    if found < needed:
        raise DataError(
            f"{file.path}: found {found:,} tokens from token {start:,} on, wanted {needed:,} "
            f"(--batches {batches} x {SEQUENCES_PER_BATCH} sequences x {model.context_length} tokens + 1); "
            "choose --start-token and --batches"
        )
    checked = CheckedTokens(file, check_tokens(file, start, needed, model.vocab_size))
    return TestTokens(checked, dataset, start, batches * SEQUENCES_PER_BATCH, of_tokens)


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


def document_losses(documents: Documents | None, tally: LossTally) -> DocumentLosses:
    """Return what whole documents cost; empty ones, which no tokenizer has anything to say about, are left out."""
    if documents is None or len(documents.keys) == 0:
        return DocumentLosses.none()
    nats = tally.document_losses()[-len(documents.keys) :]  # what ended first may have begun before the stretch
    kept = documents.num_bytes > 0
    tokens = np.diff(documents.ends)
    return DocumentLosses(documents.keys[kept], documents.num_bytes[kept], tokens[kept], nats[kept])


def by_frequency(
    datasets_dir: Path, test: TestTokens, tally: LossTally, vocab_size: int
) -> list[dict[str, object]] | None:
    """Return losses by how often the target occurs in the dataset's train split; None where that is not on disk."""
    if not split_files(datasets_dir / test.dataset, "train"):
        return None
    file = open_split(datasets_dir, test.dataset, "train")
    count = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, min(file.length, FREQUENCY_TOKENS), CHECK_CHUNK_TOKENS):
        tokens = file.read(first, min(CHECK_CHUNK_TOKENS, file.length - first))
        count += np.bincount(tokens[(tokens >= 0) & (tokens < vocab_size)], minlength=vocab_size)
    return described(tally.by_frequency(count))


def described(buckets: list[Bucket]) -> list[dict[str, object]]:
    """Return buckets as JSON; the last has no upper bound where that is infinite."""
    return [
        {"from": item.low, "below": json_number(item.high), "tokens": item.tokens, "loss": json_number(item.loss)}
        for item in buckets
    ]


def output_file(arguments: ScoreArguments, test: TestTokens, length: int, weights: Path) -> Path:
    """Return where the result goes: as asked, into the run's evals folder, or beside a loose model file.

    Makes the folder, so that one that cannot be written is known before the work is done.
    """
    path = arguments.output
    if path is None:
        owner = run_of_model_file(weights)
        place = owner[0].evals if owner else weights.parent / "evals"
        tokens = test.sequences * length
        path = score_path(place, arguments.split, test.start_token, tokens, scored_name(weights))
    elif path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"--output: found {path}, wanted the name of a .json file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path.parent}: cannot be written; --output FILE stores the result elsewhere")
    return path


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
