"""Strangers' names, files and numbers are refused in a line, and secrets never leave the process."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ddp_train
import test_smoke
from harness.engine import resume
from harness.run.errors import CheckpointError, ConfigError
from harness.run.run_folder import RunFolder, open_run
from tests.conftest import Called
from tests.helpers import ROOT, TINY_MODEL, train_in_fork, write_demanding

HOSTILE = [
    "", ".", "..", "../outside", "..\\outside", "/etc", "/", "a/b", "a/../../outside", "./x", "-rf", ".hidden",
    "x" * 129, "a b", "a\nb", "a\0b", "\x1b[31mred", "\u202egnp.exe", "naïve", "a;rm -rf ~", "$(id)", "~root", "run*",
    "%2e%2e",
]  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_" + "Planted0" * 4, "OPENAI_API_KEY": "sk-proj-" + "Planted1" * 4}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_name_is_refused(
    tmp_path: Path, datasets_dir: Path, call: Callable[..., Called], name: str
) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write_demanding(tmp_path / "outside")
    with pytest.raises(ConfigError):
        open_run(tmp_path / "runs", name)
    done = call(ddp_train.main, "--runs-dir", tmp_path / "runs", "--", name, datasets_dir)
    (line,) = done.stderr.splitlines()
    assert (done.status, done.stdout) == (2, "")
    assert line.startswith("RUN: found ")
    assert line.isprintable()


def test_a_run_that_leads_outside_is_refused(tmp_path: Path) -> None:
    write_demanding(tmp_path / "outside")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="leads outside"):
        open_run(tmp_path / "runs", "inside")


@pytest.mark.parametrize("name", [*HOSTILE, "aside-1", "step-00000777"])
def test_a_hostile_checkpoint_name_is_refused(trained: Path, name: str) -> None:
    (trained / "outside").mkdir()
    (trained / "checkpoints" / "a").mkdir()
    with pytest.raises((CheckpointError, ValueError)) as caught:  # ValueError: no command line can hold a zero byte
        resume.find(RunFolder(trained), name)
    assert caught.type is CheckpointError or "\0" in name


def test_a_checkpoint_that_is_a_link_to_outside_is_refused(trained: Path, tmp_path: Path) -> None:
    (trained / "checkpoints" / "step-00000019").rename(tmp_path / "step-00000019")
    (trained / "checkpoints" / "step-00000019").symlink_to(tmp_path / "step-00000019")
    with pytest.raises(CheckpointError):
        resume.find(RunFolder(trained), "step-00000019")


def know_secrets() -> None:
    """Have secrets in the environment, where alone they belong."""
    os.environ.update(SECRETS)


def fail_with_secrets() -> None:
    """Have the program fail with a traceback that holds every secret of the environment."""
    import data

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(f"401 for {[os.environ[name] for name in SECRETS]}")

    data.open_splits = fails
    know_secrets()


def test_secrets_reach_no_output(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "secretive")
    (worker,) = train_in_fork(folder, datasets_dir, check=1, before=fail_with_secrets)
    assert "RuntimeError: 401 for ['hf_...', 'sk-...']" in worker.stderr
    assert "RuntimeError" in json.loads((folder / "status.json").read_text())["traceback"]
    train_in_fork(folder, datasets_dir, "--max-steps", 2, before=know_secrets)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 1024, "emb_dim": 2**16, "n_heads": 1},
        {"vocab_size": 2**24, "emb_dim": 2**16},
        {"n_layers": 140, "emb_dim": 2**13},
        {"context_length": 2**20, "emb_dim": 2**14},
    ],
)
def test_a_model_that_no_machine_holds_is_refused_before_it_is_made(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], change: dict[str, Any]
) -> None:
    """Where a run is trained, planned or sampled from: each allocates the model."""
    folder = make_run(model=change)
    model_json = folder / "model.json"
    for main, words in (
        (ddp_train.main, (folder.name, datasets_dir, "--runs-dir", folder.parent)),
        (ddp_train.main, (folder.name, datasets_dir, "--runs-dir", folder.parent, "--dry-run")),
        (test_smoke.main, (model_json, folder / "model.safetensors")),
    ):
        done = call(main, *words)
        (line,) = done.stderr.splitlines()
        assert (done.status, done.stdout) == (2, "")
        assert line.startswith(f"{model_json}: emb_dim: found a model of over ")
        assert line.endswith("wanted at most 10,000,000,000")


def test_the_largest_model_counts_like_others(make_run: Callable[..., Path]) -> None:
    folder = make_run(model={**TINY_MODEL, "n_layers": 48, "emb_dim": 4096, "vocab_size": 50257})  # 9.9e9 parameters
    assert RunFolder(folder).read_configs()[0].n_layers == 48


def test_a_folder_that_anyone_may_write_to_is_warned_about(tmp_path: Path, datasets_dir: Path) -> None:
    folder = write_demanding(tmp_path / "runs" / "open")
    folder.chmod(0o777)
    (worker,) = train_in_fork(folder, datasets_dir, "--max-steps", 1)
    (line,) = [line for line in worker.stderr.splitlines() if "every user" in line]
    assert line == f"warning: {folder}: every user of this machine may write here (chmod o-w)"
    folder.chmod(0o755)
    (worker,) = train_in_fork(folder, datasets_dir, "--max-steps", 2)
    assert "every user" not in worker.stderr


@pytest.mark.parametrize("page", ["run-page.html", "report.html"])
def test_pages_may_load_and_run_nothing(page: str) -> None:
    text = (ROOT / "assets" / page).read_text()
    assert 'http-equiv="Content-Security-Policy"' in text
    assert "default-src 'none'" in text
    scripts = re.findall(r"script-src ([^;\"]*)", text)
    assert scripts == ([] if page == "run-page.html" else ["'$script_hash'"])  # the report's own, by its hash
    assert "http:" not in text
    assert "https:" not in text


@pytest.mark.parametrize("text", ['{"seed": NaN}', '{"a": 1, "a": 2}', "[" * 5000, '{"a": Infinity}', "x" * 70_000])
@pytest.mark.parametrize("name", ["model.json", "train.json"])
def test_what_is_not_strict_json_is_one_line(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], name: str, text: str
) -> None:
    folder = make_run()
    (folder / name).write_text(text)
    done = call(ddp_train.main, folder.name, datasets_dir, "--runs-dir", folder.parent)
    (line,) = done.stderr.splitlines()
    assert done.status == 2
    assert line.startswith(f"{folder / name}: ")
