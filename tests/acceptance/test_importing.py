"""Weights from elsewhere become a run that can be scored, sampled, trained on, and told apart."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import convert
import ddp_train
import experiment
import test_loss
import test_smoke
from exchange import importing, parity
from exchange.vocabulary import tokenizer_files
from harness.run.config import load_run_configs
from harness.run.files import file_sha256
from harness.tokens.gpt2 import END_OF_TEXT, MERGES, printable_vocabulary
from harness.tokens.tokenizer import train_tokenizer
from tests.conftest import Called
from tests.helpers import ROOT, command, metrics
from tests.model_hub import COMMIT, ModelHub
from tests.test_model import TINY, random_model

transformers = pytest.importorskip("transformers")
SHAPE = {"vocab_size": 50257, "n_positions": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
Call = Callable[..., Called]


def write_gpt2(folder: Path, shard_size: str = "1GB", **change: Any) -> Path:
    """Write a random GPT2LMHeadModel, every parameter far from its initial value."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SHAPE, **change}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("source") / "gpt2")


@pytest.fixture
def bring(call: Call, tmp_path: Path) -> Call:
    """A function that imports a source as run `mine`."""
    return lambda source, *words: call(
        convert.main, "import", source, "mine", "--runs-dir", tmp_path / "runs", *words
    )


def no_run(tmp_path: Path) -> bool:
    return not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_imported_weights_are_scored_and_sampled(
    bring: Call, call: Call, gpt2: Path, datasets_dir: Path, tmp_path: Path
) -> None:
    done = bring(gpt2)
    assert done.status == 0, done.stderr
    assert "Logits equal those of transformers: largest logit difference" in done.stdout
    run = tmp_path / "runs" / "mine"
    model, train = load_run_configs(run / "model.json", run / "train.json")
    assert (model.qkv_bias, model.tie_weights, model.n_heads, model.drop_rate) == (True, True, 2, 0.1)
    assert str(gpt2) in (train.notes or "")
    weights = run / "checkpoints" / "latest" / "model.safetensors"
    assert train.initial_weights == file_sha256(weights)
    source = json.loads((run / "imported" / "source.json").read_text())
    assert source["files"] == {"model.safetensors": file_sha256(gpt2 / "model.safetensors")}
    assert source["logit_parity"]["difference"] <= 1e-4

    words = (datasets_dir, run / "model.json", weights, "--dataset", "toy", "--start-token", 0, "--batches", 2)
    scored = call(test_loss.main, *words)
    assert scored.status == 0, scored.stderr
    (stored,) = (run / "evals").glob("*.json")
    assert stored.name == "loss-validation-0-192-imported.json"
    tokens = torch.from_numpy(
        load_file(datasets_dir / "toy" / "validation.safetensors")["tokens"].numpy().astype(int)
    )
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    rows = tokens[: 12 * 16].view(12, 16)
    with torch.no_grad():
        logits = theirs(rows).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1 : 12 * 16 + 1]).item()
    assert json.loads(stored.read_text())["loss"] == pytest.approx(wanted, abs=1e-5)

    one = call(test_smoke.main, run / "model.json", weights, "--seed", 1, "--num-tokens", 5)
    timeline = call(test_smoke.main, "--timeline", "mine", "--runs-dir", run.parent, "--seed", 1, "--num-tokens", 5)
    assert one.stdout.startswith("Every effort moves you")
    assert timeline.stdout == f"imported: {one.stdout}"


def test_training_starts_from_imported_weights(
    bring: Call, call: Call, gpt2: Path, datasets_dir: Path, tmp_path: Path, without_charts: None
) -> None:
    """And goes on from its own checkpoints, starts over from them with --fresh, and never without them."""
    assert bring(gpt2).status == 0
    run = tmp_path / "runs" / "mine"
    written = json.loads((run / "train.json").read_text())
    change = {"dataset": "toy", "min_train_tokens": 4 * 32 * 16, "checkpoint_interval": 2, "use_amp": False}
    (run / "train.json").write_text(json.dumps({**written, **change}))

    def train(*words: object) -> Called:
        return call(ddp_train.main, "mine", datasets_dir, "--runs-dir", run.parent, "--device", "cpu", *words)

    assert train("--dump-initial-weights", tmp_path / "initial.safetensors").status == 0
    imported = run / "imported" / "model.safetensors"
    initial, given = load_file(tmp_path / "initial.safetensors"), load_file(imported)
    assert all(torch.equal(initial[name], value) for name, value in given.items())
    first = train("--max-steps", 1)
    assert first.status == 0, first.stderr
    assert "warning" not in first.stderr  # an untrained model's first loss is not what is wanted here
    assert train().status == 0
    losses = [line["train/loss"] for line in metrics(run)]
    assert (run / "checkpoints" / "latest").readlink().name == "step-00000003"
    assert train("--fresh").status == 0
    assert [line["train/loss"] for line in metrics(run)] == losses
    shown = call(test_smoke.main, "--timeline", "mine", "--runs-dir", run.parent, "--num-tokens", 1).stdout
    assert [line.partition(":")[0] for line in shown.splitlines() if ":" in line][:2] == ["imported", "step 0"]

    save_file({**given, "tok_emb.weight": given["tok_emb.weight"] + 1}, imported)
    for reason in ("SHA-256", "no such file"):
        done = train("--fresh")
        assert (done.status, len(done.stderr.splitlines())) == (4, 1), done.stderr
        assert reason in done.stderr
        imported.unlink(missing_ok=True)


def test_a_start_from_elsewhere_is_another_recipe(
    bring: Call, call: Call, gpt2: Path, datasets_dir: Path, tmp_path: Path, without_charts: None
) -> None:
    """Trained alike and judged against each other, the two differ in their initial weights and in nothing else."""
    assert bring(gpt2).status == 0
    runs = tmp_path / "runs"
    train = {"dataset": "toy", "min_train_tokens": 2 * 32 * 16, "checkpoint_interval": 2, "use_amp": False}
    written = json.loads((runs / "mine" / "train.json").read_text())
    (runs / "mine" / "train.json").write_text(json.dumps({**written, **train}))
    (runs / "drawn").mkdir()
    shutil.copy(runs / "mine" / "model.json", runs / "drawn")
    (runs / "drawn" / "train.json").write_text(json.dumps({**written, **train, "initial_weights": None}))
    for name in ("mine", "drawn"):
        place = ("--runs-dir", runs, "--device", "cpu")
        assert call(ddp_train.main, name, datasets_dir, *place).status == 0
        words = (runs / name / "model.json", runs / name / "checkpoints" / "latest" / "model.safetensors")
        place = ("--dataset", "toy", "--start-token", 0, "--batches", 2)
        assert call(test_loss.main, datasets_dir, *words, *place).status == 0
    done = call(
        experiment.main,
        "compare",
        "--baseline",
        "drawn",
        "mine",
        "--runs-dir",
        runs,
        "--noise-sd",
        0.01,
        "--noise-df",
        9,
    )
    assert done.status == 0, done.stderr
    assert f"initial_weights none→{written['initial_weights']}" in done.stdout


def test_every_arm_of_a_plan_starts_from_the_base_s_weights(
    bring: Call, call: Call, gpt2: Path, tmp_path: Path
) -> None:
    assert bring(gpt2).status == 0
    runs = tmp_path / "runs"
    written = json.loads((runs / "mine" / "train.json").read_text())
    (runs / "mine" / "train.json").write_text(json.dumps({**written, "dataset": "toy", "min_train_tokens": 512}))
    (tmp_path / "changes.json").write_text(json.dumps({"faster": {"train": {"learning_rate": 0.001}}}))
    words = ("mine", tmp_path / "changes.json", "--seeds", "1,2", "--name", "tuned", "--runs-dir", runs)
    done = call(experiment.main, "plan", *words, "--test-batches", 1)
    assert done.status == 0, done.stderr
    arms = sorted(path for path in runs.iterdir() if path.name.startswith("tuned-"))
    assert len(arms) == 4
    assert {file_sha256(arm / "imported" / "model.safetensors") for arm in arms} == {written["initial_weights"]}


def test_comparing_with_an_imported_model_is_refused_in_one_line(
    bring: Call, call: Call, gpt2: Path, datasets_dir: Path, tmp_path: Path
) -> None:
    assert bring(gpt2).status == 0
    run = tmp_path / "runs" / "mine"
    words = (run / "model.json", run / "checkpoints" / "latest" / "model.safetensors", "--dataset", "toy")
    assert call(test_loss.main, datasets_dir, *words, "--start-token", 0, "--batches", 1).status == 0
    shutil.copytree(run, run.parent / "other", symlinks=True)
    done = call(experiment.main, "compare", "--baseline", "mine", "other", "--runs-dir", run.parent)
    assert (done.status, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "imported weights" in done.stderr


OTHER_FOLDERS: dict[str, dict[str, Any]] = {
    "sharded": {"shard_size": "1MB", "vocab_size": 30000},
    "half": {"dtype": "float16"},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", OTHER_FOLDERS)
def test_other_folders(bring: Call, tmp_path: Path, kind: str) -> None:
    change = {key: value for key, value in OTHER_FOLDERS[kind].items() if key != "dtype"}
    folder = write_gpt2(tmp_path / "other", **change)
    assert (len(list(folder.glob("model-*.safetensors"))) > 1) == (kind == "sharded")
    if kind == "half":
        tensors = load_file(folder / "model.safetensors")
        save_file({name: value.half() for name, value in tensors.items()}, folder / "model.safetensors")
    done = bring(folder)
    assert done.status == 0, done.stderr
    assert "Logits equal" in done.stdout
    assert ("float16 there, float32 here" in done.stdout) == (kind == "half")


def test_padding_is_dropped_where_the_tokenizer_says_so(bring: Call, tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path / "padded", vocab_size=50304)
    refused = bring(folder)
    assert (refused.status, len(refused.stderr.splitlines())) == (2, 1)
    assert no_run(tmp_path)
    for name, text in tokenizer_files(printable_vocabulary(), MERGES.read_text(), END_OF_TEXT, 16).items():
        (folder / name).write_text(text)
    done = bring(folder)
    assert done.status == 0, done.stderr
    assert "kept the first 50,257 of 50,304 ids" in done.stdout
    assert "Logits equal" in done.stdout
    weights = load_file(tmp_path / "runs" / "mine" / "imported" / "model.safetensors")
    assert weights["tok_emb.weight"].shape == (50257, 16)


@pytest.mark.parametrize(("tokens", "is_gpt2"), [({"a": 0, "b": 1}, False), ({"<pad>": 50257}, True)])
def test_whose_tokenizer_it_was_is_on_record(
    bring: Call, tmp_path: Path, tokens: dict[str, int], is_gpt2: bool
) -> None:
    folder = write_gpt2(tmp_path / "other", vocab_size=50258)
    found = {**printable_vocabulary(), **tokens} if is_gpt2 else tokens
    (folder / "vocab.json").write_text(json.dumps(found))
    done = bring(folder)
    assert done.status == 0, done.stderr
    assert ("not GPT-2's" in done.stdout) == (not is_gpt2)
    source = json.loads((tmp_path / "runs" / "mine" / "imported" / "source.json").read_text())
    assert source["tokenizer_is_gpt2"] == is_gpt2


def test_a_tokenizer_of_its_own_comes_along(bring: Call, call: Call, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["the words of a text, the words of a line"]), 280)
    assert tokenizer.document is not None
    folder = write_gpt2(tmp_path / "own", vocab_size=tokenizer.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.document)
    done = bring(folder)
    assert done.status == 0, done.stderr
    assert "Its own tokenizer goes with it" in done.stdout
    assert (tmp_path / "runs" / "mine" / "tokenizer.json").read_text() == tokenizer.document
    words = ("--run", "mine", "--runs-dir", tmp_path / "runs", "--device", "cpu")
    sampled = call(test_smoke.main, *words, "--prompt", "words", "--num-tokens", 3)
    assert sampled.status == 0, sampled.stderr
    assert sampled.stdout.startswith("words")
    (folder / "tokenizer.json").write_text(tokenizer.document.replace('"ByteLevel"', '"Whitespace"'))
    shutil.rmtree(tmp_path / "runs" / "mine")
    assert "would mean nothing: " in bring(folder).stdout


def test_another_harness_s_file(bring: Call, call: Call, tmp_path: Path) -> None:
    """With the causal masks that the published harness stores; the shape comes from the tensors."""
    model = random_model(replace(TINY, n_layers=2, qkv_bias=True))
    masks = {f"trf_blocks.{n}.att.mask": torch.ones(12, 12).triu(1) for n in range(2)}
    save_file({**model.state_dict(), **masks}, tmp_path / "theirs.safetensors")
    refused = bring(tmp_path / "theirs.safetensors")
    warning, line = refused.stderr.splitlines()
    assert refused.status == 2
    assert "nothing vouches for" in warning
    assert "--n-heads" in line
    done = bring(tmp_path / "theirs.safetensors", "--n-heads", 3)
    assert done.status == 0, done.stderr
    assert "not checked" in done.stdout
    ours = load_file(tmp_path / "runs" / "mine" / "checkpoints" / "latest" / "model.safetensors")
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_embd": NaN}')


def leave_only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def poison_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_2.weight"]
    save_file(tensors, folder / "model.safetensors")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "status", "said"),
    [
        (break_config, 2, "config.json"),
        (remove_config, 2, "config.json"),
        (leave_only_pickle, 4, "pickle"),
        (break_weights, 4, "cannot be read as safetensors"),
        (poison_weights, 4, "not finite"),
        (drop_tensor, 4, "h.1.ln_2.weight"),
    ],
)
def test_a_spoiled_folder_is_one_line_and_no_run(
    bring: Call, gpt2: Path, tmp_path: Path, spoil: Callable[[Path], None], status: int, said: str
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(gpt2, folder)
    spoil(folder)
    done = bring(folder)
    assert (done.status, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert said in done.stderr
    assert no_run(tmp_path)


def test_weights_that_compute_something_else_are_refused(
    bring: Call, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a wrong mapping would look like: query and key change places."""
    original = importing.from_hugging_face

    def swapped(*arguments: Any) -> Any:
        tensors, config = original(*arguments)
        names = [f"trf_blocks.0.att.W_{part}.weight" for part in ("query", "value")]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        return tensors, config

    monkeypatch.setattr(importing, "from_hugging_face", swapped)
    done = bring(gpt2)
    assert (done.status, len(done.stderr.splitlines())) == (4, 1)
    assert "computes something else" in done.stderr
    assert no_run(tmp_path)


@pytest.mark.parametrize("run", ["../up", "a/b", "", ".hidden", "taken"])
def test_run_names(call: Call, gpt2: Path, tmp_path: Path, run: str) -> None:
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    done = call(convert.main, "import", gpt2, run, "--runs-dir", tmp_path / "runs")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]


def test_without_transformers_it_says_that_nothing_was_checked(
    bring: Call, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "is_available", lambda: False)
    done = bring(gpt2)
    assert done.status == 0
    assert "Logits: not checked, because transformers is not installed" in done.stdout


@pytest.fixture
def hub(gpt2: Path) -> Iterator[ModelHub]:
    hub = ModelHub()
    hub.files = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    yield hub
    hub.close()


def test_from_the_hub(hub: ModelHub, tmp_path: Path) -> None:
    """Only what is needed is fetched, the shards but never a pickle, and the commit is on record."""
    shards = write_gpt2(tmp_path / "shards", shard_size="3MB")
    wanted = {path.name: path.read_bytes() for path in shards.iterdir() if path.name != "generation_config.json"}
    assert len(wanted) > 3
    hub.files = wanted | {"pytorch_model.bin": b"\x80", "onnx/model.safetensors": b"no", "tf_model.h5": b"no"}
    done = subprocess.run(
        command("convert.py", "import", "hf:owner/gpt2", "mine", "--runs-dir", tmp_path / "runs"),
        cwd=ROOT, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == sorted(wanted)
    source = json.loads((tmp_path / "runs" / "mine" / "imported" / "source.json").read_text())
    assert (source["source"], source["commit"]) == ("hf:owner/gpt2", COMMIT)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "Access to model owner/gpt2 is restricted, ask for it there."),
        (429, "", "Too Many Requests"),
    ],
)
def test_why_the_hub_refuses_is_said(
    bring: Call, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, status: int, code: str, reason: str
) -> None:
    """Its client puts the reason below a first line that has a status and a request id."""
    hub.refuse = {"/api/": status}
    hub.refusal = {
        "X-Request-Id": "Root=1-abc",
        **({"X-Error-Code": code, "X-Error-Message": reason} if code else {}),
    }
    monkeypatch.setattr(importing, "HfApi", functools.partial(HfApi, endpoint=hub.url))
    done = bring("hf:owner/gpt2")
    assert (done.status, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert reason in done.stderr
    assert "Request ID" not in done.stderr


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("hf:owner/none", 3, "could not be downloaded"),
        ("hf:a/b/c", 3, "downloaded"),
        ("hf:owner/gpt2", 4, "a pickle"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_one_line(
    bring: Call, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, source: str, status: int, said: str
) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    monkeypatch.setattr(importing, "HfApi", functools.partial(HfApi, endpoint=hub.url))
    done = bring(source)
    assert (done.status, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert said in done.stderr
    assert not hub.fetched()
