"""The GPT and its toggles, and the one way in which every command opens a model.

Shapes in comments: B batch, T positions, C channels (emb_dim), H heads, D head size, V vocabulary. Module names
are chosen so that the state dict is the file format: nothing is renamed on the way to disk or back.
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

from harness.engine.checkpoint import read_tensors
from harness.engine.key_value_cache import KeyValueCache
from harness.run.config import ModelConfig, load_model_config
from harness.run.errors import CheckpointError
from harness.tokens.randomness import initial_normal

INITIAL_STD = 0.02  # GPT-2's; small enough that a tied head starts at a loss near ln(V)
HEAD = "out_head.weight"
TOKEN_EMBEDDING = "tok_emb.weight"
# Causal masks that the published harness stored with every block; they hold no information.
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
        """Let every position of x (B, T, C) attend to itself and those before it; gives (B, T, C)."""
        # One product for the three: x is read, and under autocast copied to half precision, once.
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
    """Two linear layers, four times as wide in between, with GELU's tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.emb_dim
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position of x (B, T, C) by itself."""
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
        """Add both branches to x (B, T, C)."""
        attended: Tensor = x + self.dropout(self.att(self.norm1(x), cache))
        transformed: Tensor = attended + self.dropout(self.ff(self.norm2(attended)))
        return transformed


class GPTModel(nn.Module):
    """A GPT-2-style language model.

    Its parameters' values are `initialise`'s or `load_weights`'s to give; see `uninitialized_model`.
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
        # A tied model has no head of its own, so that the shared matrix exists, and is stored, once.
        self.out_head = None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Give logits (B, T, V) for token ids (B, T), where T is at most the context length.

        With a cache, the tokens stand at its positions and also see what it holds of earlier calls; for evaluation.
        """
        return F.linear(self.hidden_states(tokens, cache), self.head_weight())

    def head_weight(self) -> Tensor:
        """Give the output head's matrix (V, C), which a tied model shares with the token embedding."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def hidden_states(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Give the states (B, T, C) that the output head turns into logits, for token ids (B, T)."""
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
    """Make a model on the CPU whose parameters have no values yet, without the time to draw PyTorch's defaults."""
    with torch.device("meta"):
        model = GPTModel(config, activation_checkpointing)
    return model.to_empty(device="cpu")


def initialise(model: GPTModel, init_seed: int) -> None:
    """Give every parameter its initial value, which depends on (init_seed, parameter name, its shape) alone.

    Matrices and embeddings N(0, 0.02) and biases 0 as in GPT-2. The two projections into the residual stream are
    divided by sqrt(2 x (block + 1)), so that the stream's variance does not grow with depth (Zhang et al. 2019,
    arXiv:1908.11365; GPT-2 divides all by sqrt(2 x blocks), which would tie a block's values to the model's depth).
    """

    def give_value(named: tuple[str, nn.Parameter]) -> None:
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

    with ThreadPoolExecutor() as pool:  # no value depends on another, so any order will do
        list(pool.map(give_value, model.named_parameters()))


def _residual_divisor(name: str) -> float:
    projection = re.fullmatch(r"trf_blocks\.(\d+)\.(?:att\.out_proj|ff\.layers\.2)\.weight", name)
    return math.sqrt(2 * (int(projection[1]) + 1)) if projection else 1.0


def fingerprint(model: nn.Module) -> str:
    """Give the SHA-256 (hex) of all parameters: names, shapes and float32 values in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: GPTModel, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy `tensors` into the model, every parameter once; raises CheckpointError naming what does not fit.

    Stored causal masks are ignored, and a tied model's shared matrix may come under either of its names.
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
    if problems:
        shown = sorted(problems)[:3]
        more = [f"{source}: {len(problems) - 3} more like these"] if len(problems) > 3 else []
        raise CheckpointError(*shown, *more)
    model.load_state_dict(found)


def load_model(model_json: str | Path, safetensors_file: str | Path, device: torch.device) -> GPTModel:
    """Open a trained model for evaluation: float32, on `device`, dropout off.

    Raises ConfigError for the configuration and CheckpointError for the weights.
    """
    model = uninitialized_model(load_model_config(model_json))
    load_weights(model, read_tensors(Path(safetensors_file)), safetensors_file)
    return model.to(device).eval()
