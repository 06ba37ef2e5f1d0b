"""An experiment on disk: an experiment.json, and a run folder for every arm and seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from harness.engine.costs import RunCost, cost_of
from harness.run.config import ModelConfig, TrainConfig, config_from
from harness.run.errors import ConfigError
from harness.run.files import replace_link, write_json
from harness.run.keys import Part, keys_of
from harness.run.plan import make_plan
from harness.run.run_folder import RUN_NAME, RunFolder
from harness.run.strict_json import read_strict_json
from study.designs import Arm, Design, DesignName, Intervention, Word, factorial_arms

EXPERIMENT_FILE, EARLIER_FILE = "experiment.json", "plan.json"
MAX_EXPERIMENT_BYTES = 2**22


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
    """What experiment.json holds."""

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
        """Return the design that the runs were planned by."""
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
    """Return a run's model.json and train.json: the base's, patched by what is on, with the run's seed.

    Raises ConfigError where two interventions that are on set one key to different values.
    """
    base = RunFolder(runs_dir / experiment.base)
    documents = {"model": read_strict_json(base.model_json), "train": read_strict_json(base.train_json)}
    seed_keys = keys_of(TrainConfig, Part.SEED)
    for key in seed_keys:
        documents["train"].pop(key, None)
    set_by = {("train", key): "the experiment's seeds" for key in seed_keys}
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


def configs_of(experiment: Experiment, runs_dir: Path, run: PlannedRun) -> tuple[ModelConfig, TrainConfig]:
    """Return a run's configuration, validated; raises ConfigError with every error in it."""
    folder = RunFolder(runs_dir / run.run)
    model, train = documents_of(experiment, runs_dir, run)
    return config_from(ModelConfig, model, folder.model_json), config_from(TrainConfig, train, folder.train_json)


def write_runs(experiment: Experiment, runs_dir: Path) -> Path:
    """Write experiment.json and every run folder, after checking all of them; return experiment.json's path.

    Nothing is overwritten: folders that exist must already hold the same configuration. Raises ConfigError.
    """
    target = runs_dir / experiment.name / EXPERIMENT_FILE
    document = {"experiment": asdict(experiment)}
    if target.exists() and read_strict_json(target, MAX_EXPERIMENT_BYTES) != json.loads(json.dumps(document)):
        raise ConfigError(f"{target}: found another experiment of this name, wanted a new --name")
    documents: dict[Path, dict[str, Any]] = {}
    problems: list[str] = []
    for run in experiment.runs:
        folder = RunFolder(runs_dir / run.run)
        pair = zip((folder.model_json, folder.train_json), documents_of(experiment, runs_dir, run), strict=True)
        documents.update(pair)
        try:
            configs_of(experiment, runs_dir, run)
        except ConfigError as error:
            problems += error.lines
    problems += [
        f"{path}: found another configuration, wanted a new --name"
        for path, value in documents.items()
        if path.exists() and read_strict_json(path) != value
    ]
    if problems:
        raise ConfigError(*problems)
    for path, value in documents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    _link_imported_weights(experiment, runs_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, document)
    return target


def _link_imported_weights(experiment: Experiment, runs_dir: Path) -> None:
    """Let all runs of an imported base start from its weights, of which one copy is enough."""
    base = RunFolder(runs_dir / experiment.base)
    for run in experiment.runs if base.imported.is_dir() else ():
        if run.run != experiment.base:
            replace_link(RunFolder(runs_dir / run.run).imported, f"../{experiment.base}/{base.imported.name}")


def find_experiment(runs_dir: Path, name: str) -> Path:
    """Find an experiment's file by its name in `runs_dir`, or by the path of its folder or file; raises ConfigError.

    What earlier versions wrote as plan.json is an experiment too.
    """
    for place in (runs_dir / name, Path(name)):
        for path in (place / EXPERIMENT_FILE, place / EARLIER_FILE, place):
            if path.is_file():
                return path
    raise ConfigError(f"EXPERIMENT: found no {runs_dir / name / EXPERIMENT_FILE}, wanted what `plan` has written")


def load_experiment(path: Path) -> Experiment:
    """Read an experiment; raises ConfigError."""
    document = read_strict_json(path, MAX_EXPERIMENT_BYTES)
    try:
        found = document["experiment"] if "experiment" in document else document["plan"]
        experiment = Experiment(
            **{
                **found,
                "factors": tuple(found["factors"]),
                "generators": tuple(tuple(word) for word in found["generators"]),
                "seeds": tuple(found["seeds"]),
                "test_set": TestSet(**found["test_set"]),
                "runs": tuple(PlannedRun(**{**run, "on": tuple(run["on"])}) for run in found["runs"]),
            }
        )
        if experiment.design not in get_args(DesignName) or not experiment.runs:
            raise ValueError("no design or no runs")
        _check_runs(experiment)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as an experiment ({error!r})") from None
    return experiment


def _check_runs(experiment: Experiment) -> None:
    """Raise ValueError where an experiment's runs are not those of its design: its effects would be nonsense."""
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


def cost_of_base(base: RunFolder, model: ModelConfig, train: TrainConfig, world_size: int) -> RunCost:
    """Return what one run of the base takes; the speed is the base's own, measured or else as configured."""
    return cost_of(model, train, make_plan(model, train, world_size), base.metrics.tokens_per_second())
