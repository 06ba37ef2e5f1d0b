"""What a start of a run must share with a checkpoint to resume from it, and what it may change."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from harness.engine.schedules import SCHEDULES
from harness.run.config import CONFIG_FILES, ModelConfig, TrainConfig
from harness.run.keys import changes_nothing
from harness.run.plan import Plan
from harness.run.recipe import must_match

DATA_FINGERPRINT = "data_fingerprint"


@dataclass(frozen=True)
class Difference:
    """One thing in which a start and a checkpoint differ."""

    key: str
    found: object
    wanted: object
    """What the checkpoint has."""
    is_data: bool
    """Whether it is about the dataset and not the configuration."""


@dataclass(frozen=True)
class ResumeIdentity:
    """All that decides whether a checkpoint is one of this run."""

    must_match: dict[str, object]
    """Keys of the recipe, the seeds, the size of the global batch and a fingerprint of the data: must be equal."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the tokens that were read through, by their place; must be equal where both have the place."""
    batch_split: dict[str, int] = field(default_factory=dict)
    """How the global batch is split over processes and accumulation steps; may change."""

    def differences_from(self, checkpoint: "ResumeIdentity") -> Iterator[Difference]:
        """Yield what differs: keys first, then data.

        A key that the checkpoint does not know, or names although it was unused, is left out on both sides.
        """
        before = {key: value for key, value in checkpoint.must_match.items() if not _is_unused(key, value)}
        for key in sorted(self.must_match.keys() | before.keys()):
            if self.must_match.get(key) != before.get(key):
                yield Difference(key, self.must_match.get(key), before.get(key), key == DATA_FINGERPRINT)
        for place in sorted(self.data.keys() & checkpoint.data.keys()):
            if self.data[place] != checkpoint.data[place]:
                yield Difference(f"SHA-256 of {place}", self.data[place], checkpoint.data[place], is_data=True)


def identity_of(
    model: ModelConfig, train: TrainConfig, plan: Plan, data_fingerprint: str, data: dict[str, str]
) -> ResumeIdentity:
    """Return a run's identity; the number of steps is in it only where the schedule depends on that."""
    length = {"global_steps": plan.global_steps} if SCHEDULES[train.schedule_name] else {}
    kept: dict[str, Any] = {**must_match(model, train), "global_batch": plan.global_batch, **length}
    return ResumeIdentity({**kept, DATA_FINGERPRINT: data_fingerprint}, data, plan.batch_split())


def _is_unused(key: str, value: object) -> bool:
    return any(
        item.name == key and changes_nothing(config_class, item, value)
        for config_class in CONFIG_FILES.values()
        for item in fields(config_class)
    )
