"""One piece of work at a time beside training, on a thread of its own."""

import threading
from collections.abc import Callable
from typing import Self


class BackgroundTask:
    """Runs what it is given while its caller goes on; an error waits until somebody asks.

    The end of the `with` block waits for what is under way. Its error is raised there unless another is on its way.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join()

    @property
    def has_failed(self) -> bool:
        """Say whether what ran last failed, without waiting."""
        return self._error is not None

    def start(self, action: Callable[[], object]) -> None:
        """Begin `action` once what is under way is done; raises what that raised."""
        self.finish()

        def run() -> None:
            try:
                action()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for what is under way; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
