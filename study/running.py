"""Train and score the runs of an experiment, each in processes of its own."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.run.errors import ConfigError, DataError, HarnessError, RunLockedError
from harness.run.files import ROOT
from harness.run.locks import locked
from harness.run.run_folder import MODEL_FILE, RunFolder, open_run
from harness.run.status import Status
from harness.tokens.token_files import open_split, split_files
from study.assemble import ComparisonRequest, assemble
from study.experiment import (
    EXPERIMENT_FILE,
    Experiment,
    PlannedRun,
    find_experiment,
    load_experiment,
    save_experiment,
    write_folders,
)
from study.looking import Look, LookRecord, next_looks, plan_looks, read_record, runs_at, take_look, write_record
from study.looks import Rule
from study.results import is_diverged, is_scored


@dataclass(frozen=True)
class AskedLooks:
    """How many looks the user asks for, and by which rule."""

    count: int
    rule: Rule


@dataclass(frozen=True)
class Place:
    """Where runs are trained, and with how many processes."""

    runs_dir: Path
    datasets_dir: Path
    world_size: int


def run(name: str, datasets_dir: Path, runs_dir: Path, world_size: int, looks: AskedLooks | None = None) -> None:
    """Train and score an experiment's runs in order, look by look where looks are fixed; raises HarnessError.

    A diverged run is noted and the next one follows.
    """
    path = find_experiment(runs_dir, name)
    runs_dir = path.resolve().parent.parent
    experiment = load_experiment(path)
    check_test_set(experiment, runs_dir, datasets_dir)
    if looks is not None:
        experiment = fix_looks(experiment, path, runs_dir, looks)
    place = Place(runs_dir, datasets_dir, world_size)
    if experiment.looks is None:
        run_all(experiment, experiment.runs, place)
    else:
        run_look_by_look(experiment, place)


def fix_looks(experiment: Experiment, path: Path, runs_dir: Path, asked: AskedLooks) -> Experiment:
    """Write the looks into experiment.json before the first run; raises ConfigError after it, or for other looks."""
    if experiment.looks is not None:
        if (experiment.looks.rule, len(experiment.looks.seeds)) != (asked.rule, asked.count):
            raise ConfigError(
                f"--looks: found {asked.count} {asked.rule}, wanted {len(experiment.looks.seeds)} "
                f"{experiment.looks.rule} as fixed before the first run, or nothing"
            )
        return experiment
    begun = [run.run for run in experiment.runs if open_run(runs_dir, run.run).status_json.is_file()]
    if begun:
        raise ConfigError(f"--looks: found {begun[0]} begun already, wanted looks fixed before the first run")
    fixed = replace(experiment, looks=plan_looks(experiment, asked.count, asked.rule))
    save_experiment(fixed, path.parent / EXPERIMENT_FILE)
    return fixed


def run_look_by_look(experiment: Experiment, place: Place) -> None:
    """Train what the next look needs, take it, stop what is decided or hopeless, until no arm is open."""
    assert experiment.looks is not None
    folder = place.runs_dir / experiment.name
    record = read_record(folder)
    if not record.looks:
        record = replace(record, to_come=record.to_come or experiment.looks.seeds)
    while True:
        if record.looks and not record.looks[-1].verdicts:  # interrupted while it was taken
            count, before = record.looks[-1].seeds, replace(record, looks=record.looks[:-1])
        elif record.to_come and (not record.looks or len(record.stopped()) < len(record.looks[-1].verdicts)):
            count, before = record.to_come[0], replace(record, to_come=record.to_come[1:])
        else:
            return
        runs = runs_at(experiment, before, count)
        write_folders(experiment, runs, place.runs_dir)
        if not run_all(experiment, runs, place):
            print(f"The look after {count} seeds is taken when all of its runs are scored", flush=True)
            return
        record = _take(experiment, folder, replace(before, looks=(*before.looks, Look(count, {}, {}, {}, {}, {}))))


def _take(experiment: Experiment, folder: Path, record: LookRecord) -> LookRecord:
    """Judge the runs of a look, write what came of it, and print it."""
    assert experiment.looks is not None
    write_record(folder, record)
    request = ComparisonRequest(runs_dir=folder.parent, experiment=experiment.name)
    judged = assemble(request).judgement.arms
    stopped = record.stopped()
    still = [item.group.recipe for item in judged if item.group.recipe not in stopped]
    estimates = {item.group.recipe: item.guarded for item in judged}
    look = take_look(record, experiment.looks.rule, estimates, request.margin, still)
    record = replace(record, looks=(*record.looks[:-1], look))
    still = [arm for arm in still if arm not in look.stopped]
    record = replace(record, to_come=next_looks(experiment, record, still))
    write_record(folder, record)
    print(f"Look {len(record.looks)}, after {look.seeds} seeds:", flush=True)
    for arm, word in look.verdicts.items():
        what = f"stops, {look.stopped[arm]}" if arm in look.stopped else "goes on" if arm in still else "had stopped"
        print(f"  {arm}: {word} (p {look.p_holm[arm]:.2g} over all looks and arms): {what}", flush=True)
    if still:
        print(f"  Next: after {', '.join(map(str, record.to_come))} seeds of {', '.join(still)}", flush=True)
    return record


def run_all(experiment: Experiment, runs: Sequence[PlannedRun], place: Place) -> bool:
    """Train and score some runs in order; return whether all have a result now.

    A run that another process is at, of this experiment or not, is left alone.
    """
    is_whole = True
    for number, planned in enumerate(runs, start=1):
        folder = open_run(place.runs_dir, planned.run)
        title = f"[{number}/{len(runs)}] {planned.run}"
        try:
            folder.evals.mkdir(exist_ok=True)
            with locked(folder.evals, "another experiment trains and scores this run"):
                _run_one(experiment, planned, place, title)
        except RunLockedError:
            print(f"{title}: another process is at it", flush=True)
            is_whole = False
    return is_whole


def _run_one(experiment: Experiment, planned: PlannedRun, place: Place, title: str) -> None:
    """Train and score one run unless that is done; raises RunLockedError where a trainer holds it."""
    folder = open_run(place.runs_dir, planned.run)
    if is_scored(folder, "last"):
        how = "diverged, and counts as such" if is_diverged(folder) else "already complete"
        print(f"{title}: {how}", flush=True)
        return
    with folder.locked():
        print(f"{title}: training", flush=True)
    if status := train(folder, place.datasets_dir, place.world_size):
        with folder.locked():  # a trainer that came in between has it; torchrun's own status does not tell
            pass
        if status == RunLockedError.exit_status:
            raise RunLockedError(f"{folder.path}: another trainer held this run")
        if not Status.read(folder.status_json).has_diverged:
            raise ExecutionError(f"{planned.run}: training ended with status {status}; the same command goes on")
        print(f"{title}: diverged, and counts as such", flush=True)
    else:
        score(experiment, planned, folder, place.datasets_dir)


def train(folder: RunFolder, datasets_dir: Path, world_size: int) -> int:
    """Train one run in processes of its own; return its exit status."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    script = [str(ROOT / "ddp_train.py"), folder.path.name, str(datasets_dir), "--runs-dir", str(folder.path.parent)]
    return subprocess.run([sys.executable, *(launcher if world_size > 1 else []), *script]).returncode


def check_test_set(experiment: Experiment, runs_dir: Path, datasets_dir: Path) -> None:
    """Raise DataError where an arm's validation split is too short for the test set: before training, not after it.

    A dataset that is still to be downloaded cannot be checked yet.
    """
    test_set = experiment.test_set
    for run in experiment.first_runs.values():
        model, train = open_run(runs_dir, run.run).read_configs()
        if not split_files(datasets_dir / train.scored_dataset, "validation"):
            continue
        file = open_split(datasets_dir, train.scored_dataset, "validation")
        wanted = test_set.start_token + test_set.sequences * model.context_length + 1
        if file.length < wanted:
            raise DataError(
                f"{file.path}: found {file.length:,} tokens, wanted {wanted:,} "
                f"(--test-start-token {test_set.start_token:,} + --test-batches {test_set.batches} x 6 sequences "
                f"x {model.context_length} tokens + 1); "
                "plan anew with fewer, under another --name"
            )


class ExecutionError(HarnessError):
    """A run of an experiment did not end well."""


def score(experiment: Experiment, run: PlannedRun, folder: RunFolder, datasets_dir: Path) -> None:
    """Score a run's last checkpoint on the experiment's test set."""
    _, train = folder.read_configs()
    test_set = experiment.test_set
    script = [str(ROOT / "test_loss.py"), str(datasets_dir), str(folder.model_json)]
    script += [str(folder.checkpoints / "latest" / MODEL_FILE), "--dataset", train.scored_dataset]
    script += ["--start-token", str(test_set.start_token), "--batches", str(test_set.batches)]
    done = subprocess.run([sys.executable, *script])
    if done.returncode:
        raise ExecutionError(f"{run.run}: scoring ended with status {done.returncode}; the same command goes on")
