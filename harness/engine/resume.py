"""Decide where a start of a run begins, and tidy the run's folder for it. Only rank 0 does either."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.engine.checkpoint import link_best
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import (
    CheckpointMetadata,
    VerifiedCheckpoint,
    initial_weights,
    open_checkpoint,
    require_fit,
)
from harness.run.errors import CheckpointError, ConfigError, DataError, PeerError
from harness.run.files import replace_link
from harness.run.provenance import RunRecord
from harness.run.run_folder import IMPORTED_STEP, MODEL_FILE, RunFolder, open_run
from harness.run.train_state import TrainState

RESTARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class ResumePoint:
    """Where training begins: a checkpoint and what its state.json holds, or nothing yet."""

    checkpoint: VerifiedCheckpoint | None
    metadata: CheckpointMetadata

    @property
    def state(self) -> TrainState:
        """The run's progress; training moves it on."""
        return self.metadata.state


@dataclass(frozen=True)
class ResumeRequest:
    """Where the user asked to begin."""

    name: str | None = None
    """A checkpoint's folder, `latest` or `best`; None for the newest valid one."""
    fresh: bool = False
    """Whether to start over."""
    restart: int = 0
    """How many times torchrun has restarted this launch (--max-restarts), always with the same words."""


def choose_resume_point(
    folder: RunFolder, request: ResumeRequest, identity: ResumeIdentity, shapes: Mapping[str, tuple[int, ...]]
) -> ResumePoint:
    """Decide where to begin, and tidy the folder for it: newer checkpoints aside, later metrics dropped.

    `shapes` are those of the model's parameters, which a checkpoint must fit before anything is moved. Errors are as
    for `find`; raises ConfigError or DataError, naming the keys, where the checkpoint is of another
    run, and PeerError where restarting leads nowhere.
    """
    if request.restart:
        request = ResumeRequest(restart=request.restart)  # what was asked for has been done: now it means to go on
    old = (folder.checkpoints, folder.metrics.path, folder.evals, folder.run_json, folder.loggers, folder.page)
    if request.fresh and (aside := folder.set_aside(*old)):
        print(f"Starting over; what there was is in {aside}")
    require_own(folder)
    point = _prepare(folder, request.name, identity, shapes)
    require_progress(folder, request.restart, point.state.next_step)
    return point


def require_own(folder: RunFolder) -> None:
    """Check that a folder holds no checkpoint or page of another harness; raises ConfigError."""
    theirs = [path.parent for path in sorted(folder.checkpoints.glob("*/meta.json")) if not path.parent.is_symlink()]
    was_never_ours = not folder.run_json.exists() and not any(folder.path.glob("aside-*"))
    if was_never_ours and folder.page.exists():
        theirs.append(folder.page)
    if theirs:
        raise ConfigError(
            f"{folder.path}: found {theirs[0].name} of another harness, wanted a run of this one: python convert.py "
            f"import --all {folder.path.parent} --runs-dir ELSEWHERE imports it, --fresh moves it aside"
        )


def from_the_beginning(identity: ResumeIdentity) -> ResumePoint:
    """Return the point of a run that has not trained yet."""
    return ResumePoint(None, CheckpointMetadata(TrainState(), {}, identity))


def _prepare(
    folder: RunFolder, name: str | None, identity: ResumeIdentity, shapes: Mapping[str, tuple[int, ...]]
) -> ResumePoint:
    unfinished = folder.remove_unfinished()
    for leftover in unfinished:
        print(f"Removed {leftover}, which was cut off while it was written")
    found = find(folder, name)
    if found is None:
        if unfinished:
            print("There is no complete checkpoint; starting at step 0")
        folder.metrics.drop_from(0)
        return from_the_beginning(identity)
    metadata = found.metadata
    state = metadata.state
    require_same_identity(folder, found.path, metadata.identity, identity)
    require_fit(found, shapes)
    newer = [folder.checkpoint(step) for step in folder.checkpoint_steps() if step >= state.next_step]
    aside = folder.set_aside(*newer)
    if aside:
        print(f"Newer checkpoints are moved to {aside}")
    _repair_links(folder, found.path, state.best_step)
    folder.metrics.drop_from(state.next_step)
    print(f"Resuming from {found.path.name}: {state.next_step:,} global steps are done")
    if metadata.identity.batch_split != identity.batch_split:
        before, now = (_in_words(split) for split in (metadata.identity.batch_split, identity.batch_split))
        print(
            f"The global batch is split another way ({now}; before: {before}): the same data in the same order, "
            "results equal up to rounding and dropout masks"
        )
    return ResumePoint(found, metadata)


def _in_words(split: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in split.items())


def find_inside(folder: RunFolder, inside: str, otherwise: str = "") -> VerifiedCheckpoint | None:
    """Return the checkpoint that RUN or RUN/checkpoints/NAME means, from what stands behind RUN/.

    Without a name: the newest valid one. None stands for the imported weights of a run that was not trained on from
    them. Raises ConfigError or CheckpointError, which end on `otherwise`: what else the caller takes.
    """
    place, _, name = inside.partition("/")
    if inside and (place != "checkpoints" or not name):
        raise ConfigError(
            f"RUN: found {folder.path.name}/{inside[:80]}, wanted RUN or RUN/checkpoints/NAME{otherwise}"
        )
    is_imported = initial_weights(folder) is not None
    if is_imported and name and (folder.checkpoints / name).resolve() == folder.imported.resolve():
        return None
    # Not the link `latest`: a kill may have left it on an older checkpoint.
    found = find(folder, name or None)
    if found is None and not is_imported:
        raise CheckpointError(f"{folder.checkpoints}: found no checkpoint, wanted one with {MODEL_FILE}{otherwise}")
    return found


def find_weights(runs_dir: Path, words: str) -> tuple[RunFolder, int]:
    """Return the run and the step that RUN or RUN/checkpoints/NAME means; errors are as for `find_inside`."""
    run, _, inside = words.rstrip("/").partition("/")
    folder = open_run(runs_dir, run)
    found = find_inside(folder, inside)
    return folder, IMPORTED_STEP if found is None else found.step


def find_model(runs_dir: Path, run: str | None, files: tuple[Path | None, Path | None]) -> tuple[Path, Path]:
    """Return the files of a model and of its weights: those of `run`, as `find_weights`, or else `files`."""
    if run is not None:
        folder, step = find_weights(runs_dir, run)
        return folder.model_json, folder.weights(step)
    model_json, weights = files
    assert model_json is not None
    assert weights is not None
    return model_json, weights


def find(folder: RunFolder, name: str | None) -> VerifiedCheckpoint | None:
    """Find the checkpoint to resume from, verified; only warns about damaged ones that it passes over.

    A `name` (a folder's, `latest` or `best`) must be valid. Without one: the newest valid checkpoint by step, None
    where none was ever written. Raises CheckpointError, also where some were written and none is valid.
    """
    if name is not None:
        path = (folder.checkpoints / name).resolve()
        if path.parent != folder.checkpoints.resolve() or not path.is_dir():
            raise CheckpointError(f"{folder.checkpoints}: found no checkpoint {name[:80]!r}")
        return open_checkpoint(path)
    reasons: list[str] = []
    for step in reversed(folder.checkpoint_steps()):
        try:
            found = open_checkpoint(folder.checkpoint(step))
        except CheckpointError as error:
            reasons.extend(error.lines)
            continue
        for reason in reasons:
            print(f"warning: passing over a damaged checkpoint: {reason}", file=sys.stderr)
        return found
    if reasons:
        raise CheckpointError(
            *reasons, f"{folder.checkpoints}: no checkpoint is valid (start over with --fresh, which deletes nothing)"
        )
    return None


def require_same_identity(folder: RunFolder, path: Path, before: ResumeIdentity, now: ResumeIdentity) -> None:
    """Check that a start may go on from a checkpoint; raises DataError if only the data differ, else ConfigError."""
    differences = list(now.differences_from(before))
    lines = [
        f"{folder.path}: {item.key}: found {item.found}, wanted {item.wanted} as in {path.name} "
        "(or --fresh to start over)"
        for item in differences
    ]
    if lines:
        is_data = all(difference.is_data for difference in differences)
        raise (DataError if is_data else ConfigError)(*lines)


def require_newest_on_rank0(newest_steps: list[int]) -> None:
    """Check that no machine knows of a newer checkpoint than rank 0's; raises CheckpointError.

    `newest_steps` holds what each rank sees in its own copy of the run's folder, -1 for none. Where machines share no
    disk, a new rendezvous may have made another one rank 0, which would silently start over.
    """
    ahead = max(range(len(newest_steps)), key=lambda rank: newest_steps[rank])
    if newest_steps[ahead] > newest_steps[0]:
        seen = "no checkpoint" if newest_steps[0] < 0 else f"none after step {newest_steps[0]}"
        raise CheckpointError(
            f"rank {ahead}'s machine has a checkpoint of step {newest_steps[ahead]}, rank 0's has {seen}: make the "
            "machine that has the run's folder rank 0 (torchrun --node-rank), or share the folder (or --fresh)"
        )


def require_progress(folder: RunFolder, restart: int, from_step: int) -> None:
    """Stop a launch whose restarts (--max-restarts) get no further; raises PeerError.

    `restart` counts them, and every start, once chosen, stands in run.json.
    """
    since = 0
    for start in reversed(RunRecord.read(folder.run_json).starts if restart else []):
        if start.get("from_step") != from_step:
            break
        since += 1
        if start.get("restart", 0) == 0:
            break
    if since > RESTARTS_WITHOUT_PROGRESS:
        raise PeerError(
            f"{folder.path}: restarted {RESTARTS_WITHOUT_PROGRESS} times without progress beyond global step "
            f"{from_step}; status.json and the output above say what goes wrong"
        )


def _repair_links(folder: RunFolder, newest: Path, best_step: int | None) -> None:
    """Make `latest` and `best` what they should be: a cut-off save, or somebody's hand, may have left them behind."""
    links = {name: folder.checkpoints / name for name in ("latest", "best")}
    folder.set_aside(*(link for link in links.values() if link.exists() and not link.is_symlink()))
    replace_link(links["latest"], newest.name)
    if best_step is not None and folder.checkpoint(best_step).is_dir():
        link_best(folder, best_step)
    else:
        links["best"].unlink(missing_ok=True)
