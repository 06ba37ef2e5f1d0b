"""An experiment on disk: an experiment.json, and a run folder for every arm and seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from harness.run.config import ModelConfig, TrainConfig, config_from, require_fitting
from harness.run.errors import ConfigError
from harness.run.files import replace_link, write_json
from harness.run.keys import Part, keys_of
from harness.run.run_folder import RUN_NAME, RunFolder
from harness.run.strict_json import read_strict_json
from study.designs import BASELINE, STACK, Arm, Design, DesignName, Intervention, Word, factorial_arms
from study.looks import RULES, Rule

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
class PlannedLooks:
    """When the experiment is judged while it grows, fixed before its first run."""

    rule: Rule
    seeds: tuple[int, ...]
    """Seeds of every arm after which there is a look."""
    levels: tuple[tuple[float, ...], ...]
    """The p value that an arm's test must stay below at each look: a row for 1, 2, ... arms that are still open."""


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
    looks: PlannedLooks | None = None

    @property
    def first_runs(self) -> dict[str, PlannedRun]:
        """The first run of each arm by the arm's name, in the order in which they run."""
        first: dict[str, PlannedRun] = {}
        for run in self.runs:
            first.setdefault(run.arm, run)
        return first

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in the order in which they first run."""
        return tuple(Arm(name, run.on) for name, run in self.first_runs.items())

    @property
    def compared_with(self) -> str:
        """The arm that the others are compared with: with nothing on, or the stack where that asks more."""
        names = [arm.name for arm in self.arms]
        # Leaving one out asks what the stack loses; a fraction may have no arm with everything off.
        is_from_stack = self.design == "leave-one-out" or BASELINE not in names
        return STACK if is_from_stack and STACK in names else names[0]

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
    documents = documents_of(experiment, runs_dir, run)
    model = config_from(ModelConfig, documents[0], folder.model_json)
    train = config_from(TrainConfig, documents[1], folder.train_json)
    require_fitting(model, train, folder.train_json)
    return model, train


def write_runs(experiment: Experiment, runs_dir: Path) -> Path:
    """Write experiment.json and every run folder, after checking all of them; return experiment.json's path.

    Nothing is overwritten: folders that exist must already hold the same configuration, and an experiment whose looks
    are fixed keeps them. Raises ConfigError.
    """
    target = runs_dir / experiment.name / EXPERIMENT_FILE
    if target.exists() and replace(load_experiment(target), looks=None) != _as_read(experiment):
        raise ConfigError(f"{target}: found another experiment of this name, wanted a new --name")
    write_folders(experiment, experiment.runs, runs_dir)
    if not target.exists():
        save_experiment(experiment, target)
    return target


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Write experiment.json; looks are left out where there are none."""
    document = asdict(experiment)
    if experiment.looks is None:
        del document["looks"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"experiment": document})


def _as_read(experiment: Experiment) -> Experiment:
    """Return the experiment as its file says it, where lists of interventions are what JSON makes of them."""
    return replace(experiment, interventions=json.loads(json.dumps(experiment.interventions)))


def write_folders(experiment: Experiment, runs: Sequence[PlannedRun], runs_dir: Path) -> None:
    """Write the folders of some runs, after checking all of them; raises ConfigError and then has written none."""
    documents: dict[Path, dict[str, Any]] = {}
    problems: list[str] = []
    for run in runs:
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
    _link_imported_weights(experiment, runs, runs_dir)


def _link_imported_weights(experiment: Experiment, runs: Sequence[PlannedRun], runs_dir: Path) -> None:
    """Let all runs of an imported base start from its weights, of which one copy is enough."""
    base = RunFolder(runs_dir / experiment.base)
    for run in runs if base.imported.is_dir() else ():
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
                "looks": _looks_from(found.get("looks")),
            }
        )
        if experiment.design not in get_args(DesignName) or not experiment.runs:
            raise ValueError("no design or no runs")
        _check_runs(experiment)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as an experiment ({error!r})") from None
    return experiment


def _looks_from(found: Mapping[str, Any] | None) -> PlannedLooks | None:
    if found is None:
        return None
    looks = PlannedLooks(found["rule"], tuple(found["seeds"]), tuple(tuple(row) for row in found["levels"]))
    if looks.rule not in RULES or not looks.seeds or sorted(set(looks.seeds)) != list(looks.seeds):
        raise ValueError("looks that are not at growing numbers of seeds")
    return looks


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
