"""Reads a source file as a stream of batches, in bounded memory, starting at any item.

A file is a sequence of items: lines of a .jsonl, rows of a .parquet, pieces of a .txt or .md. Items are cut by the
file's content alone, so an item has the same number in every process that reads the file.
"""

import codecs
import gzip
import io
import itertools
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.run.errors import ConfigError, DataError, first_line
from preparation.python_docs import EMBEDDED
from preparation.selection import PreparationSettings, content_digest
from preparation.sources import SourceFile, kind_of

READ_BYTES = 2**20
BATCH_BYTES = 2**19
ITEM_BYTES = 64  # what Python needs for an item besides its text
ROWS_AT_ONCE = 64
PIECE_CHARACTERS = 2**20
LONGEST_BYTES = 2**28
"""Of a line, or of text without white space; anything longer is taken for a mistake."""

# Cutting a text here changes none of its tokens, because words of all tokenizers end between a letter or a digit and
# white space. (After a full stop a word may go on: some take the line end after it into the same word.)
CUT = re.compile(r"[^\W_](?=[ \n])")
INSTALL_DATA = "pip install '.[data]'"


@dataclass(frozen=True)
class LongDocument:
    """The document that a batch's only item is a piece of, and where in it the piece is."""

    split_key: int
    content_digest: bytes
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Batch:
    """Consecutive items of one file: documents, or one piece of a long document."""

    file: SourceFile
    first_item: int
    """Index of the first item in the file."""
    items: list[bytes | str | None]
    file_bytes: int
    """Bytes of the file on disk that were read up to here."""
    long: LongDocument | None = None


class Position:
    """How many bytes of the file on disk have been read."""

    def __init__(self) -> None:
        self.bytes = 0


def read_batches(file: SourceFile, settings: PreparationSettings, first_item: int, scratch: Path) -> Iterator[Batch]:
    """Yield a file's batches from item `first_item` on; raises DataError where the file is damaged.

    Holds one batch in memory: half a mebibyte, or one item if that is longer; of a text, 2^20 characters.
    """
    position = Position()
    if file.kind == "text":
        yield from _text_batches(file, settings, first_item, position)
        return
    items: Iterator[Any]
    if file.kind == "jsonl":
        items = _lines(file, position)
    elif file.kind == "parquet":
        items = _rows(file, settings.text_field, position, scratch)
    else:
        items = _embedded(file, position)
    yield from _batches(file, itertools.islice(items, first_item, None), first_item, position)


def _batches(file: SourceFile, items: Iterator[Any], first_item: int, position: Position) -> Iterator[Batch]:
    batch: list[bytes | str | None] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item or "") + ITEM_BYTES
        if size >= BATCH_BYTES:
            yield Batch(file, first_item, batch, position.bytes)
            first_item, batch, size = first_item + len(batch), [], 0
    if batch:
        yield Batch(file, first_item, batch, file.size)


def _text_batches(
    file: SourceFile, settings: PreparationSettings, first_item: int, position: Position
) -> Iterator[Batch]:
    """Yield a text as one document, in pieces if it is long.

    A long text is read twice, because its split depends on all of it.
    """
    pieces = _pieces(file, position)
    start = list(itertools.islice(pieces, 2))
    if len(start) < 2:
        yield from _batches(file, iter(start[first_item:]), first_item, position)
        return
    key = settings.split_key(piece.encode() for piece in _pieces(file, Position()))
    digest = b""
    if settings.drop_duplicates:
        digest = content_digest(piece.encode() for piece in _pieces(file, Position()))
    for number, (piece, following) in enumerate(itertools.pairwise(itertools.chain(start, pieces, [None]))):
        if piece is not None and number >= first_item:
            long = LongDocument(key, digest, number == 0, following is None)
            yield Batch(file, number, [piece], position.bytes, long)


def _pieces(file: SourceFile, position: Position) -> Iterator[str]:
    """Yield a UTF-8 text in pieces whose tokens, concatenated, are the tokens of the text.

    Line ends become \\n, as when Python reads a text file.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    parts: list[str] = []
    length = searched = consumed = cuts = 0
    with opened(file, position) as stream:
        while True:
            raw = stream.read(READ_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = consumed + len(raw) - len(error.object) + error.start
                raise DataError(
                    f"{file.shown}: found a byte that is not UTF-8 at {place}, wanted UTF-8 text"
                ) from None
            consumed += len(raw)
            parts.append(text)
            length += len(text)
            if not raw:
                break
            if length - searched < PIECE_CHARACTERS:
                continue
            joined = "".join(parts)
            cut = _last_cut(joined, searched)
            if cut:
                yield joined[:cut]
                cuts += 1
                joined = joined[cut:]
            elif length > LONGEST_BYTES:
                raise DataError(f"{file.shown}: found {length:,} characters without an end of a word, wanted text")
            parts, length = [joined], len(joined)
            searched = 0 if cut else max(0, length - 1)
    rest = "".join(parts)
    if rest or not cuts:  # an empty file is an empty document
        yield rest


def _last_cut(text: str, start: int) -> int:
    """Return the index of the last cut from `start` on, or 0; searches backwards, because the last cut is near."""
    end = len(text)
    while end > start:
        begin = max(start, end - 4096)
        if found := list(CUT.finditer(text, begin, min(end + 2, len(text)))):
            return found[-1].end()
        end = begin
    return 0


def _lines(file: SourceFile, position: Position) -> Iterator[bytes]:
    with opened(file, position) as stream:
        number = 1
        while line := stream.readline(LONGEST_BYTES + 1):
            if len(line) > LONGEST_BYTES:
                raise DataError(f"{file.shown}:{number}: found more than {LONGEST_BYTES:,} bytes, wanted a line")
            yield line
            number += 1


def _rows(file: SourceFile, text_field: str, position: Position, scratch: Path) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file.shown}: Parquet is read with pyarrow, which is missing: {INSTALL_DATA}") from None
    with ExitStack() as stack:
        path = stack.enter_context(_seekable(file, scratch))
        try:
            table = stack.enter_context(pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES))
            _check_column(file, table.schema_arrow, text_field)
            done = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_field], use_threads=False):
                rows = batch.column(0).to_pylist()
                done += len(rows)
                position.bytes = file.size * done // table.metadata.num_rows
                yield from rows
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file.shown}: cannot be read as Parquet ({first_line(error)})") from None


def _check_column(file: SourceFile, schema: Any, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise DataError(f"{file.shown}: found columns {', '.join(schema.names)}, wanted {text_field} (--text-field)")
    kind = schema.field(text_field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    ):
        raise DataError(f"{file.shown}: found column {text_field} of type {kind}, wanted strings")


def _embedded(file: SourceFile, position: Position) -> Iterator[str]:
    for text in EMBEDDED[file.kind].read():
        position.bytes += len(text)
        yield text


@contextmanager
def _seekable(file: SourceFile, scratch: Path) -> Iterator[Path]:
    """Yield the path of a seekable copy of a file: compressed files are decompressed into `scratch` for the block."""
    assert file.path is not None
    if not kind_of(file.path.name)[1]:
        yield file.path
        return
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "unpacked"
    with opened(file, Position()) as stream, path.open("wb") as output:
        shutil.copyfileobj(stream, output, READ_BYTES)
    yield path
    path.unlink()


@contextmanager
def opened(file: SourceFile, position: Position) -> Iterator[IO[bytes]]:
    """Yield a file's bytes, decompressed; raises DataError as soon as it proves damaged or truncated."""
    assert file.path is not None
    _, compression = kind_of(file.path.name)
    with ExitStack() as stack:
        raw = stack.enter_context(file.path.open("rb"))
        decompressed = stack.enter_context(_decompressor(compression, file)(raw)) if compression else raw
        damage: tuple[type[Exception], ...] = (
            EOFError,
            gzip.BadGzipFile,
            zlib.error,
            lzma.LZMAError,
            *_zstd_errors(compression),
        )
        try:
            yield io.BufferedReader(_Counting(decompressed, raw, position), READ_BYTES)
        except damage as error:
            reason = f"found a damaged or truncated {compression} file ({first_line(error)})"
            raise DataError(f"{file.shown}: {reason}, wanted a whole one") from None


class _Counting(io.RawIOBase):
    """A readable stream that records how many bytes of the underlying file were read."""

    def __init__(self, stream: IO[bytes], file: IO[bytes], position: Position) -> None:
        self._stream, self._file, self._position = stream, file, position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._position.bytes = self._file.tell()
        return len(chunk)


def _decompressor(compression: str, file: SourceFile) -> Callable[[IO[bytes]], Any]:
    if compression == ".gz":
        return lambda raw: gzip.GzipFile(fileobj=raw)
    if compression == ".xz":
        return lzma.LZMAFile
    zstd = _zstd()
    if zstd is None:
        raise ConfigError(f"{file.shown}: .zst is read with backports.zstd, which is missing: {INSTALL_DATA}")
    return zstd.ZstdFile  # type: ignore[no-any-return]


def _zstd_errors(compression: str) -> tuple[type[Exception], ...]:
    zstd = _zstd() if compression == ".zst" else None
    return () if zstd is None else (zstd.ZstdError,)


def _zstd() -> Any:
    """Return Python 3.14's module or its backport, or None; other packages do not detect truncated files."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            return None
    return zstd
