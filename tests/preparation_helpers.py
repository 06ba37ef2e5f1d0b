"""Corpora in every format, and what came of preparing them."""

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

try:
    from compression import zstd
except ImportError:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress,
}  # fmt: skip

TEXTS = [
    "Every effort moves you",
    "  two   spaces\tand tabs \n\n\n\nand lines  ",
    "a document that says <|endoftext|> and <|endoftext|>",
    "Grüße, 日本語のテキスト, مرحبا, 👩‍👩‍👧‍👦 and e\u0301",
    "line one\nline two\n",
    "\u0085next line, \u2028 separator, \ufeff mark, \x00 nul, \x1c control",
    "x" * 5000,
    "one",
    *(f"Document {number}: " + "the quick brown fox, " * (number % 17) for number in range(80)),
]


def write_corpus(path: Path, texts: Sequence[str | None], row_group_size: int = 7) -> Path:
    """Write texts as the format that the name says, compressed as it says; a .txt holds the only text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = path.suffix if path.suffix in COMPRESS else ""
    kind = Path(path.name.removesuffix(compression)).suffix
    if kind == ".jsonl":
        raw = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)).encode()
    elif kind == ".parquet":
        sink = pyarrow.BufferOutputStream()
        columns = {"id": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())}
        pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=row_group_size)
        raw = sink.getvalue().to_pybytes()
    else:
        (text,) = texts
        raw = (text or "").encode()
    path.write_bytes(COMPRESS[compression](raw))
    return path


def splits(folder: Path) -> dict[str, NDArray[Any]]:
    """Read both splits' tokens."""
    return {name: load_file(folder / f"{name}.safetensors")["tokens"] for name in ("train", "validation")}


def metadata(folder: Path, split: str = "train") -> dict[str, str]:
    """Read a split's metadata."""
    with safe_open(folder / f"{split}.safetensors", framework="numpy") as file:
        found: dict[str, str] = file.metadata()
    return found


def all_tokens(folder: Path) -> list[int]:
    """Return the tokens of a dataset whose validation split is its end."""
    found = splits(folder)
    return [int(token) for token in np.concatenate([found["train"], found["validation"]])]


def file_bytes(folder: Path) -> list[bytes]:
    """Return the bytes of both files."""
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("train", "validation")]
