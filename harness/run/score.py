"""evals/loss-*.json: a checkpoint's score on test tokens, and a .npz beside it with one loss for every sequence."""

import io
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from harness.run.errors import ConfigError, first_line
from harness.run.files import json_number, read_bytes, read_json, write_bytes, write_json
from harness.run.provenance import RunRecord
from harness.run.recipe import recipe_hash, run_hash
from harness.run.run_folder import AVERAGED_FILE, RunFolder, run_of_model_file


@dataclass(frozen=True)
class ScoredModel:
    """The model that was scored; what is unknown for a file outside a run is None."""

    model_file: str = ""
    model_sha256: str = ""
    run: str | None = None
    step: int | None = None
    """The checkpoint's last completed global step."""
    tokens_seen: int | None = None
    global_steps: int | None = None
    """In the run's whole plan."""
    recipe_hash: str | None = None
    run_hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The content of a score file; losses in nats per token. What earlier versions did not write has a default."""

    dataset: str
    split: str
    start_token: int
    tokens: int
    sequences: int = 0
    tokens_sha256: str
    loss: float | None
    """None where it is not finite."""
    perplexity: float | None = None
    bits_per_byte: float | None = None
    by_position: list[dict[str, Any]] = field(default_factory=list)
    by_training_frequency_per_million: list[dict[str, Any]] | None = None
    dtype: str = "float32"
    device: str = ""
    time: str = ""
    model: ScoredModel
    path: Path

    @classmethod
    def read(cls, path: Path) -> "Score | None":
        """Read a score; None if the file or the losses beside it are missing, or it is not a score.

        Damaged losses are a score that does not count, which a warning says.
        """
        document = read_json(path)
        names = {**cls.__dataclass_fields__, **ScoredModel.__dataclass_fields__}.keys() - {"model", "path"}
        if not path.with_suffix(".npz").is_file() or "tokens_sha256" not in document:
            return None
        known = {key: value for key, value in document.items() if key in names}
        model = {key: known.pop(key) for key in ScoredModel.__dataclass_fields__ if key in known}
        try:
            score = SCORE.validate_json(json.dumps({**known, "model": model, "path": str(path)}), strict=True)
            score.read_losses()
        except ValidationError:
            return None
        except ConfigError as error:
            print(f"warning: {error}; the score does not count", file=sys.stderr)
            return None
        return score

    @classmethod
    def of_checkpoint(cls, folder: RunFolder, step: int, averaged: bool = False) -> Iterator["Score"]:
        """Yield the scores of a run's checkpoint, or of the average of the weights in it, sorted by file name."""
        name = scored_name(folder.weights(step).with_name(AVERAGED_FILE) if averaged else folder.weights(step))
        for path in sorted(folder.evals.glob(f"loss-*-{name}.json")):
            if (score := cls.read(path)) is not None:
                yield score

    def write(self, losses: NDArray[np.float64], documents: NDArray[np.int64]) -> None:
        """Write each sequence's mean loss and document number, both (N,), and then the score."""
        arrays = io.BytesIO()
        np.savez(arrays, sequence_losses=losses, sequence_documents=documents)
        write_bytes(self.path.with_suffix(".npz"), arrays.getvalue())
        document = asdict(self)
        del document["path"]
        of_run = document.pop("model")
        if self.model.run is None:
            of_run = {key: of_run[key] for key in ("model_file", "model_sha256")}
        write_json(self.path, {**document, **of_run, "time": document["time"]})

    def read_losses(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return each sequence's mean loss, and the number of the document that it begins in, both (N,).

        Raises ConfigError where the file cannot be read or holds something else.
        """
        path = self.path.with_suffix(".npz")
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
                losses, documents = arrays["sequence_losses"], arrays["sequence_documents"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
        kinds = losses.dtype.kind, documents.dtype.kind
        if losses.ndim != 1 or losses.shape != documents.shape or kinds not in (("f", "i"), ("f", "u")):
            raise ConfigError(f"{path}: found something else than a loss and a document for each sequence")
        return losses, documents

    def test_in_words(self) -> str:
        """Return a description of the test tokens."""
        return f"{self.dataset} {self.split} from token {self.start_token:,} ({self.tokens:,} tokens)"


SCORE = TypeAdapter(Score)


def scored_name(weights: Path) -> str:
    """Return what a score's file name calls the weights: by their checkpoint's folder, or a loose file's stem."""
    owner = run_of_model_file(weights)
    if owner is None:
        return weights.stem
    name = owner[0].checkpoint(owner[1]).name
    return f"{name}-{weights.stem}" if weights.name == AVERAGED_FILE else name


def score_path(folder: Path, split: str, start_token: int, tokens: int, model_name: str) -> Path:
    """Return a score's path in an evals folder; `model_name` is `scored_name`'s."""
    return folder / f"loss-{split}-{start_token}-{tokens}-{model_name}.json"


def perplexity_of(loss: float) -> float | None:
    """Return exp(loss), or None if that overflows."""
    return json_number(math.exp(loss)) if loss < 700 else None


def describe_model(path: Path, sha256: str) -> ScoredModel:
    """Return what is known about the model in a weights file; most is known for a run's checkpoint."""
    owner = run_of_model_file(path)
    if owner is None:
        return ScoredModel(path.name, sha256)
    folder, step = owner
    return ScoredModel(path.name, sha256, folder.path.name, step, **describe_checkpoint(folder, step))


def describe_checkpoint(folder: RunFolder, step: int) -> dict[str, Any]:
    """Return a checkpoint's tokens seen, its run's global steps, and both hashes; None where unknown."""
    found = {
        "tokens_seen": read_json(folder.state_json(step)).get("train_state", {}).get("tokens"),
        "global_steps": RunRecord.read(folder.run_json).global_steps,
    }
    try:
        model, train = folder.read_configs()
    except ConfigError:
        return {**found, "recipe_hash": None, "run_hash": None}
    return {**found, "recipe_hash": recipe_hash(model, train), "run_hash": run_hash(model, train)}
