"""Bring in the run folders of the published harness: configurations, checkpoints, losses and charts.

    runs/NAME/model.json  train.json
    runs/NAME/checkpoints/TIME-iteration-N/model.safetensors  meta.json    and links `latest` and `best`
    runs/NAME/*.png  *.html

Its optimizer states are pickles, which can run any code, and are left alone: an imported run can be scored, sampled,
compared and exported, but not trained further.
"""

import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exchange.importing import BuildModel, new_run
from harness.engine import checkpoint
from harness.engine.checkpoint import Snapshot
from harness.engine.identity import ResumeIdentity
from harness.engine.opening import OPTIMIZER_FILE, CheckpointMetadata, read_tensors
from harness.run.config import ModelConfig, TrainConfig, config_from, require_fitting
from harness.run.errors import CheckpointError, ConfigError, HarnessError
from harness.run.files import atomic_folder, read_json, write_json
from harness.run.plan import Plan, make_plan
from harness.run.provenance import RunRecord
from harness.run.recipe import must_match, recipe_hash
from harness.run.run_folder import MODEL_FILE, RunFolder
from harness.run.status import Status
from harness.run.strict_json import read_strict_json
from harness.run.train_state import TrainState

META_FILE = "meta.json"
MOST_PROCESSES = 64
# Names of the oldest runs; their validation_interval was that of checkpoints too.
FORMER_KEYS = {"minibatch_size": "microbatch_size", "validation_interval": "checkpoint_interval"}
METRICS = {
    "train/loss": ("avg_train_loss", "train_loss"),
    "train/loss_min": ("min_train_loss",),
    "train/loss_max": ("max_train_loss",),
    "train/grad_norm": ("avg_grad_norms",),
    "val/loss": ("val_loss",),
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One checkpoint of the published harness."""

    path: Path
    step: int
    """The last completed global step."""
    meta: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """What it says of the global steps since the checkpoint before, by our names."""
        found = {key: [self.meta[name] for name in names if name in self.meta] for key, names in METRICS.items()}
        return {key: float(values[0]) for key, values in found.items() if values and _is_number(values[0])}


def import_all(source: Path, runs_dir: Path, build_model: BuildModel) -> None:
    """Import every run folder of `source` under its name; raises ConfigError if there is none that can be.

    A run that cannot be imported is skipped with one line.
    """
    if not source.is_dir():
        raise ConfigError(f"--all: found no folder {source}, wanted one with run folders")
    folders = [path for path in sorted(source.iterdir()) if (path / "train.json").is_file()]
    imported = 0
    for folder in folders:
        try:
            print(import_run(folder, new_run(runs_dir, folder.name), build_model), flush=True)
            imported += 1
        except HarnessError as error:
            print(f"skipped {folder.name}: {error.lines[0]}", file=sys.stderr)
    if not imported:
        raise ConfigError(f"--all: found {len(folders)} run folders in {source}, wanted at least one to import")
    print(f"{imported} of {len(folders)} runs imported into {runs_dir}")


def import_run(source: Path, target: Path, build_model: BuildModel) -> str:
    """Write one run folder, which appears whole; return a line that says what it holds. Raises HarnessError."""
    shape = read_strict_json(source / "model.json")
    model = config_from(ModelConfig, shape, source / "model.json")
    document, renamed = with_our_keys(read_strict_json(source / "train.json"))
    train = config_from(TrainConfig, document, source / "train.json")
    require_fitting(model, train, source / "train.json")
    found = checkpoints_of(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as path:
        folder = RunFolder(path)
        write_json(folder.model_json, shape)
        write_json(folder.train_json, document)
        charts = [
            file
            for file in sorted(source.iterdir())
            if file.suffix in (".png", ".html") and file.is_file() and not file.is_symlink()
        ]
        folder.charts.mkdir()
        for file in charts:
            shutil.copyfile(file, folder.charts / file.name)
        if found:
            plan = plan_of(source.name, model, train, found[-1].step + 1)
            write_checkpoints(folder, (model, train, plan), found, build_model)
            write_records(folder, (model, train, plan), found)
    keys = f"; {', '.join(f'{old} is {new}' for old, new in renamed.items())}" if renamed else ""
    return f"{target}: {len(found)} checkpoints, {len(charts)} charts{keys}"


def with_our_keys(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a train.json with today's keys, and those that were renamed; the oldest runs' validation is left out."""
    if "checkpoint_interval" in document:
        return document, {}
    renamed = {old: new for old, new in FORMER_KEYS.items() if old in document}
    kept = {key: value for key, value in document.items() if key != "validation_batches"}
    return {renamed.get(key, key): value for key, value in kept.items()}, renamed


def checkpoints_of(source: Path) -> list[PublishedCheckpoint]:
    """Find a run's checkpoints in the order of their steps; of one step, the newest. Raises CheckpointError."""
    found: dict[int, PublishedCheckpoint] = {}
    for path in sorted((source / "checkpoints").glob(f"*/{META_FILE}")):
        if path.parent.is_symlink():
            continue
        meta = read_json(path)
        step = meta.get("global_step", meta.get("train_ds_offset"))
        if type(step) is not int or step < 0:
            raise CheckpointError(f"{path}: found global_step {step!r}, wanted a global step")
        found[step] = PublishedCheckpoint(path.parent, step, meta)
    return [found[step] for step in sorted(found)]


def plan_of(name: str, model: ModelConfig, train: TrainConfig, steps: int) -> Plan:
    """Return the plan that ends after `steps` global steps; the number of processes is written down nowhere.

    A run that did not end has that of its name (`8xa100...`), or one process.
    """
    match = re.match(r"(\d{1,2})x", name)
    named = max(1, int(match[1])) if match else 1
    plans = [make_plan(model, train, size) for size in (named, *range(1, MOST_PROCESSES + 1))]
    return next((plan for plan in plans if plan.global_steps == steps), plans[0])


def write_checkpoints(
    folder: RunFolder,
    recipe: tuple[ModelConfig, TrainConfig, Plan],
    found: list[PublishedCheckpoint],
    build_model: BuildModel,
) -> None:
    """Write all checkpoints with what is known of them, and the links; raises HarnessError."""
    model, train, plan = recipe
    fixed = {"global_batch": plan.global_batch, "trained_by": "another harness"}
    identity = ResumeIdentity({**must_match(model, train), **fixed}, {}, plan.batch_split())
    best: PublishedCheckpoint | None = None
    for item in found:
        weights = build_model(model, read_tensors(item.path / MODEL_FILE), item.path / MODEL_FILE).state_dict()
        checkpoint.require_finite(weights, item.step)
        best = item if item.meta.get("is_best") is True else best
        done = item.step + 1
        state = TrainState(
            next_step=done,
            optimizer_steps=done,
            tokens=done * plan.tokens_per_global_step,
            last_interval_loss=item.metrics.get("train/loss"),
            best_step=best.step if best else None,
            best_loss=best.metrics.get("val/loss", best.metrics.get("train/loss")) if best else None,
            best_is_validation=best is not None and "val/loss" in best.metrics,
        )
        metadata = CheckpointMetadata(state, {}, identity)
        tensors: dict[str, dict[str, Any]] = {MODEL_FILE: {**weights}, OPTIMIZER_FILE: {}}
        checkpoint.write(folder, Snapshot(metadata, tensors))
    if best is not None:
        checkpoint.link_best(folder, best.step)


def write_records(
    folder: RunFolder, recipe: tuple[ModelConfig, TrainConfig, Plan], found: list[PublishedCheckpoint]
) -> None:
    """Write what reports read: one line of metrics for each checkpoint, run.json and status.json."""
    model, train, plan = recipe
    per_step, last = plan.tokens_per_global_step, found[-1].step
    folder.metrics.append(
        {"step": item.step, "tokens": (item.step + 1) * per_step, "elapsed": 0.0, "train/loss": None, **item.metrics}
        for item in found
    )
    record = RunRecord(asdict(model), asdict(train), recipe_hash(model, train), plan.describe())
    write_json(folder.run_json, asdict(record))
    is_whole = last + 1 == plan.global_steps
    Status("complete" if is_whole else "stopped", last, 0 if is_whole else None, "imported").write(folder.status_json)


def _is_number(value: object) -> bool:
    largest = sys.float_info.max  # NaN is not below it, and JSON's whole numbers may be above
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest
