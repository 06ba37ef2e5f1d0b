"""Convert a folder of `convert.py export` to GGUF by llama.cpp's own converter, also one with a tokenizer of its own.

  python docs/gguf/to_gguf.py LLAMA_CPP EXPORTED OUTPUT.gguf [options of convert_hf_to_gguf.py, such as --outtype f16]

LLAMA_CPP is a checkout of llama.cpp. Its converter recognises how a tokenizer splits text into words by a hash of
what it makes of one text, so that it refuses every tokenizer that was trained on somebody's own text. Those of
`prepare_dataset.py --tokenizer train:N` split as GPT-2's does, and so it is told. It does not look at all that
decides what a model computes either; an export that llama.cpp would compute otherwise is refused here.
"""

import json
import sys
from pathlib import Path
from typing import Any

# What llama.cpp computes whatever config.json says (its src/models/gpt2.cpp and arcee.cpp).
COMPUTED: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_new"},
    "arcee": {"hidden_act": "relu2", "attention_bias": False},
}


def main() -> None:
    """Read the command line and convert."""
    if len(sys.argv) < 4 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    llama_cpp, exported, output = map(Path, sys.argv[1:4])
    config, tokenizer = (read(exported / name) for name in ("config.json", "tokenizer.json"))
    for key, wanted in COMPUTED.get(config["model_type"], {}).items():
        if config[key] != wanted:
            sys.exit(f"{exported}: {key}: found {config[key]}, wanted {wanted}, which is what llama.cpp computes")
    if not tokenizer["model"].get("merges"):
        sys.exit(f"{exported}: found a tokenizer without merges, which llama.cpp does not load, wanted one with some")
    sys.path.insert(0, str(llama_cpp))
    import convert_hf_to_gguf
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def splitting_of(model: Any, loaded: Any) -> str:
        """Return llama.cpp's name for how the tokenizer splits text into words."""
        return "gpt-2" if splits_as_gpt2(tokenizer["pre_tokenizer"]) else str(known(model, loaded))

    TextModel.get_vocab_base_pre = splitting_of
    sys.argv = ["convert_hf_to_gguf.py", str(exported), "--outfile", str(output), *sys.argv[4:]]
    convert_hf_to_gguf.main()


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def splits_as_gpt2(splitter: dict[str, Any]) -> bool:
    """Say whether a tokenizer's splitter is GPT-2's."""
    return splitter["type"] == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]


if __name__ == "__main__":
    main()
