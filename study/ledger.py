"""The noise ledger: how much runs of one recipe differ when nothing but their seeds does.

An entry says which seeds varied, for which recipe, at which scale, on which hardware, and from which runs it came.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from harness.run.errors import ConfigError
from harness.run.files import write_json
from study.statistics import Noise

Component = Literal["init", "order", "dropout", "all", "pairs"]
LEDGER = "noise-ledger.json"
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclass(frozen=True)
class Entry:
    """The noise of one recipe on one kind of hardware, from runs that differ in one component's seeds, or in all.

    Component "pairs" is that of differences from a baseline on shared seeds, over sqrt(2): what is left of the noise
    of one run where seeds cancel.
    """

    component: Component
    recipe: str
    recipe_hash: str
    parameters: int
    train_tokens: int
    hardware: str
    sd: float
    df: int
    runs: tuple[str, ...]

    @property
    def noise(self) -> Noise:
        """The entry's standard deviation, in nats per token."""
        return Noise(self.sd, self.df)


@dataclass(frozen=True)
class Scale:
    """What noise depends on besides the recipe."""

    parameters: int
    train_tokens: int
    hardware: str | None
    """None where it is not known yet, as in a plan."""


def load_ledger(path: Path) -> list[Entry]:
    """Read the ledger; empty where there is none. Raises ConfigError where it cannot be read."""
    if not path.is_file():
        return []
    try:
        entries = [
            Entry(**{**item, "runs": tuple(item["runs"])})
            for item in json.loads(path.read_text(encoding="utf-8"))["entries"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as a noise ledger ({error!r})") from None
    for entry in entries:
        if not all(
            isinstance(value, int | float) for value in (entry.sd, entry.df, entry.parameters, entry.train_tokens)
        ):
            raise ConfigError(f"{path}: found an entry of {entry.recipe} with a number that is none")
        if entry.component not in COMPONENTS or not math.isfinite(entry.sd) or entry.sd < 0 or entry.df < 1:
            raise ConfigError(f"{path}: found an entry of {entry.recipe} without a component, sd and df that can be")
    return entries


def record(path: Path, learned: Sequence[Entry]) -> list[Entry]:
    """Write entries into the ledger in place of those of the same recipe, component and hardware; give them all."""

    def key(entry: Entry) -> tuple[str, str, str]:
        return (entry.recipe_hash, entry.component, entry.hardware)

    replaced = {key(entry) for entry in learned}
    entries = [*(entry for entry in load_ledger(path) if key(entry) not in replaced), *learned]
    write_json(path, {"entries": [asdict(entry) for entry in entries]})
    return entries


def find_noise(entries: Sequence[Entry], recipe_hash: str, scale: Scale) -> tuple[Entry, str] | None:
    """Find the noise that fits best, and say in words what is borrowed, nothing if it is the recipe's own.

    Only entries over all seeds serve: a component alone leaves the others out. Another recipe's noise must be of the
    same scale (parameters and tokens within a factor of two); the closest comes first.
    """
    usable = [entry for entry in entries if entry.component == "all" and entry.sd > 0]
    own = [entry for entry in usable if entry.recipe_hash == recipe_hash]
    if own:
        entry = max(own, key=lambda item: (item.hardware == scale.hardware, item.df))
        other = scale.hardware is not None and entry.hardware != scale.hardware
        return entry, f"borrowed from other hardware ({entry.hardware})" if other else ""

    near = [entry for entry in usable if scale_distance(entry, scale) <= 1]
    if not near:
        return None
    entry = min(near, key=lambda item: (scale_distance(item, scale), -item.df))
    return entry, f"borrowed from another recipe ({entry.recipe})"


def scale_distance(entry: Entry, scale: Scale) -> float:
    """Give how far apart two scales are: the larger of the factors in parameters and in tokens, as a power of two."""
    ratios = (entry.parameters / scale.parameters, entry.train_tokens / scale.train_tokens)
    return max(abs(math.log2(ratio)) for ratio in ratios)
