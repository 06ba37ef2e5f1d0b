"""No text from elsewhere reaches a terminal as a command to it, and no error is longer than a page."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ddp_train
import test_smoke
from harness.run.config import load_model_config
from harness.run.console import progress_bar
from harness.run.errors import ConfigError, exit_status_of
from harness.run.streams import MOST_CHARACTERS, escaped, fit_on_a_line
from harness.tokens.gpt2 import gpt2_encoding
from model import uninitialized_model
from tests.conftest import Called

NASTY = "\x1b]0;mine\x07\x9b31m\r\u202e\u2028\udc80"
Call = Callable[..., Called]


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\t\n" for character in text)


def test_escapes_leave_words_alone() -> None:
    assert escaped("naïve 日本語\tü\n🙂") == "naïve 日本語\tü\n🙂"
    assert escaped("\x1b[1m\x07") == "\\x1b[1m\\x07"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_whatever_a_command_prints_is_escaped(capsys: pytest.CaptureFixture[str], stream: str) -> None:
    def command() -> None:
        print(f"a name: {NASTY}", file=getattr(sys, stream))

    assert exit_status_of(command) == 0
    found = getattr(capsys.readouterr(), {"stdout": "out", "stderr": "err"}[stream])
    assert found.startswith("a name: \\x1b]0;mine\\x07")
    assert is_harmless(found)


def test_an_error_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise ConfigError(f"one\ntwo {NASTY}", "x" * 10**6)

    assert exit_status_of(command) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("one\\ntwo \\x1b")
    assert is_harmless(first)
    assert len(second) <= MOST_CHARACTERS
    assert "characters left out" in second
    assert fit_on_a_line("short") == "short"


def test_a_progress_bar_still_moves_its_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with progress_bar(2, "step") as bar:
            bar.update(2)

    assert exit_status_of(command) == 0
    assert "\r" in capsys.readouterr().err


def test_crafted_weights_do_not_command_the_terminal(make_run: Callable[..., Path], call: Call) -> None:
    """A model that writes ESC and nothing else."""
    folder = make_run(model={"vocab_size": 50257})
    model = uninitialized_model(load_model_config(folder / "model.json"))
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    (escape,) = gpt2_encoding().encode_ordinary("\x1b")
    weights["final_norm.shift"][:] = 1
    weights["out_head.weight"][escape] = 1
    save_file(weights, folder / "crafted.safetensors")
    words = (folder / "model.json", folder / "crafted.safetensors", "--temperature", 0, "--device", "cpu")
    done = call(test_smoke.main, *words)
    assert done.status == 0
    assert done.stdout == "Every effort moves you" + "\\x1b" * 20 + "\n"


def test_what_was_typed_is_shown_escaped_and_cut(call: Call) -> None:
    for words in ((f"--{NASTY[:-1]}" + "y" * 10**5,), ("run", "datasets", "--device", "z" * 10**5)):
        done = call(ddp_train.main, *words)
        assert done.status == 2
        assert is_harmless(done.stderr)
        assert max(map(len, done.stderr.splitlines())) <= MOST_CHARACTERS + 100
