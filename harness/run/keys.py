"""The part of the configuration that a key belongs to, given by the type of its field.

A field's type is `Recipe[...]`, `Execution[...]`, `Seed[...]`, `Interval[...]` or `Report[...]`, inside `Later[...]`
if the key came after the first release. No other code lists keys by name.
"""

import functools
from dataclasses import Field, fields
from enum import StrEnum
from typing import Annotated, Any, TypeVar, get_type_hints


class Part(StrEnum):
    """The parts of the configuration; they decide what changing a key means."""

    RECIPE = "recipe"
    """Decides what is computed. In the recipe's hash, and a resumed run must have the value of its checkpoint."""
    EXECUTION = "execution"
    """Decides how the recipe is carried out. In the recipe's hash, but a resumed run may change it; what it must not
    change, such as the global batch, is in the resume identity separately."""
    SEED = "seed"
    """Tells replicates of one recipe apart."""
    INTERVAL = "interval"
    """Decides when something is saved or measured."""
    REPORT = "report"
    """Changes nothing but what reports and loggers show."""


class AddedLater:
    """Marks a key that came after the first release; at its default it is left out of all hashes and identities.

    So a new key does not invalidate existing checkpoints, scores and ledgers.
    """


class Wanted(str):
    """What an error says that it wanted, where pydantic's own message is unclear."""


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
    """Return whether a key came after the first release and has its default, so that it counts as absent."""
    return came_later(config_class, item.name) and bool(value == _default(item))


def came_later(config_class: type, key: str) -> bool:
    """Return whether a key came after the first release."""
    return any(isinstance(mark, AddedLater) for mark in marks_of(config_class)[key])


@functools.cache
def marks_of(config_class: type) -> dict[str, tuple[object, ...]]:
    """Return the marks of every field of a file, by key."""
    return {key: hint.__metadata__ for key, hint in get_type_hints(config_class, include_extras=True).items()}


def _default(item: Field[Any]) -> object:
    return getattr(item.default, "default", item.default)  # pydantic's Field holds the default inside
