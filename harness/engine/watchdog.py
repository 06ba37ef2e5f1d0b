"""Requests to stop, and a watchdog over the processes that this one depends on: its launcher and the other ranks.

A signal or a lost launcher only sets a flag, which the training loop reads at the end of a step. A lost rank is
different: the step would never end, because its collectives wait for that rank. So the watchdog, on a thread of its
own, ends the process itself.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

from harness.run.errors import HarnessError, PeerError, StopRequestedError
from harness.run.streams import fit_to_print

HEARTBEAT_SECONDS = 0.5
# A rank that is silent for so long when this one has been told to stop is why it was told: torchrun ends the others
# when one has died, and kills them 30 seconds later.
SILENT_SECONDS_WHEN_STOPPING = 10.0
# Before the collectives' own timeout (distributed.COLLECTIVE_TIMEOUT), at which NCCL ends a process without a word.
STUCK_SECONDS = 570.0
# An orphaned worker may take this long to save its state before it leaves without.
ORPHAN_SECONDS = 8.0
STOPPING = b"\nstopping once this step is done and saved; asked again, at once and without saving\n"
T = TypeVar("T")


class Store(Protocol):
    """What the watchdog needs of torch's key-value store."""

    def set(self, key: str, value: str, /) -> None:
        """Store a value."""

    def check(self, keys: list[str], /) -> bool:
        """Say whether all keys are there."""

    def get(self, key: str, /) -> bytes:
        """Return a value, waiting for it."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Return several values, waiting for them."""


class StopRequest:
    """Remembers SIGTERM, SIGINT or SIGHUP so that the loop can stop at a step's end; a second signal ends at once.

    A handler sets a flag and, with `speaks`, says so: a step may take a minute. It may run at any moment, so it must
    neither wait nor speak to other ranks. Until `listen` a signal does what it always does; the end of the `with`
    block puts that back.

    Python runs no handler while the main thread waits inside CUDA, perhaps for a rank that died. So the system also
    writes every signal into a pipe, where another thread finds it (`has_arrived`).
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, speaks: bool = False) -> None:
        self.requested = False
        self._speaks = speaks
        self._former: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._has_arrived = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                os.close(end)

    def request(self) -> None:
        """Ask the loop to stop at the end of the step."""
        self.requested = True

    def listen(self) -> None:
        """Begin to listen; what is ignored, as SIGHUP is under nohup, stays ignored."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in self.signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._remember)

    def has_arrived(self) -> bool:
        """Say whether a signal has come, even if no handler could run yet; for one thread beside the main one."""
        if self._pipe is not None and not self._has_arrived:
            with suppress(BlockingIOError):
                self._has_arrived = any(number in self.signals for number in os.read(self._pipe[0], 512))
        return self._has_arrived

    def _remember(self, _: int, frame: FrameType | None) -> None:
        self.request()
        if self._speaks:
            with suppress(OSError):  # as of a terminal that was closed
                os.write(sys.stderr.fileno(), STOPPING)  # printing could be inside of a print
        # Left to the system, a second signal ends the process even while it waits inside a collective.
        for number in self._former:
            signal.signal(number, signal.SIG_DFL)


class Watchdog:
    """Shows the other ranks that this one lives, notices when one of them does not, or when the launcher is gone.

    Every rank counts up in the store twice a second; a count that stands still belongs to a rank that died, was
    stopped, or cannot be reached. After `timeout_seconds` of that, or less where this rank has been told to stop,
    `give_up` is told and the process ends, whatever it is waiting in: a collective may never return. So it does where
    all ranks live but training has not got on for nearly as long as a collective may take. When the launcher dies,
    `stop.requested` is set, and a process that has not ended a few seconds later is ended. `launcher` is its process
    number; without one there is nothing to watch.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        stop: StopRequest,
        give_up: Callable[[HarnessError], None],
        launcher: int | None,
    ) -> None:
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._give_up = give_up
        self._launcher = launcher
        self._store: Store | None = None
        self._step: int | None = None
        self._got_on_at = 0.0
        self._heartbeats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._launcher is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def announce(self, store: Store) -> None:
        """Put this rank's first heartbeat into a store that it shares with the others."""
        store.set(f"alive/{self._rank}", self._heartbeat())

    def follow(self, store: Store) -> None:
        """Begin to watch the other ranks through `store`, a connection of its own; all must have announced."""
        self._store = store

    def reached(self, step: int) -> None:
        """Note the global step that this rank is at."""
        self._got_on_at = time.monotonic()
        self._step = step

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, each a sign that this rank gets on, for work between two steps that may take long."""
        for item in items:
            self._got_on_at = time.monotonic()
            yield item

    def report(self, error: BaseException, details: str) -> None:
        """Store why this rank fails, for the other ranks to report."""
        if self._store is not None and not isinstance(error, PeerError | StopRequestedError):
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._store.set(f"failed/{self._rank}", fit_to_print(f"{self._place()}: {text}\n{details}"))

    def diagnose(self, reason: str) -> PeerError:
        """Find out, in about a second, which ranks a failed collective missed, and what became of them.

        If a rank left word of why it failed, the error says that, with its traceback as details.
        """
        if self._store is None:
            return PeerError(f"rank {self._rank}: {reason}")
        try:
            before = self._read_heartbeats(self._store)
            time.sleep(2.5 * HEARTBEAT_SECONDS)
            after = self._read_heartbeats(self._store)
            for rank in self._others:
                if self._store.check([f"failed/{rank}"]):
                    line, _, details = self._store.get(f"failed/{rank}").decode().partition("\n")
                    return PeerError(f"rank {rank} failed {line}", details=details)
        except Exception as error:  # torch's DistErrors: the store died with the launcher or another machine
            return PeerError(f"rank {self._rank}: {reason}; the launcher's store is gone too ({error})")
        lost = [rank for rank in self._others if before[rank] == after[rank]]
        if not lost:
            return PeerError(f"rank {self._rank} {self._place()}: {reason}; all ranks are alive")
        return self._loss(lost, "died or was stopped")

    def _run(self) -> None:
        heard: dict[int, tuple[str, float]] = {}
        orphaned_at: float | None = None
        while not self._done.wait(HEARTBEAT_SECONDS):
            now = time.monotonic()
            if orphaned_at is None and os.getppid() != self._launcher:
                orphaned_at = now
                self._stop.request()
            if orphaned_at is not None:
                if now - orphaned_at > ORPHAN_SECONDS:
                    self._end(PeerError(f"rank {self._rank}: the launcher is gone; the newest checkpoint stands"))
                continue  # the store was probably the launcher's
            if self._store is None:
                continue
            try:
                self.announce(self._store)
                heartbeats = self._read_heartbeats(self._store)
            except Exception as error:
                if os.getppid() == self._launcher and not self._done.is_set():
                    self._end(PeerError(f"rank {self._rank}: the launcher's store is gone ({error})"))
                continue
            for rank, heartbeat in heartbeats.items():
                if heard.get(rank, ("", 0.0))[0] != heartbeat:
                    heard[rank] = (heartbeat, now)
            patience = self._timeout_seconds
            if self._stop.has_arrived():
                patience = min(patience, SILENT_SECONDS_WHEN_STOPPING)
            lost = [rank for rank, (_, since) in heard.items() if now - since > patience]
            if lost:
                self._end(self._loss(lost, f"gave no sign of life for {patience:g} seconds"))
            if self._others and self._step is not None and now - self._got_on_at > STUCK_SECONDS:
                stuck = (
                    f"stuck for {STUCK_SECONDS:g} seconds {self._place()}, though all ranks live: one of them hangs"
                )
                self._end(PeerError(f"rank {self._rank}: {stuck}"))

    def _heartbeat(self) -> str:
        self._heartbeats += 1
        return str(self._heartbeats)

    def _read_heartbeats(self, store: Store) -> dict[int, str]:
        values = store.multi_get([f"alive/{rank}" for rank in self._others])
        return {rank: value.decode() for rank, value in zip(self._others, values, strict=True)}

    def _loss(self, lost: list[int], what: str) -> PeerError:
        # All ranks are at the same step, or nearly: none gets far without the others.
        named = " and ".join(f"rank {rank}" for rank in lost)
        return PeerError(f"lost {named} {self._place()}: it {what}")

    def _place(self) -> str:
        return "before the first step" if self._step is None else f"at global step {self._step:,}"

    def _end(self, error: HarnessError) -> None:
        try:
            print(fit_to_print(error.lines[0]), file=sys.stderr, flush=True)
            self._give_up(error)
        finally:  # whatever cannot be written, this process ends
            os._exit(error.exit_status)
