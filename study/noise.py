"""Learn the training noise from replicates, and which seeds it comes from."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from harness.run.config import PURPOSES
from harness.run.errors import ConfigError
from harness.run.run_folder import open_run
from study.experiment import find_experiment, load_experiment
from study.ledger import LEDGER, Component, Entry, load_ledger, record
from study.measures import NATS
from study.results import (
    CheckpointRule,
    Group,
    Result,
    find_replicates,
    group_results,
    has_own_budget,
    is_scored,
    name_arms,
    read_runs,
)
from study.statistics import Noise, pooled_noise


def learn_noise(group: Group) -> list[Entry]:
    """Return ledger entries of one recipe: over all seeds, and for each purpose whose seed varied alone.

    A purpose's noise is pooled over sets of runs that share the other seeds. Runs that diverged have no loss, and the
    ledger is silent about them.
    """
    results = [result for result in group.results if result.loss is not None and result.metadata is not None]
    if len(results) < 2:
        return []
    entries = []
    for component in PURPOSES:
        sets = _sets_that_vary(results, component)
        noise = pooled_noise([[r.loss for r in one if r.loss is not None] for one in sets])
        if noise is not None:
            entries.append(_entry(group, component, noise, [result for one in sets for result in one]))
    varying = [purpose for purpose in PURPOSES if len({_seeds(result)[purpose] for result in results}) > 1]
    if len(varying) > 1:
        noise = pooled_noise([[result.loss for result in results if result.loss is not None]])
        assert noise is not None
        entries.append(_entry(group, "all", noise, results))
    return entries


def _seeds(result: Result) -> dict[str, str]:
    order, _, dropout = result.train_seed.partition("/")
    return {"init": result.init_seed, "order": order, "dropout": dropout}


def _sets_that_vary(results: Sequence[Result], component: str) -> list[list[Result]]:
    """Return the sets of two or more runs that share every seed but one purpose's."""

    def others(result: Result) -> tuple[str, ...]:
        return tuple(seed for purpose, seed in _seeds(result).items() if purpose != component)

    sets = [list(found) for _, found in groupby(sorted(results, key=others), key=others)]
    return [found for found in sets if len(found) > 1]


def _entry(group: Group, component: Component, noise: Noise, results: Sequence[Result]) -> Entry:
    first = results[0].metadata
    assert first is not None
    if first.measured.unit != NATS:
        raise ConfigError(f"{group.recipe}: found losses in {first.measured.unit}, wanted runs of one tokenizer")
    return Entry(
        component=component,
        recipe=group.recipe,
        recipe_hash=first.recipe_hash,
        parameters=first.parameters,
        train_tokens=first.tokens_seen,
        hardware=first.hardware,
        sd=noise.sd,
        df=int(noise.df),
        runs=tuple(sorted(result.run for result in results)),
    )


def learn(runs_dir: Path, baseline: str, rule: CheckpointRule) -> None:
    """Write the noise of a run's replicates into the ledger, and print it; raises ConfigError without any."""
    named = [open_run(runs_dir, baseline)]
    folders = [*named, *find_replicates(named, runs_dir, rule, everything=False)]
    learned = [
        entry for group in group_results(read_runs(folders, rule), in_folders=True) for entry in learn_noise(group)
    ]
    if not learned:
        raise ConfigError("--baseline: found no replicates of it, wanted runs that differ in seeds only")
    path = runs_dir / LEDGER
    record(path, learned)
    _print_entries(learned)
    print(f"Wrote {path}")


def learn_pairs(runs_dir: Path, name: str, rule: CheckpointRule) -> None:
    """Write what shared seeds left of the noise, for each arm of an experiment, into the ledger, and print it.

    Later experiments take it for the prior of their own differences. Raises ConfigError where no arm shares two seeds
    with the baseline.
    """
    experiment = load_experiment(find_experiment(runs_dir, name))
    folders = [open_run(runs_dir, run.run) for run in experiment.runs]
    groups = name_arms(read_runs([folder for folder in folders if is_scored(folder, rule)], rule), experiment)
    learned = []
    for baseline in (group for group in groups if group.recipe == experiment.compared_with):
        arms = [arm for arm in groups if arm is not baseline and not has_own_budget(arm, baseline)]
        learned = [entry for arm in arms if (entry := _pairs_entry(arm, baseline)) is not None]
    if not learned:
        raise ConfigError("--experiment: found no arm with two seeds that its baseline has too, wanted scored runs")
    path = runs_dir / LEDGER
    record(path, learned)
    _print_entries(learned)
    print(f"Wrote {path}")


def _pairs_entry(arm: Group, baseline: Group) -> Entry | None:
    theirs = {result.seeds: result for result in baseline.results if result.loss is not None}
    pairs = [(result, theirs[result.seeds]) for result in arm.results if result.seeds in theirs]
    known = [(mine, other) for mine, other in pairs if mine.loss is not None and mine.metadata is not None]
    differences = [
        mine.loss - other.loss for mine, other in known if mine.loss is not None and other.loss is not None
    ]
    noise = pooled_noise([differences])
    if noise is None:
        return None
    noise = Noise(noise.sd / math.sqrt(2), noise.df)
    entry = _entry(arm, "pairs", noise, [mine for mine, _ in known])
    runs = tuple(sorted(result.run for pair in known for result in pair))
    return replace(entry, recipe=f"{arm.recipe} v {baseline.recipe}", runs=runs)


def show_ledger(runs_dir: Path) -> None:
    """Print what the ledger knows; raises ConfigError where there is none."""
    path = runs_dir / LEDGER
    entries = load_ledger(path)
    if not entries:
        raise ConfigError(f"{path}: found nothing in the ledger, wanted --baseline RUN to learn from its replicates")
    _print_entries(entries)


def _print_entries(entries: Sequence[Entry]) -> None:
    for entry in entries:
        print(f"{entry.recipe}: {entry.component} seeds: sd {entry.sd:.6f} on {entry.df} df, {len(entry.runs)} runs")
