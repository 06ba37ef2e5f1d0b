"""Reads a source file as a stream of batches, in bounded memory, starting at any item.

A file is a sequence of items: the records of a .jsonl or .parquet, pieces of a .txt or .md, the one text of an .html.
Items are cut by the file's content alone, so an item has the same number in every process that reads the file.
"""

import codecs
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preparation.html_text import text_of_html
from preparation.opening import READ_BYTES, BadDocumentError, Position, opened_text
from preparation.python_docs import EMBEDDED
from preparation.records import LONGEST_BYTES, Item, csv_rows, json_lines, json_values, parquet_rows
from preparation.selection import PreparationSettings, content_digest
from preparation.sources import SourceFile

BATCH_BYTES = 2**19
ITEM_BYTES = 64  # what Python needs for an item besides its text
PIECE_CHARACTERS = 2**20

# Cutting a text here changes none of its tokens, because words of all tokenizers end between a letter or a digit and
# white space. (After a full stop a word may go on: some take the line end after it into the same word.)
CUT = re.compile(r"[^\W_](?=[ \n])")


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
    items: list[Item]
    file_bytes: int
    """Bytes of the file on disk that were read up to here."""
    long: LongDocument | None = None


def read_batches(file: SourceFile, settings: PreparationSettings, first_item: int, scratch: Path) -> Iterator[Batch]:
    """Yield a file's batches from item `first_item` on; what cannot be read is an item that says why.

    Holds one batch in memory: half a mebibyte, or one item if that is longer; of a text, 2^20 characters. Raises
    DataError where a file has no such column.
    """
    position = Position()
    if file.kind == "text":
        try:
            yield from _text_batches(file, settings, first_item, position)
        except BadDocumentError as error:  # before the first piece, because a long text is read twice
            if first_item == 0:
                yield Batch(file, 0, [error], file.size)
        return
    items = itertools.islice(_or_error(_items(file, settings, position, scratch)), first_item, None)
    yield from _batches(file, items, first_item, position)


def _items(file: SourceFile, settings: PreparationSettings, position: Position, scratch: Path) -> Iterator[Item]:
    match file.kind:
        case "jsonl":
            return json_lines(file, settings, position)
        case "json":
            return json_values(file, settings, position)
        case "csv":
            return csv_rows(file, settings, position)
        case "parquet":
            return parquet_rows(file, settings.text_field, position, scratch)
        case "html":
            return _html(file, settings, position)
        case _:
            return _embedded(file, position)


def _or_error(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, and last the error that ends them."""
    try:
        yield from items
    except BadDocumentError as error:
        yield error


def _batches(file: SourceFile, items: Iterator[Item], first_item: int, position: Position) -> Iterator[Batch]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += (len(item) if isinstance(item, bytes | str) else 0) + ITEM_BYTES
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
    pieces = _pieces(file, settings.encoding, position)
    start = list(itertools.islice(pieces, 2))
    if len(start) < 2:
        yield from _batches(file, iter(start[first_item:]), first_item, position)
        return
    key = settings.split_key(piece.encode() for piece in _pieces(file, settings.encoding, Position()))
    digest = b""
    if settings.drop_duplicates:
        digest = content_digest(piece.encode() for piece in _pieces(file, settings.encoding, Position()))
    for number, (piece, following) in enumerate(itertools.pairwise(itertools.chain(start, pieces, [None]))):
        if piece is not None and number >= first_item:
            long = LongDocument(key, digest, number == 0, following is None)
            yield Batch(file, number, [piece], position.bytes, long)


def _pieces(file: SourceFile, encoding: str, position: Position) -> Iterator[str]:
    """Yield a text in pieces whose tokens, concatenated, are the tokens of the text.

    Line ends become \\n, as when Python reads a text file.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    parts: list[str] = []
    length = searched = consumed = cuts = 0
    with opened_text(file, encoding, position) as stream:
        while True:
            raw = stream.read(READ_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = consumed + len(raw) - len(error.object) + error.start
                raise _not_text(file, encoding, place) from None
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
                raise BadDocumentError(
                    f"{file.shown}: found {length:,} characters without an end of a word, wanted text"
                )
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


def _html(file: SourceFile, settings: PreparationSettings, position: Position) -> Iterator[str]:
    with opened_text(file, settings.encoding, position) as stream:
        raw = stream.read(LONGEST_BYTES + 1)
    if len(raw) > LONGEST_BYTES:
        raise BadDocumentError(f"{file.shown}: found more than {LONGEST_BYTES:,} bytes, wanted a page")
    try:
        yield text_of_html(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_text(file, settings.encoding, error.start) from None


def _not_text(file: SourceFile, encoding: str, place: int) -> BadDocumentError:
    if encoding == "utf-8":
        return BadDocumentError(
            f"{file.shown}: found a byte that is not UTF-8 at {place}, wanted UTF-8 text (--encoding)"
        )
    return BadDocumentError(f"{file.shown}: found a byte that is not {encoding}, wanted text in it (--encoding)")


def _embedded(file: SourceFile, position: Position) -> Iterator[str]:
    for text in EMBEDDED[file.kind].read():
        position.bytes += len(text)
        yield text
