"""Train and score the runs of an experiment, each in processes of its own."""

import subprocess
import sys
from pathlib import Path

from harness.run.errors import DataError, HarnessError, RunLockedError
from harness.run.files import ROOT
from harness.run.run_folder import MODEL_FILE, RunFolder, open_run
from harness.run.status import Status
from harness.tokens.token_files import open_split, split_files
from study.experiment import Experiment, PlannedRun, find_experiment, load_experiment
from study.results import is_diverged, is_scored


def run(name: str, datasets_dir: Path, runs_dir: Path, world_size: int) -> None:
    """Train and score an experiment's runs in order; a diverged run is noted and the next one follows."""
    path = find_experiment(runs_dir, name)
    runs_dir = path.resolve().parent.parent
    experiment = load_experiment(path)
    check_test_set(experiment, open_run(runs_dir, experiment.runs[0].run), datasets_dir)
    for number, planned in enumerate(experiment.runs, start=1):
        folder = open_run(runs_dir, planned.run)
        title = f"[{number}/{len(experiment.runs)}] {planned.run}"
        if is_scored(folder, "last"):
            how = "diverged, and counts as such" if is_diverged(folder) else "already complete"
            print(f"{title}: {how}", flush=True)
            continue
        try:
            with folder.locked():
                print(f"{title}: training", flush=True)
        except RunLockedError:
            print(f"{title}: another process is at it", flush=True)
            continue
        status = train(folder, datasets_dir, world_size)
        if status and Status.read(folder.status_json).has_diverged:
            print(f"{title}: diverged, and counts as such", flush=True)
            continue
        if status:
            raise ExecutionError(f"{planned.run}: training ended with status {status}; the same command goes on")
        score(experiment, planned, folder, datasets_dir)


def train(folder: RunFolder, datasets_dir: Path, world_size: int) -> int:
    """Train one run in processes of its own; return its exit status."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    script = [str(ROOT / "ddp_train.py"), folder.path.name, str(datasets_dir), "--runs-dir", str(folder.path.parent)]
    return subprocess.run([sys.executable, *(launcher if world_size > 1 else []), *script]).returncode


def check_test_set(experiment: Experiment, folder: RunFolder, datasets_dir: Path) -> None:
    """Raise DataError where the validation split is too short for the test set: before training, not after it.

    A dataset that is still to be downloaded cannot be checked yet.
    """
    model, train = folder.read_configs()
    if not split_files(datasets_dir / train.dataset, "validation"):
        return
    file = open_split(datasets_dir, train.dataset, "validation")
    test_set = experiment.test_set
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
    script += [str(folder.checkpoints / "latest" / MODEL_FILE), "--dataset", train.dataset]
    script += ["--start-token", str(test_set.start_token), "--batches", str(test_set.batches)]
    done = subprocess.run([sys.executable, *script])
    if done.returncode:
        raise ExecutionError(f"{run.run}: scoring ended with status {done.returncode}; the same command goes on")
