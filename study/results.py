"""What runs came to: test losses with their metadata, from run folders or from a table of numbers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.run.errors import ConfigError
from harness.run.model_size import count_parameters
from harness.run.provenance import RunRecord
from harness.run.recipe import recipe, recipe_hash, run_hash
from harness.run.run_folder import IMPORTED_STEP, STEP_FOLDER, RunFolder
from harness.run.score import Score
from harness.run.status import Status
from study.experiment import Experiment
from study.measures import NATS, Measured, measure
from study.statistics import Floats

CheckpointRule = Literal["last", "best", "averaged"]


@dataclass(frozen=True)
class RunMetadata:
    """What a run folder knows besides the loss."""

    recipe: dict[str, object]
    recipe_hash: str
    parameters: int
    step: int
    tokens_seen: int
    hardware: str
    decays: bool
    """Whether the learning rate is low at the end."""
    tokens_per_second: float | None
    cost: float | None
    currency: str
    tokenizer: str | None
    measured: Measured
    curve: tuple[Floats, Floats]
    """Tokens and train loss of every global step."""
    samples: tuple[tuple[int, str], ...]
    """Texts sampled while training, by global step."""

    @property
    def text_seen(self) -> float | None:
        """Bytes of text trained on, if it is like the test documents; known where tokenizers are compared."""
        per_token = self.measured.bytes_per_token
        return None if per_token is None else self.tokens_seen * per_token


@dataclass(frozen=True)
class Result:
    """One run's test loss, in nats per token or what its metadata says; None where training diverged."""

    run: str
    recipe: str
    init_seed: str
    train_seed: str
    loss: float | None
    metadata: RunMetadata | None = None

    @property
    def seeds(self) -> tuple[str, str]:
        """The block that the run belongs to."""
        return self.init_seed, self.train_seed


@dataclass(frozen=True)
class Group:
    """The replicates of one recipe."""

    recipe: str
    results: tuple[Result, ...]

    @property
    def losses(self) -> list[float]:
        """The test losses of the runs that did not diverge."""
        return [result.loss for result in self.results if result.loss is not None]

    @property
    def diverged(self) -> list[str]:
        """The runs that diverged."""
        return [result.run for result in self.results if result.loss is None]

    @property
    def metadata(self) -> list[RunMetadata]:
        """What is known of the runs that lie in folders."""
        return [result.metadata for result in self.results if result.metadata is not None]

    @property
    def unit(self) -> str:
        """The unit of its losses."""
        return self.metadata[0].measured.unit if self.metadata else NATS

    def mean_parts(self) -> Floats | None:
        """Return every test part's loss averaged over the runs that have a loss; None where one has none."""
        if len(self.metadata) < len(self.losses) or not self.metadata:
            return None
        mean: Floats = np.mean([item.measured.parts for item in self.metadata], axis=0)
        return mean


def scores_of(folder: RunFolder, rule: CheckpointRule) -> list[Score]:
    """Return the stored scores of the checkpoint that the rule names.

    `last` is the last step of the whole plan, `averaged` the average of the weights in that checkpoint, `best` the
    checkpoint that looked best while training. Raises ConfigError where there is no score.
    """
    # An imported run that was never trained has no plan, and so step -1: that of its imported weights.
    step = (RunRecord.read(folder.run_json).global_steps or 0) - 1
    if rule == "best" and (match := STEP_FOLDER.fullmatch(_target(folder.checkpoints / "best"))):
        step = int(match[1])
    scores = list(Score.of_checkpoint(folder, step, rule == "averaged"))
    if not scores:
        what = "averaged weights" if rule == "averaged" else f"{rule} checkpoint"
        command = "test_loss.py --weights averaged" if rule == "averaged" else "test_loss.py"
        raise ConfigError(f"{folder.path}: found no score of its {what}, wanted one of {command}")
    return scores


def _target(link: Path) -> str:
    return link.readlink().name if link.is_symlink() else ""


def is_diverged(folder: RunFolder) -> bool:
    """Say whether a run ended because its gradients were not finite for too long."""
    return Status.read(folder.status_json).has_diverged


def read_runs(folders: Sequence[RunFolder], rule: CheckpointRule) -> list[Result]:
    """Read runs with their losses on what all of them were scored on (study/measures.py).

    Raises ConfigError where a run has no score, or where they have no test in common.
    """
    problems: list[str] = []
    scores: dict[str, list[Score]] = {}
    for folder in folders:
        if not is_diverged(folder):
            try:
                scores[folder.path.name] = scores_of(folder, rule)
            except ConfigError as error:
                problems += error.lines
    if problems:
        raise ConfigError(*problems)
    measured = measure(scores)
    return [_result(folder, measured.get(folder.path.name)) for folder in folders]


def is_scored(folder: RunFolder, rule: CheckpointRule) -> bool:
    """Say whether a run has a result: a score of the checkpoint that the rule names, or that it diverged."""
    try:
        return is_diverged(folder) or bool(scores_of(folder, rule))
    except ConfigError:
        return False


def _result(folder: RunFolder, found: tuple[Score, Measured] | None) -> Result:
    """Put a run's result together; without a score it diverged. Raises ConfigError where its files changed since."""
    model, train = folder.read_configs()
    seeds = train.seeds()
    result = Result(
        run=folder.path.name,
        recipe=recipe_hash(model, train),
        init_seed=str(seeds["init_seed"]),
        train_seed=f"{seeds['order_seed']}/{seeds['dropout_seed']}",
        loss=None,
    )
    if found is None or found[0].loss is None:
        return result
    score, measured = found
    if score.model.run_hash != run_hash(model, train):
        raise ConfigError(f"{folder.path}: scored with another model.json or train.json, wanted a new score")
    if score.model.step == IMPORTED_STEP:
        raise ConfigError(
            f"{folder.path}: found imported weights, which nobody knows to have seen as many tokens as another run, "
            "wanted a run trained here (--losses compares numbers alone)"
        )
    return replace(result, loss=measured.loss, metadata=_metadata(folder, score, measured))


def _metadata(folder: RunFolder, score: Score, measured: Measured) -> RunMetadata:
    model, train = folder.read_configs()
    step, tokens_seen = score.model.step, score.model.tokens_seen
    if step is None or tokens_seen is None:
        raise ConfigError(f"{score.path}: does not say what the model had seen, wanted a new score")
    lines = folder.metrics.read()
    last: dict[str, Any] = lines[-1] if lines else {}
    return RunMetadata(
        recipe=recipe(model, train),
        recipe_hash=recipe_hash(model, train),
        parameters=count_parameters(model).total,
        step=step,
        tokens_seen=tokens_seen,
        hardware=RunRecord.read(folder.run_json).hardware,
        decays=train.schedule_name != "constant",
        tokens_per_second=folder.metrics.tokens_per_second(),
        cost=last.get("cost"),
        currency=train.currency or "",
        tokenizer=score.tokenizer,
        measured=measured,
        curve=(
            np.array([line["tokens"] for line in lines], dtype=np.float64),
            np.array([math.nan if line["train/loss"] is None else line["train/loss"] for line in lines]),
        ),
        samples=tuple((line["step"], line["sample"]) for line in lines if "sample" in line),
    )


def group_results(results: Iterable[Result], in_folders: bool = False) -> list[Group]:
    """Put replicates together, in the order of their first run.

    Recipes of runs `in_folders` are named by what their runs' names share. There, a run with the same recipe and
    seeds as another measures hardware, not seeds, so only the first of them counts.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        same = (other for other in groups[result.recipe] if other.seeds == result.seeds and "" not in result.seeds)
        if not in_folders or next(same, None) is None:
            groups[result.recipe].append(result)
    names = {key: recipe_name(found) if in_folders else key for key, found in groups.items()}
    taken = list(names.values())
    for key, found in groups.items():
        if taken.count(names[key]) > 1:  # two recipes whose runs are named alike
            names[key] = found[0].run
    return [Group(names[key], tuple(found)) for key, found in groups.items()]


def recipe_name(results: Sequence[Result]) -> str:
    """Name a recipe after its runs: what their names have in common, without the mark of a seed."""
    names = [result.run for result in results]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in alike)
    return (re.sub(r"[-._]?s?$", "", shared) if len(names) > 1 else shared) or names[0]


def name_arms(results: Sequence[Result], experiment: Experiment) -> list[Group]:
    """Put the results of an experiment into its arms."""
    arm_of = {run.run: run.arm for run in experiment.runs}
    return [
        Group(arm.name, tuple(result for result in results if arm_of[result.run] == arm.name))
        for arm in experiment.arms
    ]


def difference_in_words(group: Group, baseline: Group) -> str:
    """Say which keys of the recipe differ from the baseline's; empty where there are no folders to read."""
    if not group.metadata or not baseline.metadata:
        return ""
    mine, theirs = group.metadata[0].recipe, baseline.metadata[0].recipe
    return ", ".join(f"{key} {_shown(theirs[key])}→{_shown(mine[key])}" for key in mine if mine[key] != theirs[key])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_shown(item)}' for key, item in value.items() if item is not None)})"
    if isinstance(value, list):
        return " + ".join(map(_shown, value))
    return {"None": "none", "True": "on", "False": "off"}.get(str(value), str(value))


def has_own_budget(group: Group, baseline: Group) -> bool:
    """Say whether a recipe asks for another number of training tokens than the baseline's."""
    return len({item.recipe.get("min_train_tokens") for one in (group, baseline) for item in one.metadata}) > 1


def find_replicates(
    named: Sequence[RunFolder], runs_dir: Path, rule: CheckpointRule, everything: bool
) -> list[RunFolder]:
    """Find scored runs in `runs_dir` with the recipe of a named one, or with `everything` all scored runs.

    Folders that cannot be read, were never trained or have no score are passed over: they were not asked for.
    """
    known = {folder.path.name for folder in named}
    if not runs_dir.is_dir():
        raise ConfigError(f"--runs-dir: found no folder {runs_dir}, wanted one of runs")
    recipes = {recipe_hash(*folder.read_configs()) for folder in named}
    found = []
    for path in sorted(runs_dir.iterdir()):
        folder = RunFolder(path)
        if path.name in known or not folder.train_json.is_file() or not folder.run_json.is_file():
            continue
        try:
            is_wanted = everything or recipe_hash(*folder.read_configs()) in recipes
            if is_wanted and is_scored(folder, rule):
                found.append(folder)
        except ConfigError:
            continue
    return found
