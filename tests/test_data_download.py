"""Getting a dataset from the Hub, against a stand-in server on this machine that speaks the Hub's API."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save

import data
from harness.run.config import TrainConfig
from harness.run.errors import DataError, exit_status_of
from tests.helpers import STARTS, Worker

DATASET = "owner/toy-tokens"
COMMITS = {"main": "1" * 40, "v2": "2" * 40}


TRAIN: dict[str, Any] = {
    "dataset": DATASET,
    "min_train_tokens": -1,
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 1,
    "checkpoint_interval": 1,
}


class Hub:
    """Two commits of one dataset, each with both splits and a third file that nobody needs."""

    def __init__(self) -> None:
        self.files = {
            commit: {
                "train.safetensors": save({"tokens": np.full(200, number, np.uint16)}),
                "validation.safetensors": save({"tokens": np.full(100, number, np.uint16)}),
                "raw/everything.bin": b"\0" * 1000,
            }
            for number, commit in enumerate(COMMITS.values(), start=1)
        }
        self.requests: list[tuple[str, str]] = []
        self.delay_seconds = 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                status, headers, body = hub.answer_to(path)
                if self.command == "GET" and "/resolve/" in path:
                    time.sleep(hub.delay_seconds)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer_to(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path; unknown ones are answered as the Hub does."""
        api, resolve = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.rpartition("/revision/")[2] if path != api else "main"
            commit = COMMITS.get(revision, revision)
            if commit in self.files:
                siblings = [{"rfilename": name} for name in self.files[commit]]
                return self.json({"id": DATASET, "sha": commit, "siblings": siblings, "private": False, "tags": []})
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith(f"{api}/tree/"):
            commit, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            files = {name: raw for name, raw in self.files[commit].items() if name.startswith(folder)}
            if not files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return self.json(
                [{"type": "file", "path": name, "size": len(raw), "oid": git_id(raw)} for name, raw in files.items()]
            )
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            commit = COMMITS.get(revision, revision)
            if (raw := self.files.get(commit, {}).get(name)) is not None:
                return 200, {"ETag": f'"{git_id(raw)}"', "X-Repo-Commit": commit}, raw
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    @staticmethod
    def json(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were sent, in order of name."""
        return sorted(path.split("/resolve/")[1].partition("/")[2] for verb, path in self.requests
                      if verb == "GET" and "/resolve/" in path)  # fmt: skip


def git_id(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def hub_environment(folder: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """Return an environment in which the Hub is at `endpoint`, and its cache in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    return {name: value for name, value in clean.items() if not name.startswith(("HF_", "TRANSFORMERS_"))} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "*",
    }


def start(folder: Path, endpoint: str, offline: bool = False, **config: Any) -> Worker:
    """Start a process that wants the dataset in `folder`/datasets."""
    folder.mkdir(exist_ok=True)
    wanted = (hub_environment(folder, endpoint, offline), folder / "datasets", TrainConfig(**{**TRAIN, **config}))
    return Worker([], folder / f"start-{next(STARTS)}", {}, before=want_dataset, arguments=wanted)


def want_dataset(environment: dict[str, str], datasets_dir: Path, config: TrainConfig) -> None:
    """Want a dataset, and end; what reads the environment when it is imported is imported again."""
    os.environ.clear()
    os.environ.update(environment)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("huggingface_hub", "data"):
            del sys.modules[name]
    import data

    sys.exit(exit_status_of(lambda: data.ensure_dataset(datasets_dir, config)))


def finish(process: Worker) -> tuple[int, list[str]]:
    """Wait for a process; give its exit status and the lines of stderr that are not a progress bar's."""
    status = process.wait()
    lines = process.stderr.replace("\r", "\n").splitlines()
    return status, [line for line in lines if line.strip() and "it/s]" not in line]


def test_the_two_splits_are_downloaded_and_nothing_else(tmp_path: Path, hub: Hub) -> None:
    status, lines = finish(start(tmp_path, hub.url))
    assert status == 0, lines
    assert hub.fetched() == ["train.safetensors", "validation.safetensors"]
    folder = tmp_path / "datasets" / DATASET
    for name in hub.fetched():
        assert (folder / name).read_bytes() == hub.files[COMMITS["main"]][name]
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == hub.fetched()


def test_pinned_revision_is_the_one_downloaded(tmp_path: Path, hub: Hub) -> None:
    folders = {revision: tmp_path / revision for revision in ("v2", COMMITS["v2"])}
    processes = [start(folder, hub.url, dataset_revision=revision) for revision, folder in folders.items()]
    assert [finish(process)[0] for process in processes] == [0, 0]
    for folder in folders.values():
        for name in ("train.safetensors", "validation.safetensors"):
            assert (folder / "datasets" / DATASET / name).read_bytes() == hub.files[COMMITS["v2"]][name]


@pytest.mark.fault("F49")
@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("train", "validation"), {}),
        (("train", "validation"), {"validation_interval": 1, "validation_batches": 1}),
        (("train",), {}),  # a split of one's own is enough for a run that does not validate
    ],
)
def test_what_is_on_disk_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], config: dict[str, Any]
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(data.HfApi, "dataset_info", refuse)
    (tmp_path / DATASET).mkdir(parents=True)
    for name in names:
        (tmp_path / DATASET / f"{name}.safetensors").write_bytes(b"mine")
    data.ensure_dataset(tmp_path, TrainConfig(**TRAIN, **config))
    if config:
        (tmp_path / DATASET / "validation.safetensors").unlink()
        with pytest.raises(DataError, match="the Hub was asked"):
            data.ensure_dataset(tmp_path, TrainConfig(**TRAIN, **config))


def test_two_processes_download_once(tmp_path: Path, hub: Hub) -> None:
    hub.delay_seconds = 0.5
    for process in [start(tmp_path, hub.url), start(tmp_path, hub.url)]:
        status, lines = finish(process)
        assert status == 0, lines
    assert hub.fetched() == ["train.safetensors", "validation.safetensors"]


@pytest.mark.fault("F07", "F28")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_download_that_was_cut_off_is_made_again(tmp_path: Path, hub: Hub, number: signal.Signals) -> None:
    hub.delay_seconds = 1.0
    process = start(tmp_path, hub.url)
    while "train.safetensors" not in hub.fetched():
        assert process.process.is_alive()
        time.sleep(0.01)
    process.send(number)
    assert process.wait() == -number
    assert not list((tmp_path / "datasets" / DATASET).glob("*.safetensors"))
    hub.delay_seconds = 0.0
    status, lines = finish(start(tmp_path, hub.url))
    assert status == 0, lines
    for name in ("train.safetensors", "validation.safetensors"):
        assert (tmp_path / "datasets" / DATASET / name).read_bytes() == hub.files[COMMITS["main"]][name]


@pytest.mark.fault("F49")
def test_a_refused_token_is_not_printed(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "s3cret" * 6
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text(token)
    monkeypatch.setattr(hub, "answer_to", lambda _: (401, {}, f"invalid token {token}".encode()))
    assert token not in data_error(start(tmp_path, hub.url))


def data_error(process: Worker) -> str:
    """Wait for a process that must end with a documented data error of one line; give the line."""
    status, lines = finish(process)
    assert status == 3, lines
    assert len(lines) == 1, lines
    assert DATASET in lines[0]
    return lines[0]


@pytest.mark.fault("F49")
@pytest.mark.parametrize("offline", [False, True], ids=["nobody answers", "offline mode"])
def test_unreachable_hub_is_one_line_that_says_so(tmp_path: Path, offline: bool) -> None:
    line = data_error(start(tmp_path, "http://127.0.0.1:9", offline))
    assert "could not be downloaded" in line


@pytest.mark.parametrize("config", [{"dataset": "owner/other"}, {"dataset_revision": "v3"}], ids=lambda c: str(*c))
def test_unknown_dataset_or_revision_is_one_line_that_says_so(
    tmp_path: Path, hub: Hub, config: dict[str, Any]
) -> None:
    status, lines = finish(start(tmp_path, hub.url, **config))
    assert status == 3, lines
    assert len(lines) == 1, lines
    assert config.get("dataset", DATASET) in lines[0]
    assert "could not be downloaded" in lines[0]


VALIDATING: dict[str, Any] = {"validation_interval": 1, "validation_batches": 1}


def test_dataset_without_a_split_is_named(tmp_path: Path, hub: Hub) -> None:
    del hub.files[COMMITS["main"]]["validation.safetensors"]
    line = data_error(start(tmp_path, hub.url, **VALIDATING))
    assert "has no validation.safetensors" in line
    assert "train.safetensors" not in line


def test_missing_split_alone_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "datasets" / DATASET
    folder.mkdir(parents=True)
    (folder / "train.safetensors").write_bytes(b"mine")
    status, lines = finish(start(tmp_path, hub.url, **VALIDATING))
    assert status == 0, lines
    assert hub.fetched() == ["validation.safetensors"]
    assert (folder / "train.safetensors").read_bytes() == b"mine"
