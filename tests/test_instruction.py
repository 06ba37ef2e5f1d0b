"""Instruction fine-tuning: items, recipe, cached greedy answers, resuming, and the numbers that need no judge."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import instruct
from assets.instructions import builtin_set
from harness.run.config import load_model_config
from harness.run.errors import ConfigError, DataError, NonFiniteError
from harness.tokens.gpt2 import END_OF_TEXT_ID, gpt2_encoding
from harness.tokens.tokenizer import gpt2_tokenizer
from instruction.answers import load_answers
from instruction.compare import Cells, Metric, compare, ratio_cells
from instruction.examples import Example, encode_items, in_batches
from instruction.finetune import batch_at, fine_tune, response_losses, steps_of
from instruction.generation import write_answers
from instruction.items import BUILTIN_SET, Item, load_items, prompt_of, split_items
from instruction.journal import Journal
from instruction.measures import exact_match, token_f1
from instruction.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from instruction.respond import ModelSource, open_model
from model import GPTModel, fingerprint, initialise, uninitialized_model
from tests.conftest import Called
from tests.helpers import ROOT, Worker, save_weights, wait_for, write, write_run
from tests.test_data_download import COMMITS, DATASET, Hub

MODEL: dict[str, Any] = {"vocab_size": 50257, "context_length": 64, "emb_dim": 16, "n_layers": 2, "drop_rate": 0.1}
CHANGES: dict[str, Any] = {
    "max_tokens": 64,
    "epochs": 1,
    "learning_rate": 0.01,
    "seeds": [1, 2],
    "test_fraction": 0.4,
}
ITEMS = [
    {
        "instruction": f"Repeat the word number {n}{' again' * (n % 5)}.",
        "input": f"word {n}" if n % 2 else "",
        "output": f"word {n} " * (n % 4 + 1),
    }
    for n in range(30)
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


@pytest.fixture
def recipe() -> Recipe:
    return replace(load_recipe(DEFAULT_RECIPE), max_tokens=64, epochs=1, learning_rate=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPTModel:
    """A small model whose weights are large enough that its answers differ, with a likely document end."""
    config = load_model_config(write_run(tmp_path_factory.mktemp("model") / "run", MODEL, {}) / "model.json")
    made = uninitialized_model(config)
    initialise(made, 5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6.0)
        assert made.out_head is not None
        made.out_head.weight[END_OF_TEXT_ID] *= 2.0
    return made.eval()


def examples_of(recipe: Recipe) -> list[Example]:
    return encode_items(
        [Item(item["instruction"], item["input"], item["output"].strip()) for item in ITEMS], recipe, gpt2_tokenizer()
    )


def uncached(model: GPTModel, prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], bool]:
    """Continue a prompt by the definition: the whole text through the model for every token."""
    tokens = list(prompt)
    while len(tokens) < max_tokens:
        with torch.no_grad():
            best = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if best == END_OF_TEXT_ID:
            return tokens[len(prompt) :], True
        tokens.append(best)
    return tokens[len(prompt) :], False


def test_cached_answers_are_the_uncached_ones_whatever_the_batch(model: GPTModel, recipe: Recipe) -> None:
    prompts = [example.prompt for example in examples_of(recipe)][:12]
    assert len({len(prompt) for prompt in prompts}) > 2  # so that rows are padded
    together = write_answers(model, gpt2_tokenizer(), prompts, 64)
    for prompt, written in zip(prompts, together, strict=True):
        assert (list(written.tokens), written.ended) == uncached(model, prompt, 64)
        (alone,) = write_answers(model, gpt2_tokenizer(), [prompt], 64)
        assert alone == written
    assert {written.ended for written in together} == {True, False}
    assert len({written.tokens for written in together}) > 6
    assert write_answers(model, gpt2_tokenizer(), prompts[::-1], 64) == together[::-1]


def test_cached_logits_are_those_of_the_whole_text(model: GPTModel) -> None:
    from harness.engine.key_value_cache import KeyValueCache

    tokens = torch.randint(0, 50257, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        cache = KeyValueCache(40)
        first = model(tokens[:, :12], cache.at(torch.arange(12).expand(3, 12)))
        rest = [model(tokens[:, [place]], cache.at(torch.full((3, 1), place))) for place in range(12, 20)]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_a_prompt_without_room_is_a_defect(model: GPTModel) -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        write_answers(model, gpt2_tokenizer(), [[1] * 64], 64)


def test_response_loss_is_that_of_the_response_alone(model: GPTModel, recipe: Recipe) -> None:
    examples = examples_of(recipe)[:5]
    with torch.no_grad():
        found = response_losses(model, examples)
        for example, loss in zip(examples, found, strict=True):
            logits = model(torch.tensor([example.tokens]))[0].double()
            log_probabilities = logits.log_softmax(dim=-1)
            first = len(example.prompt)
            wanted = -sum(
                log_probabilities[place - 1, token].item()
                for place, token in enumerate(example.tokens) if place >= first
            )  # fmt: skip
            assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert all(example.response[-1] == END_OF_TEXT_ID for example in examples)


def test_prompt_tokens_get_no_gradient_of_their_own(recipe: Recipe, model: GPTModel) -> None:
    """Two examples with another prompt text at a place that nothing attends to would differ; so mask by hand."""
    (example,) = examples_of(recipe)[:1]
    logits = model(torch.tensor([example.tokens[:-1]]))
    logits.retain_grad()
    mask = torch.zeros(len(example.tokens) - 1)
    mask[len(example.prompt) - 1 :] = 1
    losses = torch.nn.functional.cross_entropy(logits[0], torch.tensor(example.tokens[1:]), reduction="none")
    assert response_losses(model, [example]).item() == pytest.approx((losses * mask).sum().item(), rel=1e-5)


def weights_of(model: GPTModel) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def tuned(recipe: Recipe, seed: int, examples: list[Example], config: Any) -> tuple[str, GPTModel]:
    made = uninitialized_model(replace(config, drop_rate=recipe.drop_rate))
    initialise(made, 1)
    torch.rand(3)  # what was drawn before must not matter
    fine_tune(made, examples, recipe, seed)
    return weights_of(made), made


def test_fine_tuning_follows_the_seed_and_nothing_else(recipe: Recipe, model: GPTModel) -> None:
    recipe = replace(recipe, drop_rate=0.2)
    examples = examples_of(recipe)
    first, made = tuned(recipe, 1, examples, model.config)
    assert tuned(recipe, 1, examples, model.config)[0] == first
    assert tuned(recipe, 2, examples, model.config)[0] != first
    assert not made.training
    steps = [batch_at(examples, recipe, 1, step) for step in range(steps_of(len(examples), recipe))]
    assert sorted(e.item.key for batch in steps for e in batch) == sorted(e.item.key for e in examples)


def test_fine_tuning_that_diverges_is_an_error(recipe: Recipe, model: GPTModel) -> None:
    made = uninitialized_model(model.config)
    initialise(made, 1)
    with torch.no_grad():
        made.tok_emb.weight[:, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        fine_tune(made, examples_of(recipe), recipe, 1)


# Items


MODELS = ModelSource(instruct.build_model, fingerprint)


def test_the_shipped_set_is_what_its_rules_write(recipe: Recipe) -> None:
    text = (ROOT / BUILTIN_SET).read_text()
    assert text == builtin_set.text()
    items = load_items(BUILTIN_SET).items
    assert len(items) == len(json.loads(text)) >= 300
    assert len({item["kind"] for item in json.loads(text)}) > 20
    split = split_items(items, load_recipe(DEFAULT_RECIPE))
    assert (len(split.train), len(split.test)) == (367, 141)
    assert len(encode_items(items, load_recipe(DEFAULT_RECIPE), gpt2_tokenizer())) == len(items)
    for item in items:
        assert item.instruction[0].isupper() or item.instruction[0].isdigit()
        assert item.instruction[-1] in ".?'" or item.instruction.startswith(("Define", "Classify"))
        assert "  " not in item.instruction + item.input + item.output


def test_references_can_be_checked() -> None:
    checked = 0
    for item in json.loads((ROOT / BUILTIN_SET).read_text()):
        given, output = item["input"], item["output"]
        if item["kind"] == "code_result":
            assert repr(eval(given)) == output
        elif item["kind"] == "reversed_word":
            assert "".join(reversed(given)) == output
        elif item["kind"] == "alphabetical_order":
            assert sorted(given.split(", ")) == output.split(", ")
        elif item["kind"] in ("subtraction", "multiplication"):
            a, b = (int(word) for word in item["instruction"].split() if word.isdigit())
            assert str(a - b if item["kind"] == "subtraction" else a * b) in output.split()
        else:
            continue
        checked += 1
    assert checked > 70


def test_no_question_is_on_both_sides_and_a_longer_file_moves_none(recipe: Recipe) -> None:
    items = load_items(BUILTIN_SET).items
    whole, part = split_items(items, recipe), split_items(items[:200], recipe)
    assert not {item.key for item in whole.train} & {item.key for item in whole.test}
    assert set(part.test) <= set(whole.test)
    assert set(part.train) <= set(whole.train)
    few = split_items(items, replace(recipe, max_test_items=10))
    assert few.test == whole.test[:10]
    assert few.train == whole.train
    assert split_items(items, replace(recipe, split_seed=1)).test != whole.test


def test_alpaca_files_are_read_in_every_form(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = tmp_path / "items.jsonl"
    lines.write_text("\ufeff" + "\n".join(json.dumps({**item, "text": "more"}) for item in ITEMS) + "\n\n")
    parquet.write_table(pyarrow.Table.from_pylist(ITEMS), tmp_path / "items.parquet")
    plain = load_items(str(write(tmp_path / "items.json", [*ITEMS, ITEMS[0]])))
    assert len(plain.items) == 30
    pyarrow_null = [{**item, "input": item["input"] or None} for item in ITEMS]
    parquet.write_table(pyarrow.Table.from_pylist(pyarrow_null), tmp_path / "null.parquet")
    assert load_items(str(tmp_path / "null.parquet")).sha256 == plain.sha256
    unanswered = load_items(str(write(tmp_path / "gaps.json", [*ITEMS, {"instruction": "x", "output": " "}])))
    assert (unanswered.sha256, unanswered.without_answer) == (plain.sha256, 1)
    assert load_items(str(lines)).sha256 == load_items(str(tmp_path / "items.parquet")).sha256 == plain.sha256


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.json", b"[", "invalid JSON"),
        ("a.json", b"{}", "wanted a list"),
        ("a.json", b"[]", "found no item"),
        ("a.json", b"[1]", "item 1: found int"),
        ("a.json", b'[{"instruction": "a"}]', "item 1: output"),
        ("a.json", b'[{"instruction": " ", "output": "b"}]', "item 1: instruction: found nothing"),
        ("a.json", b'[{"instruction": "a", "input": 1, "output": "b"}]', "input: found int"),
        ("a.json", b'[{"instruction": "\\ud800", "output": "b"}]', "not valid Unicode"),
        ("a.json", b'[{"instruction": "a", "output": NaN}]', "NaN"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instr', "line 2"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.csv", b"a,b", "wanted .json"),
    ],
)
def test_bad_items_are_one_line_that_names_the_place(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as error:
        load_items(str(tmp_path / name))
    (line,) = error.value.lines
    assert str(tmp_path) in line
    assert words in line


@pytest.mark.parametrize("name", ["nowhere.json", "hf:", "hf:a b/c", "hf:../../etc", "hf:owner/name@../x y"])
def test_bad_sources_are_one_line(name: str) -> None:
    with pytest.raises(DataError) as error:
        load_items(name)
    assert len(error.value.lines) == 1


HUB_SCRIPT = """
import sys
from harness.run.errors import exit_status_of
from instruction.items import load_items

sys.exit(exit_status_of(lambda: print(*(len(load_items(name).items) for name in sys.argv[1:]))))
"""


def test_hub_datasets_are_read(hub: Hub, tmp_path: Path) -> None:
    raw = json.dumps(ITEMS).encode()
    hub.files[COMMITS["main"]] = {"data/alpaca.json": raw, "dataset_infos.json": b"{}", "weights.bin": b"x"}
    hub.files[COMMITS["v2"]] = {"a.json": raw, "b/c.json": json.dumps(ITEMS[:7]).encode()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}

    def load(*names: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", HUB_SCRIPT, *names]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    done = load(f"hf:{DATASET}", f"hf:{DATASET}@v2", f"hf:{DATASET}/b@v2", f"hf:{DATASET}/b/c.json@v2")
    assert done.stdout.split() == ["30", "30", "7", "7"], done.stderr
    assert not any("weights" in path for _, path in hub.requests if "resolve" in path)
    missing = load("hf:owner/other")
    assert missing.returncode == 3
    assert "could not be downloaded" in missing.stderr.splitlines()[-1]


def test_braces_in_an_item_stay_as_they_are(recipe: Recipe) -> None:
    prompt = prompt_of(Item("Explain {input} and {0}.", "{instruction}", "x"), recipe)
    assert "Explain {input} and {0}." in prompt
    assert "### Input:\n{instruction}\n" in prompt
    assert "Input" not in prompt_of(Item("Explain.", "", "x"), recipe)


def test_text_that_looks_like_a_document_end_is_text(recipe: Recipe) -> None:
    (example,) = encode_items([Item("Write <|endoftext|>.", "", "<|endoftext|>")], recipe, gpt2_tokenizer())
    assert END_OF_TEXT_ID not in example.prompt
    assert example.response.count(END_OF_TEXT_ID) == 1
    assert gpt2_encoding().decode(list(example.response[:-1])) == "<|endoftext|>"


def test_items_that_are_too_long_are_left_out(recipe: Recipe) -> None:
    items = [Item("Say it.", "", "word " * count) for count in (1, 30, 60)]
    assert len(encode_items(items, recipe, gpt2_tokenizer())) == 2
    assert [len(batch) for batch in in_batches(examples_of(recipe), recipe)] == [30]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 1}, "unknown key"),
        ({"prompt": "no place"}, "{instruction}"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "seeds"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"drop_rate": -0.1}, "drop_rate"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    document = json.loads(DEFAULT_RECIPE.read_text())
    with pytest.raises(ConfigError, match=words.replace("{", r"\{")):
        load_recipe(write(tmp_path / "recipe.json", {**document, **change}))


# Numbers


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("It is Oslo.", "it is oslo", 1, 1),
        ("Oslo", "It is Oslo", 0.5, 0),
        ("Oslo Oslo Oslo", "Oslo", 0.5, 0),
        ("-5", "5", 0, 0),
        ("3.5", "35", 0, 0),
        ("", "Oslo", 0, 0),
        ("", "", 1, 1),
        ("!!", "!!", 1, 1),
        ("ÉTÉ", "été", 1, 1),
        ("1,200 grams", "1,200 grams.", 1, 1),
    ],
)
def test_scores_against_the_reference(answer: str, reference: str, f1: float, exact: float) -> None:
    assert (token_f1(answer, reference), exact_match(answer, reference)) == (f1, exact)


def test_a_ratio_is_linearised() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 30, 200).astype(float)
    sums = counts * generator.normal(2, 0.3, 200)
    values = ratio_cells(sums, counts)
    assert values.mean() == pytest.approx(sums.sum() / counts.sum())
    left_out = [np.delete(sums, i).sum() / np.delete(counts, i).sum() for i in range(200)]  # the jackknife
    jackknife = np.sqrt(199 / 200 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert values.std(ddof=1) / np.sqrt(200) == pytest.approx(jackknife, rel=0.02)


def test_uncertainty_has_the_items_and_the_seeds_in_it() -> None:
    generator = np.random.default_rng(1)
    cells = Cells.of([(str(item), seed) for item in range(50) for seed in range(4)])
    luck = np.tile(np.array([0.3, -0.3, 0.2, -0.2]), 50)
    quiet = generator.normal(0, 0.1, 200)
    calm, _ = cells.mean(quiet)
    lucky, by_seeds = cells.mean(quiet + luck)
    assert by_seeds is not None
    assert lucky.se > by_seeds.se > 5 * calm.se
    assert lucky.df < 5 < calm.df
    assert cells.mean(quiet + np.repeat(generator.normal(0, 1, 50), 4))[0].se > 5 * calm.se
    rows = compare(Metric("m", "higher", 0.01), {"a": quiet, "b": quiet + 1}, cells, "a")
    assert [row.verdict for row in rows] == ["", "HELPS"]
    assert compare(Metric("m", "lower", 0.01), {"a": quiet, "b": quiet + 1}, cells, "a")[1].verdict == "HURTS"
    near = quiet + generator.normal(0, 0.001, 200)
    assert compare(Metric("m", "lower", 0.01), {"a": quiet, "b": near}, cells, "a")[1].verdict.startswith("NO DIFF")


def test_a_score_that_is_the_same_in_every_cell_tells_nothing() -> None:
    """No hit in twelve items by either model does not mean that both hit equally often."""
    cells = Cells.of([(str(item), seed) for item in range(12) for seed in range(3)])
    rows = compare(Metric("exact match", "higher", 0.01), {"a": np.zeros(36), "b": np.zeros(36)}, cells, "a")
    assert rows[1].verdict == "CANNOT TELL"


def test_an_interval_is_never_narrower_than_the_seeds_alone() -> None:
    generator = np.random.default_rng(2)
    cells = Cells.of([(str(item), seed) for item in range(60) for seed in range(3)])
    for luck in (0.0, 0.1, 0.5):
        for _ in range(50):
            values = generator.normal(size=180) + np.tile(generator.normal(0, luck, 3), 60)
            both, by_seeds = cells.mean(values)
            assert by_seeds is not None
            assert both.half_width() >= by_seeds.half_width()


# The command


@pytest.fixture
def any_kernels() -> Iterator[None]:
    """Restore the process's kernels: the command asks for deterministic ones."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ready(tmp_path: Path, any_kernels: None) -> tuple[Path, tuple[object, ...]]:
    """Two runs with a checkpoint each, items and a recipe; gives the folder and the words of the command."""
    for name, seed in (("one", 1), ("two", 2)):
        folder = write_run(tmp_path / "runs" / name, MODEL, {"random_seed": seed})
        save_checkpoint(folder, seed)
    document = {**json.loads(DEFAULT_RECIPE.read_text()), **CHANGES}
    words = ("--data", write(tmp_path / "items.json", ITEMS), "--recipe", write(tmp_path / "recipe.json", document),
             "--runs-dir", tmp_path / "runs", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    return tmp_path, words


def save_checkpoint(folder: Path, seed: int) -> None:
    """Write a run's checkpoint 7 as training would, with keyed weights."""
    made = uninitialized_model(load_model_config(folder / "model.json"))
    initialise(made, seed + 100)
    save_weights(folder, 7, made.state_dict(), tokens=123)


Ready = tuple[Path, tuple[object, ...]]


def test_two_runs_and_their_untrained_selves(ready: Ready, call: Callable[..., Called]) -> None:
    folder, words = ready
    done = call(instruct.main, "respond", "one", "two/checkpoints/step-00000007", "one/untrained", *words)
    assert done.status == 0, done.stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [item["model"] for item in results["models"]] == ["one", "two/checkpoints/step-00000007", "one/untrained"]
    for item in results["models"]:
        assert f"{item['response_loss']['mean']:.4f}" in done.stdout
        assert item["model"] in done.stdout
    assert results["models"][0]["checkpoint"]["tokens_seen"] == 123
    stored = load_answers(folder / "out" / "answers" / "one@untrained.json")
    assert {answer.seed for answer in stored.answers} == {1, 2}
    texts = {item["instruction"]: item for item in ITEMS}
    for answer in stored.answers:
        assert answer.reference == texts[answer.instruction]["output"].strip()
        assert answer.token_f1 == token_f1(answer.answer, answer.reference)
    total = sum(answer.reference_nats for answer in stored.answers)
    tokens = sum(answer.reference_tokens for answer in stored.answers)
    assert results["models"][2]["response_loss"]["mean"] == pytest.approx(total / tokens)
    assert not list((folder / "out" / "partial").iterdir())
    assert json.loads((folder / "out" / "recipe.json").read_text())["max_tokens"] == 64


def test_a_finished_model_is_not_asked_again_and_another_recipe_is_refused(
    ready: Ready, call: Callable[..., Called]
) -> None:
    folder, words = ready
    assert call(instruct.main, "respond", "one", *words).status == 0
    before = (folder / "out" / "answers" / "one.json").stat().st_mtime_ns
    done = call(
        instruct.main,
        "respond",
        "one",
        "two",
        "--out",
        folder / "out",
        "--runs-dir",
        folder / "runs",
        "--device",
        "cpu",
    )
    assert done.status == 0, done.stderr  # recipe and items are those of the folder
    assert (folder / "out" / "answers" / "one.json").stat().st_mtime_ns == before
    document = {**json.loads(DEFAULT_RECIPE.read_text()), **CHANGES, "epochs": 2, "weight_decay": 0.0}
    other = call(instruct.main, "respond", "one", *words, "--recipe", write(folder / "other.json", document))
    assert (other.status, len(other.stderr.splitlines())) == (2, 1)
    assert "another epochs, weight_decay" in other.stderr
    moved = call(instruct.main, "respond", "one", *words, "--data", write(folder / "few.json", ITEMS[:20]))
    assert moved.status == 2
    assert "other items" in moved.stderr
    (folder / "runs" / "one" / "checkpoints" / "step-00000007").rename(folder / "gone")
    save_checkpoint(folder / "runs" / "one", 9)
    changed = call(instruct.main, "respond", "one", *words)
    assert changed.status == 2
    assert "another checkpoint" in changed.stderr


def test_imported_weights_are_asked_and_never_replaced_by_drawn_ones(
    ready: Ready, call: Callable[..., Called]
) -> None:
    """A run folder as convert.py import leaves it: by name, by its `latest`, and as its own untrained self."""
    folder, words = ready
    run = write_run(folder / "runs" / "gpt2", MODEL, {"learning_rate": 0.001})
    made = uninitialized_model(load_model_config(run / "model.json"))
    initialise(made, 999)
    for name in ("imported", "checkpoints"):
        (run / name).mkdir()
    weights = run / "imported" / "model.safetensors"
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, weights)
    (run / "checkpoints" / "latest").symlink_to("../imported")
    train = json.loads((run / "train.json").read_text())
    write(run / "train.json", {**train, "initial_weights": hashlib.sha256(weights.read_bytes()).hexdigest()})
    recipe = load_recipe(Path(str(words[3])))
    for name in ("gpt2", "gpt2/checkpoints/latest", "gpt2/untrained"):
        found = open_model(folder / "runs", name, recipe, MODELS, torch.device("cpu"))
        assert fingerprint(found.open(None)) == fingerprint(made) == found.checkpoint["sha256"]
        assert found.checkpoint["tokens_seen"] is None
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    done = call(instruct.main, "respond", "gpt2", *words)
    assert (done.status, "initial_weights" in done.stderr) == (4, True)


def test_a_kill_costs_nothing_that_was_answered(ready: Ready, call: Callable[..., Called]) -> None:
    """Killed while answering, and again with half a line on disk: the same answers as without."""
    folder, words = ready
    assert call(instruct.main, "respond", "one", *words).status == 0
    whole = load_answers(folder / "out" / "answers" / "one.json")
    again = [word if word != folder / "out" else folder / "again" for word in words]
    journal = folder / "again" / "partial" / "one-seed-2.jsonl"
    process = Worker(["respond", "one", *map(str, again)], folder / "killed", {}, module="instruct")
    wait_for(lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 6)
    process.end()
    if journal.is_file():  # it may have come to its end before the signal
        with journal.open("ab") as file:
            file.write(b'{"item": "cut off')
    done = call(instruct.main, "respond", "one", *again)
    assert done.status == 0, done.stderr
    assert load_answers(folder / "again" / "answers" / "one.json") == whole


@pytest.mark.parametrize(
    ("runs", "status", "words"),
    [
        (("nowhere",), 2, "nowhere"),
        (("one", "one"), 2, "twice"),
        (("one/other",), 2, "RUN/checkpoints/NAME"),
        (("one/checkpoints/step-9",), 4, "no checkpoint"),
        (("one/checkpoints/../../../etc",), 4, "no checkpoint"),
        (("bare",), 4, "bare/untrained"),
        (("short",), 2, "context_length"),
        (("other-words",), 2, "vocab_size"),
    ],
)
def test_bad_runs_are_one_line(
    ready: Ready, call: Callable[..., Called], runs: tuple[str, ...], status: int, words: str
) -> None:
    folder, options = ready
    write_run(folder / "runs" / "bare", MODEL, {})
    write_run(folder / "runs" / "short", {**MODEL, "context_length": 32}, {})
    write_run(folder / "runs" / "other-words", {**MODEL, "vocab_size": 97}, {})
    done = call(instruct.main, "respond", *runs, *options)
    assert done.status == status
    assert words in done.stderr.splitlines()[-1]
    assert not (folder / "out" / "answers").exists()


def test_a_folder_has_one_writer(ready: Ready, call: Callable[..., Called]) -> None:
    from instruction.journal import held

    folder, words = ready
    with held(folder / "out"):
        done = call(instruct.main, "respond", "one", *words)
    assert done.status == 5
    assert "another process" in done.stderr


def test_a_journal_writes_whole_lines_where_the_system_takes_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write_some(descriptor, data[:7]))
    journal = Journal(tmp_path / "lines.jsonl")
    lines = [{"text": "x" * length} for length in (1, 50, 3)]
    for line in lines:
        journal.append(line)
    journal.close()
    assert Journal(tmp_path / "lines.jsonl").lines == lines


def test_a_journal_drops_half_a_line_and_passes_over_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    journal = Journal(path)
    journal.append({"c": "\u2028 é"})
    journal.close()
    assert Journal(path).lines == [{"a": 1}, {"c": "\u2028 é"}]
    raw = b'nonsense\n{"a": 1}\n[1]\n'
    path.write_bytes(raw)
    assert Journal(path).lines == [{"a": 1}]
    assert path.read_bytes() == raw
    assert "passing over 2 damaged lines" in capsys.readouterr().err
