"""What a vocabulary holds: GPT-2's tokenizer files for `transformers`, and which ids of another's model are real."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.run.errors import ConfigError
from harness.run.strict_json import read_strict_json

MAX_JSON_BYTES = 2**28
EMBEDDINGS = ("tok_emb.weight", "out_head.weight")
PADDING_MULTIPLE = 64  # to which vocabularies are padded for speed: 50,257 becomes 50,304


def tokenizer_files(ids: Mapping[str, int], merges: str, end_of_text: str, context_length: int) -> dict[str, str]:
    """Return the files, by name, from which transformers makes a byte-level BPE tokenizer.

    `ids` names every token in GPT-2's printable characters; `merges` is a merges file with its version line.
    """
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    special = {"id": ids[end_of_text], "content": end_of_text, "special": True}
    tokenizer = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": [{**special, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}],
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": {**byte_level, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token")),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "vocab": dict(ids),
            "merges": [line.split(" ") for line in merges.splitlines()[1:]],
        },
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": tokenizer_settings(end_of_text, context_length, "GPT2Tokenizer"),
        "vocab.json": json.dumps(dict(ids)),  # to the byte the file that came with GPT-2
        "merges.txt": merges,
    }


def tokenizer_settings(end_of_text: str, context_length: int, kind: str = "PreTrainedTokenizerFast") -> str:
    """Return a tokenizer_config.json for transformers; `kind` is the class that reads the tokenizer."""
    settings = {
        "tokenizer_class": kind,
        "model_max_length": context_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
    }
    return json.dumps(settings, indent=2) + "\n"


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return every token of a Hugging Face folder's tokenizer with its id; None where no file says.

    Raises ConfigError where a file cannot be read.
    """
    found: dict[str, Any] = {}
    added: Any = []
    if (path := folder / "tokenizer.json").is_file():
        document = read_strict_json(path, MAX_JSON_BYTES)
        model, added = document.get("model"), document.get("added_tokens") or []
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict):  # not byte-pair encoding, and none of GPT-2's
            return None
        found |= vocab
    elif (path := folder / "vocab.json").is_file():
        found |= read_strict_json(path, MAX_JSON_BYTES)
    if (path := folder / "added_tokens.json").is_file():
        found |= read_strict_json(path, MAX_JSON_BYTES)
    try:
        found |= {item["content"]: item["id"] for item in added}
        is_whole = all(isinstance(number, int) for number in found.values())
    except (TypeError, KeyError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"{folder}: found a tokenizer that does not give tokens whole numbers, wanted one that does"
        )
    return found or None


def real_vocab_size(stored: int, gpt2_size: int, known: Mapping[str, int] | None, asked: int | None) -> int:
    """Return how many of a model's `stored` ids to keep: all, or GPT-2's where the rest pads to a round number.

    `known` are the tokens of the model's own tokenizer, `asked` the user's word. Raises ConfigError where neither
    says whether ids past GPT-2's are padding.
    """
    if asked is not None:
        if asked > stored:
            raise ConfigError(f"--vocab-size: found {asked}, wanted at most the {stored} ids of the model")
        return asked
    padded = -(-gpt2_size // PADDING_MULTIPLE) * PADDING_MULTIPLE
    if stored != padded:
        return stored
    if known is None:
        raise ConfigError(
            f"SOURCE: found {stored} ids and no tokenizer that says whether those from {gpt2_size} on are padding, "
            f"wanted --vocab-size {gpt2_size} to drop or --vocab-size {stored} to keep them"
        )
    return gpt2_size if max(known.values()) < gpt2_size else stored


def with_vocab_size(tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Return the tensors with the first `size` rows of the token embedding and of the output head, (V, C)."""
    return {name: value[:size].contiguous() if name in EMBEDDINGS else value for name, value in tensors.items()}
