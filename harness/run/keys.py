"""What a key of a configuration file is, said by the type of its field.

A field's type is `Recipe[...]`, `Execution[...]`, `Seed[...]`, `Interval[...]` or `Report[...]`, inside `Later[...]`
if it came after the first release. No other place lists keys by name.
"""

import functools
from dataclasses import Field, fields
from enum import StrEnum
from typing import Annotated, Any, TypeVar, get_type_hints


class Part(StrEnum):
    """What a key is a part of, which decides what changing it means."""

    RECIPE = "recipe"
    """Decides what is computed: in the recipe's hash, and a resumed run must have it as its checkpoint had."""
    EXECUTION = "execution"
    """How the recipe is carried out: in the recipe's hash, but a resumed run may change it. What must stay of it, as
    the size of the global batch, is in the resume identity by value."""
    SEED = "seed"
    """Tells replicates of one recipe apart."""
    INTERVAL = "interval"
    """When something is saved or measured."""
    REPORT = "report"
    """What only a reader of reports sees."""


class AddedLater:
    """Marks a key that came after the first release. At its default it enters no hash and no identity.

    So a new key leaves the checkpoints, scores and ledgers that users already have as they are.
    """


class Wanted(str):
    """Says in an error what to write, where pydantic's own words would not."""


T = TypeVar("T")
Recipe = Annotated[T, Part.RECIPE]
Execution = Annotated[T, Part.EXECUTION]
Seed = Annotated[T, Part.SEED]
Interval = Annotated[T, Part.INTERVAL]
Report = Annotated[T, Part.REPORT]
Later = Annotated[T, AddedLater()]


def keys_of(config_class: type, *parts: Part) -> list[str]:
    """Return the keys of a file that belong to one of `parts`, in the order of the fields."""
    return [item.name for item in fields(config_class) if part_of(config_class, item.name) in parts]


def part_of(config_class: type, key: str) -> Part:
    """Return the part that a key belongs to."""
    return next(mark for mark in marks_of(config_class)[key] if isinstance(mark, Part))


def changes_nothing(config_class: type, item: Field[Any], value: object) -> bool:
    """Say whether a key came after the first release and has its default, so that it is as if it were not there."""
    return came_later(config_class, item.name) and bool(value == _default(item))


def came_later(config_class: type, key: str) -> bool:
    """Say whether a key came after the first release."""
    return any(isinstance(mark, AddedLater) for mark in marks_of(config_class)[key])


@functools.cache
def marks_of(config_class: type) -> dict[str, tuple[object, ...]]:
    """Return the marks on every field of a file, by its key."""
    return {key: hint.__metadata__ for key, hint in get_type_hints(config_class, include_extras=True).items()}


def _default(item: Field[Any]) -> object:
    return getattr(item.default, "default", item.default)  # pydantic's Field holds the default inside
