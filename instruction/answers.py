"""The file of one model's answers: what `instruct.py respond` writes and `instruct.py judge` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.run.config import STRICT
from harness.run.errors import ConfigError, DataError


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Answer:
    """One model's answer to one item after one fine-tuning."""

    item: str = Field(min_length=1, max_length=64)
    """Key of the item."""
    seed: int
    """Of the fine-tuning."""
    instruction: str
    input: str
    reference: str
    answer: str
    answer_tokens: int = Field(ge=0)
    """Without the document end."""
    ended: bool
    """Whether the model ended the answer by itself."""
    reference_nats: float
    """Summed cross-entropy of the reference's tokens and the document end."""
    reference_tokens: int = Field(gt=0)
    """Their number."""
    token_f1: float = Field(ge=0, le=1)
    exact_match: float = Field(ge=0, le=1)

    @property
    def cell(self) -> tuple[str, int]:
        """The item and the seed."""
        return self.item, self.seed


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelAnswers:
    """All answers of one model, with what they rest on."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)
    """As `instruct.py respond` was told."""
    checkpoint: dict[str, Any]
    """Which weights: SHA-256, step, tokens seen."""
    recipe_hash: str
    data_sha256: str
    answers: list[Answer] = Field(min_length=1)


FILE = TypeAdapter(ModelAnswers)


def load_answers(path: Path) -> ModelAnswers:
    """Read a file of answers; raises DataError with the first thing that is wrong."""
    try:
        answers = FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: found no such file, wanted answers that instruct.py respond wrote") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path}: {place}: {first['msg']}; wanted answers that instruct.py respond wrote") from None
    if len({answer.cell for answer in answers.answers}) < len(answers.answers):
        raise DataError(f"{path}: found an item twice with one seed, wanted each once")
    return answers


def require_comparable(models: Sequence[ModelAnswers]) -> None:
    """Raise ConfigError where models were fine-tuned or asked in different ways, or one is there twice."""
    first, *others = models
    names = [model.model for model in models]
    problems = [f"{name}: found twice, wanted each model once" for name in set(names) if names.count(name) > 1]
    asked = {answer.cell: (answer.instruction, answer.input, answer.reference) for answer in first.answers}
    for other in others:
        for key, wanted in (("recipe_hash", "recipe"), ("data_sha256", "instructions")):
            if getattr(other, key) != getattr(first, key):
                problems.append(f"{other.model} and {first.model}: found other {wanted}, wanted the same for all")
        theirs = {answer.cell: (answer.instruction, answer.input, answer.reference) for answer in other.answers}
        if theirs != asked:
            problems.append(f"{other.model} and {first.model}: found other items or seeds, wanted the same for all")
    if problems:
        raise ConfigError(*problems)
