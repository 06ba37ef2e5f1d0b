"""A damaged checkpoint is detected and never loaded; no stranger's checkpoint reaches outside."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.engine import resume
from harness.engine.opening import CheckpointMetadata, open_checkpoint
from harness.run.errors import CheckpointError
from harness.run.files import file_sha256, write_json
from harness.run.run_folder import RunFolder
from tests.helpers import train_in_fork
from training.context import parameter_shapes

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NEWEST, BEFORE = "step-00000019", "step-00000015"


def change(raw: bytes, kind: str) -> bytes:
    """Damage a file's bytes."""
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    zeroed = raw[:middle] + b"\0" * len(raw[middle : middle + 4096]) + raw[middle + 4096 :]
    return {
        "half": raw[:middle],
        "one byte less": raw[:-1],
        "one byte more": raw + b"\0",
        "empty": b"",
        "one bit flipped": flipped,
        "4 KiB of zeros": zeroed,
        "all zeros": b"\0" * len(raw),
    }[kind]


DAMAGES = ("half", "one byte less", "one byte more", "empty", "one bit flipped", "4 KiB of zeros", "all zeros")


@pytest.mark.fault("F11", "F12")
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_seen(
    trained: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    folder, file = RunFolder(trained), trained / "checkpoints" / NEWEST / name
    file.write_bytes(change(file.read_bytes(), kind))
    found = resume.find(folder, None)
    assert found is not None
    assert found.path.name == BEFORE
    assert f"passing over a damaged checkpoint: {file}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=NEWEST):
        resume.find(folder, NEWEST)


@pytest.mark.fault("F10")
@pytest.mark.parametrize("kind", ["empty", "all zeros"])
def test_what_a_power_cut_leaves_is_passed_over(
    trained: Path, trained_once: Path, datasets_dir: Path, kind: str
) -> None:
    """The newest files may have their names and none of their bytes."""
    for name in FILES[:3]:
        file = trained / "checkpoints" / NEWEST / name
        file.write_bytes(change(file.read_bytes(), kind))
    (done,) = train_in_fork(trained, datasets_dir)
    assert f"Resuming from {BEFORE}" in done.stdout
    wanted = json.loads((trained_once / "checkpoints" / NEWEST / "manifest.json").read_text())["files"]
    (line,) = done.stderr.replace("\r", "\n").splitlines()[:1]
    assert wanted[FILES[0]]["sha256"] in line
    assert len([word for word in line.replace(",", "").split() if len(word) == 64]) == 2


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file's bytes, but for those that say how the last start ended and who holds the run."""
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name not in {"status.json", ".lock"}]
    return {path: path.read_bytes() for path in kept}


@pytest.mark.fault("F13")
def test_without_a_valid_checkpoint_nothing_is_trained_or_deleted(trained: Path, datasets_dir: Path) -> None:
    reasons = []
    for number, path in enumerate(sorted((trained / "checkpoints").glob("step-*"), reverse=True)):
        file = path / FILES[number % len(FILES)]
        file.write_bytes(file.read_bytes()[:-1])
        reasons.append(str(file))
    before = tree(trained)
    (done,) = train_in_fork(trained, datasets_dir, check=4)
    lines = done.stderr.splitlines()
    assert len(lines) == len(reasons) + 1
    assert all(line.startswith(reason) for line, reason in zip(lines, reasons, strict=False))
    assert tree(trained) == before


def to_nowhere(link: Path) -> None:
    link.symlink_to("step-00000777")


def to_itself(link: Path) -> None:
    link.symlink_to(link.name)


def to_outside(link: Path) -> None:
    link.symlink_to("/etc")


def to_an_older_one(link: Path) -> None:
    link.symlink_to("step-00000005")


def a_folder(link: Path) -> None:
    link.mkdir()
    (link / "mine").write_text("kept")


def a_file(link: Path) -> None:
    link.write_text("step-00000005")


def nothing(_: Path) -> None:
    pass


@pytest.mark.fault("F14", "F15")
@pytest.mark.parametrize("put", [to_nowhere, to_itself, to_outside, to_an_older_one, a_folder, a_file, nothing])
@pytest.mark.parametrize("name", ["latest", "best"])
def test_links_are_hints_and_are_repaired(trained: Path, name: str, put: Callable[[Path], None]) -> None:
    folder = RunFolder(trained)
    links = {link: (folder.checkpoints / link).readlink() for link in ("latest", "best")}
    metadata = CheckpointMetadata.read(folder.checkpoint(19), 19)
    (folder.checkpoints / name).unlink()
    put(folder.checkpoints / name)
    shapes = parameter_shapes(folder.read_configs()[0])
    point = resume.choose_resume_point(folder, resume.ResumeRequest(), metadata.identity, shapes)
    assert point.checkpoint is not None
    assert point.checkpoint.path == folder.checkpoint(19)
    assert point.state.best_loss == metadata.state.best_loss
    assert {link: (folder.checkpoints / link).readlink() for link in links} == links
    if put is a_folder:
        assert (trained / "aside-1" / "checkpoints" / name / "mine").read_text() == "kept"


MANIFESTS = {
    "no JSON": "{",
    "a list": "[]",
    "NaN": '{"step": NaN, "files": {}}',
    "no files": '{"step": 19}',
    "files are a list": '{"step": 19, "files": []}',
    "sizes are words": '{"step": 19, "files": {"state.json": {"bytes": "many", "sha256": ""}}}',
    "nested too deeply": "[" * 5000,
    "too long": " " * 100_000 + "{}",
}


@pytest.mark.fault("F16")
@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_malformed_manifest_makes_the_checkpoint_invalid(trained: Path, text: str) -> None:
    (trained / "checkpoints" / NEWEST / "manifest.json").write_text(text)
    found = resume.find(RunFolder(trained), None)
    assert found is not None
    assert found.path.name == BEFORE


@pytest.mark.fault("F16")
@pytest.mark.parametrize("what", ["a file's name leads outside", "a file is a link", "another step", "a huge size"])
def test_a_stranger_s_checkpoint_reaches_nothing_outside(trained: Path, tmp_path: Path, what: str) -> None:
    target = trained / "checkpoints" / NEWEST
    manifest = json.loads((target / "manifest.json").read_text())
    outside = tmp_path / "outside"
    shutil.copy(target / "state.json", outside)
    if what == "a file's name leads outside":
        manifest["files"]["../../../../outside"] = manifest["files"].pop("state.json")
    elif what == "a file is a link":
        (target / "state.json").unlink()
        (target / "state.json").symlink_to(outside)
    elif what == "another step":
        manifest["step"] = 15
    else:
        manifest["files"]["state.json"]["bytes"] = 2**70
    write_json(target / "manifest.json", manifest)
    before = outside.read_bytes()
    with pytest.raises(CheckpointError, match=NEWEST):
        open_checkpoint(target)
    found = resume.find(RunFolder(trained), None)
    assert found is not None
    assert found.path.name == BEFORE
    assert outside.read_bytes() == before


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.fault("F17")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_is_never_opened(trained: Path, tmp_path: Path, datasets_dir: Path, name: str) -> None:
    """The manifest vouches for the bomb, as it would in a checkpoint that a stranger has made."""
    target, canary = trained / "checkpoints" / NEWEST, tmp_path / "canary"
    (target / name).write_bytes(pickle.dumps({"exp_avg": Bomb(canary)}))
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": (target / name).stat().st_size,
        "sha256": file_sha256(target / name),
    }
    write_json(target / "manifest.json", manifest)
    (done,) = train_in_fork(trained, datasets_dir, NEWEST, check=4)
    assert f"{target / name}: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not canary.exists()


HUGE_HEADER = (2**40).to_bytes(8, "little")


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "raw",
    [HUGE_HEADER, HUGE_HEADER + b"{}", (2).to_bytes(8, "little") + b"[]", b"\xff" * 64],
    ids=["only a length", "1 TiB of header", "a list for a header", "noise"],
)
def test_a_hostile_header_is_one_line(trained: Path, datasets_dir: Path, raw: bytes) -> None:
    target = trained / "checkpoints" / NEWEST
    (target / "model.safetensors").write_bytes(raw)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": len(raw),
        "sha256": file_sha256(target / "model.safetensors"),
    }
    write_json(target / "manifest.json", manifest)
    (done,) = train_in_fork(trained, datasets_dir, NEWEST, check=4)
    assert len(done.stderr.splitlines()) == 1
