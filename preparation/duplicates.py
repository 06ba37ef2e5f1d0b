"""Which documents were seen before, by 16-byte digests, in about 32 bytes of memory a document."""

from pathlib import Path
from typing import IO

import numpy as np

DIGEST_BYTES = 16
RECENT = 2**18


class SeenDocuments:
    """A set of digests that only grows: sorted arrays for most, a Python set for the recent ones.

    Every new digest is appended to a file, from which the set is made again after an interruption.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._file: IO[bytes] = path.open("ab")
        self._file.truncate(DIGEST_BYTES * count)
        self.count = count
        self._recent: set[bytes] = set()
        # Compared as padded bytes: all have the same length, so a zero at the end does no harm.
        self._sorted = np.sort(np.fromfile(path, f"S{DIGEST_BYTES}", count))

    def is_new(self, digest: bytes) -> bool:
        """Whether a digest was not there, and is now."""
        if digest in self._recent:
            return False
        wanted = np.array(digest, dtype=self._sorted.dtype)
        place = int(np.searchsorted(self._sorted, wanted))
        if place < len(self._sorted) and self._sorted[place] == wanted:
            return False
        self._recent.add(digest)
        self._file.write(digest)
        self.count += 1
        if len(self._recent) >= RECENT:
            recent = np.sort(np.array(list(self._recent), dtype=self._sorted.dtype))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, recent), recent)
            self._recent.clear()
        return True

    def flush(self) -> IO[bytes]:
        """Hand all that was written to the system, and give the file so that it can be made durable."""
        self._file.flush()
        return self._file

    def close(self) -> None:
        """Close the file."""
        self._file.close()
