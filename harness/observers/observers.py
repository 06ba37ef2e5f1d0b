"""All who are told what happens in a run and never asked: charts, loggers and messages to a person."""

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
    """The observers of one run, each at work in a process of its own; silent unless `is_active`, as rank 0's are."""

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
        """Tell that training begins at global step `step`."""
        if self._is_active:
            self._loggers.start(step)
            self._messenger.begin()

    def after_step(self) -> None:
        """Tell that a global step is done; never waits."""
        if self._is_active:
            self._painter.draw_now_and_then()

    def record_failure(self, error: HarnessError) -> None:
        """Say why this process is about to be ended, since no context of it will be left."""
        if self._is_active:
            record_failure(self._folder.status_json, error)
            self._messenger.end()
