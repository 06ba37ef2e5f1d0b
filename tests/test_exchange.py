"""Other people's formats: every mapping there and back, and what each refuses, against transformers itself."""

import functools
import hashlib
import itertools
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from exchange import architectures, hugging_face, published, vocabulary
from exchange.parity import Parity
from harness.run.config import STRICT, ModelConfig
from harness.run.errors import CheckpointError, ConfigError, HarnessError
from harness.run.keys import Later, Recipe
from harness.run.model_size import count_parameters
from harness.tokens.gpt2 import END_OF_TEXT, MERGES, VOCAB_SIZE, gpt2_encoding, printable_vocabulary
from model import GPTModel, load_weights
from tests.test_model import TINY, TOGGLES, random_model


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LaterModel(ModelConfig):
    """A model.json with keys that came after the first release."""

    made_up: Later[Recipe[str]] = "learned"
    also: Later[Recipe[int | None]] = None


TOKENIZER = vocabulary.tokenizer_files(printable_vocabulary(), MERGES.read_text("utf-8"), END_OF_TEXT, 1024)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize("change", TOGGLES)
def test_there_and_back_is_exact(change: dict[str, Any]) -> None:
    model = random_model(replace(TINY, **change))
    theirs = hugging_face.to_hugging_face(model.state_dict(), model.config)
    ours, config = hugging_face.from_hugging_face(theirs, replace(model.config, qkv_bias=True), "here")
    assert config == model.config
    assert bits(ours) == bits(model.state_dict())
    load_weights(GPTModel(config), ours, "here")


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_theirs_through_ours_is_exact(is_tied: bool, prefix: str) -> None:
    """From a state dict that transformers made, in both spellings, with the masks that older versions stored."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=12, n_embd=24, n_head=3, n_layer=2, tie_word_embeddings=is_tied
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    theirs = {name: value for name, value in model.state_dict().items() if not (is_tied and name == "lm_head.weight")}
    given = {name.replace("transformer.", prefix): value for name, value in theirs.items()}
    given |= {f"{prefix}h.1.attn.bias": torch.ones(1, 1, 12, 12), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
    ours, read = hugging_face.from_hugging_face(given, replace(TINY, qkv_bias=True, tie_weights=is_tied), "there")
    assert bits(hugging_face.to_hugging_face(ours, read)) == bits(theirs)


def test_half_precision_becomes_float32() -> None:
    model = random_model(TINY)
    half = {name: value.half() for name, value in hugging_face.to_hugging_face(model.state_dict(), TINY).items()}
    ours, _ = hugging_face.from_hugging_face(half, TINY, "there")
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert torch.equal(ours["tok_emb.weight"], model.tok_emb.weight.half().float())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("transformer.h.1.mlp.c_fc.bias", None, "missing tensor h.1.mlp.c_fc.bias"),
        ("lm_head.weight", None, "missing tensor lm_head.weight"),
        ("transformer.h.0.crossattention.c_attn.weight", torch.ones(1), "unknown tensor"),
        ("score.weight", torch.ones(1), "unknown tensor"),
        ("transformer.h.0.attn.c_attn.weight", torch.ones(72, 24), "found shape (72, 24), wanted (24, 72)"),
        ("transformer.h.0.attn.c_attn.bias", torch.tensor(0.0), "found shape (), wanted (72,)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, value: Tensor | None, said: str) -> None:
    tensors = hugging_face.to_hugging_face(random_model(TINY).state_dict(), TINY)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(CheckpointError) as caught:
        hugging_face.from_hugging_face(tensors, TINY, "there")
    assert len(caught.value.lines) == 1
    assert said in caught.value.lines[0]


def test_a_tied_model_with_another_head_is_refused() -> None:
    tied = replace(TINY, tie_weights=True)
    tensors = hugging_face.to_hugging_face(random_model(tied).state_dict(), tied)
    same = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    assert "out_head.weight" not in hugging_face.from_hugging_face(same, tied, "there")[0]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        hugging_face.from_hugging_face({**same, "lm_head.weight": torch.ones(61, 24)}, tied, "there")


# --- configurations ------------------------------------------------------------------------------------------


def write_config(folder: Path, **change: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    document = {**transformers.GPT2Config().to_dict(), **change}
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "absent"}))
    return path


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_four_gpt2_sizes(tmp_path: Path, layers: int, heads: int, width: int, parameters: int) -> None:
    config = hugging_face.read_config(write_config(tmp_path, n_layer=layers, n_head=heads, n_embd=width))
    assert (config.n_layers, config.n_heads, config.emb_dim, config.context_length) == (layers, heads, width, 1024)
    assert (config.tie_weights, config.qkv_bias, config.vocab_size) == (True, True, VOCAB_SIZE)
    assert count_parameters(config).total == parameters


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", "absent"),
        ("activation_function", "gelu"),
        ("activation_function", ["gelu_new"]),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_inner", 1024),
        ("quantization_config", {"bits": 4}),
        ("n_embd", "768"),
        ("n_embd", "absent"),
        ("n_head", 7),
        ("vocab_size", -1),
        ("tie_word_embeddings", "yes"),
        ("resid_pdrop", 2),
    ],
)
def test_what_the_harness_does_not_compute_is_refused_by_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        hugging_face.read_config(write_config(tmp_path, **{key: value}))
    assert len(caught.value.lines) == 1
    assert (key if key != "n_head" else "n_embd") in caught.value.lines[0]
    assert "emb_dim" not in caught.value.lines[0].replace("multiple of n_heads", "")


@pytest.mark.parametrize(
    "change",
    [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 3072}, {"reorder_and_upcast_attn": True}],
    ids=str,
)
def test_what_computes_the_same_is_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    assert hugging_face.read_config(write_config(tmp_path, **change)).emb_dim == 768


@pytest.mark.parametrize("change", TOGGLES)
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_our_configuration_comes_back(tmp_path: Path, change: dict[str, Any], drop_rate: float) -> None:
    config = replace(TINY, **change, drop_rate=drop_rate)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.config_document(config, None)))
    assert hugging_face.read_config(tmp_path / "config.json") == replace(config, qkv_bias=True)


def test_a_later_key_in_use_is_refused_by_name() -> None:
    assert architectures.architecture_of(LaterModel(**vars(TINY)), "here") == "GPT2LMHeadModel"
    with pytest.raises(ConfigError) as caught:
        architectures.architecture_of(LaterModel(**{**vars(TINY), "made_up": "rotary", "also": None}), "here")
    assert caught.value.lines == ('here: made_up: found "rotary", which GPT2LMHeadModel cannot hold',)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", ""])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        hugging_face.weight_files(tmp_path)


# --- another harness's file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", TOGGLES)
def test_shape_is_read_off_the_tensors(change: dict[str, Any]) -> None:
    model = random_model(replace(TINY, **change))
    assert published.config_of(model.state_dict(), 3, "file") == model.config


def test_a_head_under_either_name_or_stored_twice_is_tied() -> None:
    state = random_model(replace(TINY, tie_weights=True)).state_dict()
    twice = {**state, "out_head.weight": state["tok_emb.weight"].clone()}
    only_head = {name: value for name, value in twice.items() if name != "tok_emb.weight"}
    for tensors in (twice, only_head):
        config = published.config_of(tensors, 3, "file")
        assert config.tie_weights
        load_weights(GPTModel(config), tensors, "file")


def test_heads_default_to_64_channels() -> None:
    wide = ModelConfig(**{**vars(TINY), "emb_dim": 192, "n_heads": 3, "n_layers": 1})
    assert published.config_of(random_model(wide).state_dict(), None, "file").n_heads == 3
    with pytest.raises(ConfigError, match="--n-heads"):
        published.config_of(random_model(TINY).state_dict(), None, "file")
    with pytest.raises(ConfigError, match="emb_dim"):
        published.config_of(random_model(TINY).state_dict(), 5, "file")


FLAT = {"tok_emb.weight": torch.ones(3), "pos_emb.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(1)}, FLAT, {"wte.weight": torch.ones(2, 2)}], ids=str)
def test_something_else_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(HarnessError, match=r"wanted tok_emb\.weight"):
        published.config_of(tensors, None, "file")


# --- vocabularies --------------------------------------------------------------------------------------------


def test_tokenizer_files_are_gpt2s_own() -> None:
    """The hashes that tiktoken pins for the two files OpenAI released."""
    sha256 = {name: hashlib.sha256(TOKENIZER[name].encode()).hexdigest() for name in ("vocab.json", "merges.txt")}
    assert sha256 == {
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }


@functools.cache
def hard_texts() -> list[str]:
    """Texts over all of Unicode, dense in what a pre-tokenizer decides on."""
    generator = np.random.default_rng(0)
    wild = np.array([chr(n) for n in range(0x30000) if unicodedata.category(chr(n)) not in ("Cs", "Cn")])
    plain = np.array(list(" \t\n\r'\u00a0\u3000\u200d09azé²½_-."))
    pools = (wild, plain, np.append(wild[:300], plain))
    texts = ["".join(generator.choice(pool, 40)) for pool in pools for _ in range(300)]
    return [*texts, *(f"{a}{b}" for a, b in itertools.product(("'s", "'S", " ", "\n", "  "), repeat=2))]


@pytest.mark.parametrize("loader", ["AutoTokenizer", "GPT2TokenizerFast"])
def test_transformers_encodes_as_we_do(tmp_path: Path, loader: str) -> None:
    transformers = pytest.importorskip("transformers")
    for name, text in TOKENIZER.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = getattr(transformers, loader).from_pretrained(tmp_path, local_files_only=True)
    texts = hard_texts()
    encoded = tokenizer(texts).input_ids
    assert encoded == gpt2_encoding().encode_ordinary_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert tokenizer(END_OF_TEXT).input_ids == [50256]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (50256, 50256, VOCAB_SIZE)


def test_which_ids_are_padding() -> None:
    gpt2 = printable_vocabulary()
    real = vocabulary.real_vocab_size
    assert real(50304, VOCAB_SIZE, gpt2, None) == VOCAB_SIZE
    assert real(50304, VOCAB_SIZE, {**gpt2, "<pad>": VOCAB_SIZE}, None) == 50304
    assert real(50304, VOCAB_SIZE, None, VOCAB_SIZE) == VOCAB_SIZE
    assert real(50304, VOCAB_SIZE, None, 50304) == 50304
    assert real(32000, VOCAB_SIZE, None, None) == 32000
    assert real(VOCAB_SIZE, VOCAB_SIZE, None, None) == VOCAB_SIZE
    with pytest.raises(ConfigError, match="--vocab-size 50257 to drop"):
        real(50304, VOCAB_SIZE, None, None)
    with pytest.raises(ConfigError, match="at most"):
        real(100, VOCAB_SIZE, None, 101)


UNIGRAM = {"model": {"vocab": [["a", -1.0]]}}
STRANGE = [{"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": {"a": 0}}, "added_tokens": 3}]


@pytest.mark.parametrize("document", [{}, {"model": 3}, {"model": {"vocab": {}}}, UNIGRAM], ids=str)
def test_a_tokenizer_that_says_nothing(tmp_path: Path, document: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert vocabulary.read_vocabulary(tmp_path) is None


@pytest.mark.parametrize("document", STRANGE, ids=str)
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, document: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        vocabulary.read_vocabulary(tmp_path)
    assert len(caught.value.lines) == 1


def test_tolerance_is_of_rounding_only() -> None:
    assert Parity(0.0, 3.0, 1).tolerance == 1e-4
    assert Parity(0.0, 160.0, 1).tolerance == pytest.approx(1.6e-3)
