"""The work in hand: OUT_DIR/.partial, from which an interrupted preparation goes on.

    train.safetensors  validation.safetensors    tokens so far, without a header
    digests                                      of the documents so far, where duplicates are dropped
    download/                                    the one file that is being read
    progress.json                                how far all of them are known to be whole; replaced atomically

What lies in a file beyond progress.json is cut off, so a kill at any moment costs what was done since it was written.
"""

import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from harness.run.errors import ConfigError, RunLockedError
from harness.run.files import fsync_folder, read_json, write_json
from harness.tokens.token_files import SPLITS
from preparation.duplicates import SeenDocuments
from preparation.settings import Settings
from preparation.sources import WORK_FOLDER, SourceFile
from preparation.token_writer import Counts, TokenWriter

SAVE_SECONDS = 10.0
LAYOUT = 1
"""Of progress.json, and of how a text is cut into pieces; work of another layout is not continued."""


@dataclass
class Progress:
    """How much of the source is in the files: `files` of it whole, and `items` of the next.

    `keeps_long` says whether the long document that is being read is kept. `is_divided` says that reading is over
    and the splits are as they shall be.
    """

    files: int = 0
    items: int = 0
    commit: str | None = None
    train: Counts = field(default_factory=Counts)
    validation: Counts = field(default_factory=Counts)
    digests: int = 0
    empty_documents: int = 0
    duplicates: int = 0
    keeps_long: bool = True
    is_divided: bool = False


class Work:
    """The files of an unfinished preparation, opened where they are known to be whole."""

    def __init__(self, folder: Path, settings: Settings, progress: Progress) -> None:
        self.folder = folder
        self.progress = progress
        self.settings = settings
        self.sources: Sequence[SourceFile] = []
        self._saved_at = time.monotonic()
        self.train = TokenWriter(folder / "train.safetensors", progress.train)
        self.validation = TokenWriter(folder / "validation.safetensors", progress.validation)
        self.seen = SeenDocuments(folder / "digests", progress.digests) if settings.drop_duplicates else None

    def save_if_due(self) -> None:
        """Save, unless that was done a short while ago."""
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Make all that is in the files durable, then say so."""
        for writer in (self.train, self.validation):
            writer.sync()
        if self.seen is not None:
            os.fsync(self.seen.flush().fileno())
            self.progress.digests = self.seen.count
        done = self.sources[: self.progress.files + (self.progress.items > 0)]
        sources = [[file.name, file.size, file.mtime_ns] for file in done]
        value = {"layout": LAYOUT, "settings": asdict(self.settings), "sources": sources, **asdict(self.progress)}
        write_json(self.folder / "progress.json", value)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        for file in (self.train, self.validation, self.seen):
            if file is not None:
                file.close()


@contextmanager
def locked(out_dir: Path) -> Iterator[Path]:
    """Give OUT_DIR/.partial, to this process alone; raises RunLockedError.

    On an error before anything was saved, nothing is left behind.
    """
    folder = out_dir / WORK_FOLDER
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(f"{out_dir}: another prepare_dataset.py is at work in it") from None
    try:
        yield folder
    finally:
        if not (folder / "progress.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        lock.release()


def load_progress(folder: Path, settings: Settings) -> Progress | None:
    """Read how far earlier work came, None where there is none; raises ConfigError where it was other work."""
    if not (folder / "progress.json").exists():
        return None
    value = read_json(folder / "progress.json")
    hint = "wanted the same command again, or --fresh to start over"
    if value.get("layout") != LAYOUT or not isinstance(value.get("settings"), dict):
        raise ConfigError(f"{folder}: found work of another version, {hint}")
    if difference := settings.difference(value["settings"]):
        raise ConfigError(f"{folder}: found unfinished work with other options ({difference}), {hint}")
    try:
        names = {name: value[name] for name in Progress.__dataclass_fields__}
        return Progress(**{**names, **{split: Counts(**value[split]) for split in SPLITS}})
    except (KeyError, TypeError):
        raise ConfigError(f"{folder}: found damaged work, {hint}") from None


def discard(folder: Path) -> None:
    """Forget earlier work, so that none of it is taken for this one's; a download may still be of use."""
    for name in ("progress.json", "digests", *(f"{split}.safetensors" for split in SPLITS)):
        (folder / name).unlink(missing_ok=True)


def check_sources(folder: Path, sources: Sequence[SourceFile]) -> None:
    """Raise ConfigError where a file that was already read, whole or in part, is not as it was."""
    done = read_json(folder / "progress.json").get("sources", [])
    now = [[file.name, file.size, file.mtime_ns] for file in sources[: len(done)]]
    if now != done:
        changed = next(old[0] for old, new in itertools.zip_longest(done, now) if old != new)
        raise ConfigError(
            f"{folder}: {changed} was already read and is not as it was, wanted the same sources, "
            "or --fresh to start over"
        )


def publish(folder: Path, progress: Progress, out_dir: Path, metadata: dict[str, str]) -> None:
    """Give both splits their headers and put them in place; may be repeated after a kill at any moment."""
    counts = {"train": progress.train, "validation": progress.validation}
    paths = {split: folder / f"{split}.safetensors" for split in SPLITS}
    unplaced = {split: path for split, path in paths.items() if path.exists()}
    for split, path in unplaced.items():
        writer = TokenWriter(path, counts[split])
        writer.finish(metadata)
        writer.close()
    for path in unplaced.values():
        path.replace(out_dir / path.name)
    fsync_folder(out_dir)
    (folder / "progress.json").unlink()
