"""The recipe and its hashes, which identify replicates, and what a resumed run must share with its checkpoint.

All follow one rule: the part of a key decides whether it counts, and a key that came after the first release does not
count while it has its default.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields

from harness.run.config import ModelConfig, TrainConfig
from harness.run.keys import Part, changes_nothing, part_of


def recipe(model: ModelConfig, train: TrainConfig) -> dict[str, object]:
    """Return the recipe: the keys of both files except seeds, intervals and what only reports show."""
    return dict(_chosen(model, train, Part.RECIPE, Part.EXECUTION))


def must_match(model: ModelConfig, train: TrainConfig) -> dict[str, object]:
    """Return the keys whose values a resumed run must share with its checkpoint, without unused later keys."""
    return dict(_chosen(model, train, Part.RECIPE, leave_out_unused=True)) | dict(train.seeds())


def recipe_hash(model: ModelConfig, train: TrainConfig) -> str:
    """Return the SHA-256 (hex) of the recipe; runs that share it are replicates."""
    return hash_of_json(_identifying(model, train))


def run_hash(model: ModelConfig, train: TrainConfig) -> str:
    """Return the SHA-256 (hex) of the recipe and seeds; runs that share it compute the same."""
    return hash_of_json({**_identifying(model, train), **train.seeds()})


def _identifying(model: ModelConfig, train: TrainConfig) -> dict[str, object]:
    return dict(_chosen(model, train, Part.RECIPE, Part.EXECUTION, leave_out_unused=True))


def _chosen(
    model: ModelConfig, train: TrainConfig, *parts: Part, leave_out_unused: bool = False
) -> Iterator[tuple[str, object]]:
    for config in (model, train):
        values = asdict(config)
        for item in fields(config):
            is_unused = changes_nothing(type(config), item, getattr(config, item.name))
            if part_of(type(config), item.name) in parts and not (leave_out_unused and is_unused):
                value = values[item.name]
                yield item.name, list(value) if isinstance(value, tuple) else value  # as JSON has it


def hash_of_json(value: object) -> str:
    """Return the SHA-256 (hex) of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
