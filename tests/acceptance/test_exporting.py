"""A checkpoint as transformers sees it: the same logits, tokens and text; and a card that tells the truth."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import convert
import ddp_train
import test_loss
from exchange import exporting, parity
from harness.engine.sampling import SampleSettings, continue_text
from harness.observers.charts import ChartPainter
from harness.run.config import ModelConfig, TrainConfig, config_from, load_model_config, load_run_configs
from harness.run.run_folder import RunFolder
from harness.tokens.tokenizer import gpt2_tokenizer
from study.statistics import clustered_mean
from tests.conftest import Called
from tests.helpers import ROOT, command, load_model, save_weights, write_run
from tests.model_hub import ModelHub
from tests.test_exchange import LaterModel
from tests.test_model import random_model, random_tokens

transformers = pytest.importorskip("transformers")
Call = Callable[..., Called]
SECRET = "hf_" + "plantedSecretNobodyMaySee"
TOGGLES = [
    {"qkv_bias": bias, "tie_weights": tie, "drop_rate": drop}
    for bias in (False, True)
    for tie in (False, True)
    for drop in (0.0, 0.1)
]


def with_random_weights(folder: Path) -> Path:
    """Return a run folder a checkpoint whose every parameter is far from its initial value."""
    model = random_model(load_model_config(folder / "model.json"))
    save_weights(folder, 7, model.state_dict())
    return folder


def in_process(main: Callable[[], None], *words: object) -> None:
    """Run a command's main in this process, without drawing, for fixtures that many tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        patch.setattr(ChartPainter, "_start", lambda _: None)
        main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path) -> Path:
    """A run over the GPT-2 vocabulary, trained for a few steps and scored."""
    settings = {
        "min_train_tokens": 6 * 128, "checkpoint_interval": 3, "global_batch_size": 8, "price_per_hour": 3.5,
        "currency": "EUR", "notes": "trying | a\nthing", "dataset_revision": "abc",
    }  # fmt: skip
    folder = write_run(tmp_path_factory.mktemp("export") / "runs" / "text", {"vocab_size": 50257}, settings)
    written = json.loads((folder / "train.json").read_text())
    del written["gradient_accumulation_steps"]
    (folder / "train.json").write_text(json.dumps(written))
    in_process(ddp_train.main, "text", datasets_dir, "--runs-dir", folder.parent, "--device", "cpu")
    weights = folder / "checkpoints" / "latest" / "model.safetensors"
    place = ("--dataset", "toy", "--start-token", 0, "--batches", 3, "--device", "cpu")
    in_process(test_loss.main, datasets_dir, folder / "model.json", weights, *place)
    (folder / "charts").mkdir(exist_ok=True)
    (folder / "charts" / "loss.png").write_bytes(b"drawn")
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run's latest checkpoint, exported."""
    out = tmp_path_factory.mktemp("hub") / "deep" / "text"
    in_process(convert.main, "export", "text", out, "--runs-dir", trained.parent, "--license", "apache-2.0")
    return out


@pytest.fixture
def export(call: Call, tmp_path: Path) -> Call:
    """A function that exports a run in tmp_path/runs to tmp_path/out."""
    return lambda name, *words: call(
        convert.main, "export", name, tmp_path / "out", "--runs-dir", tmp_path / "runs", *words
    )


@pytest.mark.parametrize("change", TOGGLES, ids=str)
@torch.no_grad()
def test_every_toggle_combination(
    make_run: Callable[..., Path], export: Call, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = with_random_weights(make_run("tiny", change))
    done = export("tiny")
    assert done.status == 0, done.stderr
    assert "Logits in transformers equal ours: largest logit difference" in done.stdout
    other, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(other) is transformers.GPT2LMHeadModel
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (other.lm_head.weight is other.transformer.wte.weight) == change["tie_weights"]
    assert {other.config.resid_pdrop, other.config.attn_pdrop, other.config.embd_pdrop} == {change["drop_rate"]}
    ours = load_model(folder / "model.json", folder / "checkpoints" / "latest" / "model.safetensors")
    tokens = random_tokens(ours.config)
    torch.testing.assert_close(other.eval()(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-5)
    body = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(body) is transformers.GPT2Model
    assert "none written" in done.stdout  # 97 ids are not GPT-2's
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


def test_back_and_forth_is_exact(make_run: Callable[..., Path], export: Call, call: Call, tmp_path: Path) -> None:
    folder = with_random_weights(make_run("tiny", {"tie_weights": True, "drop_rate": 0.2}))
    assert export("tiny/checkpoints/step-00000007").status == 0
    assert call(convert.main, "import", tmp_path / "out", "back", "--runs-dir", tmp_path / "runs").status == 0
    back = tmp_path / "runs" / "back"
    assert load_model_config(back / "model.json") == load_model_config(folder / "model.json")
    first, second = (load_file(run / "checkpoints" / "latest" / "model.safetensors") for run in (folder, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_is_what_users_expect(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "loss.png", "merges.txt", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}
    assert (exported / "loss.png").read_bytes() == b"drawn"
    assert not [path for path in exported.parent.iterdir() if path != exported]


@torch.no_grad()
def test_greedy_text_is_ours(trained: Path, exported: Path) -> None:
    ours = load_model(trained / "model.json", trained / "checkpoints" / "latest" / "model.safetensors")
    prompt = "Every effort moves you"
    wanted = continue_text(ours, ours.config, gpt2_tokenizer(), prompt, SampleSettings(num_tokens=8, temperature=0.0))
    pipeline = transformers.pipeline("text-generation", model=str(exported), device="cpu")
    assert pipeline(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"] == wanted
    assert len(pipeline(prompt)[0]["generated_text"]) > len(prompt)  # by default no longer than the context
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(ids[0]) == wanted
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 50256


def test_the_card_is_filled_from_the_run(trained: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"], "license": "apache-2.0",
    }  # fmt: skip
    assert huggingface_hub.ModelCard(card).data.license == "apache-2.0"
    state = json.loads((trained / "checkpoints" / "latest" / "state.json").read_text())["train_state"]
    run_json = json.loads((trained / "run.json").read_text())
    (npz,) = (trained / "evals").glob("*.npz")
    with np.load(npz) as arrays:
        estimate = clustered_mean(arrays["sequence_losses"], arrays["sequence_documents"])
    assert "| Tokens seen | 768, in 6 global steps of 8 sequences |" in body
    assert f"| Time | {state['elapsed_seconds']:,.1f} seconds |" in body
    assert f"| Hardware | 1 x {run_json['starts'][0]['devices'][0]} |" in body
    assert "| Data | `toy` at `abc` |" in body
    assert f"SHA-256 `{run_json['dataset'][0]['sha256']}`" in body
    assert " EUR |" in body
    assert f"| {estimate.difference:.6f} |" in body
    if np.isfinite(estimate.se):
        low, high = estimate.interval()
        assert f"| {low:.4f} to {high:.4f} |" in body
    for kind, block in zip(
        (ModelConfig, TrainConfig), re.findall(r"```json\n(.*?)```", body, re.DOTALL), strict=True
    ):
        wanted = load_run_configs(trained / "model.json", trained / "train.json")[kind is TrainConfig]
        assert config_from(kind, json.loads(block), "card") == (
            replace(wanted, notes=None) if isinstance(wanted, TrainConfig) else wanted
        )
    assert "trying" not in card  # notes may be private
    assert "![" in body
    assert "TODO" not in card
    assert "None" not in re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    torch.manual_seed(0)
    exec(code.replace("path/to/this/folder", str(exported)).replace("max_new_tokens=20", "max_new_tokens=3"), {})


def test_a_card_leaves_out_what_is_not_known(make_run: Callable[..., Path], export: Call, tmp_path: Path) -> None:
    with_random_weights(make_run("tiny", train={"dataset": "no/where"}))
    assert export("tiny").status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert not re.search("Hardware|Tokens seen|Time|Cost|Test loss|license|datasets|!\\[|train.json|None", card)
    assert "97 token ids" in card


def test_scores_of_other_weights_stay_out(trained: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "text", symlinks=True)
    (score,) = (tmp_path / "runs" / "text" / "evals").glob("*.json")
    score.write_text(score.read_text().replace('"model_sha256": "', '"model_sha256": "0'))
    done = call(convert.main, "export", "text", tmp_path / "out", "--runs-dir", tmp_path / "runs", "--no-check")
    assert done.status == 0, done.stderr
    assert "not checked" in done.stdout
    assert "Test loss" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "place",
    ["checkpoints", "checkpoints/", "checkpoints/nope", "checkpoints/../..", "other/latest", "checkpoints/a/b"],
)
def test_unknown_checkpoints_are_one_line(
    make_run: Callable[..., Path], export: Call, tmp_path: Path, place: str
) -> None:
    with_random_weights(make_run("tiny"))
    done = export(f"tiny/{place}")
    assert done.status in {2, 4}
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_handed_on(trained: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "text", symlinks=True)
    weights = tmp_path / "runs" / "text" / "checkpoints" / "latest" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    place = (tmp_path / "out", "--runs-dir", tmp_path / "runs", "--no-check")
    done = call(convert.main, "export", "text/checkpoints/latest", *place)
    assert (done.status, len(done.stderr.splitlines())) == (4, 1)
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "out").exists()
    done = call(convert.main, "export", "text", *place)  # the newest that is whole
    assert done.status == 0
    assert "passing over a damaged checkpoint" in done.stderr
    assert f"step-{3:08}, ready for from_pretrained" in done.stdout


def test_a_wrong_export_never_appears(
    make_run: Callable[..., Path], export: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_random_weights(make_run("tiny"))
    original = exporting.to_hugging_face

    def wrong(*arguments: Any) -> Any:
        tensors = original(*arguments)
        name = "transformer.h.0.attn.c_attn.weight"
        return {**tensors, name: tensors[name].roll(16, dims=1)}

    monkeypatch.setattr(exporting, "to_hugging_face", wrong)
    done = export("tiny")
    assert (done.status, len(done.stderr.splitlines())) == (4, 1)
    assert "computes something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_gpt2_cannot_hold_is_refused_before_the_work(
    make_run: Callable[..., Path], export: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_random_weights(make_run("tiny"))
    read = RunFolder.read_configs

    def read_later(folder: RunFolder) -> tuple[ModelConfig, TrainConfig]:
        model, train = read(folder)
        return LaterModel(**{**vars(model), "made_up": "rotary"}), train

    monkeypatch.setattr(RunFolder, "read_configs", read_later)
    done = export("tiny")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert 'model.json: made_up: found "rotary"' in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing_in_the_way(
    make_run: Callable[..., Path], export: Call, tmp_path: Path
) -> None:
    """As after a kill: what was being written lies beside, and the next attempt replaces it."""
    with_random_weights(make_run("tiny"))
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # empty, so it may be used
    assert export("tiny").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_out_dir_must_be_new_or_empty(make_run: Callable[..., Path], export: Call, tmp_path: Path) -> None:
    with_random_weights(make_run("tiny"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("dear")
    done = export("tiny")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert (tmp_path / "out" / "mine.txt").read_text() == "dear"


def test_without_transformers_it_asks_for_it(
    make_run: Callable[..., Path], export: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_random_weights(make_run("tiny"))
    monkeypatch.setattr(parity, "is_available", lambda: False)
    done = export("tiny")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert "--no-check" in done.stderr
    assert export("tiny", "--no-check").status == 0


def test_an_imported_model_with_its_own_tokenizer_gets_none(
    make_run: Callable[..., Path], export: Call, tmp_path: Path
) -> None:
    folder = with_random_weights(make_run("tiny", {"vocab_size": 50257}))
    (folder / "imported").mkdir()
    (folder / "imported" / "source.json").write_text(json.dumps({"source": "hf:a/b", "tokenizer_is_gpt2": False}))
    done = export("tiny")
    assert done.status == 0, done.stderr
    assert "tokenizer of its own" in done.stdout
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert 'base_model: "a/b"' in (tmp_path / "out" / "README.md").read_text()


# --- pushing -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    hub = ModelHub()
    yield hub
    hub.close()


def test_push_uploads_the_folder_and_keeps_the_token(trained: Path, hub: ModelHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command("convert.py", "export", "text", out, "--runs-dir", trained.parent, "--push", "owner/mine",
                "--no-check"),
        cwd=ROOT, env={**hub.environment(tmp_path / "home"), "HF_TOKEN": SECRET}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.uploaded == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [(item["name"], item["organization"], item["visibility"]) for item in hub.created] == [
        ("mine", "owner", "private")
    ]
    assert f"Bearer {SECRET}" in hub.tokens
    assert f"Pushed to {hub.url}/owner/mine" in done.stdout
    assert SECRET not in done.stdout + done.stderr
    for folder in (out, trained, tmp_path / "home"):
        assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert 'from_pretrained("owner/mine")' in (out / "README.md").read_text()


@pytest.fixture
def push(
    make_run: Callable[..., Path], export: Call, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Called]:
    """A function that exports a tiny run and pushes it to the stand-in."""
    with_random_weights(make_run("tiny"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=hub.url))
    return lambda *words: export("tiny", "--no-check", "--push", "owner/mine", *words)


@pytest.mark.parametrize(("part", "status"), [("create", 401), ("create", 403), ("commit", 400), ("preupload", 413)])
def test_a_failed_push_is_one_line_without_the_token(
    push: Callable[..., Called], hub: ModelHub, tmp_path: Path, part: str, status: int
) -> None:
    hub.refuse = {part: status}
    done = push()
    assert done.status == 6
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "owner/mine could not be uploaded" in done.stderr
    assert "hf upload owner/mine" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_token_in_an_answer_is_not_repeated(push: Callable[..., Called], monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(*arguments: Any, **named: Any) -> None:
        raise ValueError(f"bad header Authorization: Bearer {SECRET}\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: type("Api", (), {"create_repo": leak})())
    done = push()
    assert done.status == 6
    assert SECRET not in done.stdout + done.stderr
    assert "***" in done.stderr


@pytest.mark.parametrize("words", [["--push", "mine"], ["--push", "a/b/c"], ["--public"], ["--license", "My Own"]])
def test_bad_words_are_usage(make_run: Callable[..., Path], export: Call, words: list[str]) -> None:
    with_random_weights(make_run("tiny"))
    assert export("tiny", *words).status == 2


def test_no_token_is_found_out_before_the_work(
    push: Callable[..., Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    done = push()
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_public_is_asked_for(push: Callable[..., Called], hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse = {"preupload": 400}
    push("--public")
    assert [item["visibility"] for item in hub.created] == ["public"]
