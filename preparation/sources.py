"""Lists the files of a source in a fixed order, and estimates how much disk space their tokens take."""

import glob
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError, StorageError

Kind = Literal["text", "html", "jsonl", "json", "csv", "parquet", "python-docs", "python-reference"]
TEXT = (
    "txt md rst tex py pyi ipy c h cc cpp cxx hpp cu cuh cs css go hs java js jsx jl kt lua m ml php pl ps1 r rb rs "
    "scala sh sql swift ts tsx zig"
)
KINDS: dict[str, Kind] = {
    **dict.fromkeys([f".{suffix}" for suffix in TEXT.split()], "text"),
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".xz", ".zst")
GLOB = re.compile(r"[*?\[]")
SILENT_SECONDS = 2.0  # of listing a source, before a bar shows that it takes longer
PARTIAL_FOLDER = ".partial"
OWN_FILES = ("train.safetensors", "validation.safetensors", "tokenizer.json")
"""What a prepared dataset holds, and so is no source of one."""
WANTED = (
    f".txt, .md, .rst, source code, .html, .jsonl, .json, .csv, .tsv, .parquet (each also {', '.join(COMPRESSIONS)})"
)

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


def local_files(source: str, out_dir: Path) -> tuple[list[SourceFile], Counter[str]]:
    """Find the files of a folder (at any depth), a glob or a path, sorted by name, and count the others by suffix.

    Hidden files and folders are left out, and so is what a dataset in `out_dir` holds, which may be inside the source
    or be the source. Raises HarnessError.
    """
    root = Path(source)
    found: Iterable[Path]
    if root.is_dir():
        found = _below(root)
    elif root.is_file():
        if kind_of(root.name)[0] is None:
            raise ConfigError(f"SOURCE: found {root}, wanted {WANTED}")
        root, found = root.parent, [root]
    else:
        root = Path(source[: match.start()]).parent if (match := GLOB.search(source)) else root.parent
        found = map(Path, glob.iglob(source, recursive=True))
    own = {(out_dir / name).resolve() for name in OWN_FILES}
    with progress_bar(None, " files", desc=f"Listing {source}", delay=SILENT_SECONDS, leave=False) as bar:
        paths = []
        for path in found:
            if path.is_file() and path.resolve() not in own:
                paths.append(path)
            bar.update()
    paths.sort()
    files = [_local_file(path, root, kind) for path in paths if (kind := kind_of(path.name)[0])]
    skipped = Counter(suffix_of(path.name) for path in paths if kind_of(path.name)[0] is None)
    if not files:
        beside = f" but {describe_skipped(skipped)}" if skipped else ""
        raise DataError(f"SOURCE: found no file in {source}{beside}, wanted {WANTED}")
    return files, skipped


def suffix_of(name: str) -> str:
    """Return the suffix by which a file that cannot be read is counted."""
    return Path(name).suffix.lower() or "without suffix"


def describe_skipped(skipped: Counter[str]) -> str:
    """Return counts of files by suffix in words, the most frequent first."""
    return ", ".join(
        f"{count:,} {suffix}" for suffix, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden by the dot before its name."""
    return name.startswith(".")


def _below(root: Path) -> Iterator[Path]:
    """Yield all files below a folder that are not hidden, following links to folders; each folder is entered once."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = Path(place).resolve()
        if real in seen:  # a link to a parent, or a second link to the same documents
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(place, name) for name in names if not is_hidden(name))


def _local_file(path: Path, root: Path, kind: Kind) -> SourceFile:
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
        total += text
    return round(total / text_bytes_per_token(vocab_size) * stored_bytes_per_token(vocab_size))


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
