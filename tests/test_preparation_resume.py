"""A preparation that is interrupted, anywhere, and run again gives the bytes of one that was not."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prepare_dataset
from preparation import partial_dataset, readers
from preparation import prepare as room
from preparation.partial_dataset import PartialDataset, locked
from preparation.token_writer import TokenWriter
from tests.conftest import Called
from tests.helpers import OFFLINE, ROOT, wait_for
from tests.preparation_helpers import TEXTS, file_bytes, metadata, splits, write_corpus
from tests.test_data_download import COMMITS, DATASET, Hub, hub, hub_environment  # noqa: F401 (a fixture)

Call = Callable[..., Called]
LONG = "a long text, " * 700

# The command itself, but it saves and cuts often enough for a small corpus.
SCRIPT = """
import sys
from preparation import partial_dataset, readers
partial_dataset.SAVE_SECONDS = 0
readers.BATCH_BYTES = readers.PIECE_CHARACTERS = int(sys.argv.pop(1))
from harness.run.errors import exit_status_of
import prepare_dataset
sys.exit(exit_status_of(prepare_dataset.main))
"""


def start(words: list[object], batch_bytes: int = 20_000, **environment: str) -> subprocess.Popen[str]:
    """Start preparing, and do not wait."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(batch_bytes), *map(str, words)],
        cwd=ROOT, env={**os.environ, **OFFLINE, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with every kind of file, duplicates and empty documents."""
    folder = tmp_path / "in"
    write_corpus(folder / "a.jsonl.gz", [*TEXTS, "", *TEXTS[:3]])
    write_corpus(folder / "b" / "long.txt.zst", [LONG])
    write_corpus(folder / "c.parquet", [*(text + "?" for text in TEXTS), None])
    write_corpus(folder / "d.parquet.gz", TEXTS[10:20])
    write_corpus(folder / "e.md", [LONG])
    write_corpus(folder / "f.txt", ["the end"])
    return folder


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every batch of a few documents, and cut texts into many pieces."""
    monkeypatch.setattr(partial_dataset, "SAVE_SECONDS", 0)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2000)
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 2000)


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


OPTIONS = [
    ("--validation-fraction", "0.3"),
    ("--validation", "last", "--drop-duplicates"),
    ("--validation-fraction", "0.000001", "--drop-duplicates"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["random", "last, no duplicates", "would be empty"])
@pytest.mark.usefixtures("often")
def test_stopped_after_every_step(
    call: Call, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Every run dies a few steps on disk after the one before, so all together die after every one of them."""
    words = (corpus, tmp_path / "out", "--workers", "2", *options)
    assert call(prepare_dataset.main, corpus, tmp_path / "whole", *options).status == 0
    steps_left = 0

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def do(*values: Any, **named: Any) -> Any:
            nonlocal steps_left
            steps_left -= 1
            found = step(*values, **named)
            if steps_left <= 0:
                raise Killed
            return found

        return do

    with monkeypatch.context() as patch:
        patch.setattr(PartialDataset, "save", dying(PartialDataset.save))
        patch.setattr(TokenWriter, "copy_tail", dying(TokenWriter.copy_tail))
        patch.setattr(TokenWriter, "finish", dying(TokenWriter.finish))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(room, "check_space", dying(lambda *_: None))
        for number in range(400):
            steps_left = 3 + number % 4
            try:
                assert call(prepare_dataset.main, *words).status == 0
                break
            except Killed:
                pass
    assert number > 10
    done = call(prepare_dataset.main, *words)
    assert done.status == 0, done.stderr
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.safetensors", "validation.safetensors"}


def test_killed_and_run_again(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "in" / "a.jsonl", [f"{number} {text}" for number in range(40) for text in TEXTS])
    write_corpus(tmp_path / "in" / "b.txt", [LONG * 60])
    assert call(prepare_dataset.main, tmp_path / "in", tmp_path / "whole", "--drop-duplicates").status == 0
    words = [tmp_path / "in", tmp_path / "out", "--drop-duplicates"]
    progress = tmp_path / "out" / ".partial" / "progress.json"
    draw = random.Random(0)
    seen: list[bytes] = []
    for _ in range(2):
        process = start(words)

        def has_gone_on() -> bool:
            return progress.exists() and progress.read_bytes() not in seen

        wait_for(has_gone_on)
        time.sleep(draw.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen.append(progress.read_bytes())
    process = start(words)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    monkeypatch.undo()
    for ours, theirs in zip(splits(tmp_path / "out").values(), splits(tmp_path / "whole").values(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


@pytest.fixture
def unfinished(call: Call, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, often: None) -> Path:
    """An OUT_DIR with work that was killed in c.parquet."""
    original = PartialDataset.save

    def save(work: PartialDataset) -> None:
        original(work)
        if work.progress.files == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PartialDataset, "save", save)
        with pytest.raises(Killed):
            call(prepare_dataset.main, corpus, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("options", [("--seed", "1"), ("--drop-duplicates",), ("--text-field", "body")])
def test_other_options_are_refused(call: Call, corpus: Path, unfinished: Path, options: tuple[str, ...]) -> None:
    done = call(prepare_dataset.main, corpus, unfinished, *options)
    assert done.status == 2
    assert len(done.stderr.splitlines()) == 1
    assert "unfinished work with other options" in done.stderr
    assert "--fresh" in done.stderr


@pytest.mark.parametrize("change", ["changed", "removed", "touched", "before it"])
def test_changed_sources_are_refused(call: Call, corpus: Path, unfinished: Path, tmp_path: Path, change: str) -> None:
    path = corpus / "a.jsonl.gz"
    if change == "changed":
        write_corpus(path, TEXTS)
    elif change == "removed":
        path.unlink()
    elif change == "touched":
        os.utime(path)
    else:
        write_corpus(corpus / "Z.txt", ["new"])
    done = call(prepare_dataset.main, corpus, unfinished)
    assert done.status == 2
    assert "a.jsonl.gz was already read and has changed since" in done.stderr
    assert call(prepare_dataset.main, corpus, unfinished, "--fresh").status == 0
    assert call(prepare_dataset.main, corpus, tmp_path / "whole").status == 0
    assert file_bytes(unfinished) == file_bytes(tmp_path / "whole")


def test_what_was_not_read_yet_may_change(call: Call, corpus: Path, unfinished: Path, tmp_path: Path) -> None:
    write_corpus(corpus / "e.md", ["another text"])
    assert call(prepare_dataset.main, corpus, unfinished).status == 0
    assert call(prepare_dataset.main, corpus, tmp_path / "whole").status == 0
    assert file_bytes(unfinished) == file_bytes(tmp_path / "whole")


def test_work_is_saved_now_and_then_however_small_the_files(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        write_corpus(tmp_path / "in" / f"{number}.txt", [f"text {number}"])
    clock = itertools.count()
    monkeypatch.setattr(partial_dataset.time, "monotonic", lambda: next(clock))
    saved = []
    original = PartialDataset.save
    monkeypatch.setattr(PartialDataset, "save", lambda work: (original(work), saved.append(work.progress.files)))
    assert call(prepare_dataset.main, tmp_path / "in", tmp_path / "out").status == 0
    assert 5 < len(saved) < 50


def test_fresh_with_a_mistaken_source_loses_nothing(
    call: Call, corpus: Path, unfinished: Path, tmp_path: Path
) -> None:
    before = (unfinished / ".partial" / "progress.json").read_bytes()
    assert call(prepare_dataset.main, tmp_path / "nowhere", unfinished, "--fresh").status == 3
    assert (unfinished / ".partial" / "progress.json").read_bytes() == before
    assert call(prepare_dataset.main, corpus, unfinished).status == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layout": 1}', '{"layout": 99, "settings": {}}'])
def test_damaged_progress_is_refused(call: Call, corpus: Path, unfinished: Path, text: str) -> None:
    (unfinished / ".partial" / "progress.json").write_text(text)
    done = call(prepare_dataset.main, corpus, unfinished)
    assert done.status == 2
    assert "--fresh" in done.stderr


def test_lost_tokens_are_noticed(call: Call, corpus: Path, unfinished: Path) -> None:
    os.truncate(unfinished / ".partial" / "train.safetensors", 5000)
    done = call(prepare_dataset.main, corpus, unfinished)
    assert done.status == 3
    assert "--fresh" in done.stderr


def test_two_at_once_are_refused(call: Call, corpus: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        done = call(prepare_dataset.main, corpus, tmp_path / "out")
    assert done.status == 5
    assert "another prepare_dataset.py" in done.stderr
    assert f":{os.getpid()})" in done.stderr


# --- the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus_hub(hub: Hub, tmp_path: Path) -> Hub:  # noqa: F811
    """The stand-in server, with a dataset of Parquet files; the newer commit has other texts."""
    for number, commit in enumerate(COMMITS.values()):
        for name in range(4):
            texts = [f"{number} {name} {row} {text}" for row in range(6) for text in TEXTS]
            path = write_corpus(tmp_path / "made.parquet", texts, row_group_size=100)
            hub.files[commit][f"sample/10BT/{name:03}.parquet"] = path.read_bytes()
        hub.files[commit]["sample/README.md"] = b"a card, and no document"
    return hub


def local_copy(hub: Hub, commit: str, folder: Path) -> Path:  # noqa: F811
    for name, raw in hub.files[commit].items():
        if name.endswith(".parquet"):
            path = folder / Path(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
    return folder


@pytest.mark.parametrize(("place", "count"), [("", 4), ("/sample/10BT/", 4), ("/sample/10BT/000.parquet", 1)])
def test_hub_dataset_equals_its_files(call: Call, tmp_path: Path, corpus_hub: Hub, place: str, count: int) -> None:
    process = start([f"hf:{DATASET}{place}", tmp_path / "out"], **hub_environment(tmp_path, corpus_hub.url))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    own = local_copy(corpus_hub, COMMITS["main"], tmp_path / "in")
    if count == 1:
        own = own / "000.parquet"
    assert call(prepare_dataset.main, own, tmp_path / "own").status == 0
    for ours, theirs in zip(splits(tmp_path / "out").values(), splits(tmp_path / "own").values(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert corpus_hub.fetched() == [f"sample/10BT/{name:03}.parquet" for name in range(count)]
    assert metadata(tmp_path / "out")["revision"] == COMMITS["main"]
    assert metadata(tmp_path / "out")["source"] == f"hf:{DATASET}{place}"


def test_hub_dataset_killed_goes_on_from_the_same_commit(call: Call, tmp_path: Path, corpus_hub: Hub) -> None:
    """Never more than one download on disk, no file fetched twice but the one that was being read."""
    words: list[object] = [f"hf:{DATASET}/sample", tmp_path / "out", "--revision", "v2"]
    environment = hub_environment(tmp_path, corpus_hub.url)
    progress = tmp_path / "out" / ".partial" / "progress.json"
    corpus_hub.delay_seconds = 0.2
    process = start(words, **environment)
    wait_for(lambda: progress.exists() and '"files": 2' in progress.read_text())
    process.kill()
    process.communicate()
    assert len(list((tmp_path / "out").rglob("*.parquet"))) <= 1
    corpus_hub.files["3" * 40] = {"sample/other.txt": b"a newer commit"}
    moved = {**COMMITS, "v2": "3" * 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_data_download.COMMITS", moved)
        process = start(words, **environment)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    own = local_copy(corpus_hub, COMMITS["v2"], tmp_path / "in")
    assert call(prepare_dataset.main, own, tmp_path / "own").status == 0
    for ours, theirs in zip(splits(tmp_path / "out").values(), splits(tmp_path / "own").values(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert len(corpus_hub.fetched()) <= 4 + 1
    assert set(corpus_hub.fetched()) == {f"sample/10BT/{name:03}.parquet" for name in range(4)}
    # Done is done: nothing is asked again.
    asked = len(corpus_hub.requests)
    process = start(words, **environment)
    assert process.communicate(timeout=600)[0].startswith("Already prepared")
    assert len(corpus_hub.requests) == asked


MISSING = [("owner/other", "owner/other"), (f"{DATASET}/nowhere", "nowhere"), (f"{DATASET}/raw", "found no file")]


@pytest.mark.parametrize(("source", "words"), MISSING)
def test_what_the_hub_does_not_have_is_one_line(tmp_path: Path, corpus_hub: Hub, source: str, words: str) -> None:
    process = start([f"hf:{source}", tmp_path / "out"], **hub_environment(tmp_path, corpus_hub.url))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 3, errors
    assert len(errors.splitlines()) == 1, errors
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_broken_download_is_one_line_and_can_be_continued(tmp_path: Path, corpus_hub: Hub) -> None:
    name = "sample/10BT/002.parquet"
    missing = corpus_hub.files[COMMITS["main"]][name]
    corpus_hub.files[COMMITS["main"]][name] = b""
    words: list[object] = [f"hf:{DATASET}", tmp_path / "out"]
    process = start(words, **hub_environment(tmp_path, corpus_hub.url))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 3
    assert len(errors.splitlines()) == 1, errors
    corpus_hub.files[COMMITS["main"]][name] = missing
    shutil.rmtree(tmp_path / "out" / ".partial" / "download")
    (tmp_path / "out" / ".partial" / "download").mkdir()
    (tmp_path / "out" / ".partial" / "download" / "unpacked").write_bytes(b"what a kill left")
    process = start(words, **hub_environment(tmp_path, corpus_hub.url))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
