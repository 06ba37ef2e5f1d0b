"""Write a checkpoint as a stock model of transformers, and check it with transformers before it appears."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from torch import nn

from exchange import parity
from exchange.architectures import architecture_of, config_document, to_hugging_face
from exchange.hugging_face import CONFIG_FILE, WEIGHTS_FILE
from exchange.model_card import CHART, Interval, Publication, model_card
from exchange.origin import Origin
from exchange.vocabulary import tokenizer_files, tokenizer_settings
from harness.engine.checkpoint import save_tensors
from harness.engine.opening import Weights, open_weights
from harness.engine.resume import find_weights
from harness.run.config import ModelConfig
from harness.run.errors import ConfigError, StorageError, hub_errors
from harness.run.files import atomic_folder, write_json, write_text
from harness.run.run_folder import RunFolder
from harness.run.score import Score
from harness.tokens.gpt2 import END_OF_TEXT, MERGES, VOCAB_SIZE, printable_vocabulary
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, gpt2_tokenizer, tokenizer_of_model

# Each of these is encoded otherwise by a tokenizer that splits words, spaces or bytes in another way.
HARD_TEXTS = (
    "Every effort moves you",
    "  two  spaces,\ttabs\n\n\nand lines \r\n ",
    "I'll we've DON'T 'S 's 1234567 3.14159 x=-1;",
    "naïve café — “quoted” … ½ ² Ⅳ",
    "日本語 한국어 العربية हिन्दी \u200d👩‍👩‍👧‍👦🇩🇪 \u00a0\u3000 e\u0301",
    "\x00\x07\x7f\ufeff\ufffd",
)


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to."""

    run: str
    """RUN, for its newest checkpoint, or RUN/checkpoints/NAME."""
    out_dir: Path
    runs_dir: Path
    push: str | None
    """Repository on the Hub, OWNER/NAME."""
    public: bool
    license: str | None
    check: bool


ModelOf = Callable[[ModelConfig, Weights], nn.Module]
"""Makes the model with some weights, on the CPU and in evaluation mode."""
IntervalOf = Callable[[Score], Interval]


def export(request: ExportRequest, model_of: ModelOf, interval_of: IntervalOf) -> None:
    """Find the checkpoint, write the export, check it, and push it if asked; raises HarnessError."""
    require_possible(request)
    folder, step = find_weights(request.runs_dir, request.run)
    config, _ = folder.read_configs()
    architecture = architecture_of(config, folder.model_json)
    weights = open_weights(folder.weights(step))
    model = model_of(config, weights)
    tokenizer = exported_tokenizer(folder, config)
    with atomic_folder(request.out_dir) as path:
        write_model(path, model, config, tokenizer)
        write_card(path, folder, (step, weights.sha256), request, interval_of)
        if request.check:
            found = parity.check_logits(model, path, config.vocab_size, config.context_length)
            if tokenizer is not None:
                parity.check_encoding(path, [(text, tokenizer.encode(text)) for text in HARD_TEXTS])
    print(f"Architecture: {architecture}")
    print(f"Logits in transformers equal ours: {found}" if request.check else "Logits: not checked (--no-check)")
    if tokenizer is None:
        is_foreign = Origin.read(folder.imported_source).tokenizer_is_gpt2 is False
        why = f"has {config.vocab_size:,} ids, not GPT-2's {VOCAB_SIZE:,}, and no {TOKENIZER_FILE}"
        why = "came with a tokenizer of its own" if is_foreign else why
        print(f"Tokenizer: none written, because the model {why}")
    print(f"{request.out_dir}: {folder.path.name} {folder.checkpoint(step).name}, ready for from_pretrained")
    if request.push:
        push(request.out_dir, request.push, request.public)


def require_possible(request: ExportRequest) -> None:
    """Raise ConfigError for all that would stop the export, or the push, after the work is done."""
    out_dir = request.out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"OUT_DIR: found {out_dir} with something in it, wanted a new or empty folder")
    if request.check and not parity.is_available():
        raise ConfigError(
            "transformers is not installed, so the export cannot be checked: "
            "pip install '.[export]', or --no-check to write it unchecked"
        )
    if request.push and huggingface_hub.get_token() is None:
        raise ConfigError("--push: found no token, wanted one of `hf auth login` or in the variable HF_TOKEN")


def exported_tokenizer(folder: RunFolder, config: ModelConfig) -> Tokenizer | None:
    """Return the run's tokenizer, or GPT-2's where the model has exactly its ids; None where neither is known."""
    if folder.tokenizer_json.is_file():
        return tokenizer_of_model(folder.tokenizer_json, config.vocab_size)
    is_gpt2 = Origin.read(folder.imported_source).tokenizer_is_gpt2 is not False
    return gpt2_tokenizer() if is_gpt2 and config.vocab_size == VOCAB_SIZE else None


def write_model(path: Path, model: nn.Module, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Write configuration, weights and tokenizer."""
    end_of_text = None if tokenizer is None else tokenizer.end_of_text_id
    write_json(path / CONFIG_FILE, config_document(config, end_of_text))
    # Without a limit of its own a pipeline asks for 256 tokens, which is past the end of a short context.
    limit = min(256, config.context_length // 2)
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "max_new_tokens": limit}
    write_json(path / "generation_config.json", generation)
    save_tensors(to_hugging_face(model.state_dict(), config), path / WEIGHTS_FILE, {"format": "pt"})
    if tokenizer is not None and tokenizer.document is not None:
        write_text(path / TOKENIZER_FILE, tokenizer.document)
        write_text(path / "tokenizer_config.json", tokenizer_settings(tokenizer.end_of_text, config.context_length))
    elif tokenizer is not None:
        merges = MERGES.read_text(encoding="utf-8")
        files = tokenizer_files(printable_vocabulary(), merges, END_OF_TEXT, config.context_length)
        for name, text in files.items():
            write_text(path / name, text)


def write_card(
    path: Path, folder: RunFolder, exported: tuple[int, str], request: ExportRequest, interval_of: IntervalOf
) -> None:
    """Write the model card, with the run's loss chart and the scores of exactly these weights.

    `exported` is the step of the checkpoint and the SHA-256 of its weights.
    """
    step, sha256 = exported
    chart = folder.charts / CHART
    if chart.is_file():
        shutil.copyfile(chart, path / CHART)
    of_these = [score for score in Score.of_checkpoint(folder, step) if score.model.model_sha256 == sha256]
    scores = [(score, interval_of(score)) for score in of_these if score.loss is not None]
    has_tokenizer = (path / TOKENIZER_FILE).is_file()
    publication = Publication(request.push, request.license, has_tokenizer, chart.is_file())
    write_text(path / "README.md", model_card(folder, step, scores, publication))


def push(path: Path, repository: str, is_public: bool) -> None:
    """Upload an export to the Hub; raises StorageError in one line, without the token."""
    api = huggingface_hub.HfApi()
    what, after = f"--push: {repository} could not be uploaded", f"; {path} is whole: hf upload {repository} {path}"
    with hub_errors(what, StorageError, after, secret=huggingface_hub.get_token()):
        url = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=path, commit_message="Upload model")
    print(f"Pushed to {url}")
