"""Continue a prompt with a model, to see with one's own eyes what it has learned.

python test_smoke.py runs/NAME/model.json runs/NAME/checkpoints/best/model.safetensors
python test_smoke.py --timeline NAME      the same sample from every kept checkpoint of a run
"""

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.engine.distributed import Launch, choose_device, set_up_kernels
from harness.engine.opening import Weights, open_weights
from harness.engine.sampling import SampleSettings, continue_text
from harness.run.arguments import add_device, add_runs_dir, parse_into, parser_of, positive_or_zero, whole_number
from harness.run.config import ModelConfig, load_model_config
from harness.run.errors import CheckpointError, exit_status_of
from harness.run.files import utc_now
from harness.run.json_lines import append_json_lines
from harness.run.run_folder import IMPORTED, IMPORTED_STEP, open_run, run_of_model_file
from model import model_of


@dataclass(frozen=True)
class SmokeArguments:
    """The command line."""

    model_json: Path | None
    model_safetensors: Path | None
    timeline: str | None
    runs_dir: Path
    prompt: str
    num_tokens: int
    temperature: float
    top_k: int
    seed: int
    device: str


def main() -> None:
    """Sample one model, or every kept checkpoint of a run in step order."""
    arguments = parse_arguments()
    device = choose_device(arguments.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=False)
    if arguments.timeline is None:
        assert arguments.model_json is not None
        assert arguments.model_safetensors is not None
        config = load_model_config(arguments.model_json)
        print(sample(arguments, config, open_weights(arguments.model_safetensors), device))
        return
    folder = open_run(arguments.runs_dir, arguments.timeline)
    steps = folder.model_steps()
    if not steps:
        raise CheckpointError(f"{folder.checkpoints}: found no checkpoint, wanted at least one")
    config, sampled = load_model_config(folder.model_json), 0
    for step in steps:
        try:
            text = sample(arguments, config, open_weights(folder.weights(step)), device)
        except CheckpointError as error:  # the others are still worth reading
            print(f"warning: passing over {error}", file=sys.stderr)
            continue
        sampled += 1
        label = IMPORTED if step == IMPORTED_STEP else f"step {step:,}"
        print(f"{label}: {text}", flush=True)
    if not sampled:
        raise CheckpointError(f"{folder.checkpoints}: no checkpoint is valid")


def parse_arguments() -> SmokeArguments:
    """Read the command line; bad usage exits with status 2."""
    parser = parser_of(__doc__)
    parser.add_argument("model_json", metavar="MODEL_JSON", type=Path, nargs="?")
    parser.add_argument("model_safetensors", metavar="MODEL_SAFETENSORS", type=Path, nargs="?")
    parser.add_argument("--timeline", metavar="RUN", help="sample every kept checkpoint of a run")
    add_runs_dir(parser, "with --timeline (default: runs)")
    parser.add_argument("--prompt", default="Every effort moves you")
    parser.add_argument("--num-tokens", type=whole_number(0), default=20, metavar="N")
    parser.add_argument(
        "--temperature", type=positive_or_zero, default=1.0, help="0: the likeliest token (default 1)"
    )
    parser.add_argument("--top-k", type=whole_number(0), default=25, metavar="K", help="0: all tokens (default 25)")
    parser.add_argument("--seed", type=whole_number(0), default=secrets.randbelow(2**63), help="repeats a sample")
    add_device(parser)
    arguments = parse_into(SmokeArguments, parser)
    if (arguments.timeline is None) == (arguments.model_safetensors is None):
        parser.error("found neither or both, wanted MODEL_JSON MODEL_SAFETENSORS, or --timeline RUN")
    return arguments


def sample(arguments: SmokeArguments, config: ModelConfig, weights: Weights, device: torch.device) -> str:
    """Return one model's text, and keep it in evals/smoke.jsonl where the model is a run's checkpoint."""
    model = model_of(config, weights, device)
    settings = SampleSettings(arguments.num_tokens, arguments.temperature, arguments.top_k or None, arguments.seed)
    text = continue_text(model, config, arguments.prompt, settings)
    owner = run_of_model_file(weights.path)
    if owner is not None:
        folder, step = owner
        line = {
            "step": step,
            "prompt": arguments.prompt,
            "num_tokens": arguments.num_tokens,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "seed": arguments.seed,
            "text": text,
            "time": utc_now(),
        }
        folder.evals.mkdir(exist_ok=True)
        append_json_lines(folder.evals / "smoke.jsonl", [line])
    return text


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
