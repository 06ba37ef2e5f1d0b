"""How a run's state comes from disk and goes there, on all ranks alike; rank 0 alone reads and writes."""

import torch

from harness.engine import checkpoint, distributed, resume
from harness.engine.costs import cost_of
from harness.engine.distributed import Launch
from harness.engine.identity import DATA_FINGERPRINT, ResumeIdentity
from harness.engine.resume import ResumePoint, ResumeRequest
from harness.run.errors import ConfigError, DataError, PeerError
from harness.run.files import write_text
from harness.run.plan import Plan
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


def choose_resume_point(request: RunRequest, launch: Launch, plan: Plan, identity: ResumeIdentity) -> ResumePoint:
    """Decide where to begin, the same on every rank, and check that the disk has room for a checkpoint."""

    def choose() -> ResumePoint:
        wanted = ResumeRequest(request.arguments.checkpoint, request.arguments.fresh, launch.restart)
        point = resume.choose_resume_point(request.folder, wanted, identity, parameter_shapes(request.model_config))
        checkpoint.require_room(request.folder, cost_of(request.model_config, request.config, plan).checkpoint_bytes)
        return point

    return distributed.run_on_rank0(launch, choose)


def keep_tokenizer(request: RunRequest, launch: Launch, tokenizer: Tokenizer | None) -> None:
    """Copy the data's tokenizer into the run's folder; raises DataError on all ranks where the run has another one.

    With --fresh the other one is moved aside, unless the weights that the run starts from were trained with it.
    """
    folder, file = request.folder, request.folder.tokenizer_json

    def keep() -> None:
        assert tokenizer is not None
        is_begun = file.is_file() or bool(folder.checkpoint_steps())
        if is_begun and not (request.arguments.fresh and request.config.initial_weights is None):
            own = tokenizer_of_model(file, request.model_config.vocab_size)
            if own is not None and own.identity != tokenizer.identity:
                raise DataError(
                    f"dataset {request.config.scored_dataset}: found tokens of the tokenizer {tokenizer}, wanted those of "
                    f"the run's ({own}); --fresh starts over"
                )
            return
        folder.set_aside(file)
        if tokenizer.document is not None:
            write_text(file, tokenizer.document)

    if tokenizer is not None:
        distributed.run_on_rank0(launch, keep)


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
