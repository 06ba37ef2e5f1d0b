"""Fine-tune models on instructions by one frozen recipe, let them answer held-out items, and compare them.

  python ift_respond.py quickstart my-run quickstart/untrained --out evals/instructions

RUN is a run's newest checkpoint, RUN/checkpoints/NAME another one, RUN/untrained its initial weights, be they drawn
or imported. The same command goes on after an interruption; with more runs and the same --out it adds them. Compared
are the runs that are named, with the first.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from harness.engine import checkpoint, resume
from harness.engine.distributed import Launch, choose_device, device_name, set_up_kernels
from harness.engine.sampling import require_gpt2_ids
from harness.run.errors import CheckpointError, ConfigError, DataError, exit_status_of
from harness.run.files import ROOT, RUNS, read_json, utc_now, write_json
from harness.run.provenance import git_state
from harness.run.run_folder import MODEL_FILE, RunFolder, open_run
from harness.run.score import describe_checkpoint
from instruction.answers import ModelAnswers, require_comparable
from instruction.examples import encode_items
from instruction.items import BUILTIN_SET, load_items, split_items
from instruction.journal import held
from instruction.measures import HEADINGS, LOSS, measure, measures_as_json, measures_as_rows
from instruction.recipe import DEFAULT_RECIPE, Recipe, differences, load_recipe
from instruction.respondent import EvalSet, EvaluatedModel, respond
from model import fingerprint, load_weights, read_weights, uninitialized_model
from study.tables import aligned
from study.verdicts import MARGIN
from training.context import give_initial_weights

UNTRAINED = "untrained"


def main() -> None:
    """Fine-tune, ask, store and compare."""
    arguments = parse_arguments()
    device = choose_device(arguments.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=True)
    with held(arguments.out):
        questions, description = settle(arguments)
        respondents = [open_respondent(arguments.runs_dir, name, questions.recipe, device) for name in arguments.runs]
        write_json(arguments.out / "recipe.json", asdict(questions.recipe))
        write_json(arguments.out / "data.json", description)
        models = [respond(respondent, questions, arguments.out, with_progress) for respondent in respondents]
        report(arguments, questions, models, device)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="models to compare; the first is the baseline")
    parser.add_argument("--data", metavar="FILE_OR_HUB_ID", help="Alpaca format (.json, .jsonl, .parquet), or "
                        "hf:OWNER/NAME[/PATH][@REVISION] (default: the set that ships)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="(default: DIR's, or assets/instructions/recipe.json)"
    )
    parser.add_argument(
        "--margin", type=_positive, default=MARGIN, help="smallest loss difference that matters (0.01)"
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="(default: runs)")
    arguments = parser.parse_args()
    if len(set(arguments.runs)) < len(arguments.runs):
        parser.error("RUN: found one twice, wanted each model once")
    return arguments


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number above 0")
    return value


def settle(arguments: argparse.Namespace) -> tuple[EvalSet, dict[str, object]]:
    """Read recipe and items, hold them against those that the output folder was begun with, describe the items."""
    recipe_json, data_json = arguments.out / "recipe.json", arguments.out / "data.json"
    recipe = load_recipe(arguments.recipe or (recipe_json if recipe_json.is_file() else DEFAULT_RECIPE))
    begun_with = read_json(data_json)
    data = load_items(arguments.data or begun_with.get("source", BUILTIN_SET))
    if recipe_json.is_file() and (other := differences(recipe, load_recipe(recipe_json))):
        raise ConfigError(
            f"{recipe_json}: found another {', '.join(other)}, wanted one recipe for all models of a folder "
            "(or another --out)"
        )
    if begun_with and begun_with.get("sha256") != data.sha256:
        raise ConfigError(f"{data_json}: found other items than in {data.source}, wanted the same (or another --out)")
    split = split_items(data.items, recipe)
    train, test = encode_items(split.train, recipe), encode_items(split.test, recipe)
    if len(test) < 2 or (recipe.epochs and not train):
        raise DataError(f"{data.source}: found {len(train)} items to train on and {len(test)} to ask of at most "
                        f"{recipe.max_tokens} tokens, wanted at least 1 and 2 (recipe: max_tokens)")  # fmt: skip
    left_out = len(split.train) + len(split.test) - len(train) - len(test)
    description = {"source": data.source, "sha256": data.sha256, "train": len(train), "test": len(test),
                   "longer_than_max_tokens": left_out}  # fmt: skip
    unanswered = f", {data.without_answer:,} for want of an answer" if data.without_answer else ""
    print(f"{data.source}: {len(train):,} items to train on, {len(test):,} to ask, "
          f"{left_out:,} left out for more than {recipe.max_tokens} tokens{unanswered}")  # fmt: skip
    return EvalSet(recipe, data.sha256, train, test), description


def open_respondent(runs_dir: Path, name: str, recipe: Recipe, device: torch.device) -> EvaluatedModel:
    """Find a model and check it, before any work is done; raises ConfigError and CheckpointError."""
    run, _, inside = name.partition("/")
    folder = open_run(runs_dir, run)
    config, train = folder.read_configs()
    require_gpt2_ids(config.vocab_size)
    if config.context_length < recipe.max_tokens:
        raise ConfigError(
            f"{folder.model_json}: context_length: found {config.context_length}, wanted at least the recipe's "
            f"max_tokens ({recipe.max_tokens})"
        )
    found = None if inside == UNTRAINED else find_checkpoint(folder, inside, train.initial_weights is not None)

    def opened(weights: Path | None) -> nn.Module:
        model = uninitialized_model(replace(config, drop_rate=recipe.drop_rate))
        if weights is None and found is not None:
            weights = found / MODEL_FILE
        if weights is None:
            give_initial_weights(model, folder, train)
        else:
            load_weights(model, read_weights(weights), weights)
        return model.to(device).eval()

    if found is None:
        # Imported weights have seen tokens too, but nobody here knows how many.
        seen = 0 if train.initial_weights is None else None
        return EvaluatedModel(name, {"sha256": fingerprint(opened(None)), "step": None, "tokens_seen": seen}, opened)
    manifest, step = read_json(found / checkpoint.MANIFEST_FILE), int(found.name.removeprefix("step-"))
    sha256 = manifest["files"][MODEL_FILE]["sha256"]
    return EvaluatedModel(name, {"sha256": sha256, "step": step, **describe_checkpoint(folder, step)}, opened)


def find_checkpoint(folder: RunFolder, inside: str, is_imported: bool) -> Path | None:
    """Give the newest valid checkpoint of a run, or the one named `checkpoints/NAME`.

    None stands for the imported weights of a run that was not trained on from them.
    """
    place, _, name = inside.partition("/")
    if inside and (place != "checkpoints" or not name):
        raise ConfigError(f"RUN: found {folder.path.name}/{inside[:80]}, wanted RUN, RUN/checkpoints/NAME or "
                          f"RUN/{UNTRAINED}")  # fmt: skip
    path = folder.checkpoints / name
    if is_imported and name and path.resolve() == folder.imported.resolve():
        return None
    found = resume.find(folder, name or None)
    if found is None and not is_imported:
        raise CheckpointError(
            f"{folder.checkpoints}: found no checkpoint, wanted a trained run "
            f"(or {folder.path.name}/{UNTRAINED} for its initial weights)"
        )
    return found


def with_progress(words: str, things: Iterable[Any]) -> Iterator[Any]:
    """Show a progress bar on stderr; a log file gets few lines."""
    yield from tqdm(things, desc=words, mininterval=0.5 if sys.stderr.isatty() else 30)


def report(
    arguments: argparse.Namespace, questions: EvalSet, models: list[ModelAnswers], device: torch.device
) -> None:
    """Print the comparison and write results.json."""
    require_comparable(models)
    baseline = models[0].model
    tables = measure(models, baseline, arguments.margin)
    output = arguments.out / "results.json"
    document = {
        "baseline": baseline,
        "recipe_hash": questions.recipe.hash(),
        "data": read_json(arguments.out / "data.json"),
        "seeds": questions.recipe.seeds,
        "margin": arguments.margin,
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
    seeds = len(questions.recipe.seeds)
    print(*aligned(HEADINGS, measures_as_rows(tables)), "", sep="\n")
    for row in tables[LOSS][1:]:
        print(f"{row.model}: {row.sentence}")
    print(
        f"Loss in nats per response token, over {len(questions.test)} items and {seeds} fine-tunings of each model. "
        "Intervals cover other items and other fine-tunings, not other pre-trainings."
    )
    print(f"Wrote {output}; the answers are in {arguments.out / 'answers'}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
