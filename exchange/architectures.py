"""Which architecture of `transformers` holds a model exactly, and the way there and back.

A GPT-2 shape is a GPT2LMHeadModel (`hugging_face.py`). With rotary positions and RMS norms a model is one of those in
LAYOUTS, whose tensors only change their names, but for NanoChat: its norms have no scales, so that ours go into the
columns of the matrices that follow, and it turns heads the other way round, so that the halves of each are swapped.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exchange import hugging_face
from exchange.hugging_face import MAX_JSON_BYTES
from harness.engine.opening import require_tensors
from harness.run.config import ModelConfig, config_from
from harness.run.errors import CheckpointError, ConfigError
from harness.run.keys import came_later, changes_nothing
from harness.run.model_size import feed_forward_width
from harness.run.strict_json import read_strict_json, shown

GPT2 = "GPT2LMHeadModel"
ANY = None
# The values of a key of model.json that an architecture holds. A key that came later and is not here is held at its
# default alone; initial weights are no part of a trained model.
ROTARY: dict[str, tuple[Any, ...] | None] = {"positions": ("rotary",), "norm": ("rms",), "init": ANY, "bias": ANY}
HOLDS = {
    GPT2: {"feed_forward": ("gelu", "relu_squared"), "init": ANY, "bias": ANY},
    "LlamaForCausalLM": {**ROTARY, "feed_forward": ("swiglu",)},
    "MixtralForCausalLM": {**ROTARY, "feed_forward": ("swiglu",), "bias": (False,), "moe": ANY},
    "ArceeForCausalLM": {**ROTARY, "feed_forward": ("gelu", "relu_squared")},
    "Qwen3ForCausalLM": {**ROTARY, "feed_forward": ("swiglu",), "qk_norm": (True,), "bias": (False,)},
    "NanoChatForCausalLM": {
        **ROTARY, "feed_forward": ("gelu", "relu_squared"), "qk_norm": (True,), "embedding_norm": (True,),
        "logit_softcap": ANY, "bias": (False,), "tie_weights": (False,),
    },
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "relu_squared": "relu2", "swiglu": "silu"}
MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "tie_weights": "tie_word_embeddings",
    "drop_rate": "attention_dropout",  # the only one they have; it acts in training alone
}
MOE_KEYS = {"num_experts": "num_local_experts", "num_active_experts": "num_experts_per_tok"}
ATTENTION = {
    "att.W_query": "self_attn.q_proj",
    "att.W_key": "self_attn.k_proj",
    "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj",
}
NORMS = {"norm1.scale": "input_layernorm.weight", "norm2.scale": "post_attention_layernorm.weight"}
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
# Our norms, and the layers that read what they give.
READERS = {"norm1": ("att.W_query", "att.W_key", "att.W_value"), "norm2": ("ff.layers.0",)}
ROPE_THETA = 10000.0
# Keys that are not written, and what they must say where others wrote them.
LEFT_OUT = {
    "rope_theta": ROPE_THETA, "rope_scaling": None, "quantization_config": None, "use_sliding_window": False,
    "sliding_window": None,
}  # fmt: skip
TURNED = re.compile(r"trf_blocks\.\d+\.att\.W_(?:query|key)\.weight")
COMPUTED_BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Layout:
    """How an architecture with rotary positions names what others do not."""

    name: str
    """Its class in transformers, a key of HOLDS."""
    feed_forward: dict[str, str]
    """Our names of its layers, and theirs; of a mixture of experts with a place for the expert's number."""
    has_norm_scales: bool = True
    has_qk_scales: bool = False


LAYOUTS = {
    "llama": Layout(
        "LlamaForCausalLM", {"ff.layers.0": "mlp.up_proj", "ff.gate": "mlp.gate_proj", "ff.layers.2": "mlp.down_proj"}
    ),
    "mixtral": Layout(
        "MixtralForCausalLM",
        {
            "ff.router": "block_sparse_moe.gate",
            "ff.experts.{}.layers.0": "block_sparse_moe.experts.{}.w3",
            "ff.experts.{}.gate": "block_sparse_moe.experts.{}.w1",
            "ff.experts.{}.layers.2": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "arcee": Layout("ArceeForCausalLM", {"ff.layers.0": "mlp.up_proj", "ff.layers.2": "mlp.down_proj"}),
    "qwen3": Layout(
        "Qwen3ForCausalLM",
        {"ff.layers.0": "mlp.up_proj", "ff.gate": "mlp.gate_proj", "ff.layers.2": "mlp.down_proj"},
        has_qk_scales=True,
    ),
    "nanochat": Layout(
        "NanoChatForCausalLM", {"ff.layers.0": "mlp.fc1", "ff.layers.2": "mlp.fc2"}, has_norm_scales=False
    ),
}
MODEL_TYPES = {layout.name: kind for kind, layout in LAYOUTS.items()}


def architecture_of(config: ModelConfig, source: object) -> str:
    """Return the class of transformers that holds this model.

    Raises ConfigError where none does, with a line for each key that keeps the nearest one from it.
    """
    missing = {name: _not_held(config, holds) for name, holds in HOLDS.items()}
    name = min(missing, key=lambda name: len(missing[name]))
    if missing[name]:
        values = asdict(config)
        raise ConfigError(
            *(f"{source}: {key}: found {shown(values[key])}, which {name} cannot hold" for key in missing[name])
        )
    return name


def _not_held(config: ModelConfig, holds: Mapping[str, tuple[Any, ...] | None]) -> list[str]:
    kind = type(config)

    def is_held(item: Any) -> bool:
        value = getattr(config, item.name)
        if item.name in holds:
            allowed = holds[item.name]
            return allowed is ANY or value in allowed
        return not came_later(kind, item.name) or changes_nothing(kind, item, value)

    return [item.name for item in fields(config) if not is_held(item)]


def _layout_of(config: ModelConfig) -> Layout | None:
    """Return the layout of a model that some architecture holds; None for GPT-2's."""
    name = architecture_of(config, "model.json")
    return None if name == GPT2 else LAYOUTS[MODEL_TYPES[name]]


def to_hugging_face(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's state dict under the names and in the layout of the architecture that holds it."""
    layout = _layout_of(config)
    if layout is None:
        return hugging_face.to_hugging_face(tensors, config)
    if not layout.has_norm_scales:
        tensors = _turned(_without_norm_scales(tensors, config), config)
    # Query, key and value have a bias there where the output has one.
    found = {
        theirs: tensors[ours] if ours in tensors else torch.zeros(config.emb_dim)
        for ours, theirs in _renamed(layout, config)
    }
    return found | {name: torch.ones(config.emb_dim // config.n_heads) for name in _qk_scales(layout, config)}


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: ModelConfig, source: object
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Return an architecture's tensors under our names, float32, and the configuration without biases that are zero.

    Raises CheckpointError naming what is missing, unknown or of another shape.
    """
    layout = _layout_of(config)
    if layout is None:
        return hugging_face.from_hugging_face(tensors, config, source)
    named = {name: value for name, value in tensors.items() if not COMPUTED_BUFFER.fullmatch(name)}
    if config.tie_weights:
        named.pop("lm_head.weight", None)
    names = dict(_renamed(layout, config))
    scales = list(_qk_scales(layout, config))
    shapes = {theirs: _shape(ours, config) for ours, theirs in names.items()}
    require_tensors(named, shapes | dict.fromkeys(scales, (config.emb_dim // config.n_heads,)), source)
    for name in scales:
        if not (named[name] == 1).all():
            raise CheckpointError(f"{source}: {name}: found learned scales, wanted ones, which change nothing")
    ours = {ours: named[theirs].float() for ours, theirs in names.items()}
    biases = [name for name in ours if re.search(r"att\.W_\w+\.bias", name)]
    if not any(bool(ours[name].any()) for name in biases):
        config = replace(config, qkv_bias=False)
        ours = {name: value for name, value in ours.items() if name not in biases}
    if not layout.has_norm_scales:
        norms = [f"trf_blocks.{number}.{norm}.scale" for number in range(config.n_layers) for norm in READERS]
        ours = _turned(ours, config) | {name: torch.ones(config.emb_dim) for name in (*norms, "final_norm.scale")}
    return ours, config


def _renamed(layout: Layout, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield every tensor of the architecture that one of ours becomes: our name and its name there."""
    yield "tok_emb.weight", "model.embed_tokens.weight"
    if not config.tie_weights:
        yield "out_head.weight", "lm_head.weight"
    if layout.has_norm_scales:
        yield "final_norm.scale", "model.norm.weight"
    for number in range(config.n_layers):
        block, other = f"trf_blocks.{number}", f"model.layers.{number}"
        for ours, theirs in (ATTENTION | _feed_forward(layout, config)).items():
            for part in ("weight", "bias") if config.bias else ("weight",):
                yield f"{block}.{ours}.{part}", f"{other}.{theirs}.{part}"
        for ours, theirs in NORMS.items() if layout.has_norm_scales else ():
            yield f"{block}.{ours}", f"{other}.{theirs}"


def _feed_forward(layout: Layout, config: ModelConfig) -> dict[str, str]:
    """Return our names of the layers of a feed-forward, or of all experts and their router, and theirs."""
    experts = range(1 if config.moe is None else config.moe.num_experts)
    return {ours.format(n): theirs.format(n) for n in experts for ours, theirs in layout.feed_forward.items()}


def _qk_scales(layout: Layout, config: ModelConfig) -> Iterator[str]:
    for number in range(config.n_layers if layout.has_qk_scales else 0):
        for name in QK_NORMS:
            yield f"model.layers.{number}.{name}"


def _shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of one of our tensors."""
    width, hidden = config.emb_dim, feed_forward_width(config)
    if name in ("tok_emb.weight", "out_head.weight"):
        return config.vocab_size, width
    if config.moe is not None and name.endswith("ff.router.weight"):
        return config.moe.num_experts, width
    outputs = hidden if re.search(r"\.ff\..*(layers\.0|gate)\.", name) else width
    if not name.endswith(".weight"):
        return (outputs,)
    return outputs, hidden if re.search(r"\.ff\..*layers\.2\.", name) else width


def _without_norm_scales(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Multiply the scale of each norm into the columns of the matrices that read it, in float64."""
    found = dict(tensors)

    def fold(norm: str, reader: str) -> None:
        scale = tensors[f"{norm}.scale"].double()
        found[f"{reader}.weight"] = (tensors[f"{reader}.weight"].double() * scale).float()

    for number in range(config.n_layers):
        for norm, readers in READERS.items():
            for reader in readers:
                fold(f"trf_blocks.{number}.{norm}", f"trf_blocks.{number}.{reader}")
    fold("final_norm", "out_head")
    return found


def _turned(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Swap the halves of every head's queries and keys, which makes a rotation one in the other direction."""

    def swapped(value: Tensor) -> Tensor:
        return value.view(config.n_heads, 2, -1, config.emb_dim).flip(1).reshape(value.shape)

    return {name: swapped(value) if TURNED.fullmatch(name) else value for name, value in tensors.items()}


def config_document(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Return the `config.json` of the architecture; `end_of_text` is the id that begins and ends texts."""
    layout = _layout_of(config)
    if layout is None:
        return hugging_face.config_document(config, end_of_text)
    kind = MODEL_TYPES[layout.name]
    capped = {"final_logit_softcapping": config.logit_softcap} if kind == "nanochat" else {}
    sparse = {} if config.moe is None else {theirs: getattr(config.moe, ours) for ours, theirs in MOE_KEYS.items()}
    return {
        "architectures": [layout.name],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in MODEL_KEYS.items()},
        "intermediate_size": feed_forward_width(config),
        "hidden_act": ACTIVATIONS[config.feed_forward],
        **_fixed(config, is_read=False),
        "attention_bias": config.bias,
        **({"mlp_bias": config.bias} if kind in ("llama", "arcee") else {}),
        **capped,
        **sparse,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": "float32",
    }


def _fixed(config: ModelConfig, is_read: bool = True) -> dict[str, Any]:
    """Return the keys of `config.json` that can have one value only, given the shape."""
    return {
        "num_key_value_heads": config.n_heads,
        "head_dim": config.emb_dim // config.n_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        **{key: value for key, value in LEFT_OUT.items() if is_read},
    }


def read_config(path: Path) -> ModelConfig:
    """Read a `config.json`; raises ConfigError with one line for each key that this model cannot follow."""
    document = read_strict_json(path, MAX_JSON_BYTES)
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        return hugging_face.read_config(path)
    layout = LAYOUTS[kind]
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    allowed = HOLDS[layout.name]["feed_forward"] or ()
    feed_forward = activations.get(document.get("hidden_act", ""))
    if feed_forward not in allowed:
        choices = " or ".join(ACTIVATIONS[name] for name in allowed)
        raise ConfigError(f"{path}: hidden_act: found {str(document.get('hidden_act'))[:80]!r}, wanted {choices}")
    bias = document.get("attention_bias", False)
    values = {
        **{ours: document[theirs] for ours, theirs in MODEL_KEYS.items() if theirs in document},
        **{"positions": "rotary", "norm": "rms", "feed_forward": feed_forward, "bias": bias, "qkv_bias": bias},
        "qk_norm": kind in ("qwen3", "nanochat"),
        "embedding_norm": kind == "nanochat",
        "logit_softcap": document.get("final_logit_softcapping", 15.0) if kind == "nanochat" else None,
    }
    if kind == "mixtral":
        values["moe"] = {ours: document.get(theirs) for ours, theirs in MOE_KEYS.items()}
    try:
        config = config_from(ModelConfig, {"drop_rate": 0.0, **values}, path)
    except ConfigError as error:
        raise ConfigError(*(_their_key(line, path) for line in error.lines)) from None
    architecture_of(config, path)
    wanted = {**_fixed(config), "intermediate_size": feed_forward_width(config)}
    wanted |= {"mlp_bias": bias} if kind in ("llama", "arcee") else {}
    # Of a key that is left out transformers takes a default, which for most is what is wanted here.
    left_out = {**wanted, "rms_norm_eps": 1e-6, "intermediate_size": "none", "mlp_bias": False}
    problems = [
        f"{path}: {key}: found {str(found)[:80]}, wanted {value}"
        for key, value in wanted.items()
        if (found := document.get(key, left_out[key])) != value
    ]
    if problems:
        raise ConfigError(*problems)
    return config


def _their_key(line: str, path: Path) -> str:
    """Return an error's line with a key of model.json called as config.json calls it."""
    where = f"{path}: "
    key, _, rest = line.removeprefix(where).partition(":")
    return f"{where}{MODEL_KEYS.get(key, key)}:{rest}"
