"""Fine-tune one model once for each seed and collect its answers, going on where a kill interrupted it.

What is under way lies in OUT/partial: the fine-tuned weights of the current seed, and the answers so far. It goes
when the model's file of answers is written.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.engine.checkpoint import save_tensors
from harness.run.errors import ConfigError
from harness.run.files import write_json
from harness.tokens.tokenizer import Tokenizer
from instruction.answers import Answer, ModelAnswers, load_answers
from instruction.examples import Example, in_batches
from instruction.finetune import fine_tune, response_losses
from instruction.generation import write_answers
from instruction.journal import Journal
from instruction.measures import exact_match, token_f1
from instruction.recipe import Recipe

ShowProgress = Callable[[str, Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to fine-tune and ask; `open` gives it fresh, on its device, with the recipe's dropout.

    `open` takes the file to read the weights from, or None for those of the checkpoint.
    """

    label: str
    checkpoint: dict[str, Any]
    open: Callable[[Path | None], nn.Module]

    @property
    def file_stem(self) -> str:
        """The label as a file's name."""
        return self.label.replace("/checkpoints/", "@").replace("/", "@")


@dataclass(frozen=True)
class EvalSet:
    """What every model of an evaluation gets: the recipe, and examples to train on and to ask."""

    recipe: Recipe
    tokenizer: Tokenizer
    data_sha256: str
    train: Sequence[Example]
    test: Sequence[Example]


def respond(model: EvaluatedModel, eval_set: EvalSet, out: Path, progress: ShowProgress) -> ModelAnswers:
    """Fine-tune and ask one model on every seed, and write OUT/answers/LABEL.json; what is there is not done again.

    `progress(label, things)` wraps an iterable in a progress bar. Raises ConfigError where the folder
    holds answers of other weights, and what fine-tuning raises.
    """
    path = out / "answers" / f"{model.file_stem}.json"
    identity: dict[str, Any] = {
        "model": model.label,
        "checkpoint": model.checkpoint,
        "recipe_hash": eval_set.recipe.hash(),
        "data_sha256": eval_set.data_sha256,
    }
    if path.is_file():
        found = load_answers(path)
        _require_same({key: getattr(found, key) for key in identity}, identity, path)
        return found
    partial = out / "partial"
    partial.mkdir(exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    answers = []
    for seed in eval_set.recipe.seeds:
        answers += _respond_once(model, eval_set, seed, identity, partial, progress)
    whole = ModelAnswers(**identity, answers=answers)
    write_json(path, asdict(whole))
    for seed in eval_set.recipe.seeds:
        for left in _files(model, seed, partial):
            left.unlink(missing_ok=True)
    return whole


def _files(model: EvaluatedModel, seed: int, partial: Path) -> tuple[Path, Path]:
    """Return the files of one seed: its answers so far, and its fine-tuned weights."""
    stem = partial / f"{model.file_stem}-seed-{seed}"
    return stem.with_name(f"{stem.name}.jsonl"), stem.with_name(f"{stem.name}.safetensors")


def _require_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    if other := [key for key, value in wanted.items() if found.get(key) != value]:
        raise ConfigError(
            f"{path}: found answers with another {' and '.join(other)} than those of this command, "
            "wanted the same (or another --out)"
        )


def _respond_once(
    model: EvaluatedModel, eval_set: EvalSet, seed: int, identity: dict[str, Any], partial: Path,
    progress: ShowProgress,
) -> list[Answer]:  # fmt: skip
    """Return the answers of one seed, fine-tuning and asking only for those that are not on disk."""
    journal_file, weights = _files(model, seed, partial)
    with closing(Journal(journal_file)) as journal:
        if journal.lines:
            _require_same(journal.lines[0], identity, journal_file)
        else:
            journal.append(identity)
        done = {line["item"]: line for line in journal.lines[1:]}
        # Whole batches are asked again: rounding depends on what else is in a batch.
        batches = list(in_batches(eval_set.test, eval_set.recipe))
        missing = [batch for batch in batches if any(example.item.key not in done for example in batch)]
        if missing:
            tuned = _fine_tuned(model, eval_set, seed, weights, progress)
            for batch in progress(f"{model.label} seed {seed}: answering", missing):
                for answer in ask(tuned, batch, eval_set, seed):
                    if answer.item not in done:
                        journal.append(asdict(answer))
                        done[answer.item] = asdict(answer)
            weights.unlink(missing_ok=True)
    return [Answer(**done[example.item.key]) for example in eval_set.test]


def _fine_tuned(
    model: EvaluatedModel, eval_set: EvalSet, seed: int, weights: Path, progress: ShowProgress
) -> nn.Module:
    """Return the model fine-tuned with one seed, read from disk where an earlier start finished that."""
    if weights.is_file():
        return model.open(weights)
    tuned = model.open(None)
    words = f"{model.label} seed {seed}: fine-tuning"
    fine_tune(tuned, eval_set.train, eval_set.recipe, seed, lambda steps: progress(words, steps))
    temporary = weights.with_name(f".{weights.name}.{os.getpid()}.tmp")
    try:
        save_tensors(tuned.state_dict(), temporary)
        temporary.replace(weights)
    finally:
        temporary.unlink(missing_ok=True)
    return tuned


@torch.no_grad()
def ask(model: nn.Module, batch: Sequence[Example], eval_set: EvalSet, seed: int) -> list[Answer]:
    """Return a fine-tuned model's answers to one batch, with the loss of the references and the scores."""
    losses = response_losses(model, batch).tolist()  # waits for the device
    prompts, tokenizer = [example.prompt for example in batch], eval_set.tokenizer
    written = write_answers(model, tokenizer, prompts, eval_set.recipe.max_tokens)
    texts = [tokenizer.decode(answer.tokens) for answer in written]
    return [
        Answer(
            item=example.item.key,
            seed=seed,
            instruction=example.item.instruction,
            input=example.item.input,
            reference=example.item.output,
            answer=text,
            answer_tokens=len(answer.tokens),
            ended=answer.ended,
            reference_nats=loss,
            reference_tokens=len(example.response),
            token_f1=token_f1(text, example.item.output),
            exact_match=exact_match(text, example.item.output),
        )
        for example, loss, answer, text in zip(batch, losses, written, texts, strict=True)
    ]
