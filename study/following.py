"""A report that is written again and again while its runs train, with their live curves."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.report.svg import Curve, curve_of
from harness.run.errors import ConfigError
from harness.run.files import write_text
from harness.run.run_folder import RunFolder, open_run
from harness.run.status import Status
from study.assemble import ComparisonRequest, Study, assemble
from study.experiment import find_experiment, load_experiment
from study.page import SECONDS_TO_RELOAD, page
from study.results import is_scored


def follow(request: ComparisonRequest, title: str, output: Path) -> None:
    """Write the page until none of the runs trains or is still to be scored; raises HarnessError.

    While they do, the page reloads itself. A run's own curve stays until it is scored and joins its recipe's.
    """
    seen_running: set[str] = set()
    while True:
        folders = followed(request)
        running = [folder for folder in folders if Status.read(folder.status_json).state == "running"]
        seen_running.update(folder.path.name for folder in running)
        unscored = [folder for folder in folders if not is_scored(folder, request.checkpoint)]
        is_over = not running and not (unscored and request.experiment)
        states = {folder.path.name: "trained" for folder in unscored if folder.path.name in seen_running}
        states |= {folder.path.name: "training" for folder in running}
        drawn = [live_curve(folder, states[folder.path.name]) for folder in folders if folder.path.name in states]
        live = [curve for curve in drawn if curve is not None]
        study, problem = None if len(unscored) == len(folders) else _study(request, unscored), None
        if isinstance(study, ConfigError):
            study, problem = None, study
        write_text(output, page(study, title, live, reloads=not is_over, problem=problem))
        if is_over and problem is not None:
            raise problem
        if is_over:
            return
        time.sleep(SECONDS_TO_RELOAD)


def followed(request: ComparisonRequest) -> list[RunFolder]:
    """Return the runs that a request is about, scored or not; raises ConfigError."""
    if request.losses is not None:
        raise ConfigError("--follow: found --losses, wanted run folders, which alone change")
    if request.experiment is not None:
        path = find_experiment(request.runs_dir, request.experiment)
        return [open_run(path.resolve().parent.parent, run.run) for run in load_experiment(path).runs]
    named = [*([request.baseline] if request.baseline else []), *request.names]
    found = named or sorted(path.parent.name for path in request.runs_dir.glob("*/metrics.jsonl"))
    if not found:
        raise ConfigError(f"--follow: found no run in {request.runs_dir} that has trained, wanted at least one")
    return [open_run(request.runs_dir, name) for name in found]


def live_curve(folder: RunFolder, state: str) -> Curve | None:
    """Return the training curve of one run so far, whose label names its state; None before its second step."""
    lines = folder.metrics.read()
    tokens = np.array([line["tokens"] for line in lines], dtype=np.float64)
    losses = np.array([line["train/loss"] for line in lines], dtype=np.float64)
    return curve_of(f"{folder.path.name} ({state})", [(tokens, losses)])


def _study(request: ComparisonRequest, unscored: Sequence[RunFolder]) -> Study | ConfigError | None:
    """Return the judgement of what is scored already, or why there is none; None where what was named is not yet."""
    missing = {folder.path.name for folder in unscored}
    names = tuple(name for name in request.names if name not in missing)
    if request.baseline in missing or (request.names and not names):
        return None
    try:
        return assemble(replace(request, names=names))
    except ConfigError as error:
        return error
