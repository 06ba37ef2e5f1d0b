"""What each arm of an experiment takes, from that arm's own configuration; and what `compare` would refuse later."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.engine.costs import RunCost, cost_of
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError
from harness.run.plan import make_plan
from harness.run.run_folder import RunFolder
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
    first = {run.arm: run for run in reversed(experiment.runs)}
    costs = {}
    for arm in experiment.arms:
        model, train = configs_of(experiment, runs_dir, first[arm.name])
        costs[arm.name] = _cost(base_configs, measured, model, train, world_size)
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


def refuse_incomparable(experiment: Experiment, runs_dir: Path, bill: Bill) -> None:
    """Raise ConfigError, a line for each arm, for what `compare` would refuse once the money is spent.

    Other tokens trained than the first arm's, unless a change of min_train_tokens asks for them; or another test set:
    another dataset, or sequences or ids of other sizes. Another dataset with other ids is taken for the same text in
    another tokenizer.
    """
    first = {run.arm: run for run in reversed(experiment.runs)}
    names = [arm.name for arm in experiment.arms]
    model, train = configs_of(experiment, runs_dir, first[names[0]])
    tokens = bill.arms[names[0]].plan.train_tokens
    test_set = (train.scored_dataset, train.datasets[0].revision, model.context_length, model.vocab_size)
    keys = ("dataset", "dataset_revision", "context_length", "vocab_size")
    problems = []
    for name in names[1:]:
        other, other_train = configs_of(experiment, runs_dir, first[name])
        theirs = bill.arms[name].plan.train_tokens
        if other_train.scored_dataset != train.scored_dataset and other.vocab_size != model.vocab_size:
            continue  # as much text may be other tokens; judged in bits per byte
        if theirs != tokens and other_train.min_train_tokens == train.min_train_tokens:
            problems.append(
                f"{name}: would train on {theirs:,} tokens and {names[0]} on {tokens:,}; wanted the same, so "
                "that a difference is the change's, or min_train_tokens among its changes"
            )
        scored = (
            other_train.scored_dataset,
            other_train.datasets[0].revision,
            other.context_length,
            other.vocab_size,
        )
        problems += [
            f"{name}: {key}: found {value}, wanted {names[0]}'s {wanted}, since all arms are scored on one test set"
            for key, value, wanted in zip(keys, scored, test_set, strict=True)
            if value != wanted
        ]
    if problems:
        raise ConfigError(*problems)
