"""GPT-2 as Hugging Face stores it and as the harness does: names, layouts and configurations, both ways.

Hugging Face keeps a linear layer's weight as (in, out), the transpose of ours, and query, key and value side by side
in one matrix `c_attn`. Values are moved, never computed with, so a round trip is exact to the bit.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.opening import require_tensors
from harness.run.config import ModelConfig, config_from
from harness.run.errors import CheckpointError, ConfigError
from harness.run.strict_json import read_strict_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
MAX_JSON_BYTES = 2**24  # an index names every tensor, a configuration may name many labels
PREFIX = "transformer."
HEAD = "lm_head.weight"
# Causal masks that older versions stored with every block.
STORED_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
# The values of each key that this model computes, the first one being the default; any other value is refused.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "relu2"),  # the first two are names of one formula
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
OUTSIDE = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
}
LINEAR = {"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
PROJECTIONS = ("W_query", "W_key", "W_value")


def _renamed(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield the tensors that only change their name: our name, GPT-2's, and whether the value is transposed."""
    for ours, theirs in OUTSIDE.items():
        yield ours, theirs, False
    for number in range(config.n_layers):
        block, other = f"trf_blocks.{number}", f"h.{number}"
        for ours, theirs in NORMS.items():
            yield f"{block}.{ours}.scale", f"{other}.{theirs}.weight", False
            yield f"{block}.{ours}.shift", f"{other}.{theirs}.bias", False
        for ours, theirs in LINEAR.items():
            yield f"{block}.{ours}.weight", f"{other}.{theirs}.weight", True
            yield f"{block}.{ours}.bias", f"{other}.{theirs}.bias", False


def to_hugging_face(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's state dict under the names and in the layout of GPT2LMHeadModel.

    Layers and norms without bias get zeros, because GPT-2 always has one. A tied head is left out.
    """
    found, shapes = {}, _shapes(config)
    for ours, theirs, is_transposed in _renamed(config):
        value = tensors[ours] if ours in tensors else torch.zeros(shapes[theirs])
        found[PREFIX + theirs] = value.t().contiguous() if is_transposed else value
    for number in range(config.n_layers):
        parts = [f"trf_blocks.{number}.att.{name}" for name in PROJECTIONS]
        fused = f"{PREFIX}h.{number}.attn.c_attn"
        found[f"{fused}.weight"] = torch.cat([tensors[f"{part}.weight"] for part in parts]).t().contiguous()
        found[f"{fused}.bias"] = (
            torch.cat([tensors[f"{part}.bias"] for part in parts])
            if config.qkv_bias
            else torch.zeros(3 * config.emb_dim)
        )
    if not config.tie_weights:
        found[HEAD] = tensors["out_head.weight"]
    return found


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: ModelConfig, source: object
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Return GPT-2's tensors, with or without the prefix `transformer.`, under our names, float32.

    Returns the configuration too, with bias or qkv_bias off where every such bias is zero, which computes the same.
    Raises CheckpointError naming what is missing, unknown or of another shape.
    """
    stripped = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    theirs_named = {name: value for name, value in stripped.items() if not STORED_MASK.fullmatch(name)}
    if config.tie_weights and HEAD in theirs_named:
        head = theirs_named.pop(HEAD)
        if "wte.weight" in theirs_named and not torch.equal(head, theirs_named["wte.weight"]):
            raise CheckpointError(
                f"{source}: {HEAD}: found other values than in wte.weight, wanted equal ones "
                "(config.json: tie_word_embeddings is true)"
            )
    require_tensors(theirs_named, _shapes(config), source)
    found = {}
    for ours, theirs, is_transposed in _renamed(config):
        value = theirs_named[theirs].float()
        found[ours] = value.t().contiguous() if is_transposed else value
    biases = [theirs_named[f"h.{number}.attn.c_attn.bias"] for number in range(config.n_layers)]
    config = replace(config, qkv_bias=any(bool(bias.any()) for bias in biases))
    for number, fused_bias in enumerate(biases):
        weights = theirs_named[f"h.{number}.attn.c_attn.weight"].float().t().chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, fused_bias.float().chunk(3), strict=True):
            found[f"trf_blocks.{number}.att.{name}.weight"] = weight.contiguous()
            if config.qkv_bias:
                found[f"trf_blocks.{number}.att.{name}.bias"] = bias.contiguous()
    if not config.tie_weights:
        found["out_head.weight"] = theirs_named[HEAD].float()
    added = [name for name in found if name.endswith((".bias", ".shift"))]
    if not any(bool(found[name].any()) for name in added):
        config = replace(config, bias=False)
        found = {name: value for name, value in found.items() if name not in added}
    return found, config


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a GPT-2 of this configuration, by its name without the prefix."""
    width = config.emb_dim
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.context_length, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    layers = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    layers |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    for number in range(config.n_layers):
        shapes |= {f"h.{number}.{norm}.{part}": (width,) for norm in NORMS.values() for part in ("weight", "bias")}
        for layer, (inputs, outputs) in layers.items():
            shapes |= {f"h.{number}.{layer}.weight": (inputs, outputs), f"h.{number}.{layer}.bias": (outputs,)}
    return shapes if config.tie_weights else {**shapes, HEAD: (config.vocab_size, width)}


def read_config(path: Path) -> ModelConfig:
    """Read a GPT-2 `config.json`; raises ConfigError with one line for each key that this model cannot follow.

    qkv_bias is true, as GPT-2 has it. Dropout is that of the residual branches.
    """
    document = read_strict_json(path, MAX_JSON_BYTES)
    if "model_type" not in document:
        raise ConfigError(f"{path}: model_type: missing, wanted gpt2")
    problems = [
        f"{path}: {key}: found {str(document[key])[:80]!r}, wanted {' or '.join(map(str, wanted))}"
        for key, wanted in COMPUTED.items()
        if key in document and document[key] not in wanted
    ]
    if problems and document["model_type"] != "gpt2":
        raise ConfigError(problems[0])  # of another architecture, the other keys mean something else
    width, inner = document.get("n_embd"), document.get("n_inner")
    if inner is not None and isinstance(width, int) and inner != 4 * width:
        problems.append(f"{path}: n_inner: found {inner}, wanted {4 * width} (4 x n_embd)")
    shape = {ours: document[theirs] for ours, theirs in MODEL_KEYS.items() if theirs in document}
    drop_rate = document.get("resid_pdrop", 0.1)
    tie_weights = document.get("tie_word_embeddings", True)
    feed_forward = "relu_squared" if document.get("activation_function") == "relu2" else "gelu"
    values = {
        **shape, "drop_rate": drop_rate, "qkv_bias": True, "tie_weights": tie_weights, "feed_forward": feed_forward
    }  # fmt: skip
    try:
        config = config_from(ModelConfig, values, path)
    except ConfigError as error:
        renamed = {**MODEL_KEYS, "drop_rate": "resid_pdrop", "tie_weights": "tie_word_embeddings"}
        problems += [
            re.sub(rf"^({re.escape(str(path))}: )(\w+)", lambda m: m[1] + renamed.get(m[2], m[2]), line)
            for line in error.lines
        ]
    if problems:
        raise ConfigError(*problems)
    return config


def config_document(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """Return the `config.json` of a stock GPT2LMHeadModel; `end_of_text` is the id that begins and ends texts."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in MODEL_KEYS.items()},
        "n_ctx": config.context_length,  # its older name, which llama.cpp's converter reads
        "n_inner": None,
        **{key: wanted[0] for key, wanted in COMPUTED.items() if key not in ("model_type", "quantization_config")},
        "activation_function": "relu2" if config.feed_forward == "relu_squared" else "gelu_new",
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.drop_rate),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def weight_files(folder: Path) -> list[Path]:
    """Find a folder's safetensors files, one or several with an index; raises CheckpointError. Pickle is not read."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in files_of_index(folder / INDEX_FILE)]
    if (folder / PICKLE_FILE).is_file() or list(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: found {PICKLE_FILE}, a pickle that can run any code, wanted {WEIGHTS_FILE} "
            "(load it with transformers where you trust it, and save_pretrained writes one)"
        )
    raise CheckpointError(f"{folder}: found no {WEIGHTS_FILE} and no {INDEX_FILE}, wanted either")


def files_of_index(path: Path) -> list[str]:
    """Return the names of the files that a weights index lists, in order; raises CheckpointError."""
    weight_map = read_strict_json(path, MAX_JSON_BYTES).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{path}: weight_map: found {str(names)[:80]}, wanted names of safetensors files beside it"
        )
    return names
