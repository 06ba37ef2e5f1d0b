"""Measure what it costs to compare tokens with their check as they are reached, in processor time per token.

  python -m benchmarks.check_cost

A file of 2^24 tokens is read once in micro-batches of 12 x 1024, in order and shuffled, as training reads it, without
and with the comparison, side by side in one process. The pass at the first start (ids and hashes) is timed too.
Processor time hardly depends on what else the machine does; the disk is left out, because the file is in memory.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

from harness.run.files import ROOT
from harness.tokens.checked_tokens import CheckedTokens, check_tokens
from harness.tokens.token_files import TokenFile, open_split

TOKENS, SIZE, LENGTH, REPEATS = 2**24, 12, 1024, 5
OUTPUT = ROOT / "benchmarks" / "results" / "check_cost.txt"


def read_all(file: TokenFile | CheckedTokens, order: list[int], length: int) -> float:
    """Read sequences in an order; return the processor seconds."""
    began = time.process_time()
    for sequence in order:
        file.read(sequence * length, length + 1)
    return time.process_time() - began


def main() -> None:
    """Measure, print and store."""
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "mine").mkdir()
        tokens = np.random.default_rng(0).integers(0, 50257, TOKENS + 1).astype(np.uint16)
        save_file({"tokens": tokens}, Path(temporary) / "mine" / "train.safetensors")
        file = open_split(Path(temporary), "mine", "train")
        began = time.process_time()
        check = check_tokens(file, 0, TOKENS + 1, 50257)
        first = time.process_time() - began
        orders: dict[str, tuple[list[int], int]] = {
            "in order": (list(range(TOKENS // (SIZE * LENGTH))), SIZE * LENGTH),
            "shuffled": (np.random.default_rng(1).permutation(TOKENS // LENGTH).tolist(), LENGTH),
        }
        makers: tuple[Callable[[], TokenFile | CheckedTokens], ...] = (
            lambda: file,
            lambda: CheckedTokens(file, check),
        )
        lines = [f"first start: {1e9 * first / TOKENS:.1f} ns a token to check all ids and hash all tokens twice"]
        for name, (order, length) in orders.items():
            plain, checked = (
                median(seconds)
                for seconds in zip(
                    *([read_all(make(), order, length) for make in makers] for _ in range(REPEATS)), strict=True
                )
            )
            found = f"{1e9 * plain / TOKENS:.1f} ns a token to read, {1e9 * checked / TOKENS:.1f} to read and compare"
            lines.append(f"{name}: {found} (once through the file)")
    text = "\n".join(["python -m benchmarks.check_cost", *lines]) + "\n"
    sys.stdout.write(text)
    OUTPUT.write_text(text)


if __name__ == "__main__":
    main()
