"""Modern shapes as architectures of transformers: the same logits and the same greedy text, there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exchange.architectures import architecture_of, config_document, from_hugging_face, read_config, to_hugging_face
from harness.run.config import ExpertsConfig, ModelConfig
from harness.run.errors import CheckpointError, ConfigError
from model import GPTModel, uninitialized_model
from tests.test_model import TINY, random_model, random_tokens

transformers = pytest.importorskip("transformers")

ROTARY: dict[str, Any] = {"positions": "rotary", "norm": "rms"}
QK: dict[str, Any] = {**ROTARY, "qk_norm": True, "bias": False}
MOE = ExpertsConfig(num_experts=4, num_active_experts=2)
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"bias": False}, "GPT2LMHeadModel"),
    ({"feed_forward": "relu_squared", "tie_weights": True}, "GPT2LMHeadModel"),
    ({**ROTARY, "feed_forward": "swiglu", "bias": False}, "LlamaForCausalLM"),
    ({**ROTARY, "feed_forward": "swiglu", "qkv_bias": True, "tie_weights": True}, "LlamaForCausalLM"),
    ({**ROTARY, "feed_forward": "swiglu", "bias": False, "moe": MOE, "tie_weights": True}, "MixtralForCausalLM"),
    ({**ROTARY, "feed_forward": "relu_squared"}, "ArceeForCausalLM"),
    ({**ROTARY, "bias": False, "init": "torch"}, "ArceeForCausalLM"),
    ({**QK, "feed_forward": "swiglu", "tie_weights": True}, "Qwen3ForCausalLM"),
    ({**QK, "feed_forward": "relu_squared", "embedding_norm": True, "logit_softcap": 15.0}, "NanoChatForCausalLM"),
    ({**QK, "feed_forward": "gelu", "embedding_norm": True}, "NanoChatForCausalLM"),
]


def exported(model: GPTModel, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config_document(model.config, None)))
    save_file(to_hugging_face(model.state_dict(), model.config), folder / "model.safetensors", {"format": "pt"})
    return folder


def long(change: dict[str, Any]) -> ModelConfig:
    return replace(TINY, context_length=96, **change)


@pytest.mark.parametrize(("change", "architecture"), SHAPES, ids=str)
@torch.no_grad()
def test_transformers_computes_the_same(
    change: dict[str, Any], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = random_model(long(change))
    assert architecture_of(model.config, "model.json") == architecture
    folder = exported(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(model.config)
    logits = model(tokens)
    torch.testing.assert_close(theirs.eval()(tokens).logits, logits, atol=2e-5, rtol=1e-5)
    found = theirs.generate(tokens[:1, :9], max_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = tokens[:1, :9]
    for _ in range(20):
        ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ours)


@pytest.mark.parametrize(("change", "architecture"), SHAPES, ids=str)
@torch.no_grad()
def test_what_was_written_is_read_back(change: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    model = random_model(long(change))
    folder = exported(model, tmp_path)
    theirs = to_hugging_face(model.state_dict(), model.config)
    tensors, config = from_hugging_face(theirs, read_config(folder / "config.json"), folder)
    assert config == replace(model.config, init="gpt2")
    back = uninitialized_model(config)
    back.load_state_dict(tensors)
    if architecture == "NanoChatForCausalLM":  # scales are in the matrices now
        tokens = random_tokens(config)
        torch.testing.assert_close(back(tokens), model(tokens), atol=2e-5, rtol=1e-5)
    else:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"value_residual": True}, "value_residual"),
        ({"qk_norm": True}, "qk_norm"),
        ({"positions": "rotary"}, "positions"),
        ({"positions": "rotary", "feed_forward": "swiglu"}, "norm"),
        ({"feed_forward": "swiglu"}, "feed_forward"),
        ({"moe": MOE}, "moe"),
        ({**ROTARY, "feed_forward": "swiglu", "value_residual": True}, "value_residual"),
        ({**ROTARY, "feed_forward": "swiglu", "logit_softcap": 15.0}, "logit_softcap"),
        ({**QK, "feed_forward": "relu_squared", "embedding_norm": True, "tie_weights": True}, "tie_weights"),
    ],
    ids=str,
)
def test_what_no_architecture_holds_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        architecture_of(replace(TINY, **change), "model.json")
    (line,) = caught.value.lines
    assert line.startswith(f"model.json: {key}: found ")
    assert "cannot hold" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 1), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("rms_norm_eps", 1e-6), ("intermediate_size", 100), ("hidden_act", "gelu"), ("mlp_bias", False),
        ("hidden_size", 25), ("head_dim", 16), ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("quantization_config", {"bits": 4}),
    ],
)  # fmt: skip
def test_what_this_model_cannot_follow_is_named(tmp_path: Path, key: str, value: object) -> None:
    document = config_document(long({**ROTARY, "feed_forward": "swiglu"}), None)
    (tmp_path / "config.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert any(line.startswith(f"{tmp_path / 'config.json'}: {key}: found") for line in caught.value.lines)


def test_learned_scales_of_queries_are_refused() -> None:
    model = random_model(long({**QK, "feed_forward": "swiglu"}))
    tensors = to_hugging_face(model.state_dict(), model.config)
    tensors["model.layers.1.self_attn.k_norm.weight"][3] = 1.5
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight"):
        from_hugging_face(tensors, model.config, "there")
