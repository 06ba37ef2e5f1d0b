"""From text files to a score and a sample, with the real tokenizer."""

import hashlib
import importlib
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import prepare_dataset
import test_loss
import test_smoke
from harness.engine.evaluate import LossTally
from harness.observers.run_page import run_page
from harness.run.config import load_model_config, load_run_configs
from harness.run.recipe import recipe_hash, run_hash
from harness.run.run_folder import RunFolder
from harness.tokens.gpt2 import END_OF_TEXT_ID, gpt2_encoding
from model import GPTModel, initialise
from preparation.python_docs import docstrings, documented_modules
from tests.conftest import Called
from tests.helpers import ROOT, run, train_in_fork, write_run
from tests.test_architecture import COMMANDS

TEXT_MODEL = {"vocab_size": 50257, "emb_dim": 8, "n_layers": 1, "drop_rate": 0.3}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets folder with `books`, made from 120 text files."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "source" / "deep").mkdir(parents=True)
    words = (ROOT / "LICENSE").read_text().split()
    for number in range(120):
        suffix = "md" if number % 3 else "txt"
        place = folder / "source" / ("deep" if number % 2 else ".") / f"{number}.{suffix}"
        place.write_text(f"Chapter {number} — é 👍\n" + " ".join(words[number * 7 : number * 7 + 120]))
    (folder / "source" / "ignored.bin").write_bytes(b"\xff")
    run("prepare_dataset.py", folder / "source", folder / "books", "--validation-fraction", "0.2")
    return folder


@pytest.fixture(scope="module")
def scored_run(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout, trained for a few steps on the books, with its checkpoints."""
    train = {"dataset": "books", "min_train_tokens": 6 * 128, "sample_prompt": "This License"}
    folder = write_run(tmp_path_factory.mktemp("eval") / "runs" / "text", TEXT_MODEL, train)
    train_in_fork(folder, books)
    return folder


def documents_of(tokens: np.ndarray) -> list[str]:
    ends = np.flatnonzero(tokens == END_OF_TEXT_ID)
    assert ends[-1] == len(tokens) - 1
    pieces = np.split(tokens, ends + 1)[:-1]
    return [gpt2_encoding().decode(piece[:-1].tolist()) for piece in pieces]


def test_every_document_lands_in_one_split_whole(books: Path) -> None:
    splits = {name: load_file(books / "books" / f"{name}.safetensors")["tokens"] for name in ("train", "validation")}
    assert {tokens.dtype for tokens in splits.values()} == {np.dtype("uint16")}
    found = {name: documents_of(tokens) for name, tokens in splits.items()}
    wanted = {path.read_text() for path in (books / "source").rglob("*") if path.suffix in {".txt", ".md"}}
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    assert 8 <= len(found["validation"]) <= 45
    with safe_open(books / "books" / "train.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["tokenizer"] == "gpt2"
    assert int(metadata["documents"]) == len(found["train"])
    assert int(metadata["bytes"]) == sum(len(text.encode()) for text in found["train"])


def test_preparing_again_gives_the_same_bytes(books: Path, call: Callable[..., Called], tmp_path: Path) -> None:
    words = (books / "source", tmp_path / "again", "--validation-fraction", "0.2")
    assert call(prepare_dataset.main, *words).status == 0
    for split in ("train", "validation"):
        name = f"{split}.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (books / "books" / name).read_bytes()


def test_one_document_is_cut_in_two(call: Callable[..., Called], tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten " * 20
    (tmp_path / "input.txt").write_text(text)
    assert (
        call(prepare_dataset.main, tmp_path / "*.txt", tmp_path / "out", "--validation-fraction", "0.1").status == 0
    )
    train, validation = (
        load_file(tmp_path / "out" / f"{name}.safetensors")["tokens"] for name in ("train", "validation")
    )
    joined = documents_of(train) + documents_of(validation)
    assert "".join(joined) == text
    assert len(validation) / len(train) == pytest.approx(1 / 9, rel=0.1)


@pytest.mark.parametrize("source", ["nowhere", "hf:a", "empty", "bad.txt", "data.parquet"])
def test_bad_sources_are_one_line(call: Callable[..., Called], tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    done = call(prepare_dataset.main, source if source.startswith("hf:") else tmp_path / source, tmp_path / "out")
    assert done.status in {2, 3}
    assert len([line for line in done.stderr.splitlines() if line]) == 1
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_python_docs_are_this_installation_s_own(call: Callable[..., Called], tmp_path: Path) -> None:
    text = docstrings(Path(json.__file__))
    assert text.startswith("JSON (JavaScript Object Notation)")
    assert "\n\ndump\nSerialize ``obj``" in text
    names = {name for name, _ in documented_modules()}
    assert {"python/json/__init__.py", "torch/nn/modules/linear.py"} <= names
    assert not any("/tests/" in name for name in names)


def test_loss_is_the_mean_cross_entropy(scored_run: Path, books: Path, call: Callable[..., Called]) -> None:
    """Against the definition, computed here token by token in float64."""
    weights = scored_run / "checkpoints" / "latest" / "model.safetensors"
    done = call(test_loss.main, *loss_words(scored_run, books), "--start-token", 3, "--batches", 2)
    assert done.status == 0, done.stderr
    model = GPTModel(load_model_config(scored_run / "model.json"))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in load_file(weights).items()})
    tokens = torch.from_numpy(load_file(books / "books" / "validation.safetensors")["tokens"].astype(np.int64))
    model.eval()
    losses = []
    for start in range(3, 3 + 12 * 16, 16):
        with torch.no_grad():
            log_probabilities = model(tokens[None, start : start + 16])[0].double().log_softmax(-1)
        losses += [-log_probabilities[t, tokens[start + t + 1]].item() for t in range(16)]
    wanted = sum(losses) / len(losses)
    last = done.stdout.splitlines()[-1]
    found = float(last.removeprefix("Loss against our test dataset: "))
    assert found == pytest.approx(wanted, abs=2e-6)  # six decimals are printed, of sums in another order
    text_bytes = len(gpt2_encoding().decode_bytes([t for t in tokens[4 : 4 + 192].tolist() if t != END_OF_TEXT_ID]))
    result = json.loads((scored_run / "evals" / "loss-validation-3-192-step-00000005.json").read_text())
    assert result["perplexity"] == pytest.approx(math.exp(wanted))
    assert result["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / text_bytes)
    assert (result["run"], result["step"], result["sequences"]) == ("text", 5, 12)
    with np.load(scored_run / "evals" / "loss-validation-3-192-step-00000005.npz") as stored:
        np.testing.assert_allclose(stored["sequence_losses"], np.reshape(losses, (12, 16)).mean(axis=1), rtol=1e-6)


def test_a_score_keeps_its_evidence(
    scored_run: Path, books: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    place = (*loss_words(scored_run, books), "--start-token", 5, "--batches", 3, "--output", tmp_path / "out.json")
    assert call(test_loss.main, *place).status == 0
    result = json.loads((tmp_path / "out.json").read_text())
    positions = result["by_position"]
    assert [(bucket["from"], bucket["below"]) for bucket in positions] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    for buckets in (positions, result["by_training_frequency_per_million"]):
        tokens = sum(bucket["tokens"] for bucket in buckets)
        assert tokens == result["tokens"]
        assert sum(bucket["tokens"] * bucket["loss"] for bucket in buckets) / tokens == pytest.approx(result["loss"])
    state = json.loads((scored_run / "checkpoints" / "latest" / "state.json").read_text())
    assert result["tokens_seen"] == state["train_state"]["tokens"]
    assert result["global_steps"] == 6
    weights = scored_run / "checkpoints" / "latest" / "model.safetensors"
    assert result["model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    configs = load_run_configs(scored_run / "model.json", scored_run / "train.json")
    assert (result["recipe_hash"], result["run_hash"]) == (recipe_hash(*configs), run_hash(*configs))
    tokens = load_file(books / "books" / "validation.safetensors")["tokens"][5 : 5 + 18 * 16]
    documents = [int((tokens[: sequence * 16] == END_OF_TEXT_ID).sum()) for sequence in range(18)]
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["sequence_documents"].tolist() == documents
        assert stored["sequence_losses"].dtype == np.float64


def test_frequent_words_are_told_from_rare_ones() -> None:
    tally = LossTally(context_length=2, vocab_size=4)
    tally.add(np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([[0, 1], [1, 3]]))
    buckets = tally.by_frequency(np.array([999_000, 995, 5, 0]))
    assert [(bucket.low, bucket.tokens, bucket.loss) for bucket in buckets] == [
        (0.0, 1, 7.0),  # id 3 was never seen
        (100.0, 2, 4.0),  # id 1
        (10_000.0, 1, 1.0),  # id 0
    ]


def loss_words(run_folder: Path, datasets_dir: Path) -> tuple[object, ...]:
    weights = run_folder / "checkpoints" / "latest" / "model.safetensors"
    return (datasets_dir, run_folder / "model.json", weights, "--dataset", "books", "--device", "cpu")


def test_loss_depends_neither_on_batching_nor_on_dropout(
    scored_run: Path, books: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    without = json.loads((scored_run / "model.json").read_text()) | {"drop_rate": 0.0}
    (tmp_path / "model.json").write_text(json.dumps(without))
    found = []
    for size, model_json in (
        (1, scored_run / "model.json"),
        (5, scored_run / "model.json"),
        (5, tmp_path / "model.json"),
    ):
        weights = scored_run / "checkpoints" / "latest" / "model.safetensors"
        place = (books, model_json, weights, "--dataset", "books", "--start-token", 0, "--batches", 3)
        done = call(test_loss.main, *place, "--batch-size", size, "--output", tmp_path / "out.json")
        assert done.status == 0, done.stderr
        found.append(json.loads((tmp_path / "out.json").read_text())["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[1] == found[2]


def test_half_precision_is_close(scored_run: Path, books: Path, call: Callable[..., Called], tmp_path: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        words = ("--start-token", 0, "--batches", 2, "--dtype", dtype, "--output", tmp_path / "out.json")
        assert call(test_loss.main, *loss_words(scored_run, books), *words).status == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["loss"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_too_short_a_split_is_data_error(scored_run: Path, books: Path, call: Callable[..., Called]) -> None:
    done = call(test_loss.main, *loss_words(scored_run, books))
    assert done.status == 3
    assert "--start-token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_broken_model_s_loss_is_told_and_stored_as_null(
    scored_run: Path, books: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    weights = load_file(scored_run / "checkpoints" / "latest" / "model.safetensors")
    weights["final_norm.shift"][:] = np.nan
    save_file(weights, tmp_path / "broken.safetensors")
    options = ("--dataset", "books", "--start-token", "0", "--batches", "2", "--device", "cpu")
    done = call(test_loss.main, books, scored_run / "model.json", tmp_path / "broken.safetensors", *options)
    assert done.status == 0
    assert done.stdout.splitlines()[-1] == "Loss against our test dataset: nan"
    (stored,) = (tmp_path / "evals").glob("*.json")
    assert json.loads(stored.read_text())["loss"] is None
    done = call(test_smoke.main, scored_run / "model.json", tmp_path / "broken.safetensors", "--device", "cpu")
    assert done.status == 4
    warning, line = done.stderr.splitlines()
    assert "nothing vouches for" in warning
    assert "logits are not numbers" in line


@pytest.mark.parametrize("output", [".", "result.npz", "LICENSE/result.json"])
def test_an_output_that_cannot_be_written_is_refused_first(
    scored_run: Path, books: Path, call: Callable[..., Called], output: str
) -> None:
    model = (scored_run / "model.json", scored_run / "checkpoints" / "latest" / "model.safetensors")
    done = call(test_loss.main, books, *model, "--output", ROOT / output, "--device", "cpu")
    assert done.status in (2, 6)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_published_checkpoints_load_unchanged(
    scored_run: Path, books: Path, call: Callable[..., Called], tmp_path: Path
) -> None:
    """They carry a causal mask in every block."""
    tensors = load_file(scored_run / "checkpoints" / "latest" / "model.safetensors")
    mask = np.triu(np.ones((16, 16), dtype=np.float32), 1)
    save_file({**tensors, "trf_blocks.0.att.mask": mask}, tmp_path / "model.safetensors")
    words = ("--dataset", "books", "--start-token", 0, "--batches", 1, "--device", "cpu")
    done = call(test_loss.main, books, scored_run / "model.json", tmp_path / "model.safetensors", *words)
    assert done.status == 0, done.stderr
    assert list((tmp_path / "evals").glob("loss-validation-0-96-*.npz"))


def test_a_sample_is_the_only_output_and_repeats(scored_run: Path, call: Callable[..., Called]) -> None:
    place = (scored_run / "model.json", scored_run / "checkpoints" / "latest" / "model.safetensors")
    first = call(test_smoke.main, *place, "--seed", 3, "--prompt", "This License", "--num-tokens", 6)
    again = call(test_smoke.main, *place, "--seed", 3, "--prompt", "This License", "--num-tokens", 6)
    other = call(test_smoke.main, *place, "--seed", 4, "--prompt", "This License", "--num-tokens", 6)
    assert first.status == 0
    assert first.stdout.startswith("This License")
    assert first.stdout == again.stdout != other.stdout
    lines = [json.loads(line) for line in (scored_run / "evals" / "smoke.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines[-3:]] == [3, 3, 4]
    assert len(gpt2_encoding().encode_ordinary(lines[-1]["text"])) >= 3


def test_a_sample_that_cannot_be_kept_is_printed_nevertheless(
    scored_run: Path, tmp_path: Path, call: Callable[..., Called]
) -> None:
    shutil.copytree(scored_run, tmp_path / "text", symlinks=True, ignore=shutil.ignore_patterns("evals"))
    (tmp_path / "text" / "evals").write_text("in the way of the folder")
    done = call(test_smoke.main, "--run", "text", "--runs-dir", tmp_path, "--seed", 1)
    assert (done.status, done.stdout.startswith("Every effort moves you")) == (0, True), done.stderr
    assert "the sample cannot be kept" in done.stderr


def test_greedy_and_top_1_agree(scored_run: Path, call: Callable[..., Called]) -> None:
    place = (scored_run / "model.json", scored_run / "checkpoints" / "latest" / "model.safetensors")
    greedy = call(test_smoke.main, *place, "--temperature", 0)
    top_1 = call(test_smoke.main, *place, "--top-k", 1)
    assert greedy.stdout == top_1.stdout
    assert greedy.stdout.startswith("Every effort moves you")


def test_timeline_samples_every_checkpoint_in_order(scored_run: Path, call: Callable[..., Called]) -> None:
    done = call(test_smoke.main, "--timeline", "text", "--runs-dir", scored_run.parent, "--seed", 1)
    assert done.status == 0
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("step ")] == [
        "step 0",
        "step 5",
    ]


@pytest.mark.parametrize("words", [[], ["a"], ["--timeline", "x", "a", "b"], ["a", "b", "--num-tokens", "-1"]])
def test_bad_usage_of_sampling(call: Callable[..., Called], words: list[str]) -> None:
    assert call(test_smoke.main, *words).status == 2


def test_a_model_without_gpt2_ids_cannot_sample(call: Callable[..., Called], make_run: Callable[..., Path]) -> None:
    folder = make_run()
    model = GPTModel(load_model_config(folder / "model.json"))
    initialise(model, 1)
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    done = call(test_smoke.main, folder / "model.json", folder / "model.safetensors")
    assert done.status == 2
    assert "50257" in done.stderr


def test_training_samples_its_prompt_at_every_checkpoint(scored_run: Path) -> None:
    lines = [json.loads(line) for line in (scored_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "sample" in line] == [0, 5]
    assert lines[0]["sample"].startswith("This License")
    assert "This License" in run_page(RunFolder(scored_run), lines)


def test_help_fits_a_screen_and_shows_an_example(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    for name in sorted(COMMANDS):
        text = call(importlib.import_module(name).main, "--help").stdout
        assert len(text.splitlines()) <= 40
        assert f"{name}.py " in text.split("positional arguments")[0]


@pytest.mark.parametrize(
    ("name", "verb"), [("convert", "import"), ("convert", "export"), ("instruct", "respond"), ("instruct", "judge")]
)
def test_help_of_a_verb_fits_a_screen(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = call(importlib.import_module(name).main, verb, "--help").stdout
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    assert f"python {name}.py {verb} " in text


def test_nothing_ships_but_configuration() -> None:
    tracked = subprocess.run(["git", "ls-files", "runs", "datasets"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert all(name.endswith(".json") or name == "datasets/README.md" for name in tracked.stdout.split())
