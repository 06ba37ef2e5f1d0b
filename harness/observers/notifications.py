"""Sends messages when training starts, stops, fails or finishes, through any service that the apprise library knows.

A separate process sends each message (`python -m harness.observers.notifications`), so a dead network delays only
the end of training, and by a few seconds at most. Addresses often contain passwords: they are read from the
environment, passed to that process through standard input, and neither written nor printed.
"""

import json
import logging
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Self

from harness.run.errors import ConfigError
from harness.run.files import ROOT
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.status import Status
from harness.run.units import in_hours

VARIABLE = "HARNESS_NOTIFY"
END_SECONDS = 5.0  # how long the trainer waits for its last message
SEND_SECONDS = 30  # how long sending a message may take
ENDINGS = {"complete": "finished", "stopped": "stopped", "failed": "failed"}


class Messenger:
    """Sends messages about a run; leaving the context sends how the run ended, as status.json says.

    So status.json must be written before the context is left.
    """

    def __init__(self, folder: RunFolder, addresses: str) -> None:
        """Take apprise's URLs, separated by spaces; raises ConfigError if apprise is needed and missing."""
        self._folder = folder
        self._addresses = addresses.split()
        self._has_begun = False
        if self._addresses and find_spec("apprise") is None:
            raise ConfigError(f"{VARIABLE}: found an address, wanted the package apprise: pip install '.[notify]'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._has_begun or kind is not None:
            self.end()

    def begin(self) -> None:
        """Send that training starts or resumes; reads run.json and does not wait."""
        self._has_begun = True
        self._send("training started", describe_start)

    def end(self) -> None:
        """Send how training ended, as status.json says; waits up to END_SECONDS."""
        state = Status.read(self._folder.status_json).state
        process = self._send(f"training {ENDINGS.get(state, 'ended')}", describe_end)
        if process is not None:
            with suppress(subprocess.TimeoutExpired):  # it continues in the background
                process.wait(END_SECONDS)

    def _send(self, what: str, describe: Callable[[RunFolder], str]) -> subprocess.Popen[bytes] | None:
        if not self._addresses:
            return None
        command = [sys.executable, "-m", "harness.observers.notifications"]
        title = f"{self._folder.path.name}: {what}"
        try:
            message = {"addresses": self._addresses, "title": title, "body": describe(self._folder)}
            # In a new session, so that Ctrl-C, or torchrun ending all ranks, does not kill it.
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(json.dumps(message).encode())
        except (OSError, LookupError) as error:  # a message must not end training
            print(f"warning: a message could not be sent ({error})", file=sys.stderr)
            return None
        return process


def describe_start(folder: RunFolder) -> str:
    """Return the text of a start: from which global step and on which devices."""
    record = RunRecord.read(folder.run_json)
    start = record.starts[-1]
    devices = " and ".join(f"{count} x {name}" for name, count in Counter(start["devices"]).items())
    return f"{socket.gethostname()}: from global step {start['from_step']:,} of {_steps(record)}, on {devices}"


def describe_end(folder: RunFolder) -> str:
    """Return the text of an end: how far the run got and why it ended."""
    status, record = Status.read(folder.status_json), RunRecord.read(folder.run_json)
    lines = folder.metrics.read()
    parts = ["before the first global step"]
    if lines:
        last = lines[-1]
        parts = [f"global step {last['step']:,} of {_steps(record)}"]
        losses = [(name, last.get(f"{key}/loss")) for name, key in (("train", "train"), ("validation", "val"))]
        parts += [f"{name} loss {loss:.3f}" for name, loss in losses if loss is not None]
        parts.append(f"{in_hours(last['elapsed'] / 3600)} of training")
        if last.get("cost") is not None:
            parts.append(f"cost {last['cost']:,.2f} {record.train.get('currency') or ''}".rstrip())
    text = f"{socket.gethostname()}: {', '.join(parts)}"
    return f"{text}\n{status.reason}" if status.reason else text


def _steps(record: RunRecord) -> str:
    return "?" if record.global_steps is None else f"{record.global_steps:,}"


def main() -> None:
    """Send the message read from standard input."""
    import apprise

    signal.alarm(SEND_SECONDS)
    logging.disable()  # libraries would log the addresses
    message = json.load(sys.stdin)
    sender = apprise.Apprise()
    unknown = [number for number, address in enumerate(message["addresses"], 1) if not sender.add(address)]
    for number in unknown:
        print(f"warning: {VARIABLE}: address {number} is not one that apprise knows", file=sys.stderr)
    if len(unknown) < len(message["addresses"]) and not sender.notify(title=message["title"], body=message["body"]):
        print(f"warning: {VARIABLE}: the message {message['title']!r} did not reach every address", file=sys.stderr)


if __name__ == "__main__":
    main()
