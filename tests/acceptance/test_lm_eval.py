"""The tasks of docs/lm-eval, run by lm-eval from its own environment on an exported folder.

Needs the path of its command: LM_EVAL=.venv-lm-eval/bin/lm_eval pytest -m slow tests/acceptance/test_lm_eval.py
"""

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import convert
from harness.tokens.gpt2 import END_OF_TEXT_ID, gpt2_encoding
from tests.acceptance.test_exporting import with_random_weights
from tests.conftest import Called
from tests.helpers import OFFLINE, ROOT, load_model

TASKS = ROOT / "docs" / "lm-eval"


def lines_of(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.no_grad()
def test_lm_eval_agrees_with_our_own_numbers(
    make_run: Callable[..., Path], call: Callable[..., Called], tmp_path: Path
) -> None:
    if not os.environ.get("LM_EVAL"):
        pytest.skip("LM_EVAL does not name lm-eval's command")
    folder = with_random_weights(make_run("text", {"vocab_size": 50257, "context_length": 64, "drop_rate": 0.0}))
    assert call(convert.main, "export", "text", tmp_path / "out", "--runs-dir", folder.parent).status == 0
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'out'}",
        "--include_path",
        ".",
        "--device",
        "cpu",
    ]
    subprocess.run(
        [Path(os.environ["LM_EVAL"]).absolute(), *words, "--tasks", "local_text,local_choice", "--batch_size", "1",
         "--output_path", tmp_path / "results"],
        cwd=TASKS, env={**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "home")}, check=True, timeout=600,
    )  # fmt: skip
    (written,) = (tmp_path / "results").rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    ours = load_model(folder / "model.json", folder / "checkpoints" / "latest" / "model.safetensors")

    def log_probability(context: str, text: str) -> float:
        """Of `text` after `context`, or after a document end where there is none."""
        before = gpt2_encoding().encode_ordinary(context) or [END_OF_TEXT_ID]
        after = gpt2_encoding().encode_ordinary(text)
        logits = ours(torch.tensor([[*before, *after]]))[0].double().log_softmax(-1)
        return sum(logits[len(before) - 1 + n, token].item() for n, token in enumerate(after))

    texts = [str(line["text"]) for line in lines_of("documents.jsonl")]
    nats = -sum(log_probability("", text) for text in texts)
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-5)
    right = []
    for line in lines_of("choices.jsonl"):
        choices = [log_probability(str(line["question"]), choice) for choice in line["choices"]]  # type: ignore[attr-defined]
        right.append(choices.index(max(choices)) == line["answer"])
    assert results["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
