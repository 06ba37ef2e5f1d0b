"""Make a run folder from weights that were trained elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn

from exchange import parity, vocabulary
from exchange.architectures import from_hugging_face, read_config
from exchange.hugging_face import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    files_of_index,
    weight_files,
)
from exchange.origin import Origin
from exchange.published import config_of
from harness.engine.checkpoint import save_tensors
from harness.engine.opening import open_weights, read_tensors
from harness.run.config import ModelConfig
from harness.run.errors import CheckpointError, ConfigError, DataError, hub_errors
from harness.run.files import atomic_folder, file_sha256, replace_link, utc_now, write_json, write_text
from harness.run.run_folder import IMPORTED_STEP, RUN_NAME, RunFolder
from harness.tokens.gpt2 import VOCAB_SIZE, printable_vocabulary
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, read_tokenizer

DATASET_TO_NAME = "name-your-dataset"
# Gentle settings for training on: a tenth of the usual peak rate, because the weights are trained already.
TRAIN: dict[str, Any] = {
    "dataset": DATASET_TO_NAME,
    "min_train_tokens": -1,
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 1,
    "global_batch_size": 32,
    "checkpoint_interval": 100,
    "checkpoints_to_keep": 2,
    "learning_rate": 0.00004,
    "schedule_learning_rate": True,
    "warmup_period_percent": 5,
    "clipping_max_norm": 1.0,
    "shuffle": True,
}


@dataclass(frozen=True)
class Weights:
    """What a source holds, under the parameter names of this project."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    origin: Origin
    remarks: list[str] = field(default_factory=list)
    """What a user should know, one line each."""
    folder: Path | None = None
    """The Hugging Face folder, where it is one."""
    tokenizer: Tokenizer | None = None
    """Its own, where that is not GPT-2's and can be used here."""


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and as which run."""

    source: str
    run: str
    all_of: Path | None
    """A folder of run folders, in place of the other two."""
    runs_dir: Path
    revision: str | None
    n_heads: int | None
    vocab_size: int | None


BuildModel = Callable[[ModelConfig, Mapping[str, Tensor], object], nn.Module]
"""Makes a model with given weights; the last argument names their source in errors."""


def import_weights(request: ImportRequest, build_model: BuildModel) -> None:
    """Read the source, check it against transformers, and write the run folder; raises HarnessError."""
    target = new_run(request.runs_dir, request.run)
    weights = read_source(request)
    for remark in weights.remarks:
        print(remark)
    model = build_model(weights.config, weights.tensors, request.source)
    require_numbers(model.state_dict(), request.source)
    origin = replace(weights.origin, time=utc_now())
    if weights.folder is None:
        print("Logits: not checked, because the source is no Hugging Face folder")
    elif not parity.is_available():
        print("Logits: not checked, because transformers is not installed (pip install '.[export]')")
    else:
        found = parity.check_logits(
            model.eval(), weights.folder, weights.config.vocab_size, weights.config.context_length
        )
        origin = replace(origin, logit_parity=asdict(found))
        print(f"Logits equal those of transformers: {found}")
    write_run(target, replace(weights, tensors=model.state_dict(), origin=origin))
    print(f"{target}: imported {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f'To train on from here, name a dataset in {RunFolder(target).train_json} (now "{DATASET_TO_NAME}")')


def new_run(runs_dir: Path, name: str) -> Path:
    """Return the path for a new run; raises ConfigError for a bad name, or where there is something already."""
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(f"RUN: found {name[:80]!r}, wanted a name of letters, digits, '.', '_' and '-'")
    if (runs_dir / name).exists() or (runs_dir / name).is_symlink():
        raise ConfigError(f"RUN: found {runs_dir / name}, wanted the name of a run that does not exist yet")
    return runs_dir / name


def read_source(request: ImportRequest) -> Weights:
    """Read the weights that SOURCE names; raises HarnessError."""
    source, asked = request.source, request.vocab_size
    path = Path(source)
    if source.startswith("hf:"):
        folder, commit = download(source.removeprefix("hf:"), request.revision)
        return read_folder(folder, Origin(source, commit), asked)
    if path.is_dir():
        return read_folder(path, Origin(source), asked)
    if path.is_file() and path.suffix == ".safetensors":
        return read_file(path, request.n_heads, asked)
    raise ConfigError(f"SOURCE: found {source[:200]!r}, wanted hf:OWNER/NAME, a folder or a .safetensors file")


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Download the needed files of a model on the Hub into its cache, and return their folder and the commit.

    Raises DataError. Nothing but JSON and safetensors is asked for.
    """
    with hub_errors(f"hf:{repository}: could not be downloaded", DataError):
        info = HfApi().model_info(repository, revision=revision)
        names = {item.rfilename for item in info.siblings or []}
        wanted = {CONFIG_FILE, *TOKENIZER_FILES, WEIGHTS_FILE if WEIGHTS_FILE in names else INDEX_FILE} & names
        if not {WEIGHTS_FILE, INDEX_FILE} & wanted:
            found = f"{PICKLE_FILE} only, a pickle that can run any code" if PICKLE_FILE in names else "no weights"
            raise CheckpointError(f"hf:{repository}: found {found}, wanted {WEIGHTS_FILE}")
        commit = str(info.sha)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=sorted(wanted)))
        if INDEX_FILE in wanted:
            snapshot_download(repository, revision=commit, allow_patterns=files_of_index(folder / INDEX_FILE))
    return folder, commit


def read_folder(folder: Path, origin: Origin, asked: int | None) -> Weights:
    """Read a Hugging Face folder; `asked` is the --vocab-size of the command, None where it was not given."""
    config = read_config(folder / CONFIG_FILE)
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= read_tensors(path)
    kinds = sorted(
        {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()}
    )
    ours, config = from_hugging_face(tensors, config, folder)
    remarks = [] if kinds == ["float32"] else [f"Weights: {' and '.join(kinds)} there, float32 here"]
    if not config.qkv_bias:
        remarks.append("Query, key and value biases are all zero: left out (qkv_bias false)")
    known = vocabulary.read_vocabulary(folder)
    is_gpt2 = None if known is None else printable_vocabulary().items() <= known.items()
    tokenizer = own_tokenizer(folder, remarks) if is_gpt2 is False else None
    origin = replace(origin, tokenizer_is_gpt2=is_gpt2, files={path.name: file_sha256(path) for path in files})
    kept = vocabulary.real_vocab_size(config.vocab_size, VOCAB_SIZE, known, asked)
    return with_vocabulary(Weights(config, ours, origin, remarks, folder, tokenizer), kept)


def own_tokenizer(folder: Path, remarks: list[str]) -> Tokenizer | None:
    """Return a folder's tokenizer that is not GPT-2's; None where it cannot be used here. A remark says which."""
    try:
        tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    except DataError as error:
        remarks.append(f"Its tokenizer is not GPT-2's, and texts and prompts here would mean nothing: {error}")
        return None
    remarks.append(f"Its own tokenizer goes with it ({tokenizer})")
    return tokenizer


def read_file(path: Path, n_heads: int | None, asked: int | None) -> Weights:
    """Read another harness's model.safetensors; `n_heads` and `asked` are options of the command, or None."""
    found = open_weights(path)
    config = config_of(found.tensors, n_heads, path)
    origin = Origin(str(path), files={path.name: found.sha256})
    remarks = [] if n_heads else [f"Heads: {config.n_heads}, at 64 channels each (--n-heads says otherwise)"]
    kept = vocabulary.real_vocab_size(config.vocab_size, VOCAB_SIZE, None, asked)
    return with_vocabulary(Weights(config, found.tensors, origin, remarks), kept)


def with_vocabulary(weights: Weights, kept: int) -> Weights:
    """Drop the token ids from `kept` on, which are padding, and add a remark that says so."""
    stored = weights.config.vocab_size
    if kept == stored:
        return weights
    config = ModelConfig(**{**asdict(weights.config), "vocab_size": kept})
    tensors = vocabulary.with_vocab_size(weights.tensors, kept)
    remark = (
        f"Vocabulary: kept the first {kept:,} of {stored:,} ids; the others are padding, and without them in the "
        "softmax losses come out a little lower"
    )
    origin = replace(weights.origin, stored_vocab_size=stored)
    remarks = [*weights.remarks, remark]
    return replace(weights, config=config, tensors=tensors, origin=origin, remarks=remarks)


def require_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError where a tensor holds NaN or infinity."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{source}: {name}: found values that are not finite, wanted numbers")


def write_run(target: Path, source: Weights) -> None:
    """Write the run folder, which appears whole: both files, weights where training would begin, the tokenizer."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as path:
        folder = RunFolder(path)
        folder.imported.mkdir()
        folder.checkpoints.mkdir()
        weights = folder.weights(IMPORTED_STEP)
        save_tensors(source.tensors, weights)
        source.origin.write(folder.imported_source)
        replace_link(folder.checkpoints / "latest", f"../{folder.imported.name}")
        notes = {
            "initial_weights": file_sha256(weights),
            "notes": f"Starts from the weights of {source.origin}, imported {source.origin.time}.",
        }
        schemas = {
            name: {"$schema": f"../schema/{name}.schema.json"} if (target.parent / "schema").is_dir() else {}
            for name in ("model", "train")
        }
        write_json(folder.model_json, {**schemas["model"], **asdict(source.config)})
        write_json(folder.train_json, {**schemas["train"], **TRAIN, **notes})
        if source.tokenizer is not None and source.tokenizer.document is not None:
            write_text(folder.tokenizer_json, source.tokenizer.document)
        folder.read_configs()
