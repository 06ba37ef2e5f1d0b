"""Continue a prompt with a model, to see with one's own eyes what it has learned.

  python test_smoke.py runs/NAME/model.json runs/NAME/checkpoints/best/model.safetensors
  python test_smoke.py --run NAME[/checkpoints/NAME] --interactive
  python test_smoke.py --timeline NAME      the same sample from every kept checkpoint

With --interactive, each line that you type is continued; :help tells the rest.
"""

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.engine.chat import chat
from harness.engine.distributed import Launch, choose_device, set_up_kernels
from harness.engine.opening import Weights, open_weights
from harness.engine.resume import find_model
from harness.engine.sampling import SampleSettings, continue_text
from harness.run.arguments import add_device, add_runs_dir, parse_into, parser_of, positive_or_zero, whole_number
from harness.run.config import ModelConfig, load_model_config
from harness.run.errors import CheckpointError, exit_status_of
from harness.run.files import utc_now
from harness.run.json_lines import append_json_lines
from harness.run.run_folder import IMPORTED, IMPORTED_STEP, RunFolder, open_run, run_of_model_file
from harness.run.score import scored_name
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, require_tokenizer
from model import model_of


@dataclass(frozen=True)
class SmokeArguments:
    """The command line."""

    model_json: Path | None
    model_safetensors: Path | None
    run: str | None
    timeline: str | None
    interactive: bool
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
    if arguments.timeline is not None:
        sample_timeline(arguments, open_run(arguments.runs_dir, arguments.timeline), device)
        return
    files = arguments.model_json, arguments.model_safetensors
    model_json, weights = find_model(arguments.runs_dir, arguments.run, files)
    config = load_model_config(model_json)
    opened = open_weights(weights)
    tokenizer = require_tokenizer(model_json.with_name(TOKENIZER_FILE), config.vocab_size)
    if arguments.interactive:
        name = f"{scored_name(opened.path)} of {model_json.parent.name}"
        chat(model_of(config, opened, device), config, tokenizer, settings_of(arguments), name)
    else:
        print(sample(arguments, config, tokenizer, opened, device))


def sample_timeline(arguments: SmokeArguments, folder: RunFolder, device: torch.device) -> None:
    """Print the same sample from every kept checkpoint of a run; raises CheckpointError where none is valid."""
    steps = folder.model_steps()
    if not steps:
        raise CheckpointError(f"{folder.checkpoints}: found no checkpoint, wanted at least one")
    config, sampled = load_model_config(folder.model_json), 0
    tokenizer = require_tokenizer(folder.tokenizer_json, config.vocab_size)
    for step in steps:
        try:
            text = sample(arguments, config, tokenizer, open_weights(folder.weights(step)), device)
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
    parser.add_argument(
        "--run", metavar="RUN", help="in place of both: a run's newest checkpoint, or RUN/checkpoints/NAME"
    )
    parser.add_argument("--interactive", action="store_true", help="continue what you type, line by line")
    parser.add_argument("--timeline", metavar="RUN", help="sample every kept checkpoint of a run")
    add_runs_dir(parser, "with --run and --timeline (default: runs)")
    parser.add_argument("--prompt", default="Every effort moves you")
    parser.add_argument("--num-tokens", type=whole_number(0), default=20, metavar="N")
    parser.add_argument(
        "--temperature", type=positive_or_zero, default=1.0, help="0: the likeliest token (default 1)"
    )
    parser.add_argument("--top-k", type=whole_number(0), default=25, metavar="K", help="0: all tokens (default 25)")
    parser.add_argument("--seed", type=whole_number(0), default=secrets.randbelow(2**63), help="repeats a sample")
    add_device(parser)
    arguments = parse_into(SmokeArguments, parser)
    given = [name is not None for name in (arguments.model_json, arguments.run, arguments.timeline)]
    if sum(given) != 1 or given[0] != (arguments.model_safetensors is not None):
        parser.error("found none or several, wanted MODEL_JSON MODEL_SAFETENSORS, --run RUN or --timeline RUN")
    if arguments.interactive and arguments.timeline is not None:
        parser.error("--interactive is of one checkpoint, --timeline of all")
    return arguments


def settings_of(arguments: SmokeArguments) -> SampleSettings:
    """Return how to sample."""
    return SampleSettings(arguments.num_tokens, arguments.temperature, arguments.top_k or None, arguments.seed)


def sample(
    arguments: SmokeArguments, config: ModelConfig, tokenizer: Tokenizer, weights: Weights, device: torch.device
) -> str:
    """Return one model's text, and keep it in evals/smoke.jsonl, if that can be, where it is a run's checkpoint."""
    model = model_of(config, weights, device)
    text = continue_text(model, config, tokenizer, arguments.prompt, settings_of(arguments))
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
        try:
            folder.evals.mkdir(exist_ok=True)
            append_json_lines(folder.evals / "smoke.jsonl", [line])
        except OSError as error:  # it is still worth reading
            print(f"warning: {folder.evals}: the sample cannot be kept ({error.strerror})", file=sys.stderr)
    return text


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
