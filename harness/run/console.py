"""Progress bars on stderr."""

import sys
import threading
from typing import Any

from tqdm import tqdm

from harness.run.streams import LastingStream


def progress_bar(total: int | None, unit: str, **options: Any) -> "tqdm[Any]":
    """Return a progress bar on stderr, updated twice a second, or every 30 seconds in a log file."""
    is_terminal = sys.stderr.isatty()
    stream = LastingStream(getattr(sys.stderr, "unescaped", sys.stderr))  # a bar moves the cursor on purpose
    interval = 0.5 if is_terminal else 30
    # By default bars of several processes are kept apart by a semaphore, which a killed one would leave behind.
    tqdm.set_lock(threading.RLock())
    return tqdm(total=total, unit=unit, file=stream, dynamic_ncols=is_terminal, mininterval=interval, **options)
