"""Continue a prompt with a model, to see with one's own eyes what it has learned.

python test_smoke.py runs/NAME/model.json runs/NAME/checkpoints/best/model.safetensors
python test_smoke.py --timeline NAME      the same sample from every kept checkpoint of a run
"""

import argparse
import json
import secrets
import sys
from pathlib import Path

import torch

from harness.distributed import Launch, choose_device, set_up_kernels
from harness.errors import CheckpointError, exit_status_of
from harness.run_folder import IMPORTED, IMPORTED_STEP, open_run, run_of_model_file, utc_now
from harness.sampling import SampleSettings, continue_text
from model import load_model

ROOT = Path(__file__).parent


def main() -> None:
    """Sample one model, or every kept checkpoint of a run in step order."""
    arguments = parse_arguments()
    device = choose_device(arguments.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=False)
    if arguments.timeline is None:
        print(sample(arguments, arguments.model_json, arguments.model_safetensors, device))
        return
    folder = open_run(arguments.runs_dir, arguments.timeline)
    steps = folder.model_steps()
    if not steps:
        raise CheckpointError(f"{folder.checkpoints}: found no checkpoint, wanted at least one")
    for step in steps:
        weights = folder.checkpoint(step) / "model.safetensors"
        label = IMPORTED if step == IMPORTED_STEP else f"step {step:,}"
        print(f"{label}: {sample(arguments, folder.model_json, weights, device)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_json", metavar="MODEL_JSON", type=Path, nargs="?")
    parser.add_argument("model_safetensors", metavar="MODEL_SAFETENSORS", type=Path, nargs="?")
    parser.add_argument("--timeline", metavar="RUN", help="sample every kept checkpoint of a run")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs", help="with --timeline (default: runs)")
    parser.add_argument("--prompt", default="Every effort moves you")
    parser.add_argument("--num-tokens", type=int, default=20, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    parser.add_argument("--top-k", type=int, default=25, metavar="K", help="0 considers all tokens (default 25)")
    parser.add_argument("--seed", type=int, help="makes the sample repeatable")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    arguments = parser.parse_args()
    if (arguments.timeline is None) == (arguments.model_safetensors is None):
        parser.error("found neither or both, wanted MODEL_JSON MODEL_SAFETENSORS, or --timeline RUN")
    for name in ("num_tokens", "top_k", "temperature", "seed"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 2**63:
            parser.error(f"--{name.replace('_', '-')}: found {value}, wanted 0 or more")
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(2**63)  # chosen here, so that it can be recorded
    return arguments


def sample(arguments: argparse.Namespace, model_json: Path, weights: Path, device: torch.device) -> str:
    """Give one model's text, and keep it in evals/smoke.jsonl where the model is a run's checkpoint."""
    model = load_model(model_json, weights, device)
    settings = SampleSettings(arguments.num_tokens, arguments.temperature, arguments.top_k or None, arguments.seed)
    text = continue_text(model, model.config, arguments.prompt, settings)
    owner = run_of_model_file(weights)
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
        with (folder.evals / "smoke.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return text


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
