"""What a tokenizer.json may hold: byte-level BPE that gives every text back, so that a token stands for known bytes.

It is judged as JSON, before the library that would run it has it: that library drops what a tokenizer has no token
for, and for some files it ends with a panic.
"""

from collections.abc import Iterator
from typing import Any

MOST_IDS = 2**22
"""Four times those of the largest tokenizers; arrays with an entry for each stay small."""
SPLITTERS = {"ByteLevel", "Digits", "Punctuation", "Split"}
"""Kinds of pre-tokenizer that cut a text and change nothing, unless they remove where they cut."""


def what_loses_text(document: dict[str, Any], letters: set[str]) -> str | None:
    """Return what in a tokenizer.json would change or lose a text, or is not byte-level; None where nothing does.

    `letters` spell the 256 bytes. Raises KeyError, TypeError, ValueError or AttributeError where it is no
    tokenizer.json.
    """
    normalizer, model = document.get("normalizer"), document["model"]
    steps = list(_steps(document.get("pre_tokenizer"), "pretokenizers"))
    ids = [*model["vocab"].values()] if isinstance(model["vocab"], dict) else []
    lossy = {
        "one that is not byte-level": model.get("type", "BPE") != "BPE" or not letters <= set(model["vocab"]),
        "a decoder that is not byte-level": [
            step["type"] for step in _steps(document.get("decoder"), "decoders")
        ] != ["ByteLevel"],
        "dropout, which encodes a text each time in another way": model.get("dropout"),
        "a prefix or suffix of words, which loses text": model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix"),
        "two tokens of one id": len(set(ids)) < len(ids),
        f"an id of {MOST_IDS:,} or more": max(ids, default=0) >= MOST_IDS
        or any(token["id"] >= MOST_IDS for token in document["added_tokens"]),
        "an added token that swallows spaces": any(
            not token["special"] and (token["lstrip"] or token["rstrip"]) for token in document["added_tokens"]
        ),
        "add_prefix_space, which changes texts": any(step.get("add_prefix_space") for step in steps),
        "a splitter that changes or loses text": any(
            step["type"] not in SPLITTERS or step.get("behavior") == "Removed" for step in steps
        ),
        "not exactly one splitter that is byte-level": [step["type"] for step in steps].count("ByteLevel") != 1,
    }  # fmt: skip
    if normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        return f"a normalizer ({normalizer.get('type')}), which changes texts"
    return next((what for what, holds in lossy.items() if holds), None)


def _steps(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a pre-tokenizer or decoder, which may be a sequence of such."""
    if part is not None and part["type"] == "Sequence":
        for step in part[inner]:
            yield from _steps(step, inner)
    elif part is not None:
        yield part
