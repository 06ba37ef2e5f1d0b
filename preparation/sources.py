"""Lists the files of a source in a fixed order, and estimates how much disk space their tokens take."""

import glob
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.run.errors import ConfigError, DataError, StorageError

Kind = Literal["text", "jsonl", "parquet", "python-docs", "python-reference"]
KINDS: dict[str, Kind] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".zst")
PARTIAL_FOLDER = ".partial"
WANTED = f"{', '.join(KINDS)} (each also {', '.join(COMPRESSIONS)})"

# Bytes of text per byte on disk, measured on English web text. Parquet compresses about as .gz does, but a file also
# holds other columns.
TEXT_PER_DISK_BYTE = {".gz": 2.7, ".xz": 3.6, ".zst": 3.0, ".parquet": 1.7}


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Its path relative to the source."""
    kind: Kind
    size: int
    """Bytes on disk."""
    path: Path | None = None
    """Its path on this machine; None until it is downloaded."""
    mtime_ns: int = 0

    @property
    def shown(self) -> str:
        """The name to show in errors."""
        return str(self.path or self.name)


def kind_of(name: str) -> tuple[Kind | None, str]:
    """Return a file's kind by its name (None: cannot be read), and its compression suffix or ""."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return KINDS.get(path.with_suffix("").suffix.lower()), suffix
    return KINDS.get(suffix), ""


def local_files(source: str, out_dir: Path) -> list[SourceFile]:
    """Find the files of a folder (at any depth), a glob or a path, sorted by name; raises HarnessError.

    Unfinished work in `out_dir` is left out, so that OUT_DIR may be inside the source or be the source.
    """
    root = Path(source)
    if root.is_dir():
        found = [path for path in _below(root) if kind_of(path.name)[0] and path.is_file()]
    elif root.is_file():
        root, found = root.parent, [root]
    else:
        root = Path(source[: match.start()]).parent if (match := re.search(r"[*?\[]", source)) else root.parent
        found = [path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file()]
    inside = (out_dir / PARTIAL_FOLDER).resolve()
    paths = sorted(path for path in found if not path.resolve().is_relative_to(inside))
    if not paths:
        raise DataError(f"SOURCE: found no file in {source}, wanted {WANTED}")
    return [_local_file(path, root) for path in paths]


def _below(root: Path) -> Iterator[Path]:
    """Yield all paths below a folder, following links to folders; each folder is entered once."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = Path(place).resolve()
        if real in seen:  # a link to a parent, or a second link to the same documents
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in names)


def _local_file(path: Path, root: Path) -> SourceFile:
    kind, _ = kind_of(path.name)
    if kind is None:
        raise ConfigError(f"SOURCE: found {path}, wanted {WANTED}")
    stat = path.stat()
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return SourceFile(name, kind, stat.st_size, path, stat.st_mtime_ns)


def stored_bytes_per_token(vocab_size: int) -> int:
    """Return the bytes on disk of one token."""
    return 2 if vocab_size <= 2**16 else 4


def text_bytes_per_token(vocab_size: int) -> float:
    """Estimate the bytes of English text that a token stands for: 1 of 257 ids, 4 of GPT-2's 50,257."""
    return 1.0 + 0.39 * max(0.0, math.log2(vocab_size) - 8.0)


def token_bytes(files: Sequence[SourceFile], vocab_size: int) -> int:
    """Estimate the bytes of the token files from the sizes on disk and each format's usual compression ratio."""
    total = 0.0
    for file in files:
        _, compression = kind_of(file.name)
        unpacked = file.size * TEXT_PER_DISK_BYTE.get(compression, 1.0)
        text = unpacked * (TEXT_PER_DISK_BYTE[".parquet"] if file.kind == "parquet" else 1.0)
        total += text / text_bytes_per_token(vocab_size) * stored_bytes_per_token(vocab_size)
    return round(total)


def scratch_bytes(files: Sequence[SourceFile]) -> int:
    """Estimate the bytes of the largest temporary file: a download, or a Parquet file decompressed."""
    return max(
        (file.size if file.path is None else 0)
        + (round(file.size * TEXT_PER_DISK_BYTE[suffix]) if file.kind == "parquet" and suffix else 0)
        for file in files
        for suffix in [kind_of(file.name)[1]]
    )


def check_space(folder: Path, files: Sequence[SourceFile], written_tokens: int, vocab_size: int) -> None:
    """Raise StorageError if the disk has no room for the tokens of `files`, less those already there."""
    written_bytes = stored_bytes_per_token(vocab_size) * written_tokens
    wanted = max(0, token_bytes(files, vocab_size) - written_bytes) + scratch_bytes(files)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise StorageError(
            f"{folder}: found {free / 2**30:,.1f} GiB free, wanted about {wanted / 2**30:,.1f} GiB "
            "(estimated; --ignore-free-space tries nevertheless)"
        )
