"""evals/loss-*.json: a checkpoint's score on test tokens, and a .npz beside it with what the score is made of.

The .npz holds one loss for every sequence, and what every whole document of the text cost, whatever its tokens are:
by that, runs of different tokenizers compare.
"""

import io
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from harness.run.errors import ConfigError, first_line
from harness.run.files import json_number, read_bytes, read_json, remove_abandoned, write_bytes, write_json
from harness.run.provenance import RunRecord
from harness.run.recipe import recipe_hash, run_hash
from harness.run.run_folder import AVERAGED_FILE, RunFolder, run_of_model_file

MOST_ARRAY_BYTES = 2**28
"""Of a .npz, packed and unpacked: those of millions of documents."""
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, MemoryError, BadZipFile, zlib.error)
"""What reading a damaged .npz raises."""


@dataclass(frozen=True)
class DocumentLosses:
    """What the test documents cost that were predicted whole, from first token to document end: arrays (D,)."""

    keys: NDArray[np.uint64]
    """The first 8 bytes of the SHA-256 of each one's UTF-8 text, by which tokenizers know the same document."""
    num_bytes: NDArray[np.int64]
    """Of UTF-8; not 0."""
    tokens: NDArray[np.int64]
    """With the document end."""
    nats: NDArray[np.float64]
    """Summed over its tokens."""

    @classmethod
    def none(cls) -> "DocumentLosses":
        """Return those of a test set without whole documents, or of a tokenizer that is not known."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class ScoreArrays:
    """The content of a score's .npz: N sequences, D documents."""

    sequence_losses: NDArray[np.float64]
    """Each sequence's mean loss in nats per token, (N,)."""
    sequence_documents: NDArray[np.int64]
    """The number of the document that each sequence begins in, (N,)."""
    documents: DocumentLosses


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
    tokenizer: str | None = None
    """Of the tokens: its identity, equal for two that encode every text alike; None where it is not known."""
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
            if (wrong := score.contradiction(score.read_arrays())) is not None:
                raise ConfigError(f"{path}: found {wrong} beside it")
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

    def write(self, arrays: ScoreArrays) -> None:
        """Write the arrays and then the score; deletes what killed scorings left beside it."""
        remove_abandoned(self.path.parent, "loss-*")
        file = io.BytesIO()
        documents = {f"document_{name}": array for name, array in vars(arrays.documents).items()}
        np.savez_compressed(
            file,
            sequence_losses=arrays.sequence_losses,
            sequence_documents=arrays.sequence_documents,
            **documents,
        )
        write_bytes(self.path.with_suffix(".npz"), file.getvalue())
        document = asdict(self)
        del document["path"]
        of_run = document.pop("model")
        if self.model.run is None:
            of_run = {key: of_run[key] for key in ("model_file", "model_sha256")}
        write_json(self.path, {**document, **of_run})

    def read_arrays(self) -> ScoreArrays:
        """Read what the score is made of; raises ConfigError where it cannot be read or is something else.

        Earlier versions kept no documents: there are none then.
        """
        path = self.path.with_suffix(".npz")
        try:
            with np.load(io.BytesIO(read_bytes(path, MOST_ARRAY_BYTES)), allow_pickle=False) as arrays:
                if sum(member.file_size for member in arrays.zip.infolist()) > MOST_ARRAY_BYTES:
                    raise ValueError(f"found more than {MOST_ARRAY_BYTES:,} bytes of arrays")
                sequences = arrays["sequence_losses"], arrays["sequence_documents"]
                documents = DocumentLosses.none()
                if "document_keys" in arrays:
                    documents = DocumentLosses(*(arrays[f"document_{item.name}"] for item in fields(DocumentLosses)))
        except DAMAGE as error:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
        if not (_are_alike(sequences, "fi") and _are_alike(tuple(vars(documents).values()), "uiif")):
            raise ConfigError(f"{path}: found something else than a loss and a document for each sequence")
        return ScoreArrays(*sequences, documents)

    def contradiction(self, arrays: ScoreArrays) -> str | None:
        """Return what of the arrays cannot be true of this score, None where nothing is."""
        documents = arrays.documents
        if min(documents.num_bytes.min(initial=1), documents.tokens.min(initial=1)) < 1:
            return "documents without bytes or tokens"
        if self.loss is None:  # some loss was not finite
            return None
        if not np.isclose(arrays.sequence_losses.mean(), self.loss, rtol=1e-5):
            return f"losses with another mean than {self.loss}"
        if not 0 <= documents.nats.sum() <= (1 + 1e-5) * self.loss * self.tokens:
            return "documents that cost more than all of the text"
        return None

    def test_in_words(self) -> str:
        """Return a description of the test tokens."""
        return f"{self.dataset} {self.split} from token {self.start_token:,} ({self.tokens:,} tokens)"


SCORE = TypeAdapter(Score)


def _are_alike(arrays: Sequence[NDArray[Any]], kinds: str) -> bool:
    """Return whether arrays have one dimension, one length and these kinds of number; "i" may be unsigned too."""
    return len({array.shape for array in arrays}) == 1 and all(
        array.ndim == 1 and array.dtype.kind in ("iu" if kind == "i" else kind)
        for array, kind in zip(arrays, kinds, strict=True)
    )


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
