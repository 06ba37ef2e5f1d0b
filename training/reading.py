"""Read a rank's micro-batches ahead of training, so that no step is lost where the data are lost."""

from torch import Tensor

from data import SyntheticData, TrainData
from harness.engine import distributed
from harness.engine.distributed import Launch
from harness.run.errors import DataError
from harness.run.plan import Plan

STEPS_AHEAD = 2  # one in which a rank tells the others, and one in which they agree and save


class ReadAhead:
    """Reads one rank's micro-batches two global steps before they are trained on.

    Where that fails, this rank asks all to stop, as after SIGTERM; what is in hand lasts until all have agreed.
    """

    def __init__(self, source: TrainData | SyntheticData, rank: int, plan: Plan, steps: range) -> None:
        """Read for the first two of the global `steps`; raises DataError."""
        self.failure: DataError | None = None
        self._source, self._rank, self._plan, self._steps = source, rank, plan, steps
        self._in_hand = {step: self._read(step) for step in steps[:STEPS_AHEAD]}

    def take(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return tokens and targets of each accumulation step of a global step, each (B, T) int64 on the CPU."""
        batches = self._in_hand.pop(step) if step in self._in_hand else self._read(step)
        later = step + STEPS_AHEAD
        if later in self._steps and self.failure is None:
            try:
                self._in_hand[later] = self._read(later)
            except DataError as error:
                self.failure = error
        return batches

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return [
            self._source.microbatch(step, accumulation_step, self._rank)
            for accumulation_step in range(self._plan.accumulation_steps)
        ]


def require_data(launch: Launch, reader: ReadAhead, step: int) -> None:
    """Raise DataError on every rank, naming what is wrong, where any rank's data failed before global step `step`."""
    said = distributed.gather_strings(launch, str(reader.failure or ""))
    failures = list(dict.fromkeys(words for words in said if words))
    if failures:
        saved = f"saved after global step {step:,}; with the data as they were, the same command goes on"
        raise DataError(*([*failures, saved] if launch.is_main else []))
