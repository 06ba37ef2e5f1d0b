"""What each arm of an experiment takes, from that arm's own configuration; and what `compare` would refuse later."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.engine.costs import RunCost, cost_of
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError
from harness.run.plan import make_plan
from harness.run.run_folder import RunFolder
from harness.tokens.token_files import TokenFile, open_split, split_files
from harness.tokens.tokenizer import tokenizer_of_tokens
from study.experiment import Experiment, configs_of


@dataclass(frozen=True)
class Bill:
    """What an experiment takes, arm by arm; hours and money are None where one arm's are unknown."""

    arms: Mapping[str, RunCost]
    seeds: int

    @property
    def runs(self) -> int:
        """Runs of the whole experiment."""
        return len(self.arms) * self.seeds

    @property
    def tokens(self) -> int:
        """Trained tokens of the whole experiment."""
        return self.seeds * sum(cost.plan.train_tokens for cost in self.arms.values())

    @property
    def hours(self) -> float | None:
        """Hours of the whole machine, one run after another."""
        return self._total([cost.hours for cost in self.arms.values()])

    @property
    def money(self) -> float | None:
        """Price of the experiment, in its currency."""
        return self._total([cost.money for cost in self.arms.values()])

    def _total(self, values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return self.seeds * sum(known) if len(known) == len(values) else None


def bill_of(experiment: Experiment, runs_dir: Path, world_size: int) -> Bill:
    """Price every arm of an experiment by what that arm is; raises ConfigError.

    The speed is the base's, measured or else as its train.json expects it, divided by how many more operations the
    arm's model takes for a token; an arm that sets expected_tokens_per_second is believed.
    """
    base = RunFolder(runs_dir / experiment.base)
    base_configs = base.read_configs()
    measured = base.metrics.tokens_per_second()
    costs = {}
    for arm, run in experiment.first_runs.items():
        model, train = configs_of(experiment, runs_dir, run)
        costs[arm] = _cost(base_configs, measured, model, train, world_size)
    return Bill(costs, len(experiment.seeds))


def _cost(
    base: tuple[ModelConfig, TrainConfig],
    measured: float | None,
    model: ModelConfig,
    train: TrainConfig,
    world_size: int,
) -> RunCost:
    plan = make_plan(model, train, world_size)
    own = train.expected_tokens_per_second
    of_base = measured or base[1].expected_tokens_per_second
    is_own = own is not None and own != base[1].expected_tokens_per_second
    if is_own or of_base is None:
        return cost_of(model, train, plan, own)
    ratio = cost_of(base[0], train, plan).flops_per_token / cost_of(model, train, plan).flops_per_token
    return cost_of(model, train, plan, of_base * ratio)


@dataclass(frozen=True)
class ArmText:
    """How much text an arm is to train on and what it will be scored on, as far as that is known before it runs."""

    min_train_tokens: int
    dataset: str
    dataset_revision: str | None
    context_length: int
    vocab_size: int
    tokenizer: str | None
    """What identifies the dataset's tokenizer; None where the dataset is not here or does not say."""
    bytes_per_token: float | None
    """Of the held-out text; None where it is not known."""

    def is_otherwise_tokenized(self, other: "ArmText") -> bool:
        """Say whether this may be the other's text in another tokenizer; one that is not known goes by its ids."""
        if self.dataset == other.dataset:
            return False
        if self.tokenizer is None or other.tokenizer is None:
            return self.vocab_size != other.vocab_size
        return self.tokenizer != other.tokenizer


def texts_of(experiment: Experiment, runs_dir: Path, datasets_dir: Path) -> dict[str, ArmText]:
    """Return each arm's text by its name, the first arm's first; raises ConfigError or DataError."""
    found = {}
    for arm, run in experiment.first_runs.items():
        model, train = configs_of(experiment, runs_dir, run)
        name, revision = train.scored_dataset, train.datasets[0].revision
        known: tuple[str | None, float | None] = (None, None)
        if split_files(datasets_dir / name, "validation"):
            known = _tokenizer_of(open_split(datasets_dir, name, "validation"))
        found[arm] = ArmText(train.min_train_tokens, name, revision, model.context_length, model.vocab_size, *known)
    return found


def _tokenizer_of(file: TokenFile) -> tuple[str | None, float | None]:
    tokenizer, text_bytes = tokenizer_of_tokens(file), file.metadata.get("bytes", "")
    identity = None if tokenizer is None else tokenizer.identity
    return identity, int(text_bytes) / file.length if text_bytes.isdecimal() else None


def refuse_incomparable(texts: Mapping[str, ArmText], bill: Bill) -> None:
    """Raise ConfigError, a line for each arm, for what `compare` would refuse once the money is spent.

    Other tokens trained than the first arm's, unless a change of min_train_tokens asks for them; or another test set:
    another dataset, or sequences or ids of other sizes. Another dataset in another tokenizer is taken for the same
    text.
    """
    (first, wanted), *others = texts.items()
    tokens = bill.arms[first].plan.train_tokens
    problems = []
    for name, found in others:
        if found.is_otherwise_tokenized(wanted):
            continue  # as much text may be other tokens; judged in bits per byte
        theirs = bill.arms[name].plan.train_tokens
        if theirs != tokens and found.min_train_tokens == wanted.min_train_tokens:
            problems.append(
                f"{name}: would train on {theirs:,} tokens and {first} on {tokens:,}; wanted the same, so "
                "that a difference is the change's, or min_train_tokens among its changes"
            )
        problems += [
            f"{name}: {key}: found {getattr(found, key)}, wanted {first}'s {getattr(wanted, key)}, since all arms "
            "are scored on one test set"
            for key in ("dataset", "dataset_revision", "context_length", "vocab_size")
            if getattr(found, key) != getattr(wanted, key)
        ]
    if problems:
        raise ConfigError(*problems)
