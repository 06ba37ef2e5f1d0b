"""What the fuzzer draws: a small project, damage to its files, and command lines that read them."""

import contextlib
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

import convert
import ddp_train
import experiment
import instruct
import prepare_dataset
import test_loss
import test_smoke
from harness.observers.charts import draw
from harness.run.files import file_sha256, write_json
from harness.run.run_folder import RunFolder
from tests.helpers import write, write_run, write_toy_dataset

DrawValue = Callable[[Any], Any]
"""Draws a value from a strategy of hypothesis."""
COMMANDS: dict[str, Callable[[], None]] = {
    "ddp_train": ddp_train.main,
    "test_loss": test_loss.main,
    "test_smoke": test_smoke.main,
    "prepare_dataset": prepare_dataset.main,
    "experiment": experiment.main,
    "convert": convert.main,
    "instruct": instruct.main,
}
VERBS = {
    "experiment": ["plan", "run", "compare", "report", "noise"],
    "convert": ["import", "export"],
    "instruct": ["respond", "judge"],
}
TEXT = st.one_of(
    # No path that leads out of the project, which the commands may write to.
    st.text(st.characters(exclude_characters="\0/~", exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["", " ", ".", "-", "--", "-1", "0", "1e-300", "1e999", "nan", "9" * 30, "x" * 5000,
                     "\x1b[31m\r\n", "\u202e", "tiny", "toy", "latest", "hf:", "hf:a/b", "/dev/null", "/dev/zero"]),
)  # fmt: skip
NUMBER = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -0.0, 1e308, 5e-324]),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)


@dataclass(frozen=True)
class Example:
    """A command line, and what was done to the project before."""

    name: str
    words: list[str]
    damage: str

    def main(self) -> None:
        """Run the command in the current folder."""
        COMMANDS[self.name]() if self.name in COMMANDS else draw(RunFolder(Path(self.words[0])))


def write_project(place: Path) -> None:
    """Write runs of 8 steps, their data, changes for an experiment, and texts."""
    (place / "datasets").mkdir(parents=True)
    write_toy_dataset(place / "datasets")
    settings = {"min_train_tokens": 8 * 8 * 16, "checkpoint_interval": 3}
    write_run(place / "runs" / "tiny", {}, settings)
    write_run(place / "runs" / "base", {}, settings)
    write(
        place / "changes.json", {"drop": {"model": {"drop_rate": 0.0}}, "clip": {"train": {"clipping_max_norm": 1.0}}}
    )
    texts = place / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("One text.\n" * 50)
    (texts / "b.jsonl").write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(50)))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 50}), texts / "c.parquet")
    (place / "losses.csv").write_text(
        "run,recipe,init_seed,train_seed,test_loss\na,x,1,1,3.5\nb,x,2,2,3.6\nc,y,1,1,3.4\n"
    )


def score_words(name: str) -> list[str]:
    """The command line that scores a checkpoint of the run."""
    model = ["runs/tiny/model.json", f"runs/tiny/checkpoints/{name}/model.safetensors"]
    return ["datasets", *model, "--dataset", "toy", "--start-token", "0", "--batches", "1", "--device", "cpu"]


PROJECT: list[tuple[str, list[str]]] = [
    ("ddp_train", ["tiny", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
    ("test_loss", score_words("latest")),
    ("experiment", ["plan", "base", "changes.json", "--name", "study", "--runs-dir", "runs"]),
]
"""The commands that give the project its checkpoints, metrics and scores."""
READERS: list[tuple[str, list[str]]] = [
    ("ddp_train", ["tiny", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "step-00000003", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "--dry-run", "--runs-dir", "runs", "--device", "cpu"]),
    ("test_loss", score_words("latest")),
    ("test_smoke", ["--timeline", "tiny", "--runs-dir", "runs", "--device", "cpu"]),
    ("convert", ["export", "tiny", "out", "--runs-dir", "runs", "--no-check"]),
    ("convert", ["import", "runs/tiny/checkpoints/latest/model.safetensors", "mine", "--runs-dir", "runs"]),
    ("experiment", ["plan", "tiny", "changes.json", "--name", "other", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--baseline", "tiny", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--losses", "losses.csv", "--baseline", "x", "y"]),
    ("experiment", ["compare", "--experiment", "study", "--runs-dir", "runs"]),
    ("experiment", ["report", "--baseline", "tiny", "--runs-dir", "runs"]),
    ("prepare_dataset", ["texts", "made", "--workers", "1"]),
    ("draw", ["runs/tiny"]),
]


def damage_bytes(draw_value: DrawValue, path: Path) -> str:
    """Flip, cut, insert, zero or repeat some bytes of a file."""
    raw = path.read_bytes()
    at = draw_value(st.integers(0, max(0, len(raw) - 1)))
    kind = draw_value(st.sampled_from(["flip", "cut", "insert", "zero", "empty", "repeat"]))
    if kind == "flip" and raw:
        changed = raw[:at] + bytes([raw[at] ^ (1 << draw_value(st.integers(0, 7)))]) + raw[at + 1 :]
    elif kind == "insert":
        changed = raw[:at] + draw_value(st.binary(min_size=1, max_size=20)) + raw[at:]
    elif kind == "zero":
        length = draw_value(st.integers(1, 64))
        changed = raw[:at] + bytes(length) + raw[at + length :]
    else:
        changed = {"cut": raw[:at], "empty": b"", "repeat": raw * 2}.get(kind, raw)
    path.write_bytes(changed)
    return f"{kind} at {at} of {path.name}"


def damage_json(draw_value: DrawValue, path: Path) -> str:
    """Replace, remove or add a value at any depth of a JSON file, or of one of its lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw_value(st.integers(0, len(lines) - 1))
    document = json.loads(lines[number])
    place, key = document, None
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw_value(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key]) or draw_value(st.booleans()):
            break
        place = place[key]
    value = draw_value(VALUE)
    if key is None or draw_value(st.integers(0, 9)) == 0:
        document = value
    elif isinstance(place, dict) and draw_value(st.integers(0, 4)) == 0:
        place.pop(key)
    else:
        place[key] = value
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return f"{key!r} = {str(value)[:200]!r} in {path.name}"


def damage_kind(draw_value: DrawValue, path: Path) -> str:
    """Put something in place of a file that is no file."""
    kind = draw_value(st.sampled_from(["pipe", "folder", "link to itself", "link to nowhere", "device", "missing"]))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to({"link to itself": path.name, "device": "/dev/zero"}.get(kind, "nowhere"))
    return f"{kind} for {path.name}"


def reseal(checkpoint: Path) -> None:
    """Make a manifest agree with its files, as a stranger would."""
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    with contextlib.suppress(OSError):
        files = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": file_sha256(checkpoint / name)}
                 for name in names}  # fmt: skip
        write_json(checkpoint / "manifest.json", {"step": int(checkpoint.name[5:]), "files": files})


def damaged_tensors(draw_value: DrawValue, path: Path) -> str:
    """Write a token file or a checkpoint's tensors with other names, types, shapes or values."""
    dtype = draw_value(st.sampled_from(["uint16", "int32", "uint32", "int64", "float32", "float16", "bool", "uint8"]))
    shape = draw_value(st.sampled_from([(0,), (1,), (17,), (2000,), (4, 5), ()]))
    name = draw_value(st.sampled_from(["tokens", "tok_emb.weight", "other", ""]))
    values = np.full(shape, draw_value(st.integers(-5, 200))).astype(dtype)
    save_file({name: values}, path, metadata=draw_value(st.dictionaries(TEXT, TEXT, max_size=3)) or None)
    return f"{dtype} {shape} as {name!r} in {path.name}"


def damaged_files(place: Path, draw_value: DrawValue) -> Example:
    """Damage files of the project in `place`, and choose a command that reads them."""
    done = []
    for _ in range(draw_value(st.integers(1, 2))):
        files = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        path = draw_value(st.sampled_from(files))
        hows = [damage_bytes, damage_kind]
        if path.suffix in (".json", ".jsonl"):
            hows = [damage_json, damage_json, damage_json, *hows]
        if path.suffix == ".safetensors":
            hows = [damaged_tensors, *hows]
        try:
            done.append(f"{path.parent.name}: {draw_value(st.sampled_from(hows))(draw_value, path)}")
        except (ValueError, OverflowError):
            continue  # no JSON any more
        if path.parent.name.startswith("step-") and draw_value(st.booleans()):
            reseal(path.parent)
    name, words = draw_value(st.sampled_from(READERS))
    return Example(name, words, "; ".join(done))


@functools.cache
def options_of(name: str, verb: str | None) -> list[str]:
    """Return the options that a command's --help names."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        sys.argv = ["command", *([verb] if verb else []), "--help"]
        COMMANDS[name]()
    return sorted(set(re.findall(r"--[a-z][a-z-]+", output.getvalue())) - {"--follow", "--push", "--interactive"})


def strange_words(place: Path, draw_value: DrawValue) -> Example:
    """Choose a command with words and options that nobody would type, to be run in `place`."""
    del place
    if draw_value(st.booleans()):
        name, words = draw_value(st.sampled_from([reader for reader in READERS if reader[0] in COMMANDS]))
        words = list(words)
        verb = words[0] if name in VERBS else None
    else:
        name = draw_value(st.sampled_from(sorted(COMMANDS)))
        verb = draw_value(st.sampled_from(VERBS[name])) if name in VERBS else None
        words = [*([verb] if verb else []), *draw_value(st.lists(TEXT, max_size=3))]
    options = options_of(name, verb) or ["--help"]
    for _ in range(draw_value(st.integers(0, 3))):
        words.append(draw_value(st.sampled_from(options)))
        if draw_value(st.booleans()):
            words.append(draw_value(st.one_of(TEXT, NUMBER.map(str)))[:100_000])
    if words and draw_value(st.integers(0, 3)) == 0:
        words[draw_value(st.integers(0, len(words) - 1))] = draw_value(TEXT)
    return Example(name, words, "nothing")
