"""Fine-tune models on instructions, let them answer, and compare them: the work of `instruct.py respond`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.engine.distributed import device_name
from harness.engine.resume import find_inside
from harness.report.text import aligned
from harness.run.config import ModelConfig, TrainConfig
from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError
from harness.run.files import ROOT, read_json, utc_now, write_json
from harness.run.provenance import git_state
from harness.run.run_folder import MODEL_FILE, RunFolder, open_run
from harness.run.score import describe_checkpoint
from harness.tokens.tokenizer import GPT2, Tokenizer, require_tokenizer
from instruction.answering import EvalSet, EvaluatedModel, respond
from instruction.answers import ModelAnswers, require_comparable
from instruction.examples import encode_items
from instruction.items import BUILTIN_SET, load_items, split_items
from instruction.journal import held
from instruction.measures import HEADINGS, LOSS, measure, measures_as_json, measures_as_rows
from instruction.recipe import DEFAULT_RECIPE, Recipe, differences, load_recipe

UNTRAINED = "untrained"


@dataclass(frozen=True)
class RespondRequest:
    """What to evaluate, and where the results go."""

    runs: list[str]
    """RUN, RUN/checkpoints/NAME or RUN/untrained; the first is the baseline."""
    out: Path
    data: str | None
    recipe: Path | None
    margin: float
    device: str
    runs_dir: Path


@dataclass(frozen=True)
class ModelSource:
    """How models are made, which this package leaves to its caller."""

    build: Callable[[RunFolder, ModelConfig, TrainConfig, Path | None], nn.Module]
    """Makes a run's model on the CPU, with the weights of a file or, for None, its initial ones."""
    fingerprint: Callable[[nn.Module], str]
    """SHA-256 (hex) of a model's parameters."""


def evaluate(request: RespondRequest, source: ModelSource, device: torch.device) -> None:
    """Evaluate every model of the request on the device, and write and print the comparison; raises HarnessError."""
    with held(request.out):
        tokenizer = common_tokenizer(request)
        eval_set, description = prepare_eval_set(request, tokenizer)
        found = [open_model(request.runs_dir, name, eval_set.recipe, source, device) for name in request.runs]
        write_json(request.out / "recipe.json", asdict(eval_set.recipe))
        write_json(request.out / "data.json", description)
        models = [respond(model, eval_set, request.out, with_progress) for model in found]
        report(request, eval_set, models, device)


def with_progress(words: str, things: Iterable[Any]) -> Iterator[Any]:
    """Yield things while a progress bar shows how many are done."""
    with progress_bar(None, "it", iterable=things, desc=words) as bar:
        yield from bar


def common_tokenizer(request: RespondRequest) -> Tokenizer:
    """Return the tokenizer that all runs share; raises ConfigError where they do not, or one has none."""
    found = {}
    for name in request.runs:
        folder = open_run(request.runs_dir, name.partition("/")[0])
        found[name] = require_tokenizer(folder.tokenizer_json, folder.read_configs()[0].vocab_size)
    (first, tokenizer), *others = found.items()
    for name, other in others:
        if other.identity != tokenizer.identity:
            raise ConfigError(
                f"{name} and {first}: found the tokenizers {other} and {tokenizer}, wanted one for all models, "
                "because losses per token do not compare"
            )
    return tokenizer


def prepare_eval_set(request: RespondRequest, tokenizer: Tokenizer) -> tuple[EvalSet, dict[str, object]]:
    """Return the recipe with its items, and a description of the items for data.json.

    Raises ConfigError where the output folder was begun with others, and DataError for too few items.
    """
    recipe_json, data_json = request.out / "recipe.json", request.out / "data.json"
    recipe = load_recipe(request.recipe or (recipe_json if recipe_json.is_file() else DEFAULT_RECIPE))
    begun_with = read_json(data_json)
    data = load_items(request.data or begun_with.get("source", BUILTIN_SET))
    if recipe_json.is_file() and (other := differences(recipe, load_recipe(recipe_json))):
        raise ConfigError(
            f"{recipe_json}: found another {', '.join(other)}, wanted one recipe for all models of a folder "
            "(or another --out)"
        )
    if begun_with and begun_with.get("sha256") != data.sha256:
        raise ConfigError(f"{data_json}: found other items than in {data.source}, wanted the same (or another --out)")
    if begun_with and begun_with.get("tokenizer", GPT2) != tokenizer.identity:
        raise ConfigError(
            f"{data_json}: found another tokenizer than {tokenizer}, wanted the same (or another --out)"
        )
    split = split_items(data.items, recipe)
    train, test = (encode_items(items, recipe, tokenizer) for items in (split.train, split.test))
    if len(test) < 2 or (recipe.epochs and not train):
        raise DataError(
            f"{data.source}: found {len(train)} items to train on and {len(test)} to ask of at most "
            f"{recipe.max_tokens} tokens, wanted at least 1 and 2 (recipe: test_fraction, max_tokens)"
        )
    left_out = len(split.train) + len(split.test) - len(train) - len(test)
    description = {"source": data.source, "sha256": data.sha256, "tokenizer": tokenizer.identity, "train": len(train),
                   "test": len(test), "longer_than_max_tokens": left_out}  # fmt: skip
    unanswered = f", {data.without_answer:,} for want of an answer" if data.without_answer else ""
    print(f"{data.source}: {len(train):,} items to train on, {len(test):,} to ask, "
          f"{left_out:,} left out for more than {recipe.max_tokens} tokens{unanswered}")  # fmt: skip
    return EvalSet(recipe, tokenizer, data.sha256, train, test), description


def open_model(
    runs_dir: Path, name: str, recipe: Recipe, source: ModelSource, device: torch.device
) -> EvaluatedModel:
    """Return a model that was checked, before any work is done; raises ConfigError and CheckpointError."""
    run, _, inside = name.partition("/")
    folder = open_run(runs_dir, run)
    config, train = folder.read_configs()
    if config.context_length < recipe.max_tokens:
        raise ConfigError(
            f"{folder.model_json}: context_length: found {config.context_length}, wanted at least the recipe's "
            f"max_tokens ({recipe.max_tokens})"
        )
    otherwise = f" (or {run}/{UNTRAINED} for its initial weights)"
    found = None if inside == UNTRAINED else find_inside(folder, inside, otherwise)

    def opened(weights: Path | None) -> nn.Module:
        if weights is None and found is not None:
            weights = found.path / MODEL_FILE
        return source.build(folder, replace(config, drop_rate=recipe.drop_rate), train, weights).to(device).eval()

    if found is None:
        # Imported weights were trained on an unknown number of tokens.
        seen = 0 if train.initial_weights is None else None
        return EvaluatedModel(
            name, {"sha256": source.fingerprint(opened(None)), "step": None, "tokens_seen": seen}, opened
        )
    described = {"sha256": found.sha256[MODEL_FILE], "step": found.step, **describe_checkpoint(folder, found.step)}
    return EvaluatedModel(name, described, opened)


def report(request: RespondRequest, eval_set: EvalSet, models: list[ModelAnswers], device: torch.device) -> None:
    """Print the comparison and write results.json."""
    require_comparable(models)
    baseline = models[0].model
    tables = measure(models, baseline, request.margin)
    output = request.out / "results.json"
    document = {
        "baseline": baseline,
        "recipe_hash": eval_set.recipe.hash(),
        "data": read_json(request.out / "data.json"),
        "seeds": eval_set.recipe.seeds,
        "margin": request.margin,
        "models": [
            {**row, "checkpoint": model.checkpoint}
            for row, model in zip(measures_as_json(tables), models, strict=True)
        ],
        "made_with": {
            "device": device_name(device),
            "torch": torch.__version__,
            "code": git_state(ROOT),
            "time": utc_now(),
        },
    }
    write_json(output, document)
    seeds = len(eval_set.recipe.seeds)
    print(*aligned(HEADINGS, measures_as_rows(tables)), "", sep="\n")
    for row in tables[LOSS][1:]:
        print(f"{row.model}: {row.sentence}")
    print(
        f"Loss in nats per response token, over {len(eval_set.test)} items and {seeds} fine-tunings of each model. "
        "Intervals cover other items and other fine-tunings, not other pre-trainings."
    )
    print(f"Wrote {output}; the answers are in {request.out / 'answers'}")
