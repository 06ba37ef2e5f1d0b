"""Runs of different tokenizers are judged in bits per byte, on the documents that both were scored on whole."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import experiment
import test_loss
from harness.engine.opening import open_weights
from harness.run.config import load_model_config
from harness.run.files import ROOT
from harness.run.run_folder import RunFolder
from harness.tokens.tokenizer import read_tokenizer
from model import model_of
from preparation.prepare import prepare
from preparation.selection import PreparationSettings
from tests.conftest import Called
from tests.helpers import train_in_fork, write_run

Call = Callable[..., Called]
RUNS = {"bytes-s1": 1, "bytes-s2": 2, "own-s1": 1, "own-s2": 2}
TOKENS = 1024  # two global steps of 8 sequences of 64 tokens


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `own` and `bytes`: the licence, a document a paragraph, in two tokenizers; `else`, another text."""
    folder = tmp_path_factory.mktemp("datasets")
    text = (ROOT / "LICENSE").read_text()
    for name, source, tokenizer in (
        ("own", text, "train:300"),
        ("bytes", text, "bytes"),
        ("else", text * 3, "bytes"),
    ):
        parts = [part.strip() + (" again" if name == "else" else "") for part in source.split("\n\n") if part.strip()]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in [*parts, parts[0]]))
        settings = PreparationSettings(str(path), validation_fraction=0.5, tokenizer=tokenizer)
        prepare(settings, folder / name, workers=1, is_fresh=False, checks_space=True)
    return folder


@pytest.fixture(scope="module")
def trained(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of each tokenizer, which saw as many tokens, scored on all of their validation splits."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    for name, seed in RUNS.items():
        dataset = name.partition("-")[0]
        model = {"vocab_size": 320, "emb_dim": 8, "n_layers": 1, "context_length": 64}
        train = {"dataset": dataset, "min_train_tokens": TOKENS, "random_seed": seed}
        train_in_fork(write_run(runs / name, model, train), datasets)
        score_run(datasets, runs, name)
    return runs


def score_run(datasets: Path, runs: Path, name: str, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        given = ("test_loss.py", datasets, "--run", name, "--runs-dir", runs, "--device", "cpu", *words)
        patch.setattr("sys.argv", list(map(str, given)))
        test_loss.main()


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs", symlinks=True))


def compare(call: Call, runs: Path, *words: object) -> Called:
    return call(experiment.main, "compare", "--baseline", "bytes-s1", "own-s1", "--runs-dir", runs, *words)


def bits_by_document(folder: RunFolder, dataset: Path) -> dict[str, tuple[float, int]]:
    """Return the bits and bytes of each document, of which every token was predicted, window by window."""
    config = load_model_config(folder.model_json)
    weights = open_weights(folder.checkpoints / "latest" / "model.safetensors")
    model = model_of(config, weights, torch.device("cpu")).eval()
    tokens = load_file(dataset / "validation.safetensors")["tokens"].astype(np.int64)
    length, tokenizer = config.context_length, read_tokenizer(dataset / "tokenizer.json")
    used = (len(tokens) - 1) // (6 * length) * 6 * length
    bits = [math.nan]
    for start in range(0, used, length):
        window = torch.from_numpy(tokens[start : start + length + 1])
        with torch.no_grad():
            logits = model(window[None, :-1])[0].double()
        bits += (-torch.log_softmax(logits, 1)[range(length), window[1:]] / math.log(2)).tolist()
    found: dict[str, tuple[float, int]] = {}
    begin = 0
    for end in np.flatnonzero(tokens[: used + 1] == tokenizer.end_of_text_id):
        text = tokenizer.decode(tokens[begin:end].tolist())
        total = sum(bits[begin : end + 1])
        if not math.isnan(total):
            found.setdefault(text, (total, len(text.encode())))
        begin = end + 1
    return found


def test_bits_per_byte_of_the_same_documents(runs: Path, datasets: Path, call: Call) -> None:
    done = compare(call, runs, "--format", "json", "--margin", "0.5")
    assert done.status == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["unit"], document["margin"]) == ("bits per byte", 0.5)
    bits = {name: bits_by_document(RunFolder(runs / name), datasets / name[:-3]) for name in RUNS}
    texts = set.intersection(*map(set, bits.values()))
    assert 5 < len(texts) < len(bits["own-s1"]) + 1
    num_bytes = sum(bits["own-s1"][text][1] for text in texts)
    wanted = {name: sum(found[text][0] for text in texts) / num_bytes for name, found in bits.items()}
    (arm,) = document["arms"]
    assert document["baseline"]["mean"] == pytest.approx((wanted["bytes-s1"] + wanted["bytes-s2"]) / 2, rel=1e-4)
    assert arm["mean"] == pytest.approx((wanted["own-s1"] + wanted["own-s2"]) / 2, rel=1e-4)
    assert arm["method"] == "pairs"
    # The ratio estimator's variance: documents are what is drawn, so their deviations count whole.
    gain = {text: sum(b[text][0] * (1 if n[0] == "o" else -1) / 2 for n, b in bits.items()) for text in texts}
    size = {text: bits["own-s1"][text][1] for text in texts}
    off = [(gain[t] - arm["difference"] * size[t]) ** 2 / (1 - size[t] / num_bytes) for t in texts]
    assert arm["se_evaluation"] == pytest.approx(math.sqrt(sum(off)) / num_bytes, rel=1e-3)
    assert f"{len(texts)} test documents ({num_bytes:,} bytes)" in " ".join(document["notes"])
    assert any("another tokenizer: saw 1,024 tokens (about" in warning for warning in arm["warnings"])


def test_the_table_and_the_page_name_the_unit(runs: Path, call: Call, tmp_path: Path) -> None:
    done = compare(call, runs)
    assert "bits per byte" in done.stdout.splitlines()[0]
    assert "margin of 0.01 are in bits per byte" in done.stdout
    assert "nats" not in done.stdout
    words = ("--baseline", "bytes-s1", "own-s1", "--runs-dir", runs, "--output", tmp_path / "page.html")
    assert call(experiment.main, "report", *words).status == 0
    page = (tmp_path / "page.html").read_text()
    assert "bits per byte, negative is better" in page
    assert "nats" not in page


def change_scores(runs: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], names: str = "own") -> None:
    """Change score files and their arrays, of the runs whose names begin so."""
    for path in runs.glob(f"{names}*/evals/loss-*.json"):
        score = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = dict(stored)
        change(score, arrays)
        path.write_text(json.dumps(score))
        np.savez(path.with_suffix(".npz"), **arrays)


def as_earlier_version(score: dict[str, Any], arrays: dict[str, Any]) -> None:
    del score["tokenizer"]
    for name in [name for name in arrays if name.startswith("document_")]:
        del arrays[name]


def without_whole_documents(_: dict[str, Any], arrays: dict[str, Any]) -> None:
    for name in [name for name in arrays if name.startswith("document_")]:
        arrays[name] = arrays[name][:0]


def of_longer_training(score: dict[str, Any], _: dict[str, Any]) -> None:
    score["tokens_seen"] *= 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_earlier_version, "scores of an earlier version name no tokenizer"),
        (without_whole_documents, "found no whole document"),
        (of_longer_training, "so a difference would not be the change's"),
    ],
)
def test_what_does_not_compare_is_refused(
    runs: Path, call: Call, change: Callable[[dict[str, Any], dict[str, Any]], None], said: str
) -> None:
    change_scores(runs, change)
    done = compare(call, runs)
    assert done.status == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_as_much_text_is_as_fair_as_as_many_tokens(runs: Path, call: Call) -> None:
    def of_as_much_text(score: dict[str, Any], arrays: dict[str, Any]) -> None:
        of_bytes = arrays["document_num_bytes"].sum() / arrays["document_tokens"].sum()
        score["tokens_seen"] = round(1.03 * TOKENS / of_bytes)

    change_scores(runs, of_as_much_text)
    assert compare(call, runs).status == 0


def test_another_text_is_refused_in_one_line(runs: Path, datasets: Path, call: Call) -> None:
    for name in ("bytes-s1", "bytes-s2"):
        shutil.rmtree(runs / name / "evals")
        score_run(datasets, runs, name, "--dataset", "else", "--start-token", "0", "--batches", "2")
    done = compare(call, runs)
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert "no test document in common" in line


def test_one_tokenizer_stays_in_nats_and_scores_of_an_earlier_version_count(runs: Path, call: Call) -> None:
    change_scores(runs, as_earlier_version, "own-s1")
    done = call(experiment.main, "noise", "--baseline", "own-s1", "--runs-dir", runs)
    assert done.status == 0, done.stderr
    losses = [json.loads(path.read_text())["loss"] for path in sorted(runs.glob("own-s*/evals/loss-*.json"))]
    (entry,) = (
        one for one in json.loads((runs / "noise-ledger.json").read_text())["entries"] if one["component"] == "all"
    )
    assert entry["sd"] == pytest.approx(np.std(losses, ddof=1))


def test_the_ledger_of_nats_takes_no_bits(runs: Path, call: Call) -> None:
    design = {"name": "x", "base": "bytes-s1", "design": "one-at-a-time", "factors": ["own"], "generators": []}
    planned = [
        {"run": name, "arm": "own" if name.startswith("own") else "baseline", "seed": seed,
         "on": ["own"] if name.startswith("own") else []}
        for name, seed in RUNS.items()
    ]  # fmt: skip
    document = {**design, "interventions": {"own": {}}, "seeds": [1, 2], "runs": planned,
                "test_set": {"start_token": 0, "batches": 1}}  # fmt: skip
    (runs / "x").mkdir()
    (runs / "x" / "experiment.json").write_text(json.dumps({"experiment": document}))
    done = call(experiment.main, "noise", "--experiment", "x", "--runs-dir", runs)
    assert done.status == 2
    assert "found losses in bits per byte, wanted runs of one tokenizer" in done.stderr
    assert call(experiment.main, "compare", "--experiment", "x", "--runs-dir", runs).status == 0
