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
from tests.acceptance.test_published_runs import write_published
from tests.helpers import TINY_TRAIN, write, write_run, write_toy_dataset

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
    "experiment": ["new", "plan", "run", "compare", "report", "noise"],
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
TYPED = st.lists(
    st.one_of(TEXT, NUMBER.map(lambda number: f":tokens {number}"), NUMBER.map(lambda number: f":top-k {number}")),
    max_size=3,
).map("\n".join)


@dataclass(frozen=True)
class Example:
    """A command line, and what was done to the project before."""

    name: str
    words: list[str]
    damage: str
    typed: str = ""
    """What stdin gives."""

    def main(self) -> None:
        """Run the command in the current folder."""
        COMMANDS[self.name]() if self.name in COMMANDS else draw(RunFolder(Path(self.words[0])))


def write_project(place: Path) -> None:
    """Write runs of 8 steps and of mixed data, another harness's run, changes for an experiment, and texts."""
    (place / "datasets").mkdir(parents=True)
    write_toy_dataset(place / "datasets")
    settings = {"min_train_tokens": 8 * 8 * 16, "checkpoint_interval": 3}
    write_run(place / "runs" / "tiny", {}, settings)
    write_run(place / "runs" / "base", {}, settings)
    write_run(place / "runs" / "tiny-2", {"qkv_bias": True}, settings)
    for seed, name in enumerate(MIXED):
        datasets = [{"name": name, "weight": weight} for name, weight in (("own", 3), ("more", 1))]
        mixed = {"dataset": datasets, "epochs": 3, "weight_average_decay": 0.5, "random_seed": seed}
        mixed |= {"clipping_max_norm": 1.0} if name == "clipped" else {}
        write_run(place / "runs" / name, {"vocab_size": 300}, {**settings, **mixed})
    write_published(place / "theirs" / "old", {**TINY_TRAIN, "microbatch_size": 1})
    write(
        place / "changes.json", {"drop": {"model": {"drop_rate": 0.0}}, "clip": {"train": {"clipping_max_norm": 1.0}}}
    )
    texts = place / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("One text.\n" * 50)
    (texts / "b.jsonl").write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(90)))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 50}), texts / "c.parquet")
    (place / "losses.csv").write_text(
        "run,recipe,init_seed,train_seed,test_loss\na,x,1,1,3.5\nb,x,2,2,3.6\nc,y,1,1,3.4\n"
    )


def score_words(run: str) -> list[str]:
    """The command line that scores a run's newest checkpoint."""
    model = [f"runs/{run}/model.json", f"runs/{run}/checkpoints/latest/model.safetensors"]
    return ["datasets", *model, "--dataset", "toy", "--start-token", "0", "--batches", "1", "--device", "cpu"]


RUNS, CPU = ["--runs-dir", "runs"], ["--device", "cpu"]
PLACE = ["datasets", *RUNS, *CPU]
MIXED = ["mixed", "mixed-2", "clipped"]
TRAINED = ["--tokenizer", "train:264", "--validation-fraction", "0.3", "--workers", "1"]
PROJECT: list[tuple[str, list[str]]] = [
    *(("ddp_train", [name, *PLACE]) for name in ("tiny", "tiny-2")),
    *(("test_loss", score_words(name)) for name in ("tiny", "tiny-2")),
    ("experiment", ["plan", "base", "changes.json", "--name", "study", "--runs-dir", "runs"]),
    ("prepare_dataset", ["texts", "datasets/own", *TRAINED]),
    ("prepare_dataset", ["texts", "datasets/more", "--tokenizer", "datasets/own/tokenizer.json", *TRAINED[2:]]),
    *(("ddp_train", [name, *PLACE]) for name in MIXED),
    *(("test_loss", ["datasets", "--run", name, *RUNS, *CPU]) for name in MIXED),
    *(("test_loss", ["datasets", "--run", name, "--weights", "averaged", *RUNS, *CPU]) for name in MIXED),
    ("experiment", ["noise", "--baseline", "mixed", *RUNS]),
    ("convert", ["export", "mixed", "exported", *RUNS, "--no-check"]),
]
"""The commands that give the project its checkpoints, metrics and scores."""
READERS: list[tuple[str, list[str]]] = [
    ("ddp_train", ["tiny", "datasets", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "step-00000003", "--runs-dir", "runs", "--device", "cpu"]),
    ("ddp_train", ["tiny", "datasets", "--dry-run", "--runs-dir", "runs", "--device", "cpu"]),
    ("test_loss", score_words("tiny")),
    ("test_smoke", ["--timeline", "mixed", "--runs-dir", "runs", "--device", "cpu"]),
    ("convert", ["export", "tiny", "out", "--runs-dir", "runs", "--no-check"]),
    ("convert", ["import", "runs/tiny/checkpoints/latest/model.safetensors", "mine", "--n-heads", "2", *RUNS]),
    ("experiment", ["plan", "tiny", "changes.json", "--name", "other", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--baseline", "tiny", "tiny-2", "--runs-dir", "runs"]),
    ("experiment", ["compare", "--losses", "losses.csv", "--baseline", "x", "y"]),
    ("experiment", ["compare", "--experiment", "study", "--runs-dir", "runs"]),
    ("experiment", ["report", "--baseline", "tiny", "tiny-2", "--runs-dir", "runs"]),
    ("prepare_dataset", ["texts", "made", "--workers", "1"]),
    ("draw", ["runs/tiny"]),
    ("ddp_train", ["mixed", *PLACE]),
    ("ddp_train", ["mixed", *PLACE, "--max-steps", "2", "--fresh"]),
    ("ddp_train", ["mixed", *PLACE, "--dry-run"]),
    ("test_loss", ["datasets", "--run", "mixed", *RUNS, *CPU]),
    ("test_loss", ["datasets", "--run", "mixed", "--weights", "averaged", *RUNS, *CPU]),
    ("test_smoke", ["--run", "mixed", *RUNS, *CPU]),
    ("test_smoke", ["--run", "mixed", "--interactive", *RUNS, *CPU]),
    ("prepare_dataset", ["texts", "made", "--tokenizer", "datasets/own/tokenizer.json", "--workers", "1"]),
    ("prepare_dataset", ["--verify", "datasets/own"]),
    ("experiment", ["new", "fresh", "--data", "own", "--datasets-dir", "datasets", *RUNS, *CPU]),
    ("experiment", ["compare", "--baseline", "mixed", "clipped", *RUNS]),
    ("experiment", ["compare", "--baseline", "mixed", "clipped", *RUNS, "--checkpoint", "averaged"]),
    ("experiment", ["report", "mixed", "clipped", "--follow", *RUNS]),
    ("experiment", ["report", "--experiment", "study", "--follow", *RUNS]),
    ("experiment", ["noise", *RUNS]),
    ("convert", ["import", "--all", "theirs", *RUNS]),
    ("convert", ["import", "exported", "mine", *RUNS]),
]
BOMBS = ["(a+)+$", "(?:.*)*x", "(\\s*\\S*)*y", "(?=(\\w+))\\1\\1", "(((((.{0,99}){0,99}){0,99}){0,99}){0,99})", "["]
"""Patterns that take long to match, or that are none."""
STEPS_OF_TOKENIZERS = [
    None, {}, 7, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": BOMBS[0]}, "content": "x" * 1000},
    {"type": "Fuse"}, {"type": "BPEDecoder", "suffix": ""}, 
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"strategy": "LongestFirst", "stride": 0, "max_length": 0, "direction": "Left"},
]  # fmt: skip
STRANGE_TOKENS = ["\x1b[2J\x1b]0;title\x07", "\u202e", "", "\0", "x" * 100_000, "<|endoftext|>", "\u0120"]


def damage_bytes(draw_value: DrawValue, path: Path) -> str:
    """Flip, cut, insert, zero or repeat some bytes of a file."""
    raw = path.read_bytes()
    at = draw_value(st.integers(0, max(0, len(raw) - 1)))
    kind = draw_value(st.sampled_from(["flip", "cut", "insert", "zero", "empty", "repeat", "deep"]))
    if kind == "flip" and raw:
        changed = raw[:at] + bytes([raw[at] ^ (1 << draw_value(st.integers(0, 7)))]) + raw[at + 1 :]
    elif kind == "insert":
        changed = raw[:at] + draw_value(st.binary(min_size=1, max_size=20)) + raw[at:]
    elif kind == "zero":
        length = draw_value(st.integers(1, 64))
        changed = raw[:at] + bytes(length) + raw[at + length :]
    else:
        changed = {"cut": raw[:at], "empty": b"", "repeat": raw * 2, "deep": b"[" * 200_000}.get(kind, raw)
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


def strange_tokenizer(draw_value: DrawValue, path: Path) -> str:
    """Write a tokenizer.json as a stranger might: bombs, ids without end, tokens that a terminal obeys."""
    document = json.loads(path.read_text())
    kind = draw_value(st.sampled_from(["bomb", "id", "token", "added", "merge", "step"]))
    value = draw_value(st.sampled_from(BOMBS if kind == "bomb" else STRANGE_TOKENS))
    number = draw_value(st.sampled_from([-1, 0, 5, 300, 70_000, 10**7, 2**31, 2**32 - 1, 2**32, 2**64]))
    if kind == "bomb":
        split = {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    elif kind in ("id", "token"):
        document["model"]["vocab"] = {**document["model"]["vocab"], value: number}
    elif kind == "added":
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        special = draw_value(st.booleans())
        document["added_tokens"].append({"id": number, "content": value, "special": special, **flags})
    elif kind == "merge":
        document["model"]["merges"] = [[value, value]] * draw_value(st.sampled_from([1, 2000]))
    else:
        document[
            draw_value(st.sampled_from(["normalizer", "post_processor", "decoder", "truncation", "padding"]))
        ] = draw_value(st.sampled_from(STEPS_OF_TOKENIZERS))
    path.write_text(json.dumps(document))
    return f"{kind} {number} {value[:40]!r} in {path.parent.name}/{path.name}"


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
        if path.name == "tokenizer.json":
            hows = [strange_tokenizer]
        try:
            done.append(f"{path.parent.name}: {draw_value(st.sampled_from(hows))(draw_value, path)}")
        except (ValueError, OverflowError, TypeError, KeyError):
            continue  # not what it was any more
        if path.parent.name.startswith("step-") and draw_value(st.booleans()):
            reseal(path.parent)
    name, words = draw_value(st.sampled_from(READERS))
    return Example(name, words, "; ".join(done), draw_value(TYPED))


@functools.cache
def options_of(name: str, verb: str | None) -> list[str]:
    """Return the options that a command's --help names."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        sys.argv = ["command", *([verb] if verb else []), "--help"]
        COMMANDS[name]()
    return sorted(set(re.findall(r"--[a-z][a-z-]+", output.getvalue())) - {"--push"})


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
    return Example(name, words, "nothing", draw_value(TYPED))
