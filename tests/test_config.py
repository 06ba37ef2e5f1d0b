"""Strict reading of model.json and train.json: what is refused and how, defaults, recipe hash, schemas."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from harness.config import (
    ModelConfig,
    TrainConfig,
    load_model_config,
    load_run_configs,
    load_train_config,
    recipe_hash,
    schema_of,
)
from harness.errors import ConfigError, exit_status_of

ROOT = Path(__file__).parent.parent
MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
TRAIN: dict[str, Any] = {
    "dataset": "toy",
    "min_train_tokens": 2560,
    "start_train_token": 0,
    "start_val_token": 0,
    "microbatch_size": 6,
    "checkpoint_interval": 5,
}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


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
        (GOOD.replace("}", ', "dataset": "toy"}'), '"dataset" appears twice'),
        (GOOD.replace("}", ', "notes": "a", "notes": "a"}'), '"notes" appears twice'),
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
    *[("notes", value) for value in (7, ["a"])],
    *[("price_per_hour", value) for value in (-1, "40")],
    *[("expected_tokens_per_second", value) for value in (0, -1, "fast")],
    *[("currency", value) for value in (7, "x" * 100)],
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_TRAIN_VALUES)
def test_bad_training_value_is_named_with_what_was_found_and_wanted(
    tmp_path: Path, key: str, value: object
) -> None:
    (line,) = refused(load_train_config, write(tmp_path / "train.json", {**TRAIN, key: value}))
    where, named, rest = line.split(": ", 2)
    assert (where, named) == (str(tmp_path / "train.json"), key)
    shown = json.dumps(value)
    assert rest.startswith(f"found {shown if len(shown) <= 80 else shown[:77]}")
    assert len(rest.split(", wanted ", 1)[1]) > 2


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


def test_command_prints_each_error_on_a_line_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "train.json", {**TRAIN, "learning_rate": 0, "clipping_max_norm": -1})
    assert exit_status_of(lambda: load_train_config(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert "Traceback" not in captured.err


# --- what is accepted ----------------------------------------------------------------------------------------


def test_defaults(tmp_path: Path) -> None:
    train = load_train_config(write(tmp_path / "train.json", TRAIN))
    defaults = {field.name: getattr(train, field.name) for field in fields(train) if field.name not in TRAIN}
    assert defaults == {
        "dataset_revision": None,
        "gradient_accumulation_steps": 1,
        "global_batch_size": None,
        "checkpoints_to_keep": None,
        "validation_interval": None,
        "validation_batches": None,
        "learning_rate": 0.0004,
        "schedule_learning_rate": False,
        "warmup_period_percent": 0,
        "weight_decay": 0.1,
        "clipping_max_norm": None,
        "use_amp": True,
        "amp_dtype": "float16",
        "random_seed": 42,
        "init_seed": None,
        "order_seed": None,
        "dropout_seed": None,
        "shuffle": False,
        "compile": "auto",
        "activation_checkpointing": False,
        "deterministic": False,
        "nonfinite_patience": 20,
        "sample_prompt": "Every effort moves you",
        "price_per_hour": None,
        "currency": None,
        "expected_tokens_per_second": None,
        "notes": None,
    }
    model = load_model_config(write(tmp_path / "model.json", MODEL))
    assert model == ModelConfig(**MODEL, tie_weights=False)


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    values = {**TRAIN, **CHANGES}
    del values["gradient_accumulation_steps"]
    train = load_train_config(write(tmp_path / "train.json", values))
    assert {key: getattr(train, key) for key in values} == values


def test_schema_key_is_accepted_in_both_files(tmp_path: Path) -> None:
    schema = {"$schema": "../schema/model.schema.json"}
    assert load_model_config(write(tmp_path / "m.json", {**schema, **MODEL})) == ModelConfig(**MODEL)
    assert load_train_config(write(tmp_path / "t.json", {**schema, **TRAIN})) == TrainConfig(**TRAIN)


def test_whole_numbers_serve_as_floats_and_are_read_as_such(tmp_path: Path) -> None:
    model = load_model_config(write(tmp_path / "model.json", {**MODEL, "drop_rate": 0}))
    train = load_train_config(write(tmp_path / "train.json", {**TRAIN, "weight_decay": 0, "clipping_max_norm": 1}))
    assert [type(x) for x in (model.drop_rate, train.weight_decay, train.clipping_max_norm)] == [float] * 3


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TrainConfig(**TRAIN).learning_rate = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        ModelConfig(**MODEL).n_layers = 1  # type: ignore[misc]


FINEWEB: dict[str, Any] = {
    "checkpoint_interval": 617,
    "dataset": "gpjt/fineweb-gpt2-tokens",
    "min_train_tokens": 3260190720,
    "start_train_token": 0,
    "start_val_token": 0,
}
SCHEDULE = {"learning_rate": 0.0014, "schedule_learning_rate": True, "warmup_period_percent": 5}
PUBLISHED_TRAIN = {
    "baseline": {"microbatch_size": 12, **FINEWEB},
    "local baseline": {"microbatch_size": 6, "gradient_accumulation_steps": 16, **FINEWEB},
    "no AMP": {"microbatch_size": 12, **FINEWEB, "use_amp": False},
    "clipping": {"microbatch_size": 12, **FINEWEB, "clipping_max_norm": 3.5},
    "schedule": {"microbatch_size": 12, **FINEWEB, **SCHEDULE},
    "weight decay": {"microbatch_size": 12, **FINEWEB, "weight_decay": 0.33724},
    "stacked": {
        "random_seed": 67, "microbatch_size": 12, **FINEWEB, "clipping_max_norm": 3.5, "weight_decay": 0.01, **SCHEDULE
    },
    "validating": {"microbatch_size": 12, **FINEWEB, "validation_interval": 617, "validation_batches": 300},
}  # fmt: skip
GPT2_SMALL = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


@pytest.mark.parametrize("values", PUBLISHED_TRAIN.values(), ids=PUBLISHED_TRAIN.keys())
def test_published_train_json_is_accepted(tmp_path: Path, values: dict[str, Any]) -> None:
    train = load_train_config(write(tmp_path / "train.json", values))
    assert {key: getattr(train, key) for key in values} == values


@pytest.mark.parametrize("change", [{}, {"drop_rate": 0.0}, {"drop_rate": 0}, {"qkv_bias": True}, {"tie_weights": True}])
def test_published_model_json_is_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    values = {**GPT2_SMALL, **change}
    model = load_model_config(write(tmp_path / "model.json", values))
    assert {key: getattr(model, key) for key in values} == values


# --- seeds and the recipe ------------------------------------------------------------------------------------


def test_seeds_default_to_random_seed() -> None:
    train = TrainConfig(**TRAIN, random_seed=7)
    assert [train.seed_of("init"), train.seed_of("order"), train.seed_of("dropout")] == [7, 7, 7]
    assert TrainConfig(**TRAIN).seed_of("init") == 42


@pytest.mark.parametrize("purpose", ["init", "order", "dropout"])
@pytest.mark.parametrize("value", [0, 3, 2**64 - 1])
def test_one_seed_can_be_set_apart(purpose: Any, value: int) -> None:
    train = TrainConfig(**TRAIN, random_seed=7, **{f"{purpose}_seed": value})
    others = {"init", "order", "dropout"} - {purpose}
    assert train.seed_of(purpose) == value
    assert {train.seed_of(other) for other in others} == {7}  # type: ignore[arg-type]


# A changed value of every key of train.json.
CHANGES: dict[str, Any] = {
    "dataset": "other/toy",
    "dataset_revision": "abc123",
    "min_train_tokens": -1,
    "start_train_token": 1,
    "start_val_token": 1,
    "microbatch_size": 3,
    "gradient_accumulation_steps": 2,
    "global_batch_size": 12,
    "checkpoint_interval": 6,
    "checkpoints_to_keep": 2,
    "validation_interval": 5,
    "validation_batches": 2,
    "learning_rate": 0.0014,
    "schedule_learning_rate": True,
    "warmup_period_percent": 5.0,
    "weight_decay": 0.01,
    "clipping_max_norm": 3.5,
    "use_amp": False,
    "amp_dtype": "bfloat16",
    "random_seed": 43,
    "init_seed": 1,
    "order_seed": 2,
    "dropout_seed": 3,
    "shuffle": True,
    "compile": False,
    "activation_checkpointing": True,
    "deterministic": True,
    "nonfinite_patience": 3,
    "sample_prompt": "Once upon a time",
    "price_per_hour": 15.92,
    "currency": "US$",
    "expected_tokens_per_second": 270_000.0,
    "notes": "second try",
}
NOT_RECIPE = {
    "random_seed", "init_seed", "order_seed", "dropout_seed",
    "checkpoint_interval", "checkpoints_to_keep", "validation_interval", "validation_batches",
    "sample_prompt", "price_per_hour", "currency", "expected_tokens_per_second", "notes",
}  # fmt: skip
MODEL_CHANGES: dict[str, Any] = {
    "vocab_size": 98,
    "context_length": 17,
    "emb_dim": 18,
    "n_heads": 4,
    "n_layers": 3,
    "drop_rate": 0.0,
    "qkv_bias": True,
    "tie_weights": True,
}


def test_the_tables_of_changes_hold_every_key() -> None:
    assert set(CHANGES) == {field.name for field in fields(TrainConfig)}
    assert set(MODEL_CHANGES) == {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("key", CHANGES)
def test_recipe_hash_changes_with_every_key_of_the_recipe_alone(key: str) -> None:
    model, train = ModelConfig(**MODEL), TrainConfig(**TRAIN)
    # The two validation keys come as a pair.
    pair = ("validation_interval", "validation_batches")
    changed = replace(train, **{name: CHANGES[name] for name in (pair if key in pair else (key,))})
    assert (recipe_hash(model, changed) == recipe_hash(model, train)) == (key in NOT_RECIPE)


@pytest.mark.parametrize("key", MODEL_CHANGES)
def test_recipe_hash_changes_with_every_key_of_the_model(key: str) -> None:
    model, train = ModelConfig(**MODEL), TrainConfig(**TRAIN)
    assert recipe_hash(replace(model, **{key: MODEL_CHANGES[key]}), train) != recipe_hash(model, train)


@pytest.mark.parametrize("key", [field.name for field in fields(TrainConfig) if field.name not in TRAIN])
def test_writing_a_default_out_leaves_the_recipe_hash(tmp_path: Path, key: str) -> None:
    model = ModelConfig(**MODEL)
    plain = load_train_config(write(tmp_path / "plain.json", TRAIN))
    written = load_train_config(write(tmp_path / "written.json", {**TRAIN, key: getattr(plain, key)}))
    assert recipe_hash(model, written) == recipe_hash(model, plain)


def test_spelling_of_a_number_leaves_the_recipe_hash(tmp_path: Path) -> None:
    hashes = set()
    for drop_rate, decay in (("0", "1"), ("0.0", "1.0"), ("0e0", "10e-1")):
        model_text = json.dumps({**MODEL, "drop_rate": math.pi / 10}).replace(str(math.pi / 10), drop_rate)
        (tmp_path / "m.json").write_text(model_text)
        (tmp_path / "t.json").write_text(json.dumps({**TRAIN, "weight_decay": "W"}).replace('"W"', decay))
        hashes.add(recipe_hash(*load_run_configs(tmp_path / "m.json", tmp_path / "t.json")))
    assert len(hashes) == 1


def test_recipe_hash_is_the_same_on_every_machine() -> None:
    found = recipe_hash(ModelConfig(**MODEL), TrainConfig(**TRAIN, warmup_period_percent=5.0))
    assert found == "57f17fd3042990f47b6599bc4e1e6f7794d126f5842cfca1b02029e60dd38d2d"


# --- schemas -------------------------------------------------------------------------------------------------

SCHEMAS = [("model", ModelConfig), ("train", TrainConfig)]


@pytest.mark.parametrize(("name", "config_class"), SCHEMAS)
def test_committed_schema_is_up_to_date(name: str, config_class: type) -> None:
    committed = json.loads((ROOT / "runs" / "schema" / f"{name}.schema.json").read_text())
    assert committed == json.loads(json.dumps(schema_of(config_class))), "run: python -m harness.config"


@pytest.mark.parametrize(("name", "config_class"), SCHEMAS)
def test_schema_describes_every_key_and_no_other(name: str, config_class: type) -> None:
    schema = schema_of(config_class)
    assert set(schema["properties"]) == {field.name for field in fields(config_class)} | {"$schema"}
    assert schema["additionalProperties"] is False
    assert all(len(entry["description"]) > 10 for entry in schema["properties"].values())


@pytest.mark.parametrize(("config_class", "required"), [(ModelConfig, MODEL), (TrainConfig, TRAIN)])
def test_schema_requires_the_keys_without_a_default(config_class: type, required: dict[str, Any]) -> None:
    assert set(schema_of(config_class)["required"]) == set(required)
