"""What a run would do, without doing it."""

import data
from harness.engine.checkpoint import save_tensors
from harness.engine.costs import cost_of, describe
from harness.engine.distributed import Launch, choose_device
from harness.run.plan import epoch_sequences, make_plan
from harness.tokens.token_files import split_files
from model import fingerprint
from training.arguments import RunRequest
from training.context import untrained_model


def dry_run(request: RunRequest, launch: Launch) -> None:
    """Print the plan; a dataset that is there must do for it, and min_train_tokens -1 needs it.

    Without --world-size it is for this machine, else for GPUs that may be elsewhere.
    """
    asked = request.arguments
    is_elsewhere = asked.world_size is not None and asked.device == "auto"
    device_type = "cuda" if is_elsewhere else choose_device(asked.device, launch).type
    model_config, config, available = request.model_config, request.config, None
    datasets_dir = asked.datasets_dir
    is_there = all(split_files(datasets_dir / part.name, "train") for part in config.datasets)
    if is_there or config.min_train_tokens == -1:
        files = data.open_train_files(datasets_dir, config)
        available = data.tokens_available(files, model_config, config)
    plan = make_plan(model_config, config, asked.world_size or launch.world_size, available)
    rows = describe(cost_of(model_config, config, plan, device_type=device_type), config, device_type)
    if available is not None:
        times = plan.train_tokens / (epoch_sequences(available, plan.context_length) * plan.context_length)
        rows.insert(2, ("Epochs", f"{times:,.2f}, of at most {config.epochs}: so often is a token trained on"))
        if len(files) > 1:
            each = data.train_data(files, config, plan).epochs()
            shown = [f"{part.name} {often:,.2f}" for part, often in zip(config.datasets, each, strict=True)]
            rows[2] = ("Epochs", f"{', '.join(shown)}, of at most {config.epochs}: so often is a token trained on")
    rows.append(
        ("Dataset", f"{config.dataset_shares}, {'there' if is_there else 'to be downloaded by the first start'}")
    )
    rows.append(("Initial weights", f"SHA-256 {fingerprint(untrained_model(request))}"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label + ':':<{width + 1}} {value}")


def dump_initial_weights(request: RunRequest) -> None:
    """Write the untrained model to the file that was asked for; raises OSError."""
    assert request.arguments.dump_initial_weights is not None
    save_tensors(untrained_model(request).state_dict(), request.arguments.dump_initial_weights)
