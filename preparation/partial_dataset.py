"""An unfinished dataset in OUT_DIR/.partial, from which an interrupted preparation resumes.

    tokenizer.json                               unless it is GPT-2's
    train.safetensors  validation.safetensors    tokens so far, without a header
    digests                                      of the documents so far, if duplicates are dropped
    download/                                    the one file that is being read
    progress.json                                how much of each is complete; replaced atomically

On resuming, whatever a file holds beyond progress.json is cut off. So a kill loses only the work since the last save.
"""

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.run import locks
from harness.run.errors import ConfigError
from harness.run.files import fsync_folder, read_json, write_json, write_text
from harness.tokens.token_files import SPLITS
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer
from preparation.selection import PreparationSettings, SeenDocuments
from preparation.sources import PARTIAL_FOLDER, SourceFile
from preparation.token_writer import SplitCounts, TokenWriter

SAVE_SECONDS = 10.0
LAYOUT = 2
"""Version of progress.json and of how texts are cut; work of another version is not resumed."""


@dataclass
class PreparationProgress:
    """How much of the source is in the files."""

    files: int = 0
    """Source files that were read completely."""
    items: int = 0
    """Items of the next source file that were read."""
    commit: str | None = None
    """Hub commit that is read."""
    train: SplitCounts = field(default_factory=SplitCounts)
    validation: SplitCounts = field(default_factory=SplitCounts)
    digests: int = 0
    """Digests of different documents in the file `digests`."""
    empty_documents: int = 0
    bad_documents: int = 0
    first_bad: str = ""
    """Why the first of them could not be read."""
    duplicates: int = 0
    keeps_long: bool = True
    """Whether the long document that is being read is kept, not dropped as a duplicate."""
    is_divided: bool = False
    """Whether all is read and both splits have their final documents."""


class PartialDataset:
    """The open files of an unfinished dataset."""

    def __init__(
        self, folder: Path, settings: PreparationSettings, progress: PreparationProgress, tokenizer: Tokenizer
    ) -> None:
        self.folder = folder
        self.progress = progress
        self.settings = settings
        self.tokenizer = tokenizer
        self.sources: Sequence[SourceFile] = []
        self._saved_at = time.monotonic()
        self.train = TokenWriter(folder / "train.safetensors", progress.train, tokenizer)
        self.validation = TokenWriter(folder / "validation.safetensors", progress.validation, tokenizer)
        self.seen = SeenDocuments(folder / "digests", progress.digests) if settings.drop_duplicates else None

    def save_if_due(self) -> None:
        """Save if the last save was over SAVE_SECONDS ago."""
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Make the files durable, then record their lengths in progress.json."""
        for writer in (self.train, self.validation):
            writer.sync()
        if self.seen is not None:
            self.seen.sync()
            self.progress.digests = self.seen.count
        done = self.sources[: self.progress.files + (self.progress.items > 0)]
        sources = [[file.name, file.size, file.mtime_ns] for file in done]
        value = {"layout": LAYOUT, "settings": self.settings.stored(), "sources": sources, **asdict(self.progress)}
        write_json(self.folder / "progress.json", value)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        for file in (self.train, self.validation, self.seen):
            if file is not None:
                file.close()


@contextmanager
def locked(out_dir: Path) -> Iterator[Path]:
    """Yield OUT_DIR/.partial, locked for this process; raises RunLockedError.

    If nothing was saved in the block, the folders made for it are deleted again.
    """
    folder = out_dir / PARTIAL_FOLDER
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder, "another prepare_dataset.py is running in it"):
        try:
            yield folder
        finally:
            if not (folder / "progress.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                for path in made:
                    if path.is_dir() and not any(path.iterdir()):
                        path.rmdir()


def load_progress(folder: Path, settings: PreparationSettings) -> PreparationProgress | None:
    """Read the progress of earlier work, None if there is none; raises ConfigError if its settings differ."""
    if not (folder / "progress.json").exists():
        return None
    value = read_json(folder / "progress.json")
    hint = "wanted the same command again, or --fresh to start over"
    if value.get("layout") != LAYOUT or not isinstance(value.get("settings"), dict):
        raise ConfigError(f"{folder}: found work of another version, {hint}")
    if difference := settings.difference(value["settings"]):
        raise ConfigError(f"{folder}: found unfinished work with other options ({difference}), {hint}")
    try:
        names = {name: value[name] for name in PreparationProgress.__dataclass_fields__}
        return PreparationProgress(**{**names, **{split: SplitCounts(**value[split]) for split in SPLITS}})
    except (KeyError, TypeError):
        raise ConfigError(f"{folder}: found damaged work, {hint}") from None


def discard(folder: Path) -> None:
    """Delete earlier work, except a download, which may be useful again."""
    for name in ("progress.json", "digests", TOKENIZER_FILE, *(f"{split}.safetensors" for split in SPLITS)):
        (folder / name).unlink(missing_ok=True)


def check_sources(folder: Path, sources: Sequence[SourceFile]) -> None:
    """Raise ConfigError if a source file that was read, completely or in part, has changed since."""
    done = read_json(folder / "progress.json").get("sources", [])
    now = [[file.name, file.size, file.mtime_ns] for file in sources[: len(done)]]
    if now != done:
        changed = next(old[0] for old, new in itertools.zip_longest(done, now) if old != new)
        raise ConfigError(
            f"{folder}: {changed} was already read and has changed since, wanted the same sources, "
            "or --fresh to start over"
        )


def move_into_place(
    folder: Path, progress: PreparationProgress, out_dir: Path, metadata: dict[str, str], tokenizer: Tokenizer
) -> None:
    """Write both splits' headers and move the files to OUT_DIR; may be repeated after a kill at any moment."""
    counts = {"train": progress.train, "validation": progress.validation}
    paths = {split: folder / f"{split}.safetensors" for split in SPLITS}
    unplaced = {split: path for split, path in paths.items() if path.exists()}
    for split, path in unplaced.items():
        writer = TokenWriter(path, counts[split], tokenizer)
        writer.finish(metadata)
        writer.close()
    if tokenizer.document is None:
        (out_dir / TOKENIZER_FILE).unlink(missing_ok=True)
    else:
        write_text(out_dir / TOKENIZER_FILE, tokenizer.document)
    for path in unplaced.values():
        path.replace(out_dir / path.name)
    fsync_folder(out_dir)
    (folder / TOKENIZER_FILE).unlink(missing_ok=True)
    (folder / "progress.json").unlink()
