"""The frozen recipe: all that fine-tuning and answering depend on besides the model, and the same for all models."""

from dataclasses import asdict, fields
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from harness.run.config import STRICT, TrainConfig
from harness.run.errors import ConfigError
from harness.run.files import ASSETS
from harness.run.recipe import hash_of_json
from harness.run.strict_json import read_strict_json

DEFAULT_RECIPE = ASSETS / "instructions" / "recipe.json"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Recipe:
    """How every model is fine-tuned and asked; see docs/instruction-evals.md."""

    prompt: str = Field(min_length=1, max_length=10_000)
    """Prompt of an item with an input; {instruction} and {input} stand for the item's own."""
    prompt_without_input: str = Field(min_length=1, max_length=10_000)
    """Prompt of an item whose input is empty."""
    max_tokens: int = Field(gt=1, le=2**20)
    """Prompt and response together, in tokens; longer items are left out, and an answer ends there."""
    epochs: int = Field(ge=0, le=1000)
    """Passes over the training items; 0 asks the models as they are."""
    batch_items: int = Field(gt=0, le=2**16)
    """Items in one optimiser step."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak: linear warm-up, then cosine decay to a tenth."""
    warmup_period_percent: float = Field(ge=0, lt=100)
    """Length of the warm-up, in percent of the steps."""
    weight_decay: float = Field(ge=0, le=100)
    """AdamW weight decay of matrices and embeddings."""
    clipping_max_norm: float = Field(gt=0)
    """Largest L2 norm over all gradients."""
    drop_rate: float = Field(ge=0, lt=1)
    """Dropout of fine-tuning, whatever the model was trained with."""
    seeds: tuple[int, ...] = Field(min_length=1, max_length=1000)
    """One fine-tuning for each: it draws the order of the items and the dropout masks."""
    test_fraction: float = Field(gt=0, lt=1)
    """Share of the items that are held out for asking."""
    split_seed: int = Field(ge=0, lt=2**64)
    """Which items are held out."""
    max_test_items: int = Field(gt=1)
    """Most items to ask."""

    def hash(self) -> str:
        """Return the SHA-256 (hex) of all keys."""
        return hash_of_json(asdict(self))

    def optimization(self) -> TrainConfig:
        """Return the optimizer's settings as a training configuration, as `make_optimizer` takes them."""
        return TrainConfig(
            dataset="instructions",
            min_train_tokens=-1,
            start_train_token=0,
            start_val_token=0,
            microbatch_size=self.batch_items,
            checkpoint_interval=1,
            learning_rate=self.learning_rate,
            schedule_learning_rate=True,
            warmup_period_percent=self.warmup_period_percent,
            weight_decay=self.weight_decay,
            clipping_max_norm=self.clipping_max_norm,
            use_amp=False,
        )


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; raises ConfigError with one line for every error."""
    document = read_strict_json(path)
    known = {item.name for item in fields(Recipe)}
    problems = [f"{path}: {key!r:.80}: found an unknown key, wanted one of {', '.join(sorted(known))}"
                for key in document.keys() - known]  # fmt: skip
    given = {key: value for key, value in document.items() if key in known}
    if isinstance(given.get("seeds"), list):
        given["seeds"] = tuple(given["seeds"])  # JSON has no tuples
    try:
        recipe = Recipe(**given)
    except ValidationError as error:
        problems += [
            f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
        ]
    else:
        problems += [f"{path}: {problem}" for problem in _conflicts(recipe)]
    if problems:
        raise ConfigError(*sorted(problems))
    return recipe


def _conflicts(recipe: Recipe) -> list[str]:
    wanted = {"prompt": ("{instruction}", "{input}"), "prompt_without_input": ("{instruction}",)}
    lines = [
        f"{key}: found no {field}, wanted a place for it"
        for key, places in wanted.items()
        for field in places
        if field not in getattr(recipe, key)
    ]
    if len(set(recipe.seeds)) < len(recipe.seeds) or not all(0 <= seed < 2**63 for seed in recipe.seeds):
        lines.append(f"seeds: found {list(recipe.seeds)}, wanted each once, from 0 on")
    return lines


def differences(mine: Recipe, theirs: Recipe) -> list[str]:
    """Return the keys in which two recipes differ, in alphabetical order."""
    return sorted(key for key, value in asdict(mine).items() if asdict(theirs)[key] != value)
