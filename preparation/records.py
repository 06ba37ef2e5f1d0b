"""Reads files of many documents, one item each: lines of .jsonl, values of .json, rows of .csv and .parquet."""

import codecs
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.run.errors import ConfigError, DataError, first_line
from preparation.opening import INSTALL_DATA, READ_BYTES, BadDocumentError, Position, opened, opened_text
from preparation.selection import PreparationSettings
from preparation.sources import SourceFile, kind_of

Item = bytes | str | BadDocumentError | None
"""A document, a .jsonl's line that holds one, None for an empty document, or why a document cannot be read."""

ROWS_AT_ONCE = 64
LONGEST_BYTES = 2**26  # every core holds a few at once
"""Of a line, of a value, or of text without white space; anything longer is taken for a mistake."""
BLANK = re.compile(r"[ \t\r\n,]*")


def json_lines(file: SourceFile, settings: PreparationSettings, position: Position) -> Iterator[Item]:
    """Yield the lines of a .jsonl, which `document_in` reads later, on all cores."""
    with opened_text(file, settings.encoding, position) as stream:
        number = 1
        while line := stream.readline(LONGEST_BYTES + 1):
            if len(line) > LONGEST_BYTES:
                raise BadDocumentError(
                    f"{file.shown}:{number}: found more than {LONGEST_BYTES:,} bytes, wanted a line"
                )
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            number += 1


def document_in(line: bytes, place: str, text_field: str) -> str:
    """Return the document in a line of a .jsonl, "" where it is null; raises BadDocumentError."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"{place}: found a byte that is not UTF-8 at {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"{place}: found no JSON ({error}), wanted an object in each line") from None
    return _text_of(value, place, text_field)


def json_values(file: SourceFile, settings: PreparationSettings, position: Position) -> Iterator[Item]:
    """Yield the documents of a .json: a list of objects or strings, or objects one after another.

    Holds a mebibyte of it in memory, or one document if that is longer.
    """
    decode = json.JSONDecoder().raw_decode
    number, text, closer = 0, "", None
    with opened_text(file, settings.encoding, position) as stream:
        # A byte that is not UTF-8 becomes a surrogate, so that only its document cannot be read.
        reader = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape")
        while more := reader.read(max(READ_BYTES, len(text))):  # twice as much for a value that is longer
            text += more
            start = _end_of_blank(text, 0)
            if closer is None:
                closer = "]" if text.startswith("[", start) else ""
                start = _end_of_blank(text, start + len(closer))
            while start < len(text) and not (closer and text.startswith(closer, start)):
                try:
                    value, end = decode(text, start)
                except ValueError as error:
                    if len(text) - start > LONGEST_BYTES:
                        raise BadDocumentError(
                            f"{file.shown}: found no JSON in document {number + 1} ({error})"
                        ) from None
                    break  # the rest of the value may come
                number += 1
                place = f"{file.shown}: document {number}"
                yield _bad_bytes(text[start:end], place) or _text_or_error(value, place, settings.text_field)
                start = _end_of_blank(text, end)
            text = text[start:]
    if text.rstrip() != (closer or ""):
        raise BadDocumentError(
            f"{file.shown}: found no JSON after {number} documents, wanted objects or a list of them"
        )


def _end_of_blank(text: str, start: int) -> int:
    """Return the index after white space and commas."""
    match = BLANK.match(text, start)
    return match.end() if match else start


def csv_rows(file: SourceFile, settings: PreparationSettings, position: Position) -> Iterator[Item]:
    """Yield the text column of a .csv or .tsv whose first row names its columns."""
    assert file.path is not None
    csv.field_size_limit(LONGEST_BYTES)  # of the process, but nothing else in it reads such files
    with opened_text(file, settings.encoding, position) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        delimiter = "\t" if ".tsv" in file.path.suffixes else ","
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if settings.text_field not in names:
                raise DataError(_no_column(file, names, settings.text_field))
            column = names.index(settings.text_field)
            for row in rows:
                place = f"{file.shown}:{rows.line_num}"
                if row and len(row) != len(names):
                    yield BadDocumentError(
                        f"{place}: found {len(row)} columns, wanted {len(names)} as in the first row"
                    )
                elif row:
                    yield _bad_bytes(row[column], place) or row[column]
        except csv.Error as error:
            raise BadDocumentError(f"{file.shown}:{rows.line_num}: found no CSV ({error})") from None


def parquet_rows(file: SourceFile, text_field: str, position: Position, scratch: Path) -> Iterator[Item]:
    """Yield the text column of a .parquet, decompressed into `scratch` if its name says that it is compressed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file.shown}: Parquet is read with pyarrow, which is missing: {INSTALL_DATA}") from None
    with ExitStack() as stack:
        path = stack.enter_context(_seekable(file, scratch))
        try:
            _check_column(file, pyarrow.parquet.read_schema(path), text_field)
            # Texts of a dictionary stay in it until each is due: a few kilobytes may stand for gigabytes.
            table = stack.enter_context(
                pyarrow.parquet.ParquetFile(
                    path, pre_buffer=False, buffer_size=READ_BYTES, read_dictionary=[text_field]
                )
            )
            done = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_field], use_threads=False):
                done += batch.num_rows
                position.bytes = file.size * done // table.metadata.num_rows
                yield from (_bounded(file, value.as_py()) for value in batch.column(0))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadDocumentError(f"{file.shown}: cannot be read as Parquet ({first_line(error)})") from None


def _bounded(file: SourceFile, text: str | None) -> str | None:
    if text is not None and len(text) > LONGEST_BYTES:
        raise BadDocumentError(
            f"{file.shown}: found a text of {len(text):,} characters, wanted at most {LONGEST_BYTES:,}"
        )
    return text


def _check_column(file: SourceFile, schema: Any, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise DataError(_no_column(file, schema.names, text_field))
    kind = schema.field(text_field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    ):
        raise DataError(f"{file.shown}: found column {text_field} of type {kind}, wanted strings")


def _no_column(file: SourceFile, names: Sequence[str], text_field: str) -> str:
    return f"{file.shown}: found columns {', '.join(names)}, wanted {text_field} (--text-field)"


def _text_or_error(value: object, place: str, text_field: str) -> str | BadDocumentError:
    try:
        return without_surrogates(value) if isinstance(value, str) else _text_of(value, place, text_field)
    except BadDocumentError as error:
        return error


def _text_of(value: object, place: str, text_field: str) -> str:
    if not isinstance(value, dict):
        raise BadDocumentError(f"{place}: found {type(value).__name__}, wanted an object with the key {text_field}")
    if text_field not in value:
        keys = ", ".join(map(str, value))[:200]
        raise BadDocumentError(f"{place}: found keys {keys}, wanted {text_field} (--text-field)")
    text = value[text_field]
    if not isinstance(text, str | None):
        raise BadDocumentError(f"{place}: found {text_field} of type {type(text).__name__}, wanted a string")
    return without_surrogates(text or "")


def _bad_bytes(text: str, place: str) -> BadDocumentError | None:
    """Return an error if decoding with surrogateescape met a byte that is not UTF-8 in this text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocumentError(f"{place}: found a byte that is not UTF-8 (--encoding)")
    return None


def without_surrogates(text: str) -> str:
    """Return the text with each unpaired surrogate, which JSON can hold but UTF-8 cannot, as U+FFFD (as tiktoken)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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
