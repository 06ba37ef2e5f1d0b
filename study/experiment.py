"""An experiment on disk: a plan.json, and a run folder for every arm and seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from harness.config import (
    SEED_KEYS,
    ModelConfig,
    TrainConfig,
    config_from,
    read_strict_json,
)
from harness.errors import ConfigError
from harness.plan import GIB, STATE_BYTES_PER_PARAMETER, Plan, count_parameters, make_plan, microbatch_gib
from harness.run_folder import IMPORTED, RUN_NAME, RunFolder, replace_link, write_json
from study.designs import Arm, Design, DesignName, Intervention, Word, factorial_arms

FILES = ("model.json", "train.json")
MAX_PLAN_BYTES = 2**22


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    run: str
    arm: str
    on: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class TestSet:
    """The tokens that every run of an experiment is scored on; batches as test_loss.py counts them."""

    start_token: int
    batches: int

    @property
    def sequences(self) -> int:
        """Sequences that are scored; test_loss.py counts 6 a batch."""
        return 6 * self.batches


@dataclass(frozen=True)
class Experiment:
    """What plan.json holds."""

    name: str
    base: str
    design: DesignName
    factors: tuple[str, ...]
    generators: tuple[tuple[int, ...], ...]
    interventions: Mapping[str, Mapping[str, Mapping[str, Any]]]
    seeds: tuple[int, ...]
    test_set: TestSet
    runs: tuple[PlannedRun, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in the order in which they first run."""
        return tuple({run.arm: Arm(run.arm, run.on) for run in self.runs}.values())

    def as_design(self) -> Design:
        """Give the design that the runs were planned by."""
        words: tuple[Word, ...] = tuple(frozenset(word) for word in self.generators)
        return Design(self.design, self.factors, self.arms, words)


def make_experiment(
    name: str,
    base: str,
    design: Design,
    interventions: Sequence[Intervention],
    seeds: Sequence[int],
    test_set: TestSet,
) -> Experiment:
    """Lay out an experiment: all arms with the first seed, then the second, so that stopping early stays fair."""
    runs = [PlannedRun(f"{name}-{arm.name}-s{seed}", arm.name, arm.on, seed) for seed in seeds for arm in design.arms]
    if long := [run.run for run in runs if not RUN_NAME.fullmatch(run.run)]:
        raise ConfigError(
            f"--name: found {long[0][:160]!r} for a run, wanted at most 128 letters, digits, '.', '_', '-'"
        )
    return Experiment(
        name=name,
        base=base,
        design=design.name,
        factors=design.factors,
        generators=tuple(tuple(sorted(word)) for word in design.generators),
        interventions={item.name: {"train": item.train, "model": item.model} for item in interventions},
        seeds=tuple(seeds),
        test_set=test_set,
        runs=tuple(runs),
    )


def documents_of(experiment: Experiment, runs_dir: Path, run: PlannedRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a run's model.json and train.json: the base's, patched by what is on, with the run's seed.

    Raises ConfigError where two interventions that are on set one key to different values.
    """
    documents = {
        "model": read_strict_json(runs_dir / experiment.base / "model.json"),
        "train": read_strict_json(runs_dir / experiment.base / "train.json"),
    }
    for key in SEED_KEYS:
        documents["train"].pop(key, None)
    set_by: dict[tuple[str, str], str] = dict.fromkeys((("train", key) for key in SEED_KEYS), "the plan's seeds")
    for name in run.on:
        for part, patch in experiment.interventions[name].items():
            for key, value in patch.items():
                other = set_by.setdefault((part, key), name)
                if other != name and documents[part].get(key) != value:
                    raise ConfigError(f"{part}.json: {key}: found set by both {other} and {name}, wanted one of them")
                documents[part][key] = value
    documents["train"]["random_seed"] = run.seed
    what = " + ".join(run.on) or "nothing changed"
    documents["train"]["notes"] = f"{experiment.name}, {experiment.design}: {what}; seed {run.seed}"
    return documents["model"], documents["train"]


def write_runs(experiment: Experiment, runs_dir: Path) -> Path:
    """Write plan.json and every run folder, after checking all of them; gives plan.json's path.

    Nothing is overwritten: folders that exist must already hold the same configuration. Raises ConfigError.
    """
    documents = {run.run: documents_of(experiment, runs_dir, run) for run in experiment.runs}
    target = plan_path(runs_dir, experiment.name)
    text = {"plan": asdict(experiment)}
    if target.exists() and read_strict_json(target, MAX_PLAN_BYTES) != json.loads(json.dumps(text)):
        raise ConfigError(f"{target}: found another plan of this name, wanted a new --name")
    problems = []
    for name, pair in documents.items():
        for file, value, config_class in zip(FILES, pair, (ModelConfig, TrainConfig), strict=True):
            path = runs_dir / name / file
            if path.exists() and read_strict_json(path) != value:
                problems.append(f"{path}: found another configuration, wanted a new --name")
            try:
                config_from(config_class, value, path)
            except ConfigError as error:
                problems += error.lines
    if problems:
        raise ConfigError(*problems)
    for name, pair in documents.items():
        (runs_dir / name).mkdir(parents=True, exist_ok=True)
        for file, value in zip(FILES, pair, strict=True):
            write_json(runs_dir / name / file, value)
        # Runs of an imported base start from its weights, of which one copy is enough.
        if RunFolder(runs_dir / experiment.base).imported.is_dir() and name != experiment.base:
            replace_link(runs_dir / name / IMPORTED, f"../{experiment.base}/{IMPORTED}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, text)
    return target


def plan_path(runs_dir: Path, name: str) -> Path:
    """Give where an experiment's plan lies."""
    return runs_dir / name / "plan.json"


def load_experiment(path: Path) -> Experiment:
    """Read a plan.json; raises ConfigError."""
    document = read_strict_json(path, MAX_PLAN_BYTES)
    try:
        plan = document["plan"]
        experiment = Experiment(
            **{
                **plan,
                "factors": tuple(plan["factors"]),
                "generators": tuple(tuple(word) for word in plan["generators"]),
                "seeds": tuple(plan["seeds"]),
                "test_set": TestSet(**plan["test_set"]),
                "runs": tuple(PlannedRun(**{**run, "on": tuple(run["on"])}) for run in plan["runs"]),
            }
        )
        if experiment.design not in get_args(DesignName) or not experiment.runs:
            raise ValueError("no design or no runs")
        _check_runs(experiment)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a plan ({error!r}), wanted one of plan_runs.py") from None
    return experiment


def _check_runs(experiment: Experiment) -> None:
    """Raise ValueError where a plan's runs are not those of its design: its effects would be nonsense."""
    names = [run.run for run in experiment.runs]
    if not all(isinstance(value, str) for run in experiment.runs for value in (run.run, run.arm, *run.on)):
        raise ValueError("a run, an arm or an intervention that is not a name")
    if len(set(names)) < len(names):
        raise ValueError("a run appears twice")
    if any(not set(run.on) <= set(experiment.factors) for run in experiment.runs):
        raise ValueError("an intervention that is not one of the factors")
    design = experiment.as_design()
    if design.is_factorial and set(factorial_arms(design.factors, design.generators)) != set(design.arms):
        raise ValueError("arms that are not those of the design")


@dataclass(frozen=True)
class Budget:
    """What one run of an experiment takes; hours and price are None where speed or price are not known."""

    plan: Plan
    parameters: int
    tokens_per_second: float | None
    price_per_hour: float | None
    currency: str
    peak_gib: float

    def hours(self, runs: int) -> float | None:
        """Give hours of the whole machine for so many runs, one after the other."""
        if self.tokens_per_second is None:
            return None
        return runs * self.plan.train_tokens / self.tokens_per_second / 3600

    def cost(self, runs: int) -> float | None:
        """Give the price of so many runs."""
        hours = self.hours(runs)
        return None if hours is None or self.price_per_hour is None else hours * self.price_per_hour


def budget_of(base: RunFolder, model: ModelConfig, train: TrainConfig, world_size: int) -> Budget:
    """Work out what one run of the base takes; the speed is the base's own, measured or else as configured."""
    plan = make_plan(model, train, world_size)
    parameters = count_parameters(model).total
    lines = base.read_metrics()
    measured = lines[-1]["tokens"] / lines[-1]["elapsed"] if lines and lines[-1]["elapsed"] else None
    return Budget(
        plan=plan,
        parameters=parameters,
        tokens_per_second=measured or train.expected_tokens_per_second,
        price_per_hour=train.price_per_hour,
        currency=train.currency or "",
        peak_gib=parameters * STATE_BYTES_PER_PARAMETER / GIB + microbatch_gib(model, train),
    )
