"""What a start of a run says of itself: run.json and status.json at its beginning, the closing lines at its end."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.config import ModelConfig, TrainConfig, recipe_hash
from harness.plan import Plan
from harness.run_folder import RunFolder, describe_start, write_json
from harness.train_state import TrainState

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunningAs:
    """How this start runs: from which global step, after how many restarts of its launch, and on what."""

    from_step: int
    restart: int
    device_names: list[str]
    dataset: list[dict[str, object]]
    """The tokens that were read through."""


def record_start(folder: RunFolder, model: ModelConfig, config: TrainConfig, plan: Plan, how: RunningAs) -> None:
    """Write run.json, which says what really runs, with one entry for each start; status.json says that it runs."""
    document = {
        "model": asdict(model),
        "train": asdict(config),
        "recipe_hash": recipe_hash(model, config),
        "plan": {**asdict(plan), "global_batch": plan.global_batch, "train_tokens": plan.train_tokens},
        "dataset": how.dataset,
        "starts": [*folder.read_starts(), describe_start(how.from_step, how.restart, how.device_names, ROOT)],
    }
    write_json(folder.run_json, document)
    folder.write_status("running", how.from_step - 1 if how.from_step else None)


def report_nothing_to_do(folder: RunFolder, plan: Plan, state: TrainState) -> None:
    """Say that the run has got as far as it was asked to; its last process may have died before it could say so."""
    if state.next_step >= plan.global_steps:
        print(f"{folder.path} is already complete: {state.next_step:,} global steps")
        if folder.read_status().get("state") != "complete":
            folder.write_status("complete", state.next_step - 1, 0)
    else:
        print(f"{folder.path} has already done {state.next_step:,} global steps, as many as --max-steps asks for")


def report_end(folder: RunFolder, plan: Plan, state: TrainState) -> None:
    """Print the four closing lines, and before them where --max-steps stopped the run; write the final status."""
    if state.next_step < plan.global_steps:
        print(
            f"Stopped by --max-steps after {state.next_step:,} of {plan.global_steps:,} global steps, saved; "
            "without it the same command goes on"
        )
    # A scheduled checkpoint after the last step has just closed its interval.
    loss = state.interval_loss if state.interval_steps else state.last_interval_loss
    print(f"Training complete in {state.elapsed_seconds:,.3f} seconds")
    print(f"Tokens seen: {state.tokens:,}")
    print(f"Throughput: {state.tokens / state.elapsed_seconds:,.0f} tokens/second")
    print(f"Final train loss: {math.nan if loss is None else loss:.3f}")
    if state.next_step == plan.global_steps:
        folder.write_status("complete", state.next_step - 1, 0)
    else:
        folder.write_status("stopped", state.next_step - 1, 0, "--max-steps")
