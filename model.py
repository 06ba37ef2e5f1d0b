"""The GPT and its toggles, and the functions with which every command loads a model.

Shapes in comments: B batch, T positions, C channels (emb_dim), H heads, D head size, V vocabulary. Module names are
those of the published checkpoints, so a state dict is saved and loaded without renaming.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.engine.key_value_cache import KeyValueCache
from harness.engine.opening import Weights, open_weights
from harness.run.config import ModelConfig, load_model_config
from harness.run.errors import CheckpointError
from harness.tokens.randomness import initial_normal

INITIAL_STD = 0.02  # GPT-2's; small enough that a tied head starts at a loss near ln(V)
HEAD = "out_head.weight"
TOKEN_EMBEDDING = "tok_emb.weight"
# The published checkpoints store each block's causal mask, which is a constant.
STORED_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")


class LayerNorm(nn.Module):
    """Normalise over channels, eps 1e-5, with a learned scale and shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.emb_dim
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.W_query = nn.Linear(width, width, bias=config.qkv_bias)
        self.W_key = nn.Linear(width, width, bias=config.qkv_bias)
        self.W_value = nn.Linear(width, width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the attention output (B, T, C) for x (B, T, C); each position sees itself and those before it."""
        # One matrix product for all three reads x once, and under autocast converts it to half precision once.
        projections = (self.W_query, self.W_key, self.W_value)
        weight = torch.cat([projection.weight for projection in projections])
        bias = None if self.W_query.bias is None else torch.cat([projection.bias for projection in projections])
        projected = F.linear(x, weight, bias).view(*x.shape[:-1], 3, self.n_heads, -1)  # (B, T, 3, H, D)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        visible = None
        if cache is not None:
            key, value, visible = cache.extend(self, key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=self.drop_rate if self.training else 0.0,
            is_causal=visible is None,
        )
        joined: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, T, C)
        return joined


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of 4C and the tanh approximation of GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.emb_dim
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position of x (B, T, C) independently."""
        y: Tensor = self.layers(x)
        return y


class Block(nn.Module):
    """A pre-LayerNorm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.emb_dim)
        self.att = Attention(config)
        self.norm2 = LayerNorm(config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Add both branches to the residual stream x (B, T, C)."""
        attended: Tensor = x + self.dropout(self.att(self.norm1(x), cache))
        transformed: Tensor = attended + self.dropout(self.ff(self.norm2(attended)))
        return transformed


class GPTModel(nn.Module):
    """A GPT-2-style language model.

    Make it with `uninitialized_model`, and set its parameters with `initialise` or `load_weights`.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.dropout = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.emb_dim)
        # A tied model has no head module, so the shared matrix is one parameter and is stored once.
        self.out_head = None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T), where T is at most the context length.

        With a cache, the tokens continue those of earlier calls and attend to them; for evaluation only.
        """
        return F.linear(self.hidden_states(tokens, cache), self.head_weight())

    def head_weight(self) -> Tensor:
        """Return the output head's matrix (V, C), which a tied model shares with the token embedding."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def hidden_states(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the final hidden states (B, T, C), the input of the output head, for token ids (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.positions
        x = self.dropout(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, C)
        for block in self.trf_blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        normalised: Tensor = self.final_norm(x)
        return normalised


def uninitialized_model(config: ModelConfig, activation_checkpointing: bool = False) -> GPTModel:
    """Return a model on the CPU whose parameters are unset, which skips PyTorch's slow default initialisation."""
    with torch.device("meta"):
        model = GPTModel(config, activation_checkpointing)
    return model.to_empty(device="cpu")


def initialise(model: GPTModel, init_seed: int) -> None:
    """Set every parameter to its initial value, which depends only on init_seed, the parameter's name and its shape.

    As in GPT-2, matrices and embeddings are N(0, 0.02) and biases 0. The two projections into the residual stream are
    divided by sqrt(2 x (block + 1)), so that the stream's variance does not grow with depth (Zhang et al. 2019,
    arXiv:1908.11365). GPT-2 divides all by sqrt(2 x blocks), which would make a block's values depend on the number
    of blocks.
    """

    def set_initial_value(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        shape = tuple(parameter.shape)
        if name.endswith((".bias", ".shift")):
            parameter.data.zero_()
        elif name.endswith(".scale"):
            parameter.data.fill_(1.0)
        elif name.endswith(".weight") and len(shape) == 2:
            std = INITIAL_STD / _residual_divisor(name)
            parameter.data.copy_(initial_normal(init_seed, name, shape, std))
        else:
            raise ValueError(f"parameter {name} {shape} has no rule for its initial value")

    with ThreadPoolExecutor() as pool:  # values are independent, so order does not matter
        list(pool.map(set_initial_value, model.named_parameters()))


def _residual_divisor(name: str) -> float:
    projection = re.fullmatch(r"trf_blocks\.(\d+)\.(?:att\.out_proj|ff\.layers\.2)\.weight", name)
    return math.sqrt(2 * (int(projection[1]) + 1)) if projection else 1.0


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters: names, shapes and float32 values in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: GPTModel, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy `tensors` into the model; raises CheckpointError naming missing, unknown and misshapen tensors.

    Stored causal masks are ignored, and a tied model's shared matrix may have either of its names.
    """
    found = {name: value for name, value in tensors.items() if not STORED_MASK.fullmatch(name)}
    if model.out_head is None and HEAD in found:
        head = found.pop(HEAD)
        if not torch.equal(found.setdefault(TOKEN_EMBEDDING, head), head):
            raise CheckpointError(
                f"{source}: found an output head that differs from the token embedding, "
                "wanted one shared matrix (model.json: tie_weights is true)"
            )
    wanted = model.state_dict()
    problems = [f"{source}: missing tensor {name}" for name in wanted.keys() - found.keys()]
    problems += [f"{source}: unknown tensor {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{source}: {name}: found shape {tuple(found[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    problems += [
        f"{source}: {name}: found type {str(value.dtype).removeprefix('torch.')}, wanted floating point"
        for name, value in found.items()
        if not value.is_floating_point()
    ]
    if problems:
        shown = sorted(problems)[:3]
        more = [f"{source}: {len(problems) - 3} more like these"] if len(problems) > 3 else []
        raise CheckpointError(*shown, *more)
    model.load_state_dict(found)


def load_model(model_json: str | Path, safetensors_file: str | Path, device: torch.device) -> GPTModel:
    """Load a trained model for evaluation: float32, on `device`, dropout off.

    Raises ConfigError for the configuration and CheckpointError for the weights.
    """
    return model_of(load_model_config(model_json), open_weights(Path(safetensors_file)), device)


def model_of(config: ModelConfig, weights: Weights, device: torch.device) -> GPTModel:
    """Return the model with these weights, for evaluation as by `load_model`; raises CheckpointError."""
    model = uninitialized_model(config)
    load_weights(model, weights.tensors, weights.path)
    return model.to(device).eval()
