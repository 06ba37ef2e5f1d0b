"""Preparing datasets: the same tokens as tiktoken whatever the format, and one line for what cannot be read."""

import errno
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from safetensors.numpy import load_file, save_file
from tiktoken_ext import openai_public

import prepare_dataset
from harness.tokens import gpt2
from preparation import readers, sources
from preparation.opening import Position
from preparation.python_docs import EMBEDDED, EmbeddedText
from preparation.selection import SeenDocuments
from preparation.token_writer import TokenWriter
from tests.conftest import Called
from tests.helpers import ROOT
from tests.preparation_helpers import COMPRESS, TEXTS, all_tokens, file_bytes, metadata, splits, write_corpus

Call = Callable[..., Called]
LAST = ("--validation", "last", "--validation-fraction", "0.2")


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken's own gpt2, from OpenAI's two files in its cache, whose SHA-256 it checks itself."""
    cache = tmp_path_factory.mktemp("tiktoken")
    letters = dict(gpt2._byte_alphabet())
    merges = gpt2.MERGES.read_bytes()
    ids = {"".join(letters[b] for b in unit): rank for unit, rank in gpt2._ranked_tokens(merges.decode())}
    files = {"encoder.json": json.dumps({**ids, "<|endoftext|>": 50256}).encode(), "vocab.bpe": merges}
    for name, raw in files.items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.Encoding(**openai_public.gpt2())


@pytest.fixture
def reference(official: tiktoken.Encoding) -> Callable[..., list[int]]:
    """A function that gives the tokens of documents, with <|endoftext|> after each."""

    def tokens(documents: list[str]) -> list[int]:
        return [id for text in documents for id in [*official.encode(text, disallowed_special=()), 50256]]

    return tokens


def prepare(call: Call, source: object, out: Path, *words: object) -> Called:
    done = call(prepare_dataset.main, source, out, *words)
    assert done.status == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in out.iterdir()) == ["train.safetensors", "validation.safetensors"]
    return done


# --- tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_tokens_are_tiktoken_s_own(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]], kind: str, compression: str
) -> None:
    path = write_corpus(tmp_path / "in" / f"corpus{kind}{compression}", TEXTS)
    prepare(call, path, tmp_path / "out", *LAST)
    assert all_tokens(tmp_path / "out") == reference(TEXTS)
    found = splits(tmp_path / "out")
    assert {tokens.dtype for tokens in found.values()} == {np.dtype("uint16")}
    assert int(metadata(tmp_path / "out", "validation")["documents"]) == round(0.2 * len(TEXTS))
    assert (found["validation"] == 50256).sum() == round(0.2 * len(TEXTS))


@pytest.mark.parametrize("compression", COMPRESS)
def test_nested_folders_in_the_order_of_names(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]], compression: str
) -> None:
    texts = ["first\r\ndocument", "second", "third", "fourth", "fifth", "sixth"]
    places = ["a/1.txt", "a/b/1.md", "a/c.jsonl", "b.parquet", "c.txt", "d.md"]
    for place, text in zip(places, texts, strict=True):
        write_corpus(tmp_path / "in" / (place + compression), [text])
    (tmp_path / "in" / "a" / "notes.pdf").write_bytes(b"%PDF")
    prepare(call, tmp_path / "in", tmp_path / "in" / "out", *LAST)  # OUT_DIR inside SOURCE
    assert all_tokens(tmp_path / "in" / "out") == reference(["first\ndocument", *texts[1:]])
    assert call(prepare_dataset.main, tmp_path / "in", tmp_path / "in" / "out", *LAST).stdout.startswith("Already")


def test_links_and_capitals_leave_nothing_out(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]]
) -> None:
    write_corpus(tmp_path / "in" / "a.txt", ["first"]).rename(tmp_path / "in" / "A.TXT")
    write_corpus(tmp_path / "disk2" / "b.md", ["second"])
    write_corpus(tmp_path / "in" / "d.jsonl.gz", ["third"]).rename(tmp_path / "in" / "d.JSONL.GZ")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "disk2")
    (tmp_path / "in" / "c2").symlink_to(tmp_path / "disk2")  # the same documents a second time
    (tmp_path / "disk2" / "back").symlink_to(tmp_path / "in")  # a circle
    prepare(call, tmp_path / "in", tmp_path / "out", *LAST)
    assert all_tokens(tmp_path / "out") == reference(["first", "second", "third"])


@pytest.mark.parametrize("name", ["long.txt", "long.md.gz"])
def test_long_text_is_cut_without_a_change_of_its_tokens(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(readers, "READ_BYTES", 128)
    generator = np.random.default_rng(0)
    units = [*"aä日 \n\t\u3000\u0085\x1c'!1", "\r\n", "'s", " the", "👍", "  "]
    text = "".join(generator.choice(units, 20_000)) + "w" * 2000 + " " * 1000 + "end"
    write_corpus(tmp_path / "in" / name, [text])
    write_corpus(tmp_path / "in" / "z.jsonl", ["last"])
    prepare(call, tmp_path / "in", tmp_path / "out", *LAST)
    assert all_tokens(tmp_path / "out") == reference([text.replace("\r\n", "\n").replace("\r", "\n"), "last"])
    assert metadata(tmp_path / "out")["documents"] == "1"
    (file, _), _ = sources.local_files(str(tmp_path / "in"), tmp_path)
    pieces = list(readers._pieces(file, "utf-8", Position()))
    assert len(pieces) > 20


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000, "=-" * 150_000, "." * 300_000, "\n" * 300_000, "中" * 100_000, "ab1!" * 75_000,
        " " * 1_200_000, "x" + " " * 1_200_000 + "x", "x" + "\u3000" * 1_200_000 + "\nx",
        (" " * 99_999 + "y") * 4, (" " * 100_001 + "y") * 4 + " " * 200_000,
    ],
    ids=lambda text: f"{text[:3]!r} {len(text)}",
)  # fmt: skip
def test_text_without_words_takes_no_time(call: Call, text: str) -> None:
    start = time.process_time()
    tokens = gpt2.encode_ordinary(text)
    assert time.process_time() - start < 5
    assert gpt2.gpt2_encoding().decode(tokens.tolist()) == text


def test_white_space_is_cut_where_the_encoding_cuts_it(
    monkeypatch: pytest.MonkeyPatch, official: tiktoken.Encoding
) -> None:
    monkeypatch.setattr(gpt2, "LONGEST_SPACE", 3)
    short = gpt2.LONG_SPACE.pattern.replace("100000", "3")
    monkeypatch.setattr(gpt2, "LONG_SPACE", gpt2.re.compile(short))
    generator = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(generator.choice([*"a1!' \n\t\x1c\u3000", "    ", "\n\n\n"], 60))
        assert gpt2.encode_ordinary(text).tolist() == official.encode(text, disallowed_special=())


def test_half_a_pair_of_surrogates_is_the_replacement_character(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    prepare(call, tmp_path / "a.jsonl", tmp_path / "out", *LAST)
    assert all_tokens(tmp_path / "out") == reference(["a\ufffdb", "😀"])


def test_empty_documents_are_skipped_and_counted(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]]
) -> None:
    write_corpus(tmp_path / "in" / "a.txt", [""])
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "one"}\n\n  \n{"text": ""}\n{"text": null}\n{"text": "two"}')
    write_corpus(tmp_path / "in" / "c.parquet", ["three", None, "", "four"])
    done = prepare(call, tmp_path / "in", tmp_path / "out", *LAST)
    assert all_tokens(tmp_path / "out") == reference(["one", "two", "three", "four"])
    assert "Empty documents skipped: 5\n" in done.stdout


def test_another_text_field(call: Call, tmp_path: Path, reference: Callable[..., list[int]]) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": 1}\n{"body": "two"}\n')
    prepare(call, tmp_path / "a.jsonl", tmp_path / "out", *LAST, "--text-field", "body")
    assert all_tokens(tmp_path / "out") == reference(["one", "two"])


# --- the same bytes ------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_place(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 200)
    for place in ("one", "two"):
        write_corpus(tmp_path / place / "in" / "a.jsonl", TEXTS)
        write_corpus(tmp_path / place / "in" / "b" / "a.parquet.zst", [f"{text}!" for text in TEXTS])
    found = []
    for place, workers in (("one", 1), ("two", 1), ("one", 3), ("two", 17)):
        monkeypatch.chdir(tmp_path / place)
        prepare(call, "in", tmp_path / f"{place}-{workers}", "--workers", workers, "--validation-fraction", "0.3")
        found.append(file_bytes(tmp_path / f"{place}-{workers}"))
    assert all(other == found[0] for other in found)


def test_choice_follows_seed_and_text(call: Call, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", TEXTS)
    write_corpus(tmp_path / "b.jsonl", TEXTS[::-1])
    held_out = []
    for number, (name, seed) in enumerate([("a", 0), ("b", 0), ("a", 1)]):
        words = ("--seed", seed, "--validation-fraction", "0.3")
        prepare(call, tmp_path / f"{name}.jsonl", tmp_path / str(number), *words)
        tokens = splits(tmp_path / str(number))["validation"]
        ends = np.flatnonzero(tokens == 50256)
        held_out.append({tuple(part) for part in np.split(tokens, ends + 1)})
        assert 0.1 < len(ends) / len(TEXTS) < 0.5
    assert held_out[0] == held_out[1] != held_out[2]


def test_duplicates_are_dropped_and_never_in_both_splits(
    call: Call, tmp_path: Path, reference: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 300)
    long = "so many words " * 100
    write_corpus(tmp_path / "in" / "a.jsonl", ["one", "two", "one", "three"])
    write_corpus(tmp_path / "in" / "b.txt", [long])
    write_corpus(tmp_path / "in" / "c.txt.gz", [long])
    write_corpus(tmp_path / "in" / "d.parquet", ["two", long, "four"])
    done = prepare(call, tmp_path / "in", tmp_path / "out", *LAST, "--drop-duplicates")
    assert all_tokens(tmp_path / "out") == reference(["one", "two", "three", long, "four"])
    assert "Duplicate documents dropped: 4\n" in done.stdout
    prepare(call, tmp_path / "in", tmp_path / "all", "--validation-fraction", "0.5", "--seed", "3")
    parts = {}
    for name, tokens in splits(tmp_path / "all").items():
        parts[name] = {tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == 50256) + 1)} - {()}
    assert parts["train"]
    assert parts["validation"]
    assert not parts["train"] & parts["validation"]


def test_seen_documents_are_a_set_that_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preparation.selection.RECENT", 10)
    generator = np.random.default_rng(0)
    # Few bytes and many zeros, at the end too: what a comparison of padded strings could take for equal.
    digests = [bytes(14) + bytes(generator.integers(0, 12, 2).tolist()) for _ in range(300)]
    known: set[bytes] = set()
    seen = SeenDocuments(tmp_path / "digests", 0)
    for number, digest in enumerate(digests):
        if number % 70 == 69:
            seen.close()
            with (tmp_path / "digests").open("ab") as file:
                file.write(b"beyond what is known to be whole")
            seen = SeenDocuments(tmp_path / "digests", len(known))
        assert seen.is_new(digest) == (digest not in known)
        known.add(digest)
    assert seen.count == len(known)


# --- splits and metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_neither_split_is_ever_empty(call: Call, tmp_path: Path, seed: int) -> None:
    write_corpus(tmp_path / "a.jsonl", ["one document", "and another"])
    fraction = "0.9" if seed % 2 else "0.0001"
    prepare(call, tmp_path / "a.jsonl", tmp_path / "out", "--seed", seed, "--validation-fraction", fraction)
    assert [metadata(tmp_path / "out", split)["documents"] for split in ("train", "validation")] == ["1", "1"]


@pytest.mark.parametrize("words", [(), ("--seed", "1", "--validation-fraction", "0.9"), LAST])
def test_a_single_document_is_cut_in_two(call: Call, tmp_path: Path, words: tuple[str, ...]) -> None:
    text = "é and words " * 50
    write_corpus(tmp_path / "a.jsonl", [text])
    prepare(call, tmp_path / "a.jsonl", tmp_path / "out", *words)
    found = splits(tmp_path / "out")
    assert all(tokens[-1] == 50256 and (tokens == 50256).sum() == 1 for tokens in found.values())
    joined = [*found["train"][:-1].tolist(), *found["validation"][:-1].tolist()]
    assert gpt2.gpt2_encoding().decode(joined) == text
    counted = [int(metadata(tmp_path / "out", split)["bytes"]) for split in found]
    assert sum(counted) == len(text.encode())


def test_metadata_say_where_the_tokens_come_from(call: Call, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", TEXTS)
    prepare(call, path, tmp_path / "out", "--seed", "5", *LAST)
    documents = text_bytes = 0
    for split, tokens in splits(tmp_path / "out").items():
        found = metadata(tmp_path / "out", split)
        assert found["tokenizer"] == "gpt2"
        assert found["source"] == "a.jsonl"
        assert str(tmp_path) not in json.dumps(found)
        assert found["sha256"] == hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
        assert json.loads(found["settings"])["seed"] == 5
        documents += int(found["documents"])
        text_bytes += int(found["bytes"])
    assert documents == len(TEXTS)
    assert text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_verify_finds_a_changed_token(call: Call, tmp_path: Path) -> None:
    prepare(call, write_corpus(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    done = call(prepare_dataset.main, "--verify", tmp_path / "out")
    assert done.status == 0
    assert done.stdout.count("SHA-256 agrees") == 2
    path = tmp_path / "out" / "validation.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    done = call(prepare_dataset.main, "--verify", tmp_path / "out")
    assert done.status == 3
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr


# --- what is refused -----------------------------------------------------------------------------------------


def jsonl(*lines: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "a.jsonl").write_bytes(b"\n".join([b'{"text": "fine"}', *lines]))


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = write_corpus(folder / name, TEXTS if "txt" not in name else ["word " * 5000])
        path.write_bytes(change(path.read_bytes()))

    return write


COMPRESSIONS = [suffix for suffix in COMPRESS if suffix]
BAD: list[tuple[Callable[[Path], object], str]] = [
    (jsonl(b"{"), "a.jsonl:2: found no JSON"),
    (jsonl(b"[1]"), "a.jsonl:2: found list"),
    (jsonl(b'{"txt": "x", "id": 1}'), "a.jsonl:2: found keys txt, id, wanted text (--text-field)"),
    (jsonl(b"", b'{"text": 5}'), "a.jsonl:3: found text of type int"),
    (jsonl(b'{"text": "\xff"}'), "a.jsonl:2: found a byte that is not UTF-8 at 10 of the line"),
    (jsonl(b"[" * 100_000), "a.jsonl:2: found no JSON"),
    (jsonl(b'{"text": ' + b"9" * 5000 + b"}"), "a.jsonl:2: found no JSON"),
    (lambda folder: (folder / "a.txt").write_bytes(b"abc\xffdef"), "a.txt: found a byte that is not UTF-8 at 3"),
    (lambda folder: (folder / "a.txt").write_bytes(b"abc\xc3"), "a.txt: found a byte that is not UTF-8 at 3"),
    (lambda folder: (folder / "a.txt").write_bytes(b"word " * 600_000 + b"\xff"), "not UTF-8 at 3000000"),
    (lambda folder: write_corpus(folder / "a.txt", [""]), "found no document"),
    (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), "a.parquet: cannot be read as Parquet"),
    *((damaged(f"a.jsonl{end}", lambda raw: raw[:-9]), f"damaged or truncated {end}") for end in COMPRESSIONS),
    *((damaged(f"a.txt{end}", lambda raw: raw[: len(raw) // 2]), "damaged or truncated") for end in COMPRESSIONS),
    *((damaged(f"a.jsonl{end}", lambda _: b"not that"), "damaged or truncated") for end in COMPRESSIONS),
    (damaged("a.parquet", lambda raw: raw[:100] + bytes(200) + raw[300:]), "a.parquet: cannot be read as Parquet"),
    (damaged("a.parquet.gz", lambda raw: raw[:-9]), "a.parquet.gz: found a damaged or truncated .gz"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "words"), BAD, ids=[f"{n}-{words}" for n, (_, words) in enumerate(BAD)])
def test_bad_source_is_one_line_and_leaves_nothing(
    call: Call, tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    done = call(prepare_dataset.main, tmp_path / "in", tmp_path / "deep" / "out")
    assert done.status == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("column", "words"), [("body", "found columns id, body, wanted text"), ("text", "of type int64")]
)
def test_parquet_without_text_is_named(call: Call, tmp_path: Path, column: str, words: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], column: [1]}), tmp_path / "a.parquet")
    done = call(prepare_dataset.main, tmp_path / "a.parquet", tmp_path / "out")
    assert done.status == 3
    assert words in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "", "{}", "--verify x y", "{} {} --validation-fraction 1", "{} {} --validation-fraction nan",
        "{} {} --workers 0", "{} {} --seed x", "{} {} --revision main", "hf:owner {}", "x" * 2000 + " {}",
    ],
    ids=lambda words: words[:40],
)  # fmt: skip
def test_bad_usage_is_status_2(call: Call, tmp_path: Path, words: str) -> None:
    assert call(prepare_dataset.main, *(word.format(tmp_path / "a") for word in words.split())).status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "backports.zstd")])
def test_missing_library_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    path = write_corpus(tmp_path / name, TEXTS)
    for module in ("pyarrow", "pyarrow.parquet", "backports.zstd", "backports", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    done = call(prepare_dataset.main, path, tmp_path / "out")
    assert done.status == 2
    assert len(done.stderr.splitlines()) == 1
    assert package in done.stderr
    assert "pip install" in done.stderr


def test_too_small_a_disk_is_refused_before_the_start(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path / "in" / "a.jsonl", TEXTS)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, path.stat().st_size // 2 - 10))
    done = call(prepare_dataset.main, tmp_path / "in", tmp_path / "out")
    assert done.status == 6
    assert "GiB free, wanted about" in done.stderr
    assert not (tmp_path / "out").exists()
    prepare(call, tmp_path / "in", tmp_path / "out", "--ignore-free-space")


def test_full_disk_is_status_6(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_corpus(tmp_path / "in" / "a.jsonl", TEXTS)
    monkeypatch.setattr(TokenWriter, "append", full)
    done = call(prepare_dataset.main, tmp_path / "in", tmp_path / "out")
    assert done.status == 6
    assert len(done.stderr.splitlines()) == 1


# --- memory --------------------------------------------------------------------------------------------------

READ_ALL = """
import resource, sys
from pathlib import Path
from preparation.readers import read_batches
from preparation.selection import PreparationSettings
from preparation.sources import local_files

(file,), _ = local_files(sys.argv[1], Path("nowhere"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
batches = read_batches(file, PreparationSettings(sys.argv[1]), 0, Path("nowhere"))
next(batches)
before, read = peak(), 0
for batch in batches:
    read += sum(map(len, batch.items))
print(read, peak() - before)
"""


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    lines = "".join(f"{number} bottles of water, standing on the wall\n" for number in range(25_000))  # 1 MiB
    texts: list[Any] = [lines * 48] if "txt" in name else [lines[:10_000]] * 4800
    write_corpus(tmp_path / name, texts, row_group_size=4800)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    read, growth_mib = map(float, done.stdout.split())
    assert read > 45e6
    assert growth_mib < 30


def test_dataset_in_place_is_never_replaced_unasked(call: Call, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", TEXTS)
    prepare(call, path, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    assert prepare(call, path, tmp_path / "out").stdout.startswith("Already prepared")
    for words in (("--seed", "1"), LAST, ("--drop-duplicates",)):
        done = call(prepare_dataset.main, path, tmp_path / "out", *words)
        assert done.status == 2
        assert "made with other options" in done.stderr
    write_corpus(path, TEXTS[1:])
    assert "SOURCE changed" in call(prepare_dataset.main, path, tmp_path / "out").stderr
    assert file_bytes(tmp_path / "out") == before
    prepare(call, path, tmp_path / "out", "--fresh", "--validation", "last")
    assert len(load_file(tmp_path / "out" / "train.safetensors")["tokens"]) < len(before[0]) // 2


def test_somebody_else_s_dataset_is_not_replaced(call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "out" / "train.bin")
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "out" / "val.bin")
    done = call(prepare_dataset.main, write_corpus(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    assert done.status == 2
    assert "not made by prepare_dataset.py" in done.stderr


@pytest.mark.parametrize(
    "damage", [{"documents": "x" * 5000}, {"documents": "9" * 5000}, {"settings": "[" * 100_000}]
)
def test_metadata_that_cannot_be_are_somebody_else_s(call: Call, tmp_path: Path, damage: dict[str, str]) -> None:
    path = write_corpus(tmp_path / "a.jsonl", TEXTS)
    prepare(call, path, tmp_path / "out")
    found = metadata(tmp_path / "out")
    train = tmp_path / "out" / "train.safetensors"
    save_file(load_file(train), train, metadata={**found, **damage})
    done = call(prepare_dataset.main, path, tmp_path / "out")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert "not made by prepare_dataset.py" in done.stderr


# --- the page ------------------------------------------------------------------------------------------------


def commands_of(page: str) -> list[list[str]]:
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python prepare_dataset.py ")]


def test_commands_of_the_page_work(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_corpus(tmp_path / "books" / f"{number}.txt", [f"Chapter {number}"])
    write_corpus(tmp_path / "corpus" / "a.jsonl", TEXTS)
    commands = commands_of("data.md")
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EMBEDDED, "python-docs", EmbeddedText(lambda: iter(TEXTS), 10**7))
    monkeypatch.setattr("preparation.prepare.commit_of", lambda *_: "1" * 40)
    monkeypatch.setattr("preparation.prepare.hub_files", lambda *_: sources.local_files("corpus", tmp_path))
    for words in commands:
        done = call(prepare_dataset.main, *words)
        assert done.status == 0, done.stderr
    assert metadata(tmp_path / "datasets" / "fineweb-10BT")["revision"] == "1" * 40
