"""A run's configuration: `model.json` and `train.json` as frozen, validated dataclasses.

All errors of both files are reported at once, one line each, and a configuration never changes after it was read.
`plan.py` derives the counts of a run from it.

The type of each field says which part of the configuration the key belongs to (see `keys.py`). Hashes, the check
before a run is resumed, the reference page and the tests read it from there.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.run.errors import ConfigError, nearest_hint
from harness.run.keys import Execution, Interval, Later, Recipe, Report, Seed, Wanted, changes_nothing, marks_of
from harness.run.strict_json import on_one_line, read_strict_json, shown

MAX_PARAMETERS = 10**10
DATASET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
DATASETS_WANTED = Wanted(
    "NAME or OWNER/NAME, of letters, digits, '.', '_' and '-', "
    'or a list of at least two different {"name": NAME, "weight": above 0}'
)
EXPERTS_WANTED = Wanted(
    'null or {"num_experts": E, "num_active_experts": from 2 to E, "capacity_factor": null or above 0}'
)
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
# A strict class takes no JSON object, so here the fields are strict.
NESTED = ConfigDict(**{**STRICT, "strict": False})

Purpose = Literal["init", "order", "dropout"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
LoggerName = Literal["tensorboard", "wandb", "trackio"]
LOGGERS_WANTED = Wanted('a list of "tensorboard", "wandb" and "trackio", each at most once')


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("a positive number, or -1 for all that fit")
    return value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each at most once")
    return names


def _other_names(datasets: "tuple[WeightedDataset, ...]") -> "tuple[WeightedDataset, ...]":
    _each_once(tuple(dataset.name for dataset in datasets))
    return datasets


@dataclass(config=NESTED, frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of every block's feed-forward."""

    num_experts: int = Field(strict=True, ge=2, le=2**10)
    """Feed-forwards in every block."""
    num_active_experts: int = Field(strict=True, ge=2, le=2**10)
    """Experts that see each token; with one, no gradient of the loss would reach the router."""
    capacity_factor: float | None = Field(default=None, strict=True, gt=0)
    """In training, an expert takes so many times its even share of a sequence's tokens and drops the rest."""

    def __post_init__(self) -> None:
        """Check that there are enough experts."""
        if self.num_active_experts > self.num_experts:
            raise ValueError(EXPERTS_WANTED)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-2-style model and the interventions inside it."""

    vocab_size: Recipe[int] = Field(gt=0, le=2**24)
    """Number of token ids, 50257 for the GPT-2 encoding."""
    context_length: Recipe[int] = Field(gt=0, le=2**20)
    """Positions the model can see, in tokens; also the length of a training sequence."""
    emb_dim: Recipe[int] = Field(gt=0, le=2**16)
    """Width of the residual stream; divisible by n_heads."""
    n_heads: Recipe[int] = Field(gt=0, le=2**12)
    """Attention heads per block."""
    n_layers: Recipe[int] = Field(gt=0, le=2**10)
    """Transformer blocks; the whole model may have 10^10 parameters."""
    drop_rate: Recipe[float] = Field(ge=0, lt=1)
    """Dropout on embeddings, attention weights and residual branches; 0 turns it off."""
    qkv_bias: Recipe[bool]
    """Bias on the query, key and value projections."""
    tie_weights: Recipe[bool] = False
    """The output head shares the token embedding."""
    positions: Later[Recipe[Literal["learned", "rotary"]]] = "learned"
    """How attention knows where tokens stand: an embedding of every position, or a rotation of queries and keys."""
    norm: Later[Recipe[Literal["layer", "rms"]]] = "layer"
    """Normalisation before each branch and the output head: LayerNorm, or RMSNorm, which has no mean and no shift."""
    feed_forward: Later[Recipe[Literal["gelu", "relu_squared", "swiglu"]]] = "gelu"
    """Activation between the feed-forward layers; swiglu has a third layer and 2/3 of the width, as many weights."""
    moe: Later[Recipe[Annotated[ExpertsConfig | None, EXPERTS_WANTED]]] = None
    """Several feed-forwards in every block: num_experts, of which a router chooses num_active_experts for each token,
    and capacity_factor, null to drop none."""
    qk_norm: Later[Recipe[bool]] = False
    """Divide each head's queries and keys by their root mean square, without learned scales."""
    bias: Later[Recipe[bool]] = True
    """Biases of the linear layers and shifts of the norms; false leaves out every one."""
    embedding_norm: Later[Recipe[bool]] = False
    """Normalise what enters the first block, without learned scales."""
    value_residual: Later[Recipe[bool]] = False
    """Mix the first block's attention values into those of every later block, in learned proportion."""
    logit_softcap: Later[Recipe[float | None]] = Field(default=None, gt=0)
    """Bound logits between minus this number and it, by a hyperbolic tangent; null does not."""
    init: Later[Recipe[Literal["gpt2", "torch", "zero_projections"]]] = "gpt2"
    """Initial weights: GPT-2's, PyTorch's defaults, or GPT-2's with what ends a branch, and the head, at zero."""


@dataclass(config=NESTED, frozen=True, kw_only=True)
class WeightedDataset:
    """One of the datasets that a run mixes."""

    name: str = Field(strict=True, pattern=DATASET_NAME, max_length=200)
    """As the name of a single dataset."""
    weight: float = Field(strict=True, gt=0, le=1e9)
    """Its share of the sequences, relative to the other weights."""
    revision: str | None = Field(default=None, strict=True, pattern=REVISION, max_length=200)
    """Hub commit to pin."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: data, batch, optimizer, precision, seeds and intervals."""

    dataset: Recipe[
        Annotated[
            Annotated[str, Field(pattern=DATASET_NAME, max_length=200)]
            | Annotated[tuple[WeightedDataset, ...], Field(min_length=2, strict=False), AfterValidator(_other_names)],
            DATASETS_WANTED,
        ]
    ] = Field()
    """Folder under DATASETS_DIR, or else Hub dataset to download; or a list of {"name", "weight"} that are mixed."""
    dataset_revision: Recipe[Annotated[str | None, Wanted("a commit, branch or tag name")]] = Field(
        default=None, pattern=REVISION, max_length=200
    )
    """Hub commit to pin; in a list, each dataset's `revision`."""
    min_train_tokens: Execution[Annotated[int, AfterValidator(_not_zero)]] = Field(ge=-1, le=10**15)
    """Tokens to train on, rounded up to whole global batches; -1 takes all whole global batches that fit."""
    epochs: Later[Execution[int]] = Field(default=1, gt=0, le=2**20)
    """Most often that a token may be trained on; with shuffle, each epoch has an order of its own."""
    start_train_token: Recipe[int] = Field(ge=0)
    """First token used of the train split."""
    start_val_token: Recipe[int] = Field(ge=0)
    """First token used of the validation split."""
    microbatch_size: Execution[int] = Field(gt=0, le=2**20)
    """Sequences per GPU per accumulation step."""
    gradient_accumulation_steps: Execution[int] = Field(default=1, gt=0, le=2**20)
    """Micro-batches per GPU per global step; left out where global_batch_size is given."""
    global_batch_size: Execution[int | None] = Field(default=None, gt=0, le=2**30)
    """Sequences per global step, from which accumulation follows; microbatch_size x world size must divide it."""
    checkpoint_interval: Interval[int] = Field(gt=0, le=2**40)
    """Global steps between checkpoints; one is also written after step 0 and after the last."""
    checkpoints_to_keep: Interval[int | None] = Field(default=None, ge=2)
    """Newest checkpoints kept, besides the best; null keeps all."""
    validation_interval: Interval[int | None] = Field(default=None, gt=0)
    """Global steps between validations during training; null validates never."""
    validation_batches: Interval[int | None] = Field(default=None, gt=0)
    """Batches of the global size in one validation."""
    learning_rate: Recipe[float] = Field(default=0.0004, gt=0, le=1)
    """Peak learning rate."""
    schedule_learning_rate: Recipe[bool] = False
    """The published spelling of the cosine schedule; false leaves the choice to schedule."""
    schedule: Later[Recipe[Literal["constant", "cosine", "linear", "wsd"] | None]] = None
    """Learning rate over the run: constant; or after a linear warm-up a cosine, a straight line, or a constant rate
    with a linear cooldown (warm-up, stable, decay: wsd); null is constant."""
    warmup_period_percent: Recipe[float] = Field(default=0.0, ge=0, lt=100)
    """Length of the warm-up, in percent of the global steps; a constant rate has none."""
    cooldown_percent: Later[Recipe[float]] = Field(default=20.0, gt=0, le=100)
    """Length of the cooldown of schedule wsd, in percent of the global steps."""
    final_rate_fraction: Later[Recipe[float]] = Field(default=0.1, ge=0, le=1)
    """Where a schedule's decay ends, as a fraction of the peak learning rate; a constant rate has none."""
    optimizer: Later[Recipe[Literal["adamw", "muon"]]] = "adamw"
    """What turns gradients into changes of the weights; muon is for the blocks' matrices, AdamW for the rest."""
    muon_learning_rate: Later[Recipe[float]] = Field(default=0.02, gt=0, le=1)
    """Peak learning rate of muon's matrices; learning_rate is that of the rest, and both follow the schedule."""
    adam_beta1: Later[Recipe[float]] = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay rate of the mean of the gradients."""
    adam_beta2: Later[Recipe[float]] = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay rate of the mean of the squared gradients."""
    adam_epsilon: Later[Recipe[float]] = Field(default=1e-8, gt=0, le=1)
    """What AdamW adds to the root of the mean square before it divides by it."""
    weight_decay: Recipe[float] = Field(default=0.1, ge=0, le=100)
    """Weight decay, times the learning rate, of matrices and embeddings; of biases and norms with decay_all only."""
    decay_all: Later[Recipe[bool]] = False
    """Decay every parameter, biases and norms too."""
    z_loss: Later[Recipe[float]] = Field(default=0.0, ge=0, le=1)
    """Weight of the mean squared log-normaliser of the softmax in what is minimised; reported losses are without."""
    moe_router_loss_scale: Later[Recipe[float]] = Field(default=0.0, ge=0, le=1)
    """Weight of the router loss, which is least where all experts get as many tokens; 0.01 / num_active_experts is
    usual, and without it a few experts tend to get all."""
    weight_average_decay: Later[Recipe[float | None]] = Field(default=None, gt=0, lt=1)
    """Keep an exponential average of the weights, this much of it kept by each global step; null keeps none."""
    clipping_max_norm: Recipe[float | None] = Field(default=None, gt=0)
    """Largest L2 norm over all gradients; null does not clip."""
    use_amp: Recipe[bool] = True
    """Autocast to amp_dtype and TF32 matrix multiplication; false is float32 throughout."""
    amp_dtype: Recipe[Literal["float16", "bfloat16"]] = "float16"
    """Autocast type; float16 uses a gradient scaler."""
    random_seed: Seed[int] = Field(default=42, ge=0, lt=2**64)
    """Seed from which the three seeds below default."""
    init_seed: Seed[int | None] = Field(default=None, ge=0, lt=2**64)
    """Seed of the initial weights; null takes random_seed."""
    order_seed: Seed[int | None] = Field(default=None, ge=0, lt=2**64)
    """Seed of the data order; null takes random_seed."""
    dropout_seed: Seed[int | None] = Field(default=None, ge=0, lt=2**64)
    """Seed of the dropout masks; null takes random_seed."""
    initial_weights: Later[
        Recipe[Annotated[str | None, Wanted("a SHA-256 of 64 hexadecimal digits in lower case")]]
    ] = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the run's imported/model.safetensors, from which it starts; null draws weights by init_seed."""
    shuffle: Recipe[bool] = False
    """Permute the sequences by order_seed; false reads the file in order."""
    compile: Execution[Annotated[Literal["auto"] | bool, Wanted('"auto", true or false')]] = "auto"
    """torch.compile: auto is on for CUDA and off elsewhere."""
    activation_checkpointing: Execution[bool] = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    deterministic: Execution[bool] = False
    """Use deterministic kernels only, at a cost in speed."""
    nonfinite_patience: Execution[int] = Field(default=20, gt=0)
    """Consecutive skipped global steps after which the run stops with status 7."""
    sample_prompt: Report[str] = Field(default="Every effort moves you", min_length=1, max_length=10_000)
    """Text whose continuation is sampled at each checkpoint."""
    price_per_hour: Report[float | None] = Field(default=None, ge=0)
    """Price of the whole machine per hour."""
    currency: Report[str | None] = Field(default=None, max_length=16)
    """Currency of price_per_hour, shown beside costs."""
    expected_tokens_per_second: Report[float | None] = Field(default=None, gt=0)
    """Expected speed over all GPUs, from which --dry-run computes hours and cost."""
    loggers: Report[Annotated[tuple[LoggerName, ...], AfterValidator(_each_once), LOGGERS_WANTED]] = Field(
        default=(),
        strict=False,  # JSON has lists, no tuples
    )
    """Where metrics go besides metrics.jsonl; each needs its package."""
    notes: Report[str | None] = Field(default=None, max_length=20_000)
    """Free text, shown in reports."""

    def __post_init__(self) -> None:
        """Keep one of the two spellings of a constant and of a cosine schedule, so that both are the same recipe."""
        if self.schedule in ("constant", "cosine"):
            object.__setattr__(self, "schedule_learning_rate", self.schedule == "cosine")
            object.__setattr__(self, "schedule", None)

    @property
    def datasets(self) -> tuple[WeightedDataset, ...]:
        """The datasets that are trained on; a single one has the weight 1."""
        if isinstance(self.dataset, str):
            return (WeightedDataset(name=self.dataset, weight=1.0, revision=self.dataset_revision),)
        return self.dataset

    @property
    def scored_dataset(self) -> str:
        """The dataset that validation and test losses are measured on."""
        return self.datasets[0].name

    @property
    def dataset_shares(self) -> str:
        """The datasets in words, as `books` or `books (70%) + code (30%)`."""
        if isinstance(self.dataset, str):
            return self.dataset
        total = sum(part.weight for part in self.dataset)
        return " + ".join(f"{part.name} ({100 * part.weight / total:.3g}%)" for part in self.dataset)

    @property
    def schedule_name(self) -> str:
        """The schedule's name in `harness.engine.schedules`."""
        return self.schedule or ("cosine" if self.schedule_learning_rate else "constant")

    def seed_of(self, purpose: Purpose) -> int:
        """Return the seed of one purpose: its own key, or random_seed if that is null."""
        seed: int | None = getattr(self, f"{purpose}_seed")
        return self.random_seed if seed is None else seed

    def seeds(self) -> dict[str, int]:
        """Return the three seeds by their keys."""
        return {f"{purpose}_seed": self.seed_of(purpose) for purpose in PURPOSES}


ConfigT = TypeVar("ConfigT", ModelConfig, TrainConfig)
CONFIG_FILES = {"model": ModelConfig, "train": TrainConfig}
NESTED_CLASSES = {"moe": ExpertsConfig, "dataset": WeightedDataset}
UNKNOWN = "unexpected_keyword_argument"
"""pydantic's type of error for a key that a class does not have."""


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
    train = load_train_config(train_path)
    require_fitting(model, train, train_path)
    return model, train


def require_fitting(model: ModelConfig, train: TrainConfig, train_path: Path) -> None:
    """Raise ConfigError where a key of train.json does not act with this model.json."""
    if train.moe_router_loss_scale and model.moe is None:
        raise ConfigError(
            f"{train_path}: moe_router_loss_scale: found {train.moe_router_loss_scale}, which acts only with moe in "
            "model.json"
        )


def config_from(config_class: type[ConfigT], document: Mapping[str, Any], path: str | Path) -> ConfigT:
    """Validate the content of the file at `path`; raises ConfigError with one line for every error."""
    data = dict(document)
    data.pop("$schema", None)
    if isinstance(data.get("moe"), dict):  # where the published harness logs what is in metrics.jsonl here
        data["moe"] = {key: value for key, value in data["moe"].items() if key != "log_moe_balance_file"}
    known = {item.name: data.pop(item.name) for item in fields(config_class) if item.name in data}
    problems = [_unknown_key(key, config_class) for key in data]
    wrong: dict[str, dict[str, Any]] = {}
    try:
        config = config_class(**known)
    except ValidationError as error:
        # pydantic reports an error for each member of a union; keep one for each key, that of an unknown name if any.
        found = sorted(error.errors(include_url=False), key=lambda item: item["type"] == UNKNOWN)
        wrong = {str(item["loc"][0]): dict(item) for item in found}
    problems += [_line_for(key, item, known, config_class) for key, item in wrong.items()]
    if "checkpoint_interval" in wrong and "validation_interval" in known:
        problems.append(
            "validation_interval: found without checkpoint_interval, which took its place for saving "
            "(python convert.py import --all brings runs of the published harness in)"
        )
    problems += _conflicts({key: value for key, value in known.items() if key not in wrong})
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return config


def _unknown_key(key: str, config_class: type) -> str:
    hint = nearest_hint(key, [item.name for item in fields(config_class)]) or " (docs/configuration.md lists them)"
    return f"{on_one_line(key)}: found an unknown key, wanted a known one{hint}"


def _conflicts(data: dict[str, Any]) -> list[str]:
    """Return an error line for every conflict between keys of one file that are valid on their own."""

    def multiple(key: str, of: str) -> list[str]:
        value, divisor = data.get(key), data.get(of)
        if value is None or divisor is None or value % divisor == 0:
            return []
        return [f"{key}: found {value}, wanted a multiple of {of} ({divisor})"]

    def only_with(key: str, choice: str, wanted: str) -> list[str]:
        item = next(item for item in fields(TrainConfig) if item.name == key)
        if key not in data or changes_nothing(TrainConfig, item, data[key]) or data.get(choice) == wanted:
            return []
        return [f"{key}: found {data[key]}, which acts only with {choice} {shown(wanted)}"]

    lines = multiple("emb_dim", "n_heads") + multiple("global_batch_size", "microbatch_size")
    if data.get("qkv_bias") and data.get("bias") is False:
        lines.append("qkv_bias: found true with bias false, wanted one of the two")
    if data.get("positions") == "rotary":
        width, heads = data.get("emb_dim"), data.get("n_heads")
        if width and heads and width % heads == 0 and width // heads % 2:
            lines.append(f"emb_dim: found {width // heads} channels a head, wanted an even number to rotate in pairs")
    if "gradient_accumulation_steps" in data and data.get("global_batch_size") is not None:
        lines.append("global_batch_size: found together with gradient_accumulation_steps, wanted one of the two")
    if data.get("schedule_learning_rate") and data.get("schedule") not in (None, "cosine"):
        lines.append(f"schedule: found {shown(data['schedule'])} with schedule_learning_rate, wanted one of the two")
    lines += only_with("cooldown_percent", "schedule", "wsd") + only_with("muon_learning_rate", "optimizer", "muon")
    together = data.get("warmup_period_percent", 0.0) + data.get("cooldown_percent", 20.0)
    if data.get("schedule") == "wsd" and together > 100:
        lines.append(f"cooldown_percent: found {together:g} percent with the warm-up, wanted at most 100")
    if data.get("dataset_revision") is not None and not isinstance(data.get("dataset"), str | None):
        lines.append("dataset_revision: found with a list of datasets, wanted a revision in each of them")
    pair = ("validation_interval", "validation_batches")
    for missing, given in (pair, pair[::-1]):
        if data.get(missing) is None and data.get(given) is not None:
            lines.append(f"{missing}: missing, wanted a number because {given} is given")
    return lines + _too_large(data)


def _too_large(data: dict[str, Any]) -> list[str]:
    """Return an error line for a model too large for any machine, before memory is allocated; counts its matrices."""
    if not {"vocab_size", "context_length", "emb_dim", "n_layers"} <= data.keys():
        return []
    experts = data["moe"].get("num_experts", 1) if isinstance(data.get("moe"), dict) else 1
    rows = data["vocab_size"] + data["context_length"] + (4 + 8 * experts) * data["n_layers"] * data["emb_dim"]
    parameters = data["emb_dim"] * rows
    if parameters <= MAX_PARAMETERS:
        return []
    return [
        f"emb_dim: found a model of over {parameters:,} parameters with the other sizes as they are, "
        f"wanted at most {MAX_PARAMETERS:,}"
    ]


def _line_for(key: str, item: dict[str, Any], known: Mapping[str, Any], config_class: type) -> str:
    if item["type"] == UNKNOWN and key in NESTED_CLASSES:
        place = "".join(f"[{part}]" for part in item["loc"][:-1] if isinstance(part, int))
        return f"{key}{place}.{_unknown_key(str(item['loc'][-1]), NESTED_CLASSES[key])}"
    if key not in known:
        description = TypeAdapter(config_class).json_schema()["properties"][key]["description"]
        return f"{key}: missing, wanted: {description}"
    wanted = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    wanted = next((mark for mark in marks_of(config_class)[key] if isinstance(mark, Wanted)), wanted)
    found = known[key] if item["type"].startswith("missing") else item["input"]
    return f"{key}: found {shown(found)}, wanted {wanted}"
