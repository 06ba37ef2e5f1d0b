"""Strict reading of model.json and train.json: what is refused, and in which words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data
import ddp_train
from harness.run.config import load_model_config, load_run_configs, load_train_config
from harness.run.errors import ConfigError, exit_status_of
from tests.conftest import Called
from tests.helpers import REQUIRED_TRAIN as TRAIN
from tests.helpers import TINY_MODEL as MODEL
from tests.helpers import write


def refused(load: Callable[[Path], object], path: Path) -> tuple[str, ...]:
    """Load a file that must be refused; give the error's lines, after checking the form all of them share."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.exit_status == 2
    for line in caught.value.lines:
        assert "\n" not in line
        assert line.startswith(f"{path}: ")
        assert len(line) < 400
    return caught.value.lines


# --- files ---------------------------------------------------------------------------------------------------

GOOD = json.dumps(TRAIN)
BAD_FILES = {
    "empty": b"",
    "only white space": b" \n",
    "truncated": GOOD[:-9].encode(),
    "truncated in a string": GOOD[:6].encode(),
    "list at top": f"[{GOOD}]".encode(),
    "string at top": b'"train"',
    "null at top": b"null",
    "UTF-16": GOOD.encode("utf-16"),
    "byte-order mark": GOOD.encode("utf-8-sig"),
    "not text": bytes(range(128, 256)),
    "trailing comma": GOOD.replace("}", ",}").encode(),
    "two objects": (GOOD + GOOD).encode(),
    "comment": f"// a run\n{GOOD}".encode(),
    "single quotes": GOOD.replace('"', "'").encode(),
    "10 MB of white space": GOOD.encode() + b" " * 10_000_000,
    "10 MB of notes": json.dumps({**TRAIN, "notes": "x" * 10_000_000}).encode(),
    "list of depth 1000": b"[" * 1000 + b"]" * 1000,
    "value of depth 1000": GOOD.replace('"toy"', "[" * 1000 + "]" * 1000).encode(),
    "objects of depth 10000": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "integer of 5000 digits": GOOD.replace("2560", "9" * 5000).encode(),
}


@pytest.mark.parametrize("raw", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_one_line_that_names_it(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(raw)
    (line,) = refused(load_train_config, path)
    assert "wanted" in line


@pytest.mark.parametrize("is_folder", [False, True], ids=["missing", "a folder"])
def test_unreadable_file_is_one_line_that_names_it(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / "model.json"
    if is_folder:
        path.mkdir()
    assert len(refused(load_model_config, path)) == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD.replace("}", ', "dataset": "toy"}'), 'found key "dataset" twice'),
        (GOOD.replace("}", ', "notes": "a", "notes": "a"}'), 'found key "notes" twice'),
        (GOOD.replace("}", ', "learning_rate": NaN}'), "NaN"),
        (GOOD.replace("}", ', "learning_rate": Infinity}'), "Infinity"),
        (GOOD.replace("}", ', "learning_rate": -Infinity}'), "-Infinity"),
        (GOOD.replace("}", ', "learning_rate": 1e999}'), "learning_rate: found a number too large"),
    ],
)
def test_what_is_not_json_is_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    (line,) = refused(load_train_config, path)
    assert word in line


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("batch_size", "microbatch_size"),
        ("micro_batch_size", "microbatch_size"),
        ("minibatch_size", "microbatch_size"),
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("warmup_percent", "warmup_period_percent"),
        ("Shuffle", "shuffle"),
        ("clip_max_norm", "clipping_max_norm"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, key: 1}))
    assert line.split(": ")[1] == key
    assert line.endswith(f"nearest is {nearest}")


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[31mb", "x" * 5000, "", "__dataclass_self__", "self", "\ud800"])
def test_strange_unknown_key_is_refused_on_one_line(tmp_path: Path, key: str) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, key: 1}))
    assert line.isprintable()
    assert "unknown key" in line


def test_unknown_key_of_the_model_names_the_nearest(tmp_path: Path) -> None:
    (line,) = refused(load_model_config, write(tmp_path / "model.json", {**MODEL, "n_layer": 2}))
    assert "n_layer: found an unknown key" in line
    assert line.endswith("n_layers")


# --- values --------------------------------------------------------------------------------------------------

BAD_TRAIN_VALUES: list[tuple[str, object]] = [
    *[("microbatch_size", value) for value in (0, -1, 1.5, "6", True, 10**12, None, [6])],
    *[("gradient_accumulation_steps", value) for value in (0, -1, 2.0, "1", True)],
    *[("global_batch_size", value) for value in (0, -6, 6.5, "96", True)],
    *[("checkpoint_interval", value) for value in (0, -5, None, 1.5, "617", True)],
    *[("checkpoints_to_keep", value) for value in (1, 0, -1, 2.5, True)],
    *[("random_seed", value) for value in (-1, 2**64, 1.5, "42", None, True)],
    *[(key, value) for key in ("init_seed", "order_seed", "dropout_seed") for value in (-1, 2**64, 0.5, "1")],
    *[(key, value) for key in ("start_train_token", "start_val_token") for value in (-1, 1.5, "0", None, False)],
    *[("min_train_tokens", value) for value in (-2, 0, 1e9, "3260190720", None, True)],
    *[("learning_rate", value) for value in (0, -1, 1e30, "0.0004", None, True)],
    *[("clipping_max_norm", value) for value in (0, -1, "3.5", True)],
    *[("weight_decay", value) for value in (-1, -0.1, "0.1", None, 1e30)],
    *[("warmup_period_percent", value) for value in (-5, 100, 101, "5", None)],
    *[("nonfinite_patience", value) for value in (0, -1, 1.5, None)],
    *[
        ("dataset", value)
        for value in (
            "../../x", "..", ".", "/etc", "a/b/c", "a/..", "a/../b", "", "a/", "/a", "~", "a b", "a\\b", "a\n",
            "a\x00", "-a", None, 7, ["toy"],
        )
    ],
    *[("dataset_revision", value) for value in ("", "-x", "../x", "a b", 7, "a\n")],
    *[
        (key, value)
        for key in ("use_amp", "schedule_learning_rate", "shuffle", "activation_checkpointing", "deterministic")
        for value in ("false", 0, 1, None)
    ],
    *[("amp_dtype", value) for value in ("fp16", "bf16", "float32", "float16+bfloat16", None, 16, ["float16"])],
    *[("amp_dtype", ["float16", "bfloat16"])],
    *[("compile", value) for value in ("on", "true", 1, 0, None)],
    *[("sample_prompt", value) for value in ("", 7, None)],
    *[("loggers", value) for value in ("wandb", 7, None, {"wandb": True}, ["wandb", "wandb"])],
    *[("notes", value) for value in (7, ["a"])],
    *[("price_per_hour", value) for value in (-1, "40")],
    *[("expected_tokens_per_second", value) for value in (0, -1, "fast")],
    *[("currency", value) for value in (7, "x" * 100)],
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_TRAIN_VALUES)
def test_bad_training_value_is_named_with_what_was_found_and_wanted(tmp_path: Path, key: str, value: object) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, key: value}))
    where, named, rest = line.split(": ", 2)
    assert (where, named) == (str(tmp_path / "train.json"), key)
    shown = json.dumps(value)
    assert rest.startswith(f"found {shown if len(shown) <= 80 else shown[:77]}")
    assert len(rest.split(", wanted ", 1)[1]) > 2


def test_an_unknown_logger_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", {**TRAIN, "loggers": ["wandb", "tensorbord"]})
    (line,) = refused(load_train_config, path)
    wanted = 'a list of "tensorboard", "wandb" and "trackio", each at most once'
    assert line == f'{path}: loggers: found "tensorbord", wanted {wanted}'


BAD_MODEL_VALUES: list[tuple[str, object]] = [
    *[
        (key, value)
        for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        for value in (0, -1, 1.5, "12", True, None, 10**9)
    ],
    ("emb_dim", 15),
    *[("drop_rate", value) for value in (-0.1, 1, 1.5, "0.1", None, False)],
    *[("qkv_bias", value) for value in ("false", 0, None)],
    *[("tie_weights", value) for value in ("true", 1, None)],
]


@pytest.mark.parametrize(("key", "value"), BAD_MODEL_VALUES)
def test_bad_model_value_is_named_with_what_was_found_and_wanted(tmp_path: Path, key: str, value: object) -> None:
    (line,) = refused(load_model_config, write(tmp_path / "model.json", {**MODEL, key: value}))
    where, named, rest = line.split(": ", 2)
    assert (where, named) == (str(tmp_path / "model.json"), key)
    assert rest.startswith(f"found {json.dumps(value)}, wanted ")


@pytest.mark.parametrize(
    ("key", "load", "good"),
    [
        *[(key, load_model_config, MODEL) for key in MODEL],
        *[(key, load_train_config, TRAIN) for key in TRAIN],
    ],
)
def test_missing_key_is_named_with_what_it_means(
    tmp_path: Path, key: str, load: Callable[[Path], object], good: dict[str, Any]
) -> None:
    without = {name: value for name, value in good.items() if name != key}
    (line,) = refused(load, write(tmp_path / "file.json", without))
    assert f" {key}: missing, wanted" in line


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"global_batch_size": 8}, ("global_batch_size", "8", "microbatch_size", "6")),
        ({"global_batch_size": 12, "gradient_accumulation_steps": 2}, ("global_batch_size", "gradient_accum")),
        ({"validation_interval": 5}, ("validation_interval", "validation_batches")),
        ({"validation_batches": 5}, ("validation_interval", "validation_batches")),
    ],
)
def test_keys_that_do_not_fit_together_are_named(
    tmp_path: Path, values: dict[str, Any], named: tuple[str, ...]
) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, **values}))
    assert all(word in line for word in (*named, "wanted"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"qkv_bias": True, "bias": False}, "qkv_bias"),
        ({"positions": "rotary", "emb_dim": 30, "n_heads": 2}, "emb_dim"),
    ],
)
def test_keys_of_a_model_that_do_not_fit_together_are_named(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    (line,) = refused(load_model_config, write(tmp_path / "model.json", {**MODEL, **values}))
    assert line.split(": ")[1] == key
    assert ", wanted " in line


# --- all errors at once --------------------------------------------------------------------------------------


def test_every_error_of_a_file_is_reported(tmp_path: Path) -> None:
    values = {**TRAIN, "learning_rate": -1, "checkpoint_interval": 0, "shuffel": True}
    del values["dataset"]
    lines = refused(load_train_config, write(tmp_path / "train.json", values))
    assert {line.split(": ")[1] for line in lines} == {"learning_rate", "checkpoint_interval", "shuffel", "dataset"}


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"min_train_tokens": 0, "learning_rate": -1}, {"min_train_tokens", "learning_rate"}),
        ({"global_batch_size": 8, "learning_rate": -1}, {"global_batch_size", "learning_rate"}),
        ({"min_train_tokens": 0, "global_batch_size": 8}, {"min_train_tokens", "global_batch_size"}),
        (
            {"global_batch_size": 12, "gradient_accumulation_steps": 2, "learning_rate": -1},
            {"global_batch_size", "learning_rate"},
        ),
        ({"a:b": 1, "a:c": 1}, {"a:b", "a:c"}),
    ],
)
def test_one_error_does_not_hide_another(tmp_path: Path, values: dict[str, Any], keys: set[str]) -> None:
    lines = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, **values}))
    assert {line.split(": ")[1] for line in lines} == keys


def test_errors_of_both_files_are_reported_together(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", {**MODEL, "emb_dim": 15})
    train = write(tmp_path / "train.json", {**TRAIN, "learning_rate": 0, "clipping_max_norm": -1})
    with pytest.raises(ConfigError) as caught:
        load_run_configs(model, train)
    assert [line.split(": ")[:2] for line in caught.value.lines] == [
        [str(model), "emb_dim"],
        [str(train), "learning_rate"],
        [str(train), "clipping_max_norm"],
    ]


@pytest.mark.parametrize("bad", ["model.json", "train.json"])
def test_error_of_either_file_alone_is_reported(tmp_path: Path, bad: str) -> None:
    paths = {"model.json": MODEL, "train.json": TRAIN}
    for name, values in paths.items():
        write(tmp_path / name, {**values, "oops": 1} if name == bad else values)
    with pytest.raises(ConfigError) as caught:
        load_run_configs(tmp_path / "model.json", tmp_path / "train.json")
    (line,) = caught.value.lines
    assert line.startswith(f"{tmp_path / bad}: oops: ")


def test_command_prints_each_error_on_a_line_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "train.json", {**TRAIN, "learning_rate": 0, "clipping_max_norm": -1})
    assert exit_status_of(lambda: load_train_config(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("key", ["xyz", "moe", "start", "quantization", "self"])
def test_no_key_is_suggested_without_likeness(tmp_path: Path, key: str) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, key: 1}))
    assert line.endswith("wanted a known one (docs/configuration.md lists them)")


def test_a_mistyped_run_or_dataset_is_refused_with_the_nearest_name_and_without_a_network(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub for a local dataset")

    monkeypatch.setattr(data, "HfApi", unreachable)
    folder = make_run("my-run", train={"dataset": "tooy"})
    place = ("--runs-dir", folder.parent, "--device", "cpu")
    run = call(ddp_train.main, "my-rnu", datasets_dir, *place)
    assert run.status == 2
    assert run.stderr.endswith("my-rnu, wanted one with model.json and train.json; the nearest is my-run\n")
    dataset = call(ddp_train.main, "my-run", datasets_dir, *place)
    assert dataset.status == 3
    assert dataset.stderr.endswith(
        "tooy/train.safetensors: found no such file, wanted the train split of dataset tooy; the nearest is toy\n"
    )
