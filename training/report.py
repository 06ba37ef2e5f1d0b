"""What a start of a run says at its end, and the last status it leaves."""

import math
import sys
from collections import Counter

from harness.run.config import TrainConfig
from harness.run.plan import Plan
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from harness.run.train_state import TrainState


def report_devices(names: list[str], device_type: str, config: TrainConfig) -> None:
    """Name what a run trains on, given the device of every rank; warn of a precision that is slow there."""
    print("Training on " + ", ".join(f"{count} x {name}" for name, count in Counter(names).items()))
    if device_type == "cpu" and config.use_amp and config.amp_dtype == "float16":
        print(
            'warning: float16 is many times slower than float32 on a CPU; write "use_amp": false in train.json',
            file=sys.stderr,
        )


def report_nothing_to_do(folder: RunFolder, plan: Plan, state: TrainState) -> None:
    """Say that the run has got as far as it was asked to; its last process may have died before it could say so."""
    if state.next_step < plan.global_steps:
        print(f"{folder.path} has already done {state.next_step:,} global steps, as many as --max-steps asks for")
    else:
        print(f"{folder.path} is already complete: {state.next_step:,} global steps")
    known, last = Status.read(folder.status_json), _last_status(plan, state)
    if (known.state, known.exit_code) != (last.state, last.exit_code):
        last.write(folder.status_json)


def report_end(folder: RunFolder, plan: Plan, state: TrainState) -> None:
    """Print the four closing lines, the first of them another where --max-steps stopped the run; write the status."""
    is_complete = state.next_step == plan.global_steps
    # A scheduled checkpoint after the last step has just closed its interval.
    loss = state.interval_loss if state.interval_steps else state.last_interval_loss
    seconds = f"{state.elapsed_seconds:,.3f} seconds"
    if is_complete:
        print(f"Training complete in {seconds}")
    else:
        print(
            f"Stopped by --max-steps after {state.next_step:,} of {plan.global_steps:,} global steps and {seconds}, "
            "saved; without it the same command goes on"
        )
    print(f"Tokens seen: {state.tokens:,}")
    print(f"Throughput: {state.tokens / state.elapsed_seconds:,.0f} tokens/second")
    print(f"Final train loss: {math.nan if loss is None else loss:.3f}")
    _last_status(plan, state).write(folder.status_json)


def _last_status(plan: Plan, state: TrainState) -> Status:
    if state.next_step == plan.global_steps:
        return Status("complete", state.next_step - 1, 0)
    return Status("stopped", state.next_step - 1, 0, "--max-steps")
