"""What model.json and train.json mean: what is accepted, defaults, seeds, the recipe's hash, the schemas."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from harness.run.config import ModelConfig, TrainConfig, load_model_config, load_run_configs, load_train_config
from harness.run.errors import ConfigError
from harness.run.keys import Part, part_of
from harness.run.recipe import recipe_hash
from harness.run.reference import reference, schema_of
from harness.run.run_folder import RunFolder
from tests.helpers import REQUIRED_TRAIN as TRAIN
from tests.helpers import ROOT, write
from tests.helpers import TINY_MODEL as MODEL
from tests.key_table import MODEL_ROWS, TRAIN_ROWS, Row

# --- what is accepted ----------------------------------------------------------------------------------------


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    values = {**TRAIN, **CHANGES}
    for key in ("gradient_accumulation_steps", "cooldown_percent"):  # refused beside another of these keys
        del values[key]
    train = load_train_config(write(tmp_path / "train.json", values))
    # A cosine schedule is kept under its published spelling.
    assert {key: getattr(train, key) for key in values} == {**values, "schedule": None}


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
        "random_seed": 67, "microbatch_size": 12, **FINEWEB, "clipping_max_norm": 3.5, "weight_decay": 0.01,
        **SCHEDULE,
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


@pytest.mark.parametrize(
    "change", [{}, {"drop_rate": 0.0}, {"drop_rate": 0}, {"qkv_bias": True}, {"tie_weights": True}]
)
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
    apart: dict[str, Any] = {f"{purpose}_seed": value}
    train = TrainConfig(**TRAIN, random_seed=7, **apart)
    others = {"init", "order", "dropout"} - {purpose}
    assert train.seed_of(purpose) == value
    assert {train.seed_of(other) for other in others} == {7}  # type: ignore[arg-type]


def changed_values(rows: dict[str, Row]) -> dict[str, Any]:
    return {key: tuple(row.value) if isinstance(row.value, list) else row.value for key, row in rows.items()}


CHANGES, MODEL_CHANGES = changed_values(TRAIN_ROWS), changed_values(MODEL_ROWS)


@pytest.mark.parametrize("key", CHANGES)
def test_recipe_hash_changes_with_every_key_of_the_recipe_alone(key: str) -> None:
    model, train = ModelConfig(**MODEL), TrainConfig(**TRAIN)
    changed = replace(train, **{key: CHANGES[key]})
    is_recipe = part_of(TrainConfig, key) in (Part.RECIPE, Part.EXECUTION)
    assert (recipe_hash(model, changed) != recipe_hash(model, train)) == (is_recipe and changed != train)


@pytest.mark.parametrize("key", MODEL_CHANGES)
def test_recipe_hash_changes_with_every_key_of_the_model(key: str) -> None:
    model, train = ModelConfig(**MODEL), TrainConfig(**TRAIN)
    assert recipe_hash(replace(model, **{key: MODEL_CHANGES[key]}), train) != recipe_hash(model, train)


def test_both_spellings_of_a_schedule_are_one_recipe(tmp_path: Path) -> None:
    model = ModelConfig(**MODEL)
    spelled = [{"schedule_learning_rate": True}, {"schedule": "cosine"}]
    spelled.append({"schedule": "cosine", "schedule_learning_rate": True})
    found = [load_train_config(write(tmp_path / "train.json", {**TRAIN, **values})) for values in spelled]
    assert {train.schedule_name for train in found} == {"cosine"}
    assert len({recipe_hash(model, train) for train in found}) == 1
    constant = load_train_config(write(tmp_path / "train.json", {**TRAIN, "schedule": "constant"}))
    assert recipe_hash(model, constant) == recipe_hash(model, TrainConfig(**TRAIN))
    with pytest.raises(ConfigError, match='schedule: found "constant" with schedule_learning_rate'):
        load_train_config(
            write(tmp_path / "t.json", {**TRAIN, "schedule": "constant", "schedule_learning_rate": True})
        )


@pytest.mark.parametrize("key", [field.name for field in fields(TrainConfig) if field.name not in TRAIN])
def test_writing_out_a_default_leaves_the_recipe_hash(tmp_path: Path, key: str) -> None:
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


def test_hashes_of_the_shipped_runs_are_what_they_always_were() -> None:
    """Scores, ledgers and checkpoints that users have name these."""
    pinned = json.loads((ROOT / "tests" / "golden" / "recipe-hashes.json").read_text())
    for name, wanted in pinned.items():
        folder = RunFolder(ROOT / "runs" / name)
        assert recipe_hash(*folder.read_configs()) == wanted, name


# --- schemas -------------------------------------------------------------------------------------------------

SCHEMAS = [("model", ModelConfig), ("train", TrainConfig)]


@pytest.mark.parametrize(("name", "config_class"), SCHEMAS)
def test_committed_schema_is_up_to_date(name: str, config_class: type) -> None:
    committed = json.loads((ROOT / "runs" / "schema" / f"{name}.schema.json").read_text())
    assert committed == json.loads(json.dumps(schema_of(config_class))), "run: make generated"


@pytest.mark.parametrize(("name", "config_class"), SCHEMAS)
def test_schema_describes_every_key_and_no_other(name: str, config_class: type) -> None:
    schema = schema_of(config_class)
    assert set(schema["properties"]) == {field.name for field in fields(config_class)} | {"$schema"}
    assert schema["additionalProperties"] is False
    assert all(len(entry["description"]) > 10 for entry in schema["properties"].values())


@pytest.mark.parametrize(("config_class", "required"), [(ModelConfig, MODEL), (TrainConfig, TRAIN)])
def test_schema_requires_the_keys_without_a_default(config_class: type, required: dict[str, Any]) -> None:
    assert set(schema_of(config_class)["required"]) == set(required)


def test_committed_reference_of_all_keys_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "run: make generated"
