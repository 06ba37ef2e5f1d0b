"""A conversation with a base model: every line that is typed is continued, token by token as it is drawn."""

import sys
from dataclasses import replace

from torch import nn

from harness.engine.sampling import SampleSettings, sample_tokens
from harness.run.config import ModelConfig
from harness.tokens.tokenizer import Tokenizer

HELP = """Type the beginning of a text. The model goes on with it; an empty line lets it go on with what it wrote.
  :temperature 0.8   how daring it is (0: always the likeliest token)
  :top-k 50          how many tokens it chooses from (0: all)
  :tokens 150        how much it writes
  :quit              or Ctrl-D"""


def chat(model: nn.Module, config: ModelConfig, tokenizer: Tokenizer, settings: SampleSettings, name: str) -> None:
    """Read prompts from stdin and stream their continuations to stdout, until the input ends; `name` the model.

    Where stdin is no terminal nothing else is printed, so that a file of prompts gives a file of texts.
    """
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if is_terminal:
        print(f"{name}, at temperature {settings.temperature}, top-k {settings.top_k or 'all'}. :help for help")
    text, seed = "", settings.seed
    while True:
        try:
            line = _read_line(is_terminal)
        except (EOFError, KeyboardInterrupt):
            print() if is_terminal else None
            return
        if line.strip() in (":quit", ":q"):
            return
        if line.startswith(":"):
            settings = _changed(settings, line)
            continue
        text = line or text
        try:
            written = _stream(model, config, tokenizer, text, replace(settings, seed=seed))
        except KeyboardInterrupt:  # enough of this one
            written = ""
        print(flush=True)
        text += written
        seed = None if seed is None else seed + 1  # or an empty line after a repeated text would repeat it too


def _read_line(is_terminal: bool) -> str:
    if is_terminal:
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _changed(settings: SampleSettings, line: str) -> SampleSettings:
    """Return the settings after a line such as ":top-k 50"; what is wrong is said on stderr and changes nothing."""
    name, _, value = line[1:].strip().partition(" ")
    try:
        if name == "temperature" and (number := float(value)) >= 0 and number < float("inf"):
            return replace(settings, temperature=number)
        if name == "top-k" and (count := int(value)) >= 0:
            return replace(settings, top_k=count or None)
        if name == "tokens" and (count := int(value)) >= 0:
            return replace(settings, num_tokens=count)
    except ValueError:
        pass
    print(HELP if name == "help" else f"{line[:80]}: wanted one of\n{HELP}", file=sys.stderr)
    return settings


def _stream(model: nn.Module, config: ModelConfig, tokenizer: Tokenizer, text: str, settings: SampleSettings) -> str:
    """Print a text and its continuation as it grows, and return the continuation; a document's end ends it."""
    print(text, end="", flush=True)
    tokens: list[int] = []
    shown = ""
    for token in sample_tokens(model, config, tokenizer, tokenizer.encode(text), settings):
        if token == tokenizer.end_of_text_id:
            break
        tokens.append(token)
        written = tokenizer.decode(tokens)
        # A character of several tokens shows as U+FFFD until the last of them; wait for it.
        if not written.endswith("\ufffd"):
            print(written[len(shown) :], end="", flush=True)
            shown = written
    written = tokenizer.decode(tokens)
    print(written[len(shown) :], end="", flush=True)
    return written
