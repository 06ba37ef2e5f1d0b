"""What the user wrote: `model.json` and `train.json` as frozen, validated dataclasses.

JSON is read strictly (no duplicate keys, NaN, Infinity or unknown keys), every error of both files is reported
at once, one line each, and nothing here changes a configuration after it was read. What follows from a
configuration for a world size is in `plan.py`. `python -m harness.config` writes the JSON
Schemas and the reference of all keys.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.errors import ConfigError

ROOT = Path(__file__).parent.parent
MAX_FILE_BYTES = 64 * 1024
MAX_PARAMETERS = 10**10
DATASET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Purpose = Literal["init", "order", "dropout"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

# Not part of the recipe: seeds, names, notes, intervals, and what only a reader of reports sees.
SEED_KEYS = frozenset({"random_seed", "init_seed", "order_seed", "dropout_seed"})
INTERVAL_KEYS = frozenset({"checkpoint_interval", "checkpoints_to_keep", "validation_interval", "validation_batches"})
REPORT_KEYS = frozenset(
    {"sample_prompt", "price_per_hour", "currency", "expected_tokens_per_second", "loggers", "notes"}
)

# Where pydantic's own words would not tell a user what to write.
WANTED_IN_WORDS = {
    "compile": '"auto", true or false',
    "dataset": "NAME or OWNER/NAME, of letters, digits, '.', '_' and '-'",
    "dataset_revision": "a commit, branch or tag name",
    "initial_weights": "a SHA-256 of 64 hexadecimal digits in lower case",
    "loggers": 'a list of "tensorboard", "wandb" and "trackio", each at most once',
}


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("a positive number, or -1 for all that fit")
    return value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each at most once")
    return names


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-2-style model and the interventions inside it."""

    vocab_size: int = Field(gt=0, le=2**24)
    """Number of token ids, 50257 for the GPT-2 encoding."""
    context_length: int = Field(gt=0, le=2**20)
    """Positions the model can see, in tokens; also the length of a training sequence."""
    emb_dim: int = Field(gt=0, le=2**16)
    """Width of the residual stream; divisible by n_heads."""
    n_heads: int = Field(gt=0, le=2**12)
    """Attention heads per block."""
    n_layers: int = Field(gt=0, le=2**10)
    """Transformer blocks; the whole model may have 10^10 parameters."""
    drop_rate: float = Field(ge=0, lt=1)
    """Dropout on embeddings, attention weights and residual branches; 0 turns it off."""
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    tie_weights: bool = False
    """The output head shares the token embedding."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: data, batch, optimiser, precision, seeds and intervals."""

    dataset: str = Field(pattern=DATASET_NAME, max_length=200)
    """Folder under DATASETS_DIR, and Hub dataset id to download when the folder is missing."""
    dataset_revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)
    """Hub commit to pin."""
    min_train_tokens: Annotated[int, AfterValidator(_not_zero)] = Field(ge=-1, le=10**15)
    """Tokens to train on, rounded up to whole global batches; -1 takes all whole global batches that fit."""
    start_train_token: int = Field(ge=0)
    """First token used of the train split."""
    start_val_token: int = Field(ge=0)
    """First token used of the validation split."""
    microbatch_size: int = Field(gt=0, le=2**20)
    """Sequences per GPU per accumulation step."""
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=2**20)
    """Micro-batches per GPU per global step; left out where global_batch_size is given."""
    global_batch_size: int | None = Field(default=None, gt=0, le=2**30)
    """Sequences per global step, from which accumulation follows; microbatch_size x world size must divide it."""
    checkpoint_interval: int = Field(gt=0, le=2**40)
    """Global steps between checkpoints; one is also written after step 0 and after the last."""
    checkpoints_to_keep: int | None = Field(default=None, ge=2)
    """Newest checkpoints kept, besides the best; null keeps all."""
    validation_interval: int | None = Field(default=None, gt=0)
    """Global steps between validations during training; null validates never."""
    validation_batches: int | None = Field(default=None, gt=0)
    """Batches of the global size in one validation."""
    learning_rate: float = Field(default=0.0004, gt=0, le=1)
    """Peak learning rate."""
    schedule_learning_rate: bool = False
    """Linear warm-up, then cosine decay to a tenth of the peak; false keeps the rate constant."""
    warmup_period_percent: float = Field(default=0.0, ge=0, lt=100)
    """Length of the warm-up, in percent of the global steps; acts with schedule_learning_rate."""
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    """AdamW weight decay of matrices and embeddings; biases and LayerNorm parameters are never decayed."""
    clipping_max_norm: float | None = Field(default=None, gt=0)
    """Largest L2 norm over all gradients; null does not clip."""
    use_amp: bool = True
    """Autocast to amp_dtype and TF32 matrix multiplication; false is float32 throughout."""
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    """Autocast type; float16 uses a gradient scaler."""
    random_seed: int = Field(default=42, ge=0, lt=2**64)
    """Seed from which the three seeds below default."""
    init_seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Seed of the initial weights; null takes random_seed."""
    order_seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Seed of the data order; null takes random_seed."""
    dropout_seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Seed of the dropout masks; null takes random_seed."""
    initial_weights: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the run's imported/model.safetensors, from which it starts; null draws weights by init_seed."""
    shuffle: bool = False
    """Permute the sequences by order_seed; false reads the file in order."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile: auto is on for CUDA and off elsewhere."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Use deterministic kernels only, at a cost in speed."""
    nonfinite_patience: int = Field(default=20, gt=0)
    """Consecutive skipped global steps after which the run stops with status 7."""
    sample_prompt: str = Field(default="Every effort moves you", min_length=1, max_length=10_000)
    """Text whose continuation is sampled at each checkpoint."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of the whole machine per hour."""
    currency: str | None = Field(default=None, max_length=16)
    """Currency of price_per_hour, shown beside costs."""
    expected_tokens_per_second: float | None = Field(default=None, gt=0)
    """Expected speed over all GPUs, from which --dry-run computes hours and cost."""
    loggers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], AfterValidator(_each_once)] = Field(
        default=(),
        strict=False,  # JSON has lists, no tuples
    )
    """Where metrics go besides metrics.jsonl; each needs its package."""
    notes: str | None = Field(default=None, max_length=20_000)
    """Free text, shown in reports."""

    def seed_of(self, purpose: Purpose) -> int:
        """Give the seed of one purpose, which is random_seed unless set apart."""
        seed: int | None = getattr(self, f"{purpose}_seed")
        return self.random_seed if seed is None else seed

    def seeds(self) -> dict[str, int]:
        """Give the three seeds by their keys."""
        return {f"{purpose}_seed": self.seed_of(purpose) for purpose in PURPOSES}


ConfigT = TypeVar("ConfigT", ModelConfig, TrainConfig)
CONFIG_FILES = {"model": ModelConfig, "train": TrainConfig}


def recipe(model: ModelConfig, train: TrainConfig) -> dict[str, object]:
    """Give the recipe: every key of both files but seeds, notes, intervals and what only reports show."""
    excluded = SEED_KEYS | INTERVAL_KEYS | REPORT_KEYS
    written = {**asdict(model), **asdict(train)}
    return {key: value for key, value in written.items() if key not in excluded}


def recipe_hash(model: ModelConfig, train: TrainConfig) -> str:
    """Give the SHA-256 (hex) of the recipe: runs that share it are replicates of each other."""
    return hash_of_json(_hashed(recipe(model, train)))


def run_hash(model: ModelConfig, train: TrainConfig) -> str:
    """Give the SHA-256 (hex) of the recipe and its seeds: runs that share it are the same run."""
    return hash_of_json({**_hashed(recipe(model, train)), **train.seeds()})


def _hashed(recipe: dict[str, object]) -> dict[str, object]:
    """Leave out a key that came later where it is not used, so that the hashes of older runs stay as they were."""
    return {key: value for key, value in recipe.items() if key != "initial_weights" or value is not None}


def hash_of_json(value: object) -> str:
    """Give the SHA-256 (hex) of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_model_config(path: str | Path) -> ModelConfig:
    """Read and validate a `model.json`; raises ConfigError with one line for every error."""
    return config_from(ModelConfig, read_strict_json(Path(path)), path)


def load_train_config(path: str | Path) -> TrainConfig:
    """Read and validate a `train.json`; raises ConfigError with one line for every error."""
    return config_from(TrainConfig, read_strict_json(Path(path)), path)


def load_run_configs(model_path: Path, train_path: Path) -> tuple[ModelConfig, TrainConfig]:
    """Read both files of a run; raises ConfigError with the errors of both at once."""
    try:
        model = load_model_config(model_path)
    except ConfigError as model_error:
        try:
            load_train_config(train_path)
        except ConfigError as train_error:
            raise ConfigError(*model_error.lines, *train_error.lines) from None
        raise
    return model, load_train_config(train_path)


def read_strict_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Read a small JSON object, refusing duplicate keys, NaN, Infinity, a byte-order mark and over `max_bytes`."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), wanted a JSON object") from None
    if len(raw) > max_bytes:
        raise ConfigError(f"{path}: found over {max_bytes} bytes, wanted a small JSON object")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: found bytes that are not UTF-8, wanted a JSON object in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: found JSON nested too deeply, wanted one flat JSON object") from None
    except ValueError as error:
        # JSONDecodeError's message already carries line and column.
        raise ConfigError(f"{path}: found invalid JSON ({error}), wanted a JSON object") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {_shown(value)}, wanted a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {_shown(key)} appears twice")
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def config_from(config_class: type[ConfigT], document: Mapping[str, Any], path: str | Path) -> ConfigT:
    """Validate a document that is, or will be, the file at `path`; raises ConfigError with a line for every error."""
    data = dict(document)
    data.pop("$schema", None)
    known = {item.name: data.pop(item.name) for item in fields(config_class) if item.name in data}
    problems = [_unknown_key(key, config_class) for key in data]
    wrong: dict[str, dict[str, Any]] = {}
    try:
        config = config_class(**known)
    except ValidationError as error:
        # A union reports an error for each of its members; one for each key says enough.
        wrong = {str(item["loc"][0]): dict(item) for item in error.errors(include_url=False)}
    problems += [_line_for(key, item, config_class) for key, item in wrong.items()]
    problems += _conflicts({key: value for key, value in known.items() if key not in wrong})
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return config


def _unknown_key(key: str, config_class: type) -> str:
    def likeness(name: str) -> float:
        initials = "".join(word[0] for word in name.split("_"))
        return max(difflib.SequenceMatcher(None, key.lower(), other).ratio() for other in (name, initials))

    nearest = max((item.name for item in fields(config_class)), key=likeness)
    return f"{_plain(key)}: found an unknown key, wanted a known one; the nearest is {nearest}"


def _conflicts(data: dict[str, Any]) -> list[str]:
    """Give what keys of one file, each right by itself, say against each other."""

    def multiple(key: str, of: str) -> list[str]:
        value, divisor = data.get(key), data.get(of)
        if value is None or divisor is None or value % divisor == 0:
            return []
        return [f"{key}: found {value}, wanted a multiple of {of} ({divisor})"]

    lines = multiple("emb_dim", "n_heads") + multiple("global_batch_size", "microbatch_size")
    if "gradient_accumulation_steps" in data and data.get("global_batch_size") is not None:
        lines.append("global_batch_size: found together with gradient_accumulation_steps, wanted one of the two")
    pair = ("validation_interval", "validation_batches")
    for missing, given in (pair, pair[::-1]):
        if data.get(missing) is None and data.get(given) is not None:
            lines.append(f"{missing}: missing, wanted a number because {given} is given")
    return lines + _too_large(data)


def _too_large(data: dict[str, Any]) -> list[str]:
    """Refuse a model that no machine could hold before anything is allocated for it; counts its matrices alone."""
    if not {"vocab_size", "context_length", "emb_dim", "n_layers"} <= data.keys():
        return []
    rows = data["vocab_size"] + data["context_length"] + 12 * data["n_layers"] * data["emb_dim"]
    parameters = data["emb_dim"] * rows
    if parameters <= MAX_PARAMETERS:
        return []
    return [
        f"emb_dim: found a model of over {parameters:,} parameters with the other sizes as they are, "
        f"wanted at most {MAX_PARAMETERS:,}"
    ]


def _line_for(key: str, item: dict[str, Any], config_class: type) -> str:
    if item["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        description = TypeAdapter(config_class).json_schema()["properties"][key]["description"]
        return f"{key}: missing, wanted: {description}"
    wanted = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key}: found {_shown(item['input'])}, wanted {WANTED_IN_WORDS.get(key, wanted)}"


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large to represent"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(text: str) -> str:
    """Keep a stranger's key on one line and free of control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)[:80] or '""'


def schema_of(config_class: type) -> dict[str, Any]:
    """Give the JSON Schema of a configuration file, with descriptions, and `$schema` allowed as a key."""
    schema = TypeAdapter(config_class).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["$schema"] = {"type": "string", "description": "Path or URL of this schema."}
    return schema


def schema_text(config_class: type) -> str:
    """Give a schema as it is written to disk."""
    return json.dumps(schema_of(config_class), indent=2) + "\n"


def reference() -> str:
    """Give the reference of all keys as Markdown, from the fields themselves."""
    parts = ["# Configuration", "", "Generated from `harness/config.py` by `make generated`."]
    for name, config_class in CONFIG_FILES.items():
        parts += ["", f"## {name}.json", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, entry in TypeAdapter(config_class).json_schema()["properties"].items():
            default = f"`{json.dumps(entry['default'])}`" if "default" in entry else "required"
            parts.append(f"| `{key}` | {_type_in_words(entry)} | {default} | {entry['description']} |")
    return "\n".join(parts) + "\n"


def _type_in_words(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        return " or ".join(_type_in_words(option) for option in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return " or ".join(f"`{json.dumps(value)}`" for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {_type_in_words(entry['items'])}"
    bounds = [("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")]
    shown = [f"{sign} {entry[bound]:,}" for bound, sign in bounds if bound in entry]
    return " ".join([entry["type"], *([", ".join(shown)] if shown else [])])


if __name__ == "__main__":
    for file_name, file_class in CONFIG_FILES.items():
        (ROOT / "runs" / "schema" / f"{file_name}.schema.json").write_text(schema_text(file_class))
    (ROOT / "docs" / "configuration.md").write_text(reference())
