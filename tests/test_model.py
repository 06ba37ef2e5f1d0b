"""The model held against a plain textbook GPT-2 and against transformers; names, causality, loading."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.engine.key_value_cache import KeyValueCache
from harness.run.config import ExpertsConfig, ModelConfig
from harness.run.errors import CheckpointError, ConfigError
from model import GPTModel, fingerprint, initialise, load_weights, uninitialized_model
from tests.helpers import load_model

TINY = ModelConfig(vocab_size=61, context_length=12, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=False)
TOGGLES: list[dict[str, Any]] = [
    {"qkv_bias": bias, "tie_weights": tie} for bias in (False, True) for tie in (False, True)
]

INTERVENTIONS: list[dict[str, Any]] = [
    {"positions": "rotary"},
    {"norm": "rms"},
    {"feed_forward": "relu_squared"},
    {"feed_forward": "swiglu"},
    {"qk_norm": True},
    {"bias": False},
    {"embedding_norm": True},
    {"value_residual": True},
    {"logit_softcap": 2.0},
    {"moe": ExpertsConfig(num_experts=3, num_active_experts=2)},
]
# Two stacks that between them have everything, and one that has what is left beside rotary positions.
STACKS: list[dict[str, Any]] = [
    {
        "positions": "rotary", "norm": "rms", "feed_forward": "relu_squared", "qk_norm": True, "bias": False,
        "embedding_norm": True, "value_residual": True, "logit_softcap": 15.0, "init": "zero_projections",
    },
    {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "qkv_bias": True, "tie_weights": True},
    {"embedding_norm": True, "value_residual": True, "bias": False, "init": "torch"},
    {
        "positions": "rotary", "norm": "rms", "feed_forward": "swiglu",
        "moe": ExpertsConfig(num_experts=3, num_active_experts=3),
    },
]  # fmt: skip


def random_model(config: ModelConfig, seed: int = 0, **named: Any) -> GPTModel:
    """A model whose every parameter, biases and norms too, is far from its initial value."""
    model = GPTModel(config, **named)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith(".scale"))
    return model.eval()


def random_tokens(config: ModelConfig, rows: int = 3, length: int | None = None, seed: int = 1) -> Tensor:
    shape = (rows, length or config.context_length)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- a second implementation, from the description alone -----------------------------------------------------


def textbook_logits(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """The model with loops over heads, an explicit mask, and no library layer; (B, T) to (B, T, V)."""
    weights = {name: value.double() for name, value in weights.items()}
    zero = torch.zeros((), dtype=torch.float64)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", zero)

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        normal = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)
        return normal * weights.get(f"{name}.scale", zero + 1) + weights.get(f"{name}.shift", zero)

    def feed_forward(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.layers.0")
        if config.feed_forward == "swiglu":
            gate = linear(x, f"{name}.gate")
            hidden = hidden * gate / (1 + torch.exp(-gate))
        elif config.feed_forward == "relu_squared":
            hidden = hidden.clamp(min=0) ** 2
        else:
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return linear(hidden, f"{name}.layers.2")

    def mixture(x: Tensor, name: str) -> Tensor:
        """Give each token the experts with the highest scores, one token after the other."""
        assert config.moe is not None
        mixed = torch.zeros_like(x)
        for row, place in product(range(x.shape[0]), range(x.shape[1])):
            token = x[row, place]
            scores = linear(token, f"{name}.router")
            best = sorted(range(config.moe.num_experts), key=lambda expert: -scores[expert].item())
            chosen = best[: config.moe.num_active_experts]
            exponentials = torch.exp(scores[chosen] - scores.max())
            for expert, share in zip(chosen, exponentials / exponentials.sum(), strict=True):
                mixed[row, place] += share * feed_forward(token, f"{name}.experts.{expert}")
        return mixed

    def turned(x: Tensor) -> Tensor:
        """Multiply every pair of channels, as a complex number, by one whose angle grows with the position."""
        half = size // 2
        speeds = 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / size)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speeds
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    def scored(x: Tensor) -> Tensor:
        x = turned(x) if config.positions == "rotary" else x
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) if config.qk_norm else x

    def attention(x: Tensor, name: str, first: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value = (linear(x, f"{name}.W_{part}") for part in ("query", "key", "value"))
        if config.value_residual and first is not None:
            mix = weights[f"{name}.value_mix"]
            value = (1 - mix) * value + mix * first
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        heads = []
        for head in range(config.n_heads):
            part = slice(head * size, (head + 1) * size)
            scores = scored(query[..., part]) @ scored(key[..., part]).transpose(1, 2) / math.sqrt(size)
            scores = scores.masked_fill(future, float("-inf"))
            exponentials = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append(exponentials / exponentials.sum(-1, keepdim=True) @ value[..., part])
        return linear(torch.cat(heads, -1), f"{name}.out_proj"), value

    size = config.emb_dim // config.n_heads
    x = weights["tok_emb.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["pos_emb.weight"][: tokens.shape[1]]
    x = norm(x, "embedding") if config.embedding_norm else x
    first = None
    for number in range(config.n_layers):
        block = f"trf_blocks.{number}"
        attended, values = attention(norm(x, f"{block}.norm1"), f"{block}.att", first)
        first = values if first is None else first
        x = x + attended
        x = x + (mixture if config.moe else feed_forward)(norm(x, f"{block}.norm2"), f"{block}.ff")
    head = weights["tok_emb.weight" if config.tie_weights else "out_head.weight"]
    logits = norm(x, "final_norm") @ head.T
    cap = config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("change", [*TOGGLES, *INTERVENTIONS, *STACKS], ids=str)
@torch.no_grad()
def test_logits_equal_the_textbook(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model = random_model(config)
    tokens = random_tokens(config)
    logits, expected = model(tokens), textbook_logits(model.state_dict(), config, tokens)
    assert logits.shape == (3, 12, 61)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=2e-5)
    tolerance = 1e-6 if config.positions == "rotary" else 1e-12  # angles are computed in float32
    torch.testing.assert_close(model.double()(tokens), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 2, 11])
@torch.no_grad()
def test_shorter_sequences(length: int) -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, length=length)
    expected = textbook_logits(model.state_dict(), TINY, tokens)
    torch.testing.assert_close(model(tokens).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"n_heads": 1}, {"n_heads": 24}, {"n_layers": 1}, {"n_layers": 5}, {"context_length": 1}]
)
@torch.no_grad()
def test_other_shapes(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model, tokens = random_model(config), random_tokens(config)
    expected = textbook_logits(model.state_dict(), config, tokens)
    torch.testing.assert_close(model(tokens).double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("change", TOGGLES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, **change)
    model = random_model(config)
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.emb_dim,
            n_layer=config.n_layers, n_head=config.n_heads, activation_function="gelu_new",
            layer_norm_epsilon=1e-5, tie_word_embeddings=config.tie_weights, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    weights = model.state_dict()
    mapped = {
        "transformer.wte.weight": weights["tok_emb.weight"],
        "transformer.wpe.weight": weights["pos_emb.weight"],
        "transformer.ln_f.weight": weights["final_norm.scale"],
        "transformer.ln_f.bias": weights["final_norm.shift"],
        "lm_head.weight": weights["tok_emb.weight" if config.tie_weights else "out_head.weight"],
    }
    for number in range(config.n_layers):
        ours, theirs = f"trf_blocks.{number}", f"transformer.h.{number}"
        parts = [f"{ours}.att.W_{part}" for part in ("query", "key", "value")]
        mapped[f"{theirs}.attn.c_attn.weight"] = torch.cat([weights[f"{part}.weight"] for part in parts]).T
        mapped[f"{theirs}.attn.c_attn.bias"] = torch.cat(
            [weights.get(f"{part}.bias", torch.zeros(config.emb_dim)) for part in parts]
        )
        for to, source in (
            ("attn.c_proj", "att.out_proj"),
            ("mlp.c_fc", "ff.layers.0"),
            ("mlp.c_proj", "ff.layers.2"),
        ):
            mapped[f"{theirs}.{to}.weight"] = weights[f"{ours}.{source}.weight"].T
            mapped[f"{theirs}.{to}.bias"] = weights[f"{ours}.{source}.bias"]
        for to, source in (("ln_1", "norm1"), ("ln_2", "norm2")):
            mapped[f"{theirs}.{to}.weight"] = weights[f"{ours}.{source}.scale"]
            mapped[f"{theirs}.{to}.bias"] = weights[f"{ours}.{source}.shift"]
    other.load_state_dict(mapped, strict=True)
    tokens = random_tokens(config)
    torch.testing.assert_close(model(tokens), other(tokens).logits, atol=1e-5, rtol=1e-5)


# --- what a position can see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 5, 11])
@torch.no_grad()
def test_a_token_is_seen_from_its_place_on_and_not_before(place: int) -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, rows=1)
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % TINY.vocab_size
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (difference[:place] < 1e-6).all()
    assert (difference[place:] > 1e-4).all()


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, rows=4)
    alone = torch.cat([model(tokens[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(model(tokens), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [*INTERVENTIONS, *STACKS], ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(change: dict[str, Any]) -> None:
    """Three rows read 7, 5 and 3 tokens at first, padded to 7, and then one after the other."""
    config = replace(TINY, **change)
    model, tokens = random_model(config), random_tokens(config)
    whole, cache, lengths = model(tokens), KeyValueCache(config.context_length), torch.tensor([7, 5, 3])
    first = model(tokens[:, :7], cache.at(torch.arange(7).expand(3, 7)))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], whole[row, :length], atol=1e-5, rtol=1e-5)
    for further in range(5):
        places = (lengths + further).unsqueeze(1)
        found = model(tokens.gather(1, places), cache.at(places))[:, 0]
        torch.testing.assert_close(found, whole[torch.arange(3), places[:, 0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moe", [None, ExpertsConfig(num_experts=4, num_active_experts=2, capacity_factor=0.8)])
def test_compiled_code_computes_the_same(moe: ExpertsConfig | None) -> None:
    """Traced and differentiated as for a GPU, in one graph, but without making kernels."""
    torch._dynamo.reset()
    model = random_model(replace(TINY, **{**STACKS[0], "feed_forward": "swiglu", "moe": moe})).train()
    tokens = random_tokens(TINY)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        logits = forward(tokens)
        logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[0], results[1])


# --- dropout and recomputation -------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout_acts_in_training_alone() -> None:
    tokens = random_tokens(TINY)
    dropping, plain = random_model(replace(TINY, drop_rate=0.5)), random_model(TINY)
    assert torch.equal(dropping(tokens), plain(tokens))
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))
    dropping.train()
    assert not torch.equal(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize(
    "silenced",
    [
        ("att.out_proj", "ff.layers.2"),  # leaves the embeddings' dropout
        ("tok_emb", "pos_emb", "ff.layers.2"),  # leaves the attention branch's
        ("tok_emb", "pos_emb", "att.out_proj"),  # leaves the feed-forward branch's
    ],
)
@torch.no_grad()
def test_dropout_acts_in_each_place(silenced: tuple[str, ...]) -> None:
    model = random_model(replace(TINY, drop_rate=0.5)).train()
    for name, parameter in model.named_parameters():
        if any(part in name for part in silenced):
            parameter.zero_()
    tokens = random_tokens(TINY)
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("change", [{}, *STACKS], ids=str)
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(drop_rate: float, change: dict[str, Any]) -> None:
    config = replace(TINY, drop_rate=drop_rate, **change)
    tokens = random_tokens(config)
    results = []
    for checkpointing in (False, True):
        model = random_model(config, activation_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        model(tokens).square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


@pytest.mark.parametrize("change", [*TOGGLES, *INTERVENTIONS, *STACKS], ids=str)
def test_every_parameter_gets_a_gradient(change: dict[str, Any]) -> None:
    model = random_model(replace(TINY, **change)).train()
    model(random_tokens(TINY)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a query alike, so its gradient is zero.
        assert name.endswith("W_key.bias") or (parameter.grad.abs() > 1e-6).any(), name


# --- names ---------------------------------------------------------------------------------------------------


def documented_names(config: ModelConfig) -> set[str]:
    names = {"tok_emb.weight", "pos_emb.weight", "final_norm.scale", "final_norm.shift"}
    names |= set() if config.tie_weights else {"out_head.weight"}
    names -= {"pos_emb.weight"} if config.positions == "rotary" else set()
    for block in (f"trf_blocks.{number}" for number in range(config.n_layers)):
        names |= {f"{block}.{norm}.{part}" for norm in ("norm1", "norm2") for part in ("scale", "shift")}
        experts = range(config.moe.num_experts) if config.moe else None
        forwards = [f"{block}.ff"] if experts is None else [f"{block}.ff.experts.{number}" for number in experts]
        names |= {f"{block}.ff.router.weight"} if config.moe else set()
        gates = ("gate",) if config.feed_forward == "swiglu" else ()
        layers = [f"{forward}.{layer}" for forward in forwards for layer in ("layers.0", "layers.2", *gates)]
        names |= {f"{layer}.{part}" for layer in (f"{block}.att.out_proj", *layers) for part in ("weight", "bias")}
        parts = ("weight", "bias") if config.qkv_bias else ("weight",)
        names |= {f"{block}.att.W_{which}.{part}" for which in ("query", "key", "value") for part in parts}
        names |= {f"{block}.att.value_mix"} if config.value_residual and block != "trf_blocks.0" else set()
    if config.norm == "rms" or not config.bias:
        names = {name for name in names if not name.endswith(".shift")}
    return names if config.bias else {name for name in names if not name.endswith(".bias")}


@pytest.mark.parametrize("change", [*TOGGLES, *INTERVENTIONS, *STACKS], ids=str)
def test_state_dict_has_the_documented_names_and_nothing_else(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model = GPTModel(config)
    assert set(model.state_dict()) == documented_names(config)
    assert {name for name, _ in model.named_parameters()} == documented_names(config)
    assert list(model.buffers()) == []


def test_tied_model_stores_the_matrix_once(tmp_path: Path) -> None:
    model = random_model(replace(TINY, tie_weights=True))
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    shapes = [tuple(value.shape) for value in model.state_dict().values()]
    assert shapes.count((61, 24)) == 1


# --- loading -------------------------------------------------------------------------------------------------


def refused(model: GPTModel, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Load weights that must be refused, and leave the model as it was; give the error's lines."""
    before = fingerprint(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tensors, "a/model.safetensors")
    assert caught.value.exit_status == 4
    assert all(line.startswith("a/model.safetensors: ") for line in caught.value.lines)
    assert fingerprint(model) == before
    return caught.value.lines


@pytest.mark.parametrize("change", TOGGLES)
def test_weights_come_back_as_they_were(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model, copy = random_model(config, seed=1), random_model(config, seed=2)
    assert fingerprint(model) != fingerprint(copy)
    load_weights(copy, model.state_dict(), "file")
    assert fingerprint(model) == fingerprint(copy)


def test_published_masks_are_ignored() -> None:
    model, copy = random_model(TINY, seed=1), random_model(TINY, seed=2)
    masks = {f"trf_blocks.{number}.att.mask": torch.ones(12, 12).triu(1) for number in range(2)}
    load_weights(copy, {**model.state_dict(), **masks}, "file")
    assert fingerprint(model) == fingerprint(copy)
    for name in ("trf_blocks.0.mask", "mask", "trf_blocks.0.att.mask2"):
        assert name in refused(copy, {**model.state_dict(), name: torch.ones(2)})[0]


@pytest.mark.parametrize("names", [("tok_emb.weight",), ("out_head.weight",), ("tok_emb.weight", "out_head.weight")])
def test_tied_matrix_is_read_under_either_name(names: tuple[str, ...]) -> None:
    config = replace(TINY, tie_weights=True)
    model, copy = random_model(config, seed=1), random_model(config, seed=2)
    tensors = model.state_dict()
    matrix = tensors.pop("tok_emb.weight")
    load_weights(copy, tensors | dict.fromkeys(names, matrix), "file")
    assert fingerprint(model) == fingerprint(copy)


def test_differing_head_is_refused_by_a_tied_model() -> None:
    model = random_model(replace(TINY, tie_weights=True))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["out_head.weight"] = tensors["tok_emb.weight"].clone()
    tensors["out_head.weight"][60, 23] += 1e-3
    (line,) = refused(model, tensors)
    assert "tie_weights" in line


def test_missing_head_is_refused_by_an_untied_model() -> None:
    tensors = dict(random_model(TINY).state_dict())
    del tensors["out_head.weight"]
    (line,) = refused(random_model(TINY, seed=2), tensors)
    assert "missing tensor out_head.weight" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("final_norm.shift"), "missing tensor final_norm.shift"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (
            lambda t: t.update({"pos_emb.weight": torch.zeros(13, 24)}),
            "pos_emb.weight: found shape (13, 24), wanted (12, 24)",
        ),
        (
            lambda t: t.update({"tok_emb.weight": torch.zeros(61)}),
            "tok_emb.weight: found shape (61,), wanted (61, 24)",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_named(change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    tensors = dict(random_model(TINY).state_dict())
    change(tensors)
    (line,) = refused(random_model(TINY, seed=2), tensors)
    assert line == f"a/model.safetensors: {words}"


def test_many_problems_are_counted_and_not_all_listed() -> None:
    lines = refused(random_model(replace(TINY, n_layers=20)), dict(random_model(TINY).state_dict()))
    assert len(lines) <= 5
    assert "more" in lines[-1]


def test_fingerprint_follows_names_shapes_and_values() -> None:
    prints = {fingerprint(random_model(replace(TINY, **change))) for change in TOGGLES}
    model = random_model(TINY)
    with torch.no_grad():
        model.final_norm.shift[5] += 1e-6
    assert len(prints | {fingerprint(model)}) == 5
    assert fingerprint(random_model(TINY)) in prints


@pytest.fixture
def model_json(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    values = {"vocab_size": 61, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    path.write_text(json.dumps({**values, "drop_rate": 0.5, "qkv_bias": False}))
    return path


@torch.no_grad()
def test_model_is_opened_for_evaluation(tmp_path: Path, model_json: Path) -> None:
    model = random_model(TINY)
    half = {name: value.bfloat16() for name, value in model.state_dict().items()}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(half, tmp_path / "half.safetensors")
    opened = load_model(model_json, tmp_path / "model.safetensors")
    assert not opened.training
    assert fingerprint(opened) == fingerprint(model)
    tokens = random_tokens(TINY)
    assert torch.equal(opened(tokens), model(tokens))
    from_half = load_model(model_json, tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in from_half.parameters()} == {torch.float32}


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "a pickle", "a folder"])
def test_damaged_weights_are_refused(tmp_path: Path, model_json: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    if damage == "a pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        save_file(random_model(TINY).state_dict(), path)
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError) as caught:
        load_model(model_json, path)
    assert len(caught.value.lines) == 1
    assert str(path) in caught.value.lines[0]


def test_bad_configuration_is_refused_before_the_weights(tmp_path: Path, model_json: Path) -> None:
    model_json.write_text("{}")
    with pytest.raises(ConfigError):
        load_model(model_json, tmp_path / "missing.safetensors")


def test_empty_model_is_complete_once_it_is_initialised() -> None:
    empty, plain = uninitialized_model(TINY), GPTModel(TINY)
    for model in (empty, plain):
        initialise(model, 42)
    assert fingerprint(empty) == fingerprint(plain)
    assert {parameter.device.type for parameter in empty.parameters()} == {"cpu"}
