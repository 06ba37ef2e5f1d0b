"""Tokenizers of one's own, from text to a score, a sample, an export and a conversation."""

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import convert
import instruct
import prepare_dataset
import test_loss
import test_smoke
from harness.run.errors import DataError
from harness.run.files import ROOT
from harness.tokens.tokenizer import (
    LibraryTokenizer,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from preparation.prepare import prepare
from preparation.selection import PreparationSettings
from tests.conftest import Called
from tests.helpers import run, train_in_fork, write_run
from tests.preparation_helpers import TEXTS, all_tokens, file_bytes, metadata
from tests.test_tokenizer import TEXTS as HARD_TEXTS

Call = Callable[..., Called]
LICENSE = (ROOT / "LICENSE").read_text()
WORDS = 300  # ids: 256 bytes, 43 merges and the document end


def paragraphs() -> list[str]:
    return [part.strip() for part in LICENSE.split("\n\n") if part.strip()]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `own`, `bytes` and `gpt2`: the licence, a document a paragraph, in three tokenizers."""
    folder = tmp_path_factory.mktemp("datasets")
    lines = [json.dumps({"text": text}) + "\n" for text in paragraphs()]
    (folder / "source.jsonl").write_text("".join(lines))
    for name, tokenizer in (("own", f"train:{WORDS}"), ("bytes", "bytes"), ("gpt2", "gpt2")):
        settings = PreparationSettings(str(folder / "source.jsonl"), validation_fraction=0.3, tokenizer=tokenizer)
        prepare(settings, folder / name, workers=2, is_fresh=False, checks_space=True)
    return folder


@pytest.fixture(scope="module")
def runs(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `own` and `bytes`, trained for a few steps on those datasets; `own` has a vocabulary rounded up."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    for name, ids in (("own", 320), ("bytes", 257)):
        model = {"vocab_size": ids, "emb_dim": 8, "n_layers": 1}
        train_in_fork(write_run(folder / name, model, {"dataset": name, "min_train_tokens": 6 * 128}), datasets)
    return folder


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_tokenizer(iter([LICENSE, *TEXTS]), WORDS)


# --- encoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_every_text_comes_back_and_its_bytes_are_counted(learned: Tokenizer, text: str) -> None:
    for tokenizer in (learned, byte_tokenizer(), gpt2_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text_id not in ids
        assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_tokens_are_those_of_the_library(learned: Tokenizer, text: str) -> None:
    """Read by the library as anybody would read the file; bytes too, although they are encoded without it."""
    for tokenizer in (learned, byte_tokenizer()):
        assert tokenizer.document is not None
        library = tokenizers.Tokenizer.from_str(tokenizer.document)
        if "<|endoftext|>" not in text:
            assert tokenizer.encode(text) == library.encode(text).ids
        assert library.token_to_id("<|endoftext|>") == tokenizer.end_of_text_id


def test_bytes_are_bytes() -> None:
    assert byte_tokenizer().encode("aé") == [97, 195, 169]
    assert byte_tokenizer().decode([97, 195, 256]) == "a\ufffd<|endoftext|>"
    assert byte_tokenizer().vocab_size == 257


def test_a_vocabulary_is_learned_from_what_is_frequent(learned: Tokenizer) -> None:
    assert learned.vocab_size == WORDS
    assert len(learned.encode(LICENSE)) < 0.75 * len(LICENSE.encode())
    assert train_tokenizer(iter([*TEXTS, LICENSE]), WORDS).sha256 == learned.sha256


@pytest.mark.parametrize("cores", ["1", "3"])
def test_preparing_gives_the_same_bytes_for_any_number_of_workers(datasets: Path, tmp_path: Path, cores: str) -> None:
    words = ("--tokenizer", f"train:{WORDS}", "--validation-fraction", "0.3", "--workers", cores)
    out = tmp_path / "own"
    done = run("prepare_dataset.py", datasets / "source.jsonl", out, *words, RAYON_NUM_THREADS=cores)
    assert f"{WORDS} ids learned from" in done.stdout
    assert file_bytes(out) == file_bytes(datasets / "own")
    assert (out / "tokenizer.json").read_bytes() == (datasets / "own" / "tokenizer.json").read_bytes()
    assert "Already prepared" in run("prepare_dataset.py", datasets / "source.jsonl", out, *words).stdout


def test_held_out_documents_teach_the_tokenizer_nothing(datasets: Path, call: Call, tmp_path: Path) -> None:
    lines = (datasets / "source.jsonl").read_text()
    zebra = {n: json.dumps({"text": f"zebra{n} " * 400}) + "\n" for n in range(40)}
    held_out = []
    for number, line in zebra.items():
        (tmp_path / "s.jsonl").write_text(lines + line)
        words = ("--tokenizer", "bytes", "--validation-fraction", "0.3", "--fresh")
        assert call(prepare_dataset.main, tmp_path / "s.jsonl", tmp_path / "b", *words).status == 0
        if int(metadata(tmp_path / "b", "validation")["documents"]) > int(
            metadata(datasets / "bytes", "validation")["documents"]
        ):
            held_out.append(number)
        if held_out:
            break
    words = ("--tokenizer", f"train:{WORDS}", "--validation-fraction", "0.3")
    assert call(prepare_dataset.main, tmp_path / "s.jsonl", tmp_path / "own", *words).status == 0
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() == (datasets / "own" / "tokenizer.json").read_bytes()


def test_a_long_text_has_the_tokens_of_the_whole(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces while it is read, with a tokenizer that takes a line end after a full stop into its word."""
    from preparation import readers

    monkeypatch.setattr(readers, "READ_BYTES", 500)
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 700)
    split = tokenizers.Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(split, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    library.decoder = tokenizers.decoders.ByteLevel()
    text = LICENSE.replace("  ", " ") + "\n\n".join("It ends. \n\nSo. \nIt " for _ in range(200))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text], trainer)
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "theirs.json"))
    (tmp_path / "a.txt").write_text(text)
    words = ("--tokenizer", tmp_path / "theirs.json", "--validation", "last")
    done = call(prepare_dataset.main, tmp_path / "a.txt", tmp_path / "out", *words)
    assert done.status == 0, done.stderr
    end = library.token_to_id("</s>")
    found = [token for token in all_tokens(tmp_path / "out") if token != end]
    assert found == library.encode(text).ids


def test_many_ids_are_stored_in_four_bytes(learned: Tokenizer, tmp_path: Path, call: Call) -> None:
    assert learned.document is not None
    document = json.loads(learned.document)
    often = Counter(number for number in learned.encode(LICENSE) if number > 255).most_common(1)[0][0]
    vocab = document["model"]["vocab"]
    vocab[next(token for token, number in vocab.items() if number == often)] = 70_000
    (tmp_path / "wide.json").write_text(json.dumps(document))
    (tmp_path / "a.txt").write_text(LICENSE)
    done = call(prepare_dataset.main, tmp_path / "a.txt", tmp_path / "out", "--tokenizer", tmp_path / "wide.json")
    assert done.status == 0, done.stderr
    tokens = load_file(tmp_path / "out" / "train.safetensors")["tokens"]
    assert tokens.dtype == np.uint32
    assert 70_000 in tokens
    assert call(prepare_dataset.main, "--verify", tmp_path / "out").status == 0


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.fault("F65")
def test_a_tokenizer_that_loses_text_is_refused(learned: Tokenizer) -> None:
    assert learned.document is not None
    model, (added,) = (json.loads(learned.document)[key] for key in ("model", "added_tokens"))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"decoder": None}, "byte-level"),
        ({"pre_tokenizer": None}, "one splitter that is byte-level"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}}, "exactly one splitter"),
        ({"pre_tokenizer": splitting(" ?[^ ]+ ?|.", "Isolated")}, "go on over a space"),
        ({"pre_tokenizer": splitting("secret", "Removed")}, "loses text"),
        ({"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "x"}}, "loses text"),
        ({"decoder": {"type": "Sequence", "decoders": [BYTE_LEVEL, {"type": "Fuse"}]}}, "decoder"),
        ({"model": {**model, "vocab": {**model["vocab"], "twin": model["vocab"]["a"]}}}, "two tokens of one id"),
        ({"model": {**model, "vocab": {**model["vocab"], "far": 2**32 - 1}}}, "an id of 4,194,304 or more"),
        ({"model": {**model, "continuing_subword_prefix": "##"}}, "prefix"),
        ({"model": {**model, "end_of_word_suffix": "</w>"}}, "suffix"),
        ({"added_tokens": [{**added, "content": "foo", "special": False, "rstrip": True}]}, "swallows spaces"),
        ({"model": []}, "cannot be used"),
        ({"added_tokens": []}, "ends a document"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "add_prefix_space"),
        ({"version": 7}, "cannot be used"),
    ]  # fmt: skip
    for change, said in changes:
        with pytest.raises(DataError) as caught:
            LibraryTokenizer(json.dumps({**json.loads(learned.document), **change}), "place")
        (line,) = caught.value.lines
        assert said in line


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splitting(pattern: str, behavior: str, use_regex: bool = False) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": use_regex}]}


@pytest.mark.fault("F65")
def test_a_pattern_that_takes_too_long_is_one_line(learned: Tokenizer, tmp_path: Path, call: Call) -> None:
    """The library panics, which is no Exception."""
    assert learned.document is not None
    bomb = {**json.loads(learned.document), "pre_tokenizer": splitting("(x+x+)+y", "Isolated", True)}
    (tmp_path / "bomb.json").write_text(json.dumps(bomb))
    (tmp_path / "a.txt").write_text("x" * 60)
    done = call(prepare_dataset.main, tmp_path / "a.txt", tmp_path / "out", "--tokenizer", tmp_path / "bomb.json")
    assert done.status == 3
    assert done.stderr.splitlines()[-1].startswith(f"{tmp_path / 'bomb.json'}: cannot be used as a tokenizer")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["train:256", "train:x", "train:", "gpt3", "train:99999999999", ""])
def test_bad_words_for_a_tokenizer_are_one_line(call: Call, datasets: Path, tmp_path: Path, words: str) -> None:
    done = call(prepare_dataset.main, datasets / "source.jsonl", tmp_path / "out", "--tokenizer", words)
    assert done.status in (2, 3)
    assert len(done.stderr.splitlines()) == 1
    assert "--tokenizer" in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_does_not_resume_or_replace(call: Call, datasets: Path) -> None:
    done = call(prepare_dataset.main, datasets / "source.jsonl", datasets / "own", "--validation-fraction", "0.3")
    assert done.status == 2
    assert f"tokenizer train:{WORDS} there, gpt2 now" in done.stderr


def test_a_changed_or_missing_tokenizer_is_told(datasets: Path, runs: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(datasets / "own", tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    for wanted in ("SHA-256", "no such file"):
        done = call(test_loss.main, tmp_path, "--run", "own", "--runs-dir", runs, "--device", "cpu")
        assert done.status == 3
        assert wanted in done.stderr
        path.unlink(missing_ok=True)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(datasets: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "small", {"vocab_size": 299}, {"dataset": "own"})
    (worker,) = train_in_fork(folder, datasets, check=2)
    assert "vocab_size: found 299, wanted at least the 300 ids" in worker.stderr


def test_another_tokenizer_than_the_checkpoint_s_is_refused(datasets: Path, runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "own", tmp_path / "runs" / "own", symlinks=True)
    train = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**train, "dataset": "bytes"}))
    (worker,) = train_in_fork(folder, datasets, check=3)
    assert "found tokens of the tokenizer bytes, wanted those of the run's" in worker.stderr
    train_in_fork(folder, datasets, "--fresh")
    assert read_tokenizer(folder / "tokenizer.json") is byte_tokenizer()
    assert list(folder.glob("aside-*/tokenizer.json"))


# --- a run knows itself --------------------------------------------------------------------------------------


def test_bits_per_byte_are_the_nats_of_the_text_over_its_bytes(datasets: Path, runs: Path, call: Call) -> None:
    for name in ("own", "bytes"):
        for of_another_test in (runs / name / "evals").glob("loss-*"):
            of_another_test.unlink()
        done = call(test_loss.main, datasets, "--run", name, "--runs-dir", runs, "--device", "cpu")
        assert done.status == 0, done.stderr
        (path,) = (runs / name / "evals").glob("loss-*.json")
        score = json.loads(path.read_text())
        assert (score["dataset"], score["split"], score["start_token"]) == (name, "validation", 0)
        tokens = load_file(datasets / name / "validation.safetensors")["tokens"][1 : 1 + score["tokens"]]
        tokenizer = read_tokenizer(datasets / name / "tokenizer.json")
        text = tokenizer.decode([int(token) for token in tokens if token != tokenizer.end_of_text_id])
        nats = score["loss"] * score["tokens"]
        assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-3)


def test_weights_inside_a_run_are_scored_on_the_run_s_own_data(datasets: Path, runs: Path, call: Call) -> None:
    weights = runs / "own" / "checkpoints" / "latest" / "model.safetensors"
    done = call(test_loss.main, datasets, runs / "own" / "model.json", weights, "--device", "cpu", "--batches", "2")
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Scoring on the validation split of own, the run's own data")
    done = call(test_loss.main, datasets, "--run", "own", "--runs-dir", runs, "--dataset", "bytes", "--batches", "2")
    assert done.status == 3
    assert "found tokens of the tokenizer bytes, wanted the model's" in done.stderr


def test_tokens_of_an_unknown_tokenizer_get_no_bits_per_byte(datasets: Path, runs: Path, call: Call) -> None:
    tokens = load_file(datasets / "bytes" / "validation.safetensors")["tokens"]
    (datasets / "nano").mkdir(exist_ok=True)
    tokens.astype("<u2").tofile(datasets / "nano" / "val.bin")
    (datasets / "bare").mkdir(exist_ok=True)
    save_file({"tokens": tokens}, datasets / "bare" / "validation.safetensors")
    for name in ("nano", "bare"):
        words = ("--dataset", name, "--start-token", "0", "--batches", "2", "--device", "cpu")
        done = call(test_loss.main, datasets, "--run", "bytes", "--runs-dir", runs, *words)
        assert done.status == 0, done.stderr
        assert "Bits per byte" not in done.stdout
        assert "Loss against our test dataset" in done.stdout


def test_training_samples_in_the_run_s_own_tokenizer(runs: Path, call: Call) -> None:
    first = json.loads((runs / "own" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["sample"].startswith("Every effort moves you")
    words = ("--runs-dir", runs, "--device", "cpu", "--seed", "3", "--num-tokens", "5")
    done = call(test_smoke.main, "--run", "own/checkpoints/step-00000000", *words, "--prompt", "Ünder")
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Ünder")
    model = (runs / "own" / "model.json", runs / "own" / "checkpoints" / "step-00000000" / "model.safetensors")
    assert call(test_smoke.main, *model, *words[2:], "--prompt", "Ünder").stdout == done.stdout


@pytest.mark.parametrize("name", ["own", "bytes"])
def test_a_prompt_that_is_no_unicode_is_continued(runs: Path, call: Call, name: str) -> None:
    words = ("--run", name, "--runs-dir", runs, "--device", "cpu", "--num-tokens", "0")
    done = call(test_smoke.main, *words, "--prompt", "a\udcffb")  # as a byte of a command line becomes
    assert (done.status, done.stdout) == (0, "a\ufffdb\n")


@pytest.mark.parametrize("words", [["--run", "own", "a", "b"], ["--run", "own", "--timeline", "own"], ["a"]])
def test_either_a_run_or_two_files(call: Call, words: list[str]) -> None:
    assert call(test_smoke.main, *words).status == 2
    assert call(test_loss.main, "datasets", *[word for word in words if word != "--timeline"]).status == 2


def test_a_conversation_is_quiet_when_piped(runs: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = b"Licensed\n:tokens 0\nWork\n\xff\n:top-k x\n:temperature 0\nYou\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    words = ("--run", "own", "--runs-dir", runs, "--device", "cpu", "--seed", "1", "--num-tokens", "3")
    done = call(test_smoke.main, *words, "--interactive")
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Licensed")
    assert done.stdout.endswith("\nWork\n\ufffd\nYou\n")
    assert ">" not in done.stdout.replace("<|", "")
    assert ":top-k x: wanted one of" in done.stderr


# --- elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own", "bytes"])
def test_an_export_encodes_in_transformers_as_here(runs: Path, call: Call, tmp_path: Path, name: str) -> None:
    import transformers

    done = call(convert.main, "export", name, tmp_path / "out", "--runs-dir", runs)
    assert done.status == 0, done.stderr
    assert "none written" not in done.stdout
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        read_tokenizer(runs / name / "tokenizer.json"),
    )
    for text in HARD_TEXTS.values():
        if "<|endoftext|>" not in text:
            assert theirs(text).input_ids == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_text_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == ours.end_of_text_id


def test_instruction_evals_use_one_tokenizer_for_all(runs: Path, call: Call, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "evals", "--runs-dir", runs, "--device", "cpu")
    done = call(instruct.main, "respond", "own", "bytes", *words)
    assert done.status == 2
    assert "wanted one for all models" in done.stderr
