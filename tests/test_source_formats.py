"""Sources as people have them: web pages, tables, code, other encodings, clutter, and damaged documents."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare_dataset
from harness.tokens.gpt2 import gpt2_encoding
from preparation import html_text, readers, records, sources
from preparation.opening import Position
from preparation.sources import SourceFile
from tests.conftest import Called
from tests.preparation_helpers import all_tokens, metadata, write_corpus

Call = Callable[..., Called]


def documents(call: Call, folder: Path, *words: object) -> tuple[list[str], str]:
    """Prepare a folder; return the documents in order and what was printed."""
    out = folder.with_name(f"{folder.name}-out")
    done = call(prepare_dataset.main, folder, out, "--validation", "last", "--validation-fraction", "0.3", *words)
    assert done.status == 0, done.stderr
    text = gpt2_encoding().decode(all_tokens(out))
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>"), done.stdout


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p {color: red}</style>
<script>if (1 < 2) { document.write("<p>no</p>") }</script></head>
<body><h1>Head
 line</h1><p>One <b>bold</b>   word,<br>next&nbsp;line.<p>Two<!-- not this --></p>
<ul><li>first</li><li>second</li></ul>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>
<pre>def f():
    return 1</pre><template>no</template></body></html>"""
PAGE_TEXT = """A & B

Head line

One bold word,
next\xa0line.

Two

first
second

a\tb
c

def f():
    return 1
"""


def test_formats_are_read_as_what_they_hold(call: Call, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        {
            "a.html": PAGE,
            "b.csv": 'id,text\r\n1,"two\nlines, and a ""quote"""\r\n2,plain\r\n',
            "c.tsv": "text\tid\nof tabs\t1\n",
            "d.json": json.dumps([{"text": "from a list"}, "a string", {"text": None}, {"text": "é \ud83d\ude00"}]),
            "e.json": '{"text": "from lines"}\n{"text": "\\ud83d\\ude00"}\n',
            "f.json.gz": gzip.compress(b'{\n  "text": "one object"\n}\n'),
            "g.rst": "Title\n=====\n",
            "h.py": "def f():\n    return 1\n",
        },
    )
    found, printed = documents(call, folder)
    assert found == [
        PAGE_TEXT, 'two\nlines, and a "quote"', "plain", "of tabs", "from a list", "a string", "é 😀", "from lines",
        "😀", "one object", "Title\n=====\n", "def f():\n    return 1\n",
    ]  # fmt: skip
    assert "Empty documents skipped: 1\n" in printed


def test_damaged_markup_still_gives_its_text() -> None:
    assert html_text.text_of_html("a<b>c</i><p>d &nosuch;") == "ac\n\nd &nosuch;\n"
    assert html_text.text_of_html("<div><div>a</div></div><div>b</div>") == "a\nb\n"
    assert html_text.text_of_html("<script>a") == html_text.text_of_html("") == ""


@pytest.mark.parametrize("size", [3, 40, 2**20])
def test_json_is_read_in_pieces_of_any_size(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(records, "READ_BYTES", size)
    monkeypatch.setattr(readers, "BATCH_BYTES", 100)
    texts = [f'{number} [brackets], {{braces}} and "quotes" \\ é' * (1 + number % 5) for number in range(60)]
    rows = [{"id": [{}, number], "text": text} for number, text in enumerate(texts)]
    folder = write(
        tmp_path / "in",
        {
            "a.json": json.dumps(rows, indent=2),
            "b.json": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        },
    )
    assert documents(call, folder)[0] == [*texts, *texts]


def test_few_held_out_documents_are_warned_of(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {f"{number}.txt": f"text {number}" for number in range(40)})
    few = call(prepare_dataset.main, folder, tmp_path / "out")
    assert "Held out: 1 of 40 documents, so a loss" in few.stdout
    assert "validation.safetensors: 1 document, " in few.stdout
    (advice,) = re.findall(r"(--validation-fraction) (\S+) (--fresh)", few.stdout)
    enough = call(prepare_dataset.main, folder, tmp_path / "out", *advice)
    assert enough.status == 0
    assert "Held out" not in enough.stdout


def test_clutter_is_left_out_and_named(call: Call, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        {
            "a.txt": "one", "b/c.md": "two", ".hidden.txt": "no", ".git/d.txt": "no", "b/.cache/e.md": "no",
            "p.pdf": "%PDF", "q.PDF": "%PDF", "r.png": "", "LICENSE": "x",
        },
    )  # fmt: skip
    found, printed = documents(call, folder)
    assert found == ["one", "two"]
    assert "Files skipped: 2 .pdf, 1 .png, 1 without suffix (" in printed
    done = call(prepare_dataset.main, tmp_path / "in" / "p*", tmp_path / "out")
    assert done.status == 3
    assert "found no file in" in done.stderr
    assert "but 1 .pdf" in done.stderr


def test_prepared_files_in_the_source_are_no_source(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.txt": "one", "b.txt": "two"})
    for _ in range(2):
        done = call(prepare_dataset.main, folder, folder, "--fresh")
        assert done.status == 0, done.stderr
        assert "skipped" not in done.stdout
        assert metadata(folder)["files"] == "2"


def test_byte_order_marks_and_encodings(call: Call, tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    rows = "text\nGrüße\n"
    folder = write(
        tmp_path / "in",
        {
            "a.txt": mark + b"one", "b.jsonl": mark + b'{"text": "two"}\n', "c.json": mark + b'["three"]',
            "d.csv": mark + rows.encode(), "e.html": mark + b"four",
        },
    )  # fmt: skip
    assert documents(call, folder)[0] == ["one", "two", "three", "Grüße", "four\n"]
    for encoding in ("utf-16", "cp1252"):
        folder = write(
            tmp_path / encoding,
            {
                "a.txt": "Grüße\r\naus".encode(encoding),
                "b.jsonl": '{"text": "ä"}\n{"text": "ö"}\n'.encode(encoding),
                "c.json": '["ü"]'.encode(encoding), "d.csv": rows.encode(encoding), "e.html": "<p>ß".encode(encoding),
            },
        )  # fmt: skip
        assert documents(call, folder, "--encoding", encoding)[0] == ["Grüße\naus", "ä", "ö", "ü", "Grüße", "ß\n"]
    for wrong in ("no-such", "base64"):
        done = call(prepare_dataset.main, folder, tmp_path / "out", "--encoding", wrong)
        assert done.status == 2
        assert "wanted a text encoding" in done.stderr


BAD = {
    "a.txt": b"bad \xff",
    "b.txt": "long " * 100 + "end",
    "c.txt": b"long " * 100 + b"\xff",
    "d.jsonl": b'{"text": "one"}\nnonsense\n{"body": "x"}\n{"text": "\xff"}\n{"text": "two"}\n',
    "e.csv": b'id,text\n1,three\n2\n3,"\xff"\n4,four\n',
    "f.json": b'["five", 6, "\xff", "seven", nonsense, "not read"]',
    "g.jsonl.gz": gzip.compress(b'{"text": "lost"}\n' * 50)[:-20],
    "h.parquet": b"PAR1",
    "i.html": b"<p>\xff",
}


def test_what_cannot_be_read_is_skipped_and_counted(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(readers, "READ_BYTES", 64)
    folder = write(tmp_path / "in", BAD)
    found, printed = documents(call, folder, "--skip-bad", "--drop-duplicates")
    assert found == ["long " * 100 + "end", "one", "two", "three", "four", "five", "seven"]
    assert f"cannot be read: 13, first {folder}/a.txt: found a byte that is not UTF-8 at 4" in printed


@pytest.mark.parametrize("name", [name for name in BAD if name != "b.txt"])
def test_what_cannot_be_read_is_one_line(call: Call, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "in", {name: BAD[name]})
    done = call(prepare_dataset.main, folder, tmp_path / "out")
    assert done.status == 3
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr


def test_nothing_readable_says_why(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jsonl": '{"body": 1}\n'})
    done = call(prepare_dataset.main, folder, tmp_path / "out", "--skip-bad")
    assert done.status == 3
    assert "found no document" in done.stderr
    assert "found keys body" in done.stderr


def test_datasets_of_before_these_options_are_still_theirs(call: Call, tmp_path: Path) -> None:
    """A setting that a stored dataset does not know had its default there."""
    from preparation.selection import PreparationSettings

    now = PreparationSettings("/somewhere/else/books")
    before = {"source": "/home/me/books", "revision": None, "text_field": "text", "validation": "random",
              "validation_fraction": 0.01, "seed": 0, "drop_duplicates": False}  # fmt: skip
    assert now.difference(before) is None
    assert PreparationSettings("books", skip_bad=True).difference(before) == "skip_bad False there, True now"
    assert PreparationSettings("/a/b/*/c.txt").stored()["source"] == "b/*/c.txt"


def test_a_large_source_is_not_listed_in_silence(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", {f"{number}.txt": "text" for number in range(3)})
    assert "Listing" not in call(prepare_dataset.main, folder, tmp_path / "quick").stderr
    monkeypatch.setattr(sources, "SILENT_SECONDS", 0)
    assert f"Listing {folder}" in call(prepare_dataset.main, folder, tmp_path / "slow").stderr


def test_few_bytes_that_stand_for_many_are_not_unpacked_at_once(tmp_path: Path) -> None:
    """A text that is repeated costs a Parquet file a few bits a row; rows that are not due must not be in memory."""
    path, text, rows = tmp_path / "bomb.parquet", "x" * 2**17, 200
    pyarrow.parquet.write_table(pyarrow.table({"text": [text] * rows}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    file = SourceFile(path.name, "parquet", path.stat().st_size, path)
    before = pyarrow.total_allocated_bytes()
    found = 0
    for item in records.parquet_rows(file, "text", Position(), tmp_path):
        assert item == text
        found += 1
        assert pyarrow.total_allocated_bytes() - before < 20 * len(text)  # of 64 rows at once
    assert found == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_text_past_the_bound_ends_its_file_in_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(records, "LONGEST_BYTES", 5000)
    texts = ["first", "x" * 6000, "last"]
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith(".csv"):
        write(folder, {name: "text\n" + "".join(f"{text}\n" for text in texts)})
    else:
        write_corpus(folder / name, texts)
    done = call(prepare_dataset.main, folder, tmp_path / "out")
    assert done.status == 3
    assert len(done.stderr.splitlines()[-1]) < 300
    assert "5,000" in done.stderr or "5000" in done.stderr
    write(folder, {"b.txt": "another file"})
    found, printed = documents(call, folder, "--skip-bad")
    assert found == ["first", "another file"]
    assert "Documents skipped because they cannot be read: 1" in printed
