"""What TensorBoard, W&B and trackio get to see of a run, read back through what each keeps; and messages."""

import json
import os
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import ddp_train
from harness.observers import loggers
from harness.observers import notifications as messages
from harness.run.run_folder import RunFolder
from tests.conftest import Called
from tests.helpers import metrics, status, train, wait_for

pytestmark = pytest.mark.usefixtures("without_charts")
SHORT = {"min_train_tokens": 12 * 8 * 16, "price_per_hour": 3600.0, "currency": "EUR"}
SECRET = "planted-secret-4711"
Rows = dict[int, dict[str, Any]]


@pytest.fixture(autouse=True)
def without_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", messages.VARIABLE))]:
        monkeypatch.delenv(name)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait at the end of training for loggers and messages as long as a busy machine needs."""
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 300.0)
    monkeypatch.setattr(messages, "END_SECONDS", 300.0)


@pytest.fixture
def train_here(call: Callable[..., Called], datasets_dir: Path) -> Callable[..., Called]:
    """A function that trains a run in this process."""

    def run(folder: Path, *words: object) -> Called:
        return call(ddp_train.main, folder.name, datasets_dir, *words, "--runs-dir", folder.parent, "--device", "cpu")

    return run


def in_tensorboard(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "loggers" / "tensorboard"))
    events.Reload()
    found: Rows = {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            assert key not in found.setdefault(event.step, {})
            found[event.step][key] = event.value
    return found


def in_wandb(folder: Path) -> tuple[list[Rows], set[str], list[int]]:
    """Return the rows of every start, the ids of the runs, and the exit codes, from W&B's files of offline runs."""
    from wandb.proto import wandb_internal_pb2

    starts, ids, codes = [], set(), []
    for path in sorted((folder / "loggers" / "wandb").glob("offline-run-*/run-*.wandb")):
        rows: Rows = {}
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                rows[row["_step"]] = row
        starts.append(rows)
    return starts, ids, codes


def leveldb_records(file: bytes) -> Iterator[bytes]:
    """Return the records of a file in LevelDB's log format: blocks of 32 KiB, after a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(file):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        _, length, kind = struct.unpack("<IHB", file[place : place + 7])
        record += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def in_trackio(place: Path) -> list[tuple[str, int, dict[str, Any]]]:
    with closing(sqlite3.connect(place / f"{loggers.PROJECT}.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(name, step, json.loads(text)) for name, step, text in rows]


def assert_same(seen: Rows, lines: list[dict[str, Any]]) -> None:
    """Every number of every line is there, under its key, and no step more."""
    assert sorted(seen) == [line["step"] for line in lines]
    for line in lines:
        for key, value in line.items():
            if value is not None and not isinstance(value, str) and key != "step":
                assert seen[line["step"]][key] == pytest.approx(float(value), rel=1e-6), key


def test_each_logger_has_every_step_once_also_after_a_resume(
    make_run: Callable[..., Path], train_here: Callable[..., Called], patient: None
) -> None:
    folder = make_run(train={**SHORT, "loggers": ["tensorboard", "wandb", "trackio"]})
    assert train_here(folder, "--max-steps", 8).status == 0
    first = metrics(folder)
    assert train_here(folder, "step-00000005").status == 0  # steps 6 and 7 are trained again
    lines = metrics(folder)
    assert_same(in_tensorboard(folder), lines)

    (before, after), ids, codes = in_wandb(folder)
    assert_same(before, first)
    assert_same(after, lines[6:])
    assert len(ids) == 1
    assert codes == [0, 0]

    in_database = in_trackio(folder / "loggers" / "trackio")
    assert {name for name, _, _ in in_database} == ids
    assert [step for _, step, _ in in_database] == list(range(12))
    assert_same({step: values for _, step, values in in_database}, [*first, *lines[8:]])


def test_starting_over_is_another_run_for_the_loggers(
    make_run: Callable[..., Path],
    train_here: Callable[..., Called],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "all-runs"))
    folder = make_run(train={**SHORT, "loggers": ["trackio"]})
    train_here(folder, "--max-steps", 2)
    time.sleep(1.1)  # starts are told apart by the second
    train_here(folder, "--max-steps", 3, "--fresh")
    rows = in_trackio(tmp_path / "all-runs")
    assert [step for _, step, _ in rows] == [0, 1, 0, 1, 2]
    assert len({name for name, _, _ in rows}) == 2


def test_a_server_that_never_answers_costs_no_step_and_no_data(
    make_run: Callable[..., Path], train_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "4")
        monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.5)
        folder = make_run(train={**SHORT, "loggers": ["wandb"]})
        done = train_here(folder, "--max-steps", 3)
        assert done.status == 0
        assert len(metrics(folder)) == 3
        assert "wandb is not done yet" in done.stderr  # and was not waited for
        wait_for(lambda: bool(in_wandb(folder)[2]))  # goes on by itself, offline
    (*_, rows), _, codes = in_wandb(folder)
    assert (sorted(rows), codes) == ([0, 1, 2], [0])


def test_a_missing_package_is_said_before_anything_is_trained(
    make_run: Callable[..., Path], train_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "wandb" else name)
    folder = make_run(train={**SHORT, "loggers": ["tensorboard", "wandb"]})
    done = train_here(folder)
    line = f"{folder}/train.json: loggers: found wandb, wanted its package: pip install '.[wandb]'\n"
    assert (done.status, done.stderr) == (2, line)
    monkeypatch.setattr(messages, "find_spec", lambda _: None)
    monkeypatch.setenv(messages.VARIABLE, f"json://127.0.0.1/{SECRET}")
    done = train_here(make_run("other", train=SHORT))
    assert done.status == 2
    assert done.stderr.startswith("HARNESS_NOTIFY: found an address, wanted the package apprise")
    assert SECRET not in done.stderr
    assert not (folder / "metrics.jsonl").exists()


def test_a_logger_that_breaks_says_so_once_and_training_goes_on(
    make_run: Callable[..., Path], train_here: Callable[..., Called]
) -> None:
    folder = make_run(train={**SHORT, "loggers": ["tensorboard"]})
    (folder / "loggers").write_text("in the way of the folder")
    done = train_here(folder)
    assert done.status == 0
    assert len(metrics(folder)) == 12
    (line,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert "tensorboard gets no more metrics (NotADirectoryError" in line


def test_tensorboard_follows_a_run_whose_path_is_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a logger, a process of its own, goes elsewhere
    folder = RunFolder(tmp_path / os.fsdecode(b"\xe9"))
    logger = loggers.TensorBoard(loggers.LoggedRun(folder, 0))
    logger.log(0, {"train/loss": 4.5})
    logger.close(0)
    (file,) = (folder.loggers / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What a server on this machine receives, at the address that the environment names."""
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert SECRET in self.path
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(messages.VARIABLE, f"json://127.0.0.1:{server.server_port}/{SECRET}")
        monkeypatch.setattr(messages, "END_SECONDS", 60.0)  # other tests may keep the machine busy
        yield received
        server.shutdown()


def titles(mailbox: list[dict[str, str]]) -> list[str]:
    """Return the titles received, in the order of a run: a first message may be overtaken by the last."""
    return sorted((message["title"] for message in mailbox), key=lambda title: "started" not in title)


def test_messages_say_how_a_run_starts_and_ends(
    make_run: Callable[..., Path],
    train_here: Callable[..., Called],
    mailbox: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_run(train=SHORT)
    monkeypatch.setenv("TRAIN_FAULT", "step.opt@3:term")
    stopped = train_here(folder)
    monkeypatch.delenv("TRAIN_FAULT")
    assert stopped.status == 75
    wait_for(lambda: len(mailbox) == 2)  # only the last message is waited for by the run
    assert titles(mailbox) == ["tiny: training started", "tiny: training stopped"]
    bodies = {message["title"].split()[-1]: message["message"] for message in mailbox}
    assert "from global step 0 of 12, on 1 x cpu" in bodies["started"]
    last = metrics(folder)[-1]
    assert f"global step {last['step']} of 12, train loss {last['train/loss']:.3f}" in bodies["stopped"]
    assert f"cost {last['cost']:.2f} EUR" in bodies["stopped"]
    assert bodies["stopped"].splitlines()[1] == status(folder)["reason"]

    mailbox.clear()
    finished = train_here(folder)
    wait_for(lambda: len(mailbox) == 2)
    assert titles(mailbox) == ["tiny: training started", "tiny: training finished"]
    assert any(f"from global step {last['step'] + 1} of 12" in message["message"] for message in mailbox)

    mailbox.clear()
    assert "already complete" in train_here(folder).stdout
    assert mailbox == []

    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET not in "".join([*stopped[1:], *finished[1:]])


def test_messages_say_why_a_run_fails(
    make_run: Callable[..., Path],
    train_here: Callable[..., Called],
    mailbox: list[dict[str, str]],
) -> None:
    folder = make_run(train={**SHORT, "start_train_token": 10**9})
    assert train_here(folder).status == 3
    (message,) = mailbox
    assert message["title"] == "tiny: training failed"
    assert "before the first global step\ntrain split of toy: found 0 tokens" in message["message"]


@pytest.mark.slow
def test_a_lost_rank_is_reported_by_the_one_that_lives(
    make_run: Callable[..., Path], datasets_dir: Path, mailbox: list[dict[str, str]]
) -> None:
    folder = make_run(train={**SHORT, "min_train_tokens": 90 * 16 * 16})
    train(folder, datasets_dir, processes=2, check=1, TRAIN_FAULT="step.opt@3#1:kill9")
    assert titles(mailbox) == ["tiny: training started", "tiny: training failed"]
    (reason,) = [message["message"] for message in mailbox if "failed" in message["title"]]
    assert "lost rank 1 at global step 3" in reason


def test_a_dead_network_delays_the_end_by_seconds_and_betrays_nothing(
    make_run: Callable[..., Path], train_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(train=SHORT)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"json://127.0.0.1:{silent.getsockname()[1]}/{SECRET}?rto=60"
        monkeypatch.setenv(messages.VARIABLE, f"{address} json://127.0.0.1:9/{SECRET} nonsense://{SECRET}")
        monkeypatch.setattr(messages, "END_SECONDS", 1.0)
        began = time.monotonic()
        done = train_here(folder, "--max-steps", 3)
        seconds = time.monotonic() - began
    assert done.status == 0
    assert seconds < metrics(folder)[-1]["elapsed"] + 50  # the address asks for 60
    assert SECRET not in done.stderr


def test_an_address_that_fails_is_said_by_its_number(
    make_run: Callable[..., Path], train_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    monkeypatch.setenv(messages.VARIABLE, f"json://127.0.0.1:9/{SECRET} nonsense://{SECRET}")
    done = train_here(make_run(train=SHORT), "--max-steps", 3)
    assert done.status == 0
    assert "address 2 is not one that apprise knows" in done.stderr
    assert "the message 'tiny: training stopped' did not reach every address" in done.stderr
    assert SECRET not in done.stderr
