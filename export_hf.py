"""Write a checkpoint as a folder that transformers loads as it is: a stock GPT2LMHeadModel, without remote code.

RUN is a run's name, for its latest checkpoint, or RUN/checkpoints/NAME. What is written is loaded again with
transformers, and its logits are compared, before it appears.

  python export_hf.py 8xa100m40-baseline/checkpoints/best export/baseline
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import torch

from exchange import parity
from exchange.hugging_face import CONFIG_FILE, WEIGHTS_FILE, config_document, to_hugging_face
from exchange.model_card import CHART, Publication, Score, model_card
from exchange.vocabulary import tokenizer_files
from harness.engine.checkpoint import MANIFEST_FILE, save_tensors
from harness.run.errors import CheckpointError, ConfigError, StorageError, exit_status_of, hub_errors
from harness.run.files import RUNS, atomic_folder, file_sha256, read_json, write_json, write_text
from harness.run.run_folder import RunFolder, open_run
from harness.tokens.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    MERGES,
    VOCAB_SIZE,
    gpt2_encoding,
    printable_vocabulary,
)
from model import GPTModel, load_model
from study.statistics import clustered_mean

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
# Each of these breaks a tokenizer that cuts text, counts spaces or spells bytes in another way.
HARD_TEXTS = (
    "Every effort moves you",
    "  two  spaces,\ttabs\n\n\nand lines \r\n ",
    "I'll we've DON'T 'S 's 1234567 3.14159 x=-1;",
    "naïve café — “quoted” … ½ ² Ⅳ",
    "日本語 한국어 العربية हिन्दी \u200d👩‍👩‍👧‍👦🇩🇪 \u00a0\u3000 e\u0301",
    "\x00\x07\x7f\ufeff\ufffd",
)


def main() -> None:
    """Find the checkpoint, write the export, check it, and push it if asked."""
    arguments = parse_arguments()
    require_possible(arguments)
    folder, step = find_checkpoint(arguments.runs_dir, arguments.run)
    weights = folder.checkpoint(step) / WEIGHTS_FILE
    require_whole(folder, step)
    model = load_model(folder.model_json, weights, torch.device("cpu"))
    vocab_size, context_length = model.config.vocab_size, model.config.context_length
    is_gpt2 = read_json(folder.imported / "source.json").get("tokenizer_is_gpt2") is not False
    has_tokenizer = vocab_size == VOCAB_SIZE and is_gpt2
    with atomic_folder(arguments.out_dir) as path:
        write_model(path, model, has_tokenizer)
        write_card(path, folder, step, arguments, has_tokenizer)
        if arguments.check:
            found = parity.check_logits(model, path, vocab_size, context_length)
            if has_tokenizer:
                encoding = gpt2_encoding()
                parity.check_encoding(path, [(text, encoding.encode_ordinary(text)) for text in HARD_TEXTS])
    if arguments.check:
        print(f"Logits in transformers equal ours: {found}")
    else:
        print("Logits: not checked (--no-check)")
    if not has_tokenizer:
        why = f"has {vocab_size:,} ids, not GPT-2's {VOCAB_SIZE:,}" if is_gpt2 else "came with a tokenizer of its own"
        print(f"Tokenizer: none written, because the model {why}")
    print(f"{arguments.out_dir}: {folder.path.name} {folder.checkpoint(step).name}, ready for from_pretrained")
    if arguments.push:
        push(arguments.out_dir, arguments.push, arguments.public)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run, or RUN/checkpoints/NAME (latest, best or a step's folder)")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a folder that is new or empty")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs live (default: runs)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, privately")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0 or mit")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not load it with transformers")
    arguments = parser.parse_args()
    if arguments.public and not arguments.push:
        parser.error("--public goes with --push OWNER/NAME")
    if arguments.push and not REPOSITORY.fullmatch(arguments.push):
        parser.error(f"--push: found {arguments.push[:80]!r}, wanted OWNER/NAME")
    if arguments.license and not LICENCE.fullmatch(arguments.license):
        parser.error(f"--license: found {arguments.license[:80]!r}, wanted an identifier such as apache-2.0")
    return arguments


def require_possible(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for all that would stop the export, or the push, after the work is done."""
    out_dir: Path = arguments.out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"OUT_DIR: found {out_dir} with something in it, wanted a new or empty folder")
    if arguments.check and not parity.is_available():
        raise ConfigError(
            "transformers is not installed, so the export cannot be checked: "
            "pip install 'transformers>=5', or --no-check to write it unchecked"
        )
    if arguments.push and huggingface_hub.get_token() is None:
        raise ConfigError("--push: found no token, wanted one of `hf auth login` or in the variable HF_TOKEN")


def find_checkpoint(runs_dir: Path, words: str) -> tuple[RunFolder, int]:
    """Find the checkpoint that RUN or RUN/checkpoints/NAME means; raises ConfigError or CheckpointError."""
    run, _, rest = words.rstrip("/").partition("/")
    folder = open_run(runs_dir, run)
    place, _, name = rest.partition("/")
    if rest and (place != "checkpoints" or not name or "/" in name):
        raise ConfigError(f"RUN: found {words[:200]!r}, wanted RUN or RUN/checkpoints/NAME")
    if not rest:  # the links are hints; the newest folder is the truth
        steps = folder.model_steps()
    else:
        path = (folder.checkpoints / name).resolve()
        steps = [step for step in folder.model_steps() if folder.checkpoint(step).resolve() == path]
    if not steps or not (folder.checkpoint(steps[-1]) / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder.checkpoints}: found no {name or 'checkpoint'}, wanted one with {WEIGHTS_FILE}"
        )
    return folder, steps[-1]


def require_whole(folder: RunFolder, step: int) -> None:
    """Check the weights against the checkpoint's manifest, where it has one; raises CheckpointError."""
    path = folder.checkpoint(step) / WEIGHTS_FILE
    manifest = read_json(path.parent / MANIFEST_FILE).get("files", {})
    wanted = manifest.get(WEIGHTS_FILE, {}).get("sha256")
    if wanted and (found := file_sha256(path)) != wanted:
        raise CheckpointError(f"{path}: found SHA-256 {found}, wanted {wanted}")


def write_model(path: Path, model: GPTModel, has_tokenizer: bool) -> None:
    """Write configuration, weights and tokenizer."""
    config = model.config
    end_of_text = END_OF_TEXT_ID if has_tokenizer else None
    write_json(path / CONFIG_FILE, config_document(config, end_of_text))
    # Without a limit of its own a pipeline asks for 256 tokens, which is past the end of a short context.
    limit = min(256, config.context_length // 2)
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "max_new_tokens": limit}
    write_json(path / "generation_config.json", generation)
    save_tensors(to_hugging_face(model.state_dict(), config), path / WEIGHTS_FILE, {"format": "pt"})
    if has_tokenizer:
        merges = MERGES.read_text(encoding="utf-8")
        files = tokenizer_files(printable_vocabulary(), merges, END_OF_TEXT, config.context_length)
        for name, text in files.items():
            write_text(path / name, text)


def write_card(path: Path, folder: RunFolder, step: int, arguments: argparse.Namespace, has_tokenizer: bool) -> None:
    """Write the model card, with the run's loss chart where there is one."""
    chart = folder.charts / CHART
    if chart.is_file():
        shutil.copyfile(chart, path / CHART)
    publication = Publication(arguments.push, arguments.license, has_tokenizer, chart.is_file())
    write_text(path / "README.md", model_card(folder, step, scores_of(folder, step), publication))


def scores_of(folder: RunFolder, step: int) -> list[Score]:
    """Read what test_loss.py made of exactly these weights, with the uncertainty that the test text leaves."""
    sha256 = file_sha256(folder.checkpoint(step) / WEIGHTS_FILE)
    scores = []
    for path in sorted(folder.evals.glob(f"loss-*-{folder.checkpoint(step).name}.json")):
        score = read_json(path)
        if score.get("model_sha256") != sha256 or score.get("loss") is None:
            continue
        interval = None
        if (stored := path.with_suffix(".npz")).is_file():
            with np.load(stored, allow_pickle=False) as arrays:
                estimate = clustered_mean(arrays["sequence_losses"], arrays["sequence_documents"])
            interval = estimate.interval() if np.isfinite(estimate.se) else None
        place = (str(score["dataset"]), str(score["split"]), int(score["start_token"]), int(score["tokens"]))
        scores.append(Score(*place, float(score["loss"]), interval, score.get("bits_per_byte")))
    return scores


def push(path: Path, repository: str, is_public: bool) -> None:
    """Upload an export to the Hub; raises StorageError in one line, without the token."""
    api = huggingface_hub.HfApi()
    what, after = f"--push: {repository} could not be uploaded", f"; {path} is whole: hf upload {repository} {path}"
    with hub_errors(what, StorageError, after, secret=huggingface_hub.get_token()):
        url = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=path, commit_message="Upload model")
    print(f"Pushed to {url}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
