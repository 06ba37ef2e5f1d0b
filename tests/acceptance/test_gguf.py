"""The recipe for GGUF tells llama.cpp's converter how a tokenizer splits, and refuses what it would get wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.tokens.tokenizer import byte_tokenizer, train_tokenizer
from tests.helpers import ROOT

TEXT = ["One sheep, two sheep, and a third sheep."] * 9
# A stand-in for llama.cpp's converter: it prints how it was called, and what it takes the splitting for.
CONVERTER = """
import sys
from conversion.base import TextModel
def main():
    print(sys.argv, TextModel().get_vocab_base_pre("loaded"))
"""
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        return f"looked up {tokenizer}"
"""


@pytest.fixture
def convert(tmp_path: Path) -> Any:
    """A function that converts an export with such a config.json and tokenizer.json."""
    (tmp_path / "llama.cpp" / "conversion").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "llama.cpp" / "conversion" / "base.py").write_text(BASE)
    (tmp_path / "export").mkdir()

    def run(config: dict[str, Any], tokenizer: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        for name, document in (("config.json", config), ("tokenizer.json", tokenizer)):
            (tmp_path / "export" / name).write_text(json.dumps(document))
        words = [ROOT / "docs" / "gguf" / "to_gguf.py", "llama.cpp", "export", "out.gguf", "--outtype", "f16"]
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )

    return run


def test_a_tokenizer_of_its_own_is_said_to_split_as_gpt2s(convert: Any) -> None:
    own = json.loads(train_tokenizer(TEXT, 300).document or "")
    done = convert({"model_type": "llama"}, own)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['convert_hf_to_gguf.py', 'export', '--outfile', 'out.gguf', '--outtype', 'f16'] gpt-2\n"
    foreign = {**own, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [own["pre_tokenizer"]]}}
    assert convert({"model_type": "llama"}, foreign).stdout.endswith("looked up loaded\n")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2", "activation_function": "relu2"}, "activation_function: found relu2, wanted gelu_new"),
        ({"model_type": "arcee", "hidden_act": "relu2", "attention_bias": True}, "attention_bias: found True"),
        ({"model_type": "qwen3"}, "without merges"),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_one_line(convert: Any, config: dict[str, Any], said: str) -> None:
    done = convert(config, json.loads(byte_tokenizer().document or ""))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert said in done.stderr
