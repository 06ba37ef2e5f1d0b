"""Measure what goes into metrics besides training: validation loss, a sample, and whether the first loss is sane."""

import math
import sys
from contextlib import suppress

import torch

import data
from harness.engine import distributed
from harness.engine.evaluate import sequence_losses
from harness.engine.failpoints import failpoint
from harness.engine.loss import first_loss_warning
from harness.engine.metrics import StepLog
from harness.engine.sampling import SampleSettings, continue_text
from harness.run.errors import CheckpointError, DataError
from harness.run.files import json_number
from harness.run.plan import validation_sequences
from harness.tokens.randomness import stream_seed
from training.context import TrainContext


def validate_and_sample(context: TrainContext, is_scheduled: bool) -> tuple[float | None, dict[str, object]]:
    """Return the validation loss, None where the run does not validate, and what to add to the step's metrics.

    A sample is drawn at a scheduled checkpoint, on rank 0. Waits for the device.
    """
    validation: float | None = None
    measured: dict[str, object] = {}
    failpoint("eval", context.state.next_step - 1)
    if context.splits.validation is not None:
        validation = validation_loss(context)
        measured["val/loss"] = json_number(validation)
    if is_scheduled and context.launch.is_main and context.tokenizer is not None:
        settings = SampleSettings(seed=stream_seed("sample", context.config.random_seed))
        with suppress(CheckpointError):  # of weights that are not numbers; saving, which is next, tells all ranks
            measured["sample"] = continue_text(
                context.model, context.model_config, context.tokenizer, context.config.sample_prompt, settings
            )
    return validation, measured


def validation_loss(context: TrainContext) -> float:
    """Return the mean loss over the first validation_batches global batches of that split, on every rank.

    It is NaN where a rank could not read its share; the run then stops at the next global step.
    """
    assert context.splits.validation is not None
    launch, plan = context.launch, context.plan
    sequences = validation_sequences(context.config, plan)
    share = range(sequences * launch.rank // launch.world_size, sequences * (launch.rank + 1) // launch.world_size)
    batches = data.evaluation_batches(
        context.splits.validation, context.config.start_val_token, share, plan.context_length, plan.microbatch_size
    )
    try:
        with context.autocast():
            own = sequence_losses(context.model, context.watchdog.watching(batches), context.device).sum()
    except DataError as error:  # the others are waiting for this rank's share: they get one that is no number
        context.reader.failure, own = error, math.nan
    total = torch.tensor([own], dtype=torch.float32, device=context.device)
    return float(distributed.gather(launch, total).cpu().double().sum()) / sequences  # MPS has no float64


def warn_of_first_loss(context: TrainContext, log: StepLog) -> None:
    """Print one line if the first loss is not that of an untrained model, on rank 0."""
    assert log.last is not None
    warning = first_loss_warning(log.last.loss, context.model, context.model_config.vocab_size)
    if warning is not None and context.launch.is_main:
        print(warning, file=sys.stderr)
