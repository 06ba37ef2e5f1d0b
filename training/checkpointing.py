"""How a run's state comes from disk and goes there, on all ranks alike; rank 0 alone reads and writes."""

import torch

from data import Splits
from harness.engine import checkpoint, distributed, resume
from harness.engine.costs import cost_of
from harness.engine.distributed import Launch
from harness.engine.identity import DATA_FINGERPRINT, ResumeIdentity
from harness.engine.resume import ResumePoint, ResumeRequest
from harness.run.errors import ConfigError, DataError, PeerError
from harness.run.files import write_text
from harness.run.status import Status
from harness.tokens.tokenizer import Tokenizer, tokenizer_of_model
from training.arguments import RunRequest
from training.context import TrainContext, parameter_shapes


def require_equal_runs(request: RunRequest, launch: Launch, identity: ResumeIdentity, stop_step: int) -> None:
    """Check that all ranks are about to train the same run; raises the same error on all, naming what differs.

    Machines may have copies of their own of the run's folder and of the dataset.
    """
    keys = dict(identity.must_match)
    fingerprint = {DATA_FINGERPRINT: keys.pop(DATA_FINGERPRINT)}
    distributed.require_equal_across_ranks(launch, fingerprint, DataError)
    distributed.require_equal_across_ranks(
        launch, {**keys, **identity.batch_split, "--max-steps": stop_step}, ConfigError
    )
    distributed.require_equal_across_ranks(launch, {"torch": torch.__version__}, PeerError)
    if not request.arguments.fresh:
        newest = max(request.folder.checkpoint_steps(), default=-1)
        steps = [int(step) for step in distributed.gather_strings(launch, str(newest))]
        distributed.run_on_rank0(launch, lambda: resume.require_newest_on_rank0(steps))


def choose_resume_point(request: RunRequest, launch: Launch, splits: Splits, identity: ResumeIdentity) -> ResumePoint:
    """Decide where to begin, the same on every rank, and check that tokenizer and disk do for it."""

    def choose() -> ResumePoint:
        if splits.tokenizer is not None:
            _keep_tokenizer(request, splits.tokenizer)
        wanted = ResumeRequest(request.arguments.checkpoint, request.arguments.fresh, launch.restart)
        point = resume.choose_resume_point(request.folder, wanted, identity, parameter_shapes(request.model_config))
        cost = cost_of(request.model_config, request.config, splits.plan)
        checkpoint.require_room(request.folder, cost.checkpoint_bytes)
        return point

    return distributed.run_on_rank0(launch, choose)


def _keep_tokenizer(request: RunRequest, tokenizer: Tokenizer) -> None:
    """Copy the data's tokenizer into the run's folder; raises DataError where the run has another one.

    With --fresh the other one is moved aside, unless the weights that the run starts from were trained with it.
    """
    folder, file = request.folder, request.folder.tokenizer_json
    is_begun = file.is_file() or bool(folder.checkpoint_steps())
    own = tokenizer_of_model(file, request.model_config.vocab_size) if is_begun else None
    if own is not None and own.identity != tokenizer.identity:
        if not request.arguments.fresh or request.config.initial_weights is not None:
            raise DataError(
                f"dataset {request.config.scored_dataset}: found tokens of the tokenizer {tokenizer}, wanted those "
                f"of the run's ({own}); --fresh starts over"
            )
        folder.set_aside(file)
    if tokenizer.document is not None and not file.is_file():
        write_text(file, tokenizer.document)


def save_checkpoint(context: TrainContext, is_scheduled: bool, validation: float | None, waits: bool) -> None:
    """Copy a checkpoint on rank 0 and write it while training goes on, or wait for it; fails alike on all ranks.

    A scheduled one ends the interval and may be the best. An error in writing the one before is raised here.
    """
    is_best = is_scheduled and context.state.close_interval(validation)

    def begin() -> None:
        context.checkpoint_writer.finish()  # one at a time, in memory and on disk
        taken = checkpoint.snapshot(
            context.model, context.optimizer, context.scaler, context.state, context.identity, context.average
        )
        Status("running", taken.step).write(context.folder.status_json)
        keep = context.config.checkpoints_to_keep
        context.checkpoint_writer.start(lambda: checkpoint.save(context.folder, taken, keep, is_best))
        if waits:
            context.checkpoint_writer.finish()

    distributed.run_on_rank0(context.launch, begin)
