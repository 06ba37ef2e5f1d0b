"""The GPT and its toggles, and the functions with which every command loads a model.

Shapes in comments: B batch, T positions, C channels (emb_dim), H heads, D head size, V vocabulary. Module names are
those of the published checkpoints, so a state dict is saved and loaded without renaming.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.engine.experts import Layer, MixtureOfExperts
from harness.engine.key_value_cache import KeyValueCache
from harness.engine.loss import capped
from harness.engine.opening import Weights, require_tensors
from harness.run.config import ModelConfig
from harness.run.errors import CheckpointError
from harness.run.model_size import feed_forward_width
from harness.tokens.randomness import initial_normal, initial_uniform

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02  # GPT-2's; small enough that a tied head starts at a loss near ln(V)
CONSTANTS = {".bias": 0.0, ".shift": 0.0, ".scale": 1.0, ".value_mix": 0.5}  # initial values, by the end of the name
RESIDUAL_PROJECTION = re.compile(r"trf_blocks\.(\d+)\.(?:att\.out_proj|ff\.(?:experts\.\d+\.)?layers\.2)\.weight")
HEAD = "out_head.weight"
TOKEN_EMBEDDING = "tok_emb.weight"
POSITION_EMBEDDING = "pos_emb.weight"
# The published checkpoints store each block's causal mask, which is a constant.
STORED_MASK = re.compile(r"trf_blocks\.\d+\.att\.mask")


class LayerNorm(nn.Module):
    """Normalise over channels to mean 0 and variance 1, with a learned scale and shift if `is_learned`."""

    def __init__(self, config: ModelConfig, is_learned: bool = True) -> None:
        super().__init__()
        self.shape = (config.emb_dim,)
        self.scale = nn.Parameter(torch.ones(self.shape)) if is_learned else None
        self.shift = nn.Parameter(torch.zeros(self.shape)) if is_learned and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        return F.layer_norm(x, self.shape, self.scale, self.shift, NORM_EPS)


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, is_learned: bool = True) -> None:
        super().__init__()
        self.shape = (config.emb_dim,)
        self.scale = nn.Parameter(torch.ones(self.shape)) if is_learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        return F.rms_norm(x, self.shape, self.scale, NORM_EPS)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def rotation_at(positions: Tensor, head_size: int) -> Tensor:
    """Return cosine and sine (2, ..., T, D/2), float32, of the angles by which positions (..., T) turn a head.

    Pair i of channels turns by position x ROTARY_BASE^(-2i/D) (Su et al. 2021, arXiv:2104.09864, equation 15).
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    speeds = 1.0 / ROTARY_BASE ** (pairs / head_size)  # rounded as transformers rounds it
    angles = positions.unsqueeze(-1) * speeds
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn queries or keys x (B, H, T, D); channel i forms a pair with channel i + D/2."""
    cosine, sine = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, is_first: bool) -> None:
        super().__init__()
        width, has_bias = config.emb_dim, config.qkv_bias and config.bias
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qk_norm = config.qk_norm
        self.W_query = nn.Linear(width, width, bias=has_bias)
        self.W_key = nn.Linear(width, width, bias=has_bias)
        self.W_value = nn.Linear(width, width, bias=has_bias)
        self.out_proj = nn.Linear(width, width, bias=config.bias)
        # Value residual learning (Zhou et al. 2024, arXiv:2410.17897): the part that the first block's values have.
        self.value_mix = nn.Parameter(torch.full((1,), 0.5)) if config.value_residual and not is_first else None

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        first_values: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output (B, T, C) for x (B, T, C), and the values (B, H, T, D) of its tokens.

        Each position sees itself and those before it. `rotation` is of the positions, where those are rotary;
        `first_values` are those that the first block returned.
        """
        # One matrix product for all three reads x once, and under autocast converts it to half precision once.
        projections = (self.W_query, self.W_key, self.W_value)
        # Viewed as they are: in a bare list the compiler would not see them when it cuts its graph by DDP's buckets.
        weight = torch.cat([projection.weight.view(-1, x.shape[-1]) for projection in projections])
        has_bias = self.W_query.bias is not None
        bias = torch.cat([projection.bias.view(-1) for projection in projections]) if has_bias else None
        projected = F.linear(x, weight, bias).view(*x.shape[:-1], 3, self.n_heads, -1)  # (B, T, 3, H, D)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.qk_norm:  # Henry et al. 2020, arXiv:2010.04245, but with the usual 1 / sqrt(D) and no learned scale
            query, key = (F.rms_norm(heads, heads.shape[-1:], eps=NORM_EPS) for heads in (query, key))
        if self.value_mix is not None and first_values is not None:
            value = value + self.value_mix.to(value.dtype) * (first_values - value)
        values, visible = value, None
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
        return self.out_proj(attended.transpose(1, 2).flatten(2)), values  # (B, T, C)


class ReluSquared(nn.Module):
    """The square of what is positive, 0 elsewhere (So et al. 2021, arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element of x."""
        return F.relu(x).square()


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig, activation: nn.Module) -> None:
        super().__init__()
        width, hidden = config.emb_dim, feed_forward_width(config)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, config.bias), activation, nn.Linear(hidden, width, config.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position of x (..., C) independently."""
        return self.transform(x, self.get_submodule)

    def transform(self, x: Tensor, layer: Callable[[str], Layer]) -> Tensor:
        """Transform x (..., C) with the linear layers that `layer` gives for their names."""
        _, activation, _ = self.layers
        return layer("layers.2")(activation(layer("layers.0")(x)))


class GatedFeedForward(FeedForward):
    """A feed-forward whose hidden channels are multiplied by activated gates (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, activation: nn.Module) -> None:
        super().__init__(config, activation)
        self.gate = nn.Linear(config.emb_dim, feed_forward_width(config), config.bias)

    def transform(self, x: Tensor, layer: Callable[[str], Layer]) -> Tensor:
        """Transform x (..., C) with the linear layers that `layer` gives for their names."""
        _, activation, _ = self.layers
        return layer("layers.2")(activation(layer("gate")(x)) * layer("layers.0")(x))


FEED_FORWARDS: dict[str, Callable[[ModelConfig], FeedForward]] = {
    "gelu": lambda config: FeedForward(config, nn.GELU(approximate="tanh")),
    "relu_squared": lambda config: FeedForward(config, ReluSquared()),
    "swiglu": lambda config: GatedFeedForward(config, nn.SiLU()),
}


class Block(nn.Module):
    """A pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, is_first: bool) -> None:
        super().__init__()
        self.norm1 = NORMS[config.norm](config)
        self.att = Attention(config, is_first)
        self.norm2 = NORMS[config.norm](config)
        make = partial(FEED_FORWARDS[config.feed_forward], config)
        self.ff = make() if config.moe is None else MixtureOfExperts(config.emb_dim, config.moe, make)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        first_values: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add both branches to the residual stream x (B, T, C).

        Returns it, the attention's values, and with a mixture of experts how tokens were routed (num_experts + 2,).
        """
        attended, values = self.att(self.norm1(x), rotation, first_values, cache)
        x = x + self.dropout(attended)
        routing = None
        transformed = self.ff(self.norm2(x))
        if isinstance(self.ff, MixtureOfExperts):
            transformed, routing = transformed
        return x + self.dropout(transformed), values, routing


class GPTModel(nn.Module):
    """A GPT-2-style language model.

    Make it with `uninitialized_model`, and set its parameters with `initialise` or `load_weights`.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.logit_softcap = config.logit_softcap
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        is_learned = config.positions == "learned"
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim) if is_learned else None
        self.embedding_norm = NORMS[config.norm](config, is_learned=False) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(Block(config, is_first=number == 0) for number in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config)
        # A tied model has no head module, so the shared matrix is one parameter and is stored once.
        self.out_head = None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T), where T is at most the context length.

        With a cache, the tokens continue those of earlier calls and attend to them; for evaluation only.
        """
        hidden, _ = self.hidden_states(tokens, cache)
        logits = F.linear(hidden, self.head_weight())
        return logits if self.logit_softcap is None else capped(logits, self.logit_softcap)

    def head_weight(self) -> Tensor:
        """Return the output head's matrix (V, C), which a tied model shares with the token embedding."""
        return self.tok_emb.weight if self.out_head is None else self.out_head.weight

    def hidden_states(self, tokens: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the final hidden states (B, T, C), the input of the output head, for token ids (B, T).

        And with a mixture of experts how each block routed them (n_layers, num_experts + 2), as by `route`.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.positions
        x, rotation = self._embed(tokens, positions)
        first_values, routings = None, []
        for block in self.trf_blocks:
            if self.activation_checkpointing and self.training:
                x, values, routing = checkpoint(block, x, rotation, first_values, use_reentrant=False)
            else:
                x, values, routing = block(x, rotation, first_values, cache)
            if first_values is None and self.config.value_residual:
                first_values = values
            routings.append(routing)
        return self.final_norm(x), None if self.config.moe is None else torch.stack(routings)

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what enters the first block (B, T, C), and the rotation of the positions where those are rotary."""
        x, rotation = self.tok_emb(tokens), None  # (B, T, C)
        if self.pos_emb is not None:
            x = x + self.pos_emb(positions)
        else:
            rotation = rotation_at(positions, self.config.emb_dim // self.config.n_heads)
            if positions.ndim == 2:
                rotation = rotation.unsqueeze(2)  # the same for every head
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x), rotation


def uninitialized_model(config: ModelConfig, activation_checkpointing: bool = False) -> GPTModel:
    """Return a model on the CPU whose parameters are unset, which skips PyTorch's slow default initialisation."""
    with torch.device("meta"):
        model = GPTModel(config, activation_checkpointing)
    return model.to_empty(device="cpu")


Shapes = Mapping[str, tuple[int, ...]]


def initialise(model: GPTModel, init_seed: int) -> None:
    """Set every parameter to its initial value, which depends only on init_seed, the parameter's name and its shape.

    `INITS` says which values those are. Raises ValueError naming a parameter that has no rule.
    """
    draw = INITS[model.config.init]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def set_initial_value(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        parameter.data.copy_(draw(init_seed, name, shapes))

    with ThreadPoolExecutor() as pool:  # values are independent, so order does not matter
        list(pool.map(set_initial_value, model.named_parameters()))


def _gpt2_value(init_seed: int, name: str, shapes: Shapes) -> Tensor:
    """Draw matrices and embeddings from N(0, 0.02), and leave biases at 0, as GPT-2 does.

    The two projections into the residual stream are divided by sqrt(2 x (block + 1)), so that the stream's variance
    does not grow with depth (Zhang et al. 2019, arXiv:1908.11365). GPT-2 divides all by sqrt(2 x blocks), which would
    make a block's values depend on the number of blocks.
    """
    shape = shapes[name]
    for ending, value in CONSTANTS.items():
        if name.endswith(ending):
            return torch.full(shape, value)
    if not name.endswith(".weight") or len(shape) != 2:
        raise ValueError(f"parameter {name} {shape} has no rule for its initial value")
    projection = RESIDUAL_PROJECTION.fullmatch(name)
    divisor = math.sqrt(2 * (int(projection[1]) + 1)) if projection else 1.0
    return initial_normal(init_seed, name, shape, INITIAL_STD / divisor)


def _torch_value(init_seed: int, name: str, shapes: Shapes) -> Tensor:
    """Draw as PyTorch's modules do by default, which is what the published runs started from.

    Weights and biases of linear layers are uniform within 1/sqrt(inputs), embeddings N(0, 1).
    """
    shape = shapes[name]
    if name in (TOKEN_EMBEDDING, POSITION_EMBEDDING):
        return initial_normal(init_seed, name, shape, 1.0)
    inputs = shapes.get(re.sub(r"\.bias$", ".weight", name), ())
    if len(inputs) == 2:
        return initial_uniform(init_seed, name, shape, 1 / math.sqrt(inputs[1]))
    return _gpt2_value(init_seed, name, shapes)


def _zero_projections_value(init_seed: int, name: str, shapes: Shapes) -> Tensor:
    """Draw as GPT-2 does, but leave the projections into the residual stream and the head at 0.

    So every block begins as the identity and the first loss is ln(V); for the head see Yang et al. 2022,
    arXiv:2203.03466, appendix D.2. An embedding that is also the head is not 0.
    """
    if name == HEAD or RESIDUAL_PROJECTION.fullmatch(name):
        return torch.zeros(shapes[name])
    return _gpt2_value(init_seed, name, shapes)


INITS = {"gpt2": _gpt2_value, "torch": _torch_value, "zero_projections": _zero_projections_value}


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
    require_tensors(found, {name: tuple(value.shape) for name, value in model.state_dict().items()}, source)
    model.load_state_dict(found)


def model_of(config: ModelConfig, weights: Weights, device: torch.device) -> GPTModel:
    """Return the model with these weights, for evaluation: float32, dropout off; raises CheckpointError."""
    model = uninitialized_model(config)
    load_weights(model, weights.tensors, weights.path)
    return model.to(device).eval()
