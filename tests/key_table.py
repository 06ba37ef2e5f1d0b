"""Every key of both files, one row each: another value than the default, and what that must change in a run.

A new key needs one row here; the tests of toggles, hashes, resume identities and parameter counts all go through it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save

from harness.run.config import ModelConfig
from model import GPTModel, initialise
from tests.helpers import TINY_MODEL


def imported_weights() -> bytes:
    """Return other initial weights than the runs' seeds would draw, as a file."""
    model = GPTModel(ModelConfig(**TINY_MODEL))
    initialise(model, init_seed=1234)
    return save(model.state_dict())


IMPORTED = imported_weights()


@dataclass
class Row:
    """A key's new value, what it must change, and what the baseline needs to have for that."""

    value: Any
    changes: set[str]
    context: dict[str, Any] = field(default_factory=dict)
    drop: str | None = None
    """A key that has to go when this one comes."""
    shown_in: str = ""
    """Where a key is tested whose effect is none of the respects."""


# The token budget stays, so another batch or sequence length makes another number of global steps.
STEPS_CHANGE = {"plan", "checkpoints"}
MODEL_ROWS = {
    "vocab_size": Row(101, {"parameters", "losses"}),
    "context_length": Row(8, {"parameters", "order", "losses", *STEPS_CHANGE}),
    "emb_dim": Row(32, {"parameters", "losses"}),
    "n_heads": Row(4, {"losses"}),
    "n_layers": Row(1, {"parameters", "losses"}),
    "drop_rate": Row(0.0, {"losses"}),
    "qkv_bias": Row(True, {"parameters", "losses"}),
    "tie_weights": Row(True, {"parameters", "losses"}),
    "positions": Row("rotary", {"parameters", "losses"}),
    "norm": Row("rms", {"parameters", "losses"}),
    "feed_forward": Row("swiglu", {"parameters", "losses"}),
    "moe": Row({"num_experts": 3, "num_active_experts": 2}, {"parameters", "losses"}),
    "qk_norm": Row(True, {"losses"}),
    "bias": Row(False, {"parameters", "losses"}),
    "embedding_norm": Row(True, {"losses"}),
    "value_residual": Row(True, {"parameters", "losses"}),
    "logit_softcap": Row(2.0, {"losses"}),
    "init": Row("torch", {"initial", "losses", "extras"}),
}
TRAIN_ROWS = {
    "dataset": Row("other", {"order", "losses", "extras"}),
    "dataset_revision": Row("abc", set(), shown_in="test_data_download.py"),
    "min_train_tokens": Row(1536, {"losses", *STEPS_CHANGE}),
    "epochs": Row(2, set(), shown_in="test_epochs.py"),
    "start_train_token": Row(64, {"order", "losses"}),
    "start_val_token": Row(512, {"extras"}, {"validation_interval": 1, "validation_batches": 1}),
    "microbatch_size": Row(4, {"order", "losses", "rate", "extras", *STEPS_CHANGE}),
    "gradient_accumulation_steps": Row(2, {"losses", *STEPS_CHANGE}),
    "global_batch_size": Row(16, {"losses", "rate", "extras", *STEPS_CHANGE}, drop="gradient_accumulation_steps"),
    "checkpoint_interval": Row(3, {"checkpoints"}),
    "checkpoints_to_keep": Row(2, {"checkpoints"}, {"checkpoint_interval": 1}),
    "validation_interval": Row(2, {"extras"}, {"validation_interval": 3, "validation_batches": 1}),
    "validation_batches": Row(2, {"extras"}, {"validation_interval": 1, "validation_batches": 1}),
    "learning_rate": Row(0.02, {"losses", "rate"}),
    "schedule_learning_rate": Row(True, {"losses", "rate"}),
    "schedule": Row("cosine", {"losses", "rate"}),
    "warmup_period_percent": Row(50, {"losses", "rate"}, {"schedule_learning_rate": True}),
    "cooldown_percent": Row(50.0, {"losses", "rate"}, {"schedule": "wsd"}),
    "final_rate_fraction": Row(0.0, {"losses", "rate"}, {"schedule": "linear"}),
    "optimizer": Row("muon", {"losses"}),
    "muon_learning_rate": Row(0.05, {"losses"}, {"optimizer": "muon"}),
    "adam_beta1": Row(0.8, {"losses"}),
    "adam_beta2": Row(0.95, {"losses"}),
    "adam_epsilon": Row(1e-4, {"losses"}),
    "weight_decay": Row(0.5, {"losses"}),
    "decay_all": Row(True, {"losses"}),
    "z_loss": Row(0.01, {"losses"}),
    "moe_router_loss_scale": Row(0.5, {"losses"}, {"moe": {"num_experts": 3, "num_active_experts": 2}}),
    "weight_average_decay": Row(0.9, set(), shown_in="test_averaging.py"),
    "clipping_max_norm": Row(50.0, {"losses", "extras"}),
    "use_amp": Row(True, {"losses"}),
    "amp_dtype": Row("bfloat16", {"losses"}, {"use_amp": True}),
    "random_seed": Row(1, {"initial", "losses"}),
    "init_seed": Row(1, {"initial", "losses"}),
    "order_seed": Row(1, {"order", "losses"}, {"shuffle": True}),
    "dropout_seed": Row(1, {"losses"}),
    "initial_weights": Row(hashlib.sha256(IMPORTED).hexdigest(), {"initial", "losses"}),
    "shuffle": Row(True, {"order", "losses"}),
    "compile": Row(True, {"losses"}),
    "activation_checkpointing": Row(True, set(), shown_in="test_toggles.py"),
    "deterministic": Row(True, set(), shown_in="test_toggles.py"),
    "nonfinite_patience": Row(1, set(), shown_in="test_fault_nonfinite.py"),
    "sample_prompt": Row("other", set(), shown_in="test_training.py"),
    "price_per_hour": Row(7200.0, {"extras"}),
    "currency": Row("EUR", set(), shown_in="test_plan.py"),
    "expected_tokens_per_second": Row(100.0, {"dry run"}),
    "loggers": Row(["tensorboard"], set(), shown_in="test_watching.py"),
    "notes": Row("other", set(), shown_in="test_report.py"),
}
