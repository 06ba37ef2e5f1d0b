"""The observers of a run: charts, loggers and notifications. They are told what happens and influence nothing."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Self

from harness.observers.charts import ChartPainter
from harness.observers.loggers import Loggers
from harness.observers.notifications import VARIABLE, Messenger
from harness.run.config import LoggerName
from harness.run.errors import HarnessError
from harness.run.run_folder import RunFolder
from harness.run.status import record_failure


class Observers:
    """The observers of one run, each working in a separate process; they do nothing unless `is_active` (rank 0)."""

    def __init__(
        self, folder: RunFolder, loggers: Sequence[LoggerName], environment: Mapping[str, str], is_active: bool
    ) -> None:
        self._folder = folder
        self._is_active = is_active
        self._painter = ChartPainter(folder)
        self._loggers = Loggers(loggers if is_active else (), folder, environment)
        self._messenger = Messenger(folder, environment.get(VARIABLE, "") if is_active else "")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for observer in (self._painter, self._loggers, self._messenger):
            self._stack.enter_context(observer)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def begin(self, step: int) -> None:
        """Report that training begins at global step `step`."""
        if self._is_active:
            self._loggers.start(step)
            self._messenger.begin()

    def after_step(self) -> None:
        """Report that a global step is done; never waits."""
        if self._is_active:
            self._painter.draw_if_due()

    def record_failure(self, error: HarnessError) -> None:
        """Record an error in status.json and send a notification, for a process about to exit without cleaning up."""
        if self._is_active:
            record_failure(self._folder.status_json, error)
            self._messenger.end()
