"""Import weights from elsewhere, and export checkpoints to transformers.

  python convert.py import hf:openai-community/gpt2 gpt2-small
  python convert.py export 8xa100m40-baseline/checkpoints/best export/best

`python convert.py VERB --help` tells more of each verb.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exchange.exporting import ExportRequest, export
from exchange.importing import ImportRequest, import_weights
from exchange.published_runs import import_all
from harness.run.arguments import add_runs_dir, dispatch, new_folder, parse_into, parser_of, whole_number
from harness.run.config import ModelConfig
from harness.run.errors import exit_status_of
from harness.run.score import Score
from harness.run.streams import ignore_output_errors
from model import load_weights, model_of, uninitialized_model
from study.statistics import clustered_mean

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def main() -> None:
    """Do what the verb asks for; raises HarnessError."""
    ignore_output_errors()
    dispatch(__doc__, {"import": import_verb, "export": export_verb})


def import_verb(words: list[str]) -> None:
    """Make a run folder from weights that were trained elsewhere.

      python convert.py import hf:openai-community/gpt2 gpt2-small

    SOURCE is hf:OWNER/NAME (a model on the Hugging Face Hub), a folder with
    config.json and model.safetensors, or another harness's model.safetensors.
    The run can be scored, sampled, exported, and trained on. --all brings in
    all run folders of the published harness with their checkpoints and losses.
    """
    parser = parser_of(import_verb.__doc__, "convert.py import")
    parser.usage = "convert.py import SOURCE RUN [options]\n       convert.py import --all DIR [--runs-dir DIR]"
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="hf:OWNER/NAME, a folder, or a .safetensors file")
    parser.add_argument("run", metavar="RUN", nargs="?", help="name of the run folder to make")
    parser.add_argument("--all", dest="all_of", type=Path, metavar="DIR", help="the published harness's runs folder")
    add_runs_dir(parser)
    parser.add_argument("--revision", help="commit, branch or tag of an hf: source (default: the newest)")
    parser.add_argument(
        "--n-heads", type=whole_number(), metavar="N", help="of a .safetensors file (default: emb_dim / 64)"
    )
    parser.add_argument(
        "--vocab-size", type=whole_number(), metavar="N", help="keep the first N ids: the rest is padding"
    )
    request = parse_into(ImportRequest, parser, words)
    if (request.all_of is None) == (request.run is None) or (request.all_of and request.source):
        parser.error("wanted SOURCE and RUN, or --all DIR")
    if request.all_of is not None:
        import_all(request.all_of, request.runs_dir, build_model)
        return
    if request.revision and not request.source.startswith("hf:"):
        parser.error("--revision goes with a source hf:OWNER/NAME")
    if request.n_heads and not request.source.endswith(".safetensors"):
        parser.error("--n-heads goes with a .safetensors file; a Hugging Face folder says it itself")
    import_weights(request, build_model)


def build_model(config: ModelConfig, tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """Return a model with these weights, on the CPU; raises CheckpointError where they do not fit."""
    model = uninitialized_model(config)
    load_weights(model, tensors, source)
    return model


def export_verb(words: list[str]) -> None:
    """Write a checkpoint as a folder that transformers loads without remote code.

      python convert.py export 8xa100m40-baseline/checkpoints/best export/best

    Before OUT_DIR appears, transformers loads it and its logits are compared.
    """
    parser = parser_of(export_verb.__doc__, "convert.py export")
    parser.add_argument("run", metavar="RUN", help="a run, or RUN/checkpoints/NAME (latest, best or a step's folder)")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=new_folder, help="a folder that is new or empty")
    add_runs_dir(parser)
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, privately")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0 or mit")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not load it with transformers")
    request = parse_into(ExportRequest, parser, words)
    if request.public and not request.push:
        parser.error("--public goes with --push OWNER/NAME")
    if request.push and not REPOSITORY.fullmatch(request.push):
        parser.error(f"--push: found {request.push[:80]!r}, wanted OWNER/NAME")
    if request.license and not LICENCE.fullmatch(request.license):
        parser.error(f"--license: found {request.license[:80]!r}, wanted an identifier such as apache-2.0")
    export(request, lambda config, weights: model_of(config, weights, torch.device("cpu")), interval_of)


def interval_of(score: Score) -> tuple[float, float] | None:
    """Return the 95% interval of a test loss that the choice of test text leaves; None where nothing is known."""
    arrays = score.read_arrays()
    estimate = clustered_mean(arrays.sequence_losses, arrays.sequence_documents)
    return estimate.interval() if np.isfinite(estimate.se) else None


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
