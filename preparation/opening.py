"""Opens a source file: decompressed, counted, and in UTF-8 whatever its encoding is."""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from harness.run.errors import ConfigError, DataError, first_line
from preparation.sources import SourceFile, kind_of

READ_BYTES = 2**20
INSTALL_DATA = "pip install '.[data]'"


class BadDocumentError(DataError):
    """A document, or the rest of a file, that cannot be read; --skip-bad leaves it out."""


class Position:
    """How many bytes of the file on disk have been read."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def opened_text(file: SourceFile, encoding: str, position: Position) -> Iterator[IO[bytes]]:
    """Yield a file's text in UTF-8, perhaps with a byte-order mark; raises BadDocumentError.

    Bytes that are not of the encoding come through as they are, which is not UTF-8, so that a reader finds them
    in their document.
    """
    with opened(file, position) as stream:
        if encoding == "utf-8":
            yield stream
            return
        try:
            yield io.BufferedReader(_Recoded(stream, encoding), READ_BYTES)
        except UnicodeDecodeError as error:
            raise BadDocumentError(f"{file.shown}: found bytes that are not {encoding} ({error.reason})") from None


class _Recoded(io.RawIOBase):
    """A readable stream of text in UTF-8, from a stream of another encoding."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            raw = self._stream.read(READ_BYTES)
            self._rest = self._decoder.decode(raw, final=not raw).encode("utf-8", "surrogateescape")
            if not raw:
                break
        chunk, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def opened(file: SourceFile, position: Position) -> Iterator[IO[bytes]]:
    """Yield a file's bytes, decompressed; raises BadDocumentError as soon as it proves damaged or truncated."""
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
            raise BadDocumentError(f"{file.shown}: {reason}, wanted a whole one") from None


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
