"""Finds and reads the token files of a split: safetensors, nanoGPT and llm.c.

    DATASET/train.safetensors     DATASET/validation.safetensors    one 1-D tensor `tokens`
    DATASET/train.bin             DATASET/val.bin                   nanoGPT: raw uint16
    DATASET/*_train_000001.bin    DATASET/*_val_000000.bin          llm.c: shards, each with a header of 256 int32

The first that exists is used. A raw file has no header to recognise it by, so its ids are checked against the
vocabulary before use, as for every split. Files are not kept open or mapped: memory stays flat, and a file that is
cut or lies on a bad disk is an error and no signal.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from harness.run.errors import DataError, nearest_hint
from harness.run.files import open_regular

SPLITS = ("train", "validation")
TENSOR = "tokens"
DTYPES = {"U16": "<u2", "I32": "<i4", "U32": "<u4"}
BIN_NAMES = {"train": ("train",), "validation": ("val", "validation")}

# The header of llm.c's dev/data/data_common.py: 256 int32, of which the first three are a magic number, the version
# and the number of tokens. Read as uint16, the magic number begins with 55432, which is not a GPT-2 id, so no raw
# file of GPT-2 tokens can begin so.
LLMC_MAGIC = 20240520
LLMC_VERSION = 1
LLMC_HEADER_BYTES = 4 * 256


@dataclass(frozen=True)
class Shard:
    """Tokens in a file from byte `offset` on; `length` in tokens."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class TokenFile:
    """One split on disk, in one file or several; `length` in tokens."""

    dtype: str
    """As safetensors names it: a key of DTYPES."""
    metadata: dict[str, str]
    shards: tuple[Shard, ...]

    @property
    def path(self) -> Path:
        """The file, the first of them where there are several."""
        return self.shards[0].path

    @property
    def length(self) -> int:
        """Tokens in the split."""
        return sum(shard.length for shard in self.shards)

    @property
    def is_llmc(self) -> bool:
        """Whether it is llm.c's, whose version 1 is defined to hold GPT-2's tokens."""
        return any(shard.path.suffix == ".bin" and shard.offset for shard in self.shards)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Read tokens [start, start + count) as int64, (count,); fewer at the end of the split. Raises OSError."""
        dtype = np.dtype(DTYPES[self.dtype])
        parts = [np.empty(0, dtype=np.int64)]
        first = 0  # index in the split of the shard's first token
        for shard in self.shards:
            low, high = max(start, first), min(start + count, first + shard.length)
            if low < high:
                offset = shard.offset + dtype.itemsize * (low - first)
                parts.append(np.fromfile(shard.path, dtype, high - low, offset=offset).astype(np.int64))
            first += shard.length
        return np.concatenate(parts)

    def size_and_times(self) -> tuple[int, int, int]:
        """Return bytes on disk, and the newest times (ns) at which content and inode of the split's files changed."""
        stats = [shard.path.stat() for shard in self.shards]
        newest = max(stat.st_mtime_ns for stat in stats), max(stat.st_ctime_ns for stat in stats)
        return sum(stat.st_size for stat in stats), *newest

    def on_disk(self) -> list[tuple[int, int, int, int, int]]:
        """Return what changes when a file is replaced or written to: device, number, size, times. Raises OSError."""
        stats = [shard.path.stat() for shard in self.shards]
        return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def split_files(folder: Path, split: str) -> list[Path]:
    """Find the file of a split, or its shards in order; an empty list if there are none."""
    candidates = [folder / f"{split}.safetensors", *(folder / f"{name}.bin" for name in BIN_NAMES[split])]
    if found := [path for path in candidates if path.is_file()]:
        return found[:1]
    names = "|".join(BIN_NAMES[split])
    shard = re.compile(rf".+_({names})(_\d+)?\.bin")
    return sorted(path for path in folder.glob("*.bin") if shard.fullmatch(path.name) and path.is_file())


def open_split(datasets_dir: Path, dataset: str, split: str) -> TokenFile:
    """Open a split and check its format; raises DataError naming the file and what is wrong."""
    paths = split_files(datasets_dir / dataset, split)
    if not paths:
        path = datasets_dir / dataset / f"{split}.safetensors"
        others = sorted(folder.name for folder in datasets_dir.glob("*") if split_files(folder, split))
        hint = nearest_hint(dataset, others)
        raise DataError(f"{path}: found no such file, wanted the {split} split of dataset {dataset}{hint}")
    if paths[0].suffix == ".safetensors":
        return _open_safetensors(paths[0])
    _check_shard_names(paths)
    return TokenFile("U16", {}, tuple(map(_open_bin, paths)))


def _open_safetensors(path: Path) -> TokenFile:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if TENSOR not in names:
                raise DataError(f"{path}: found tensors {names}, wanted one named {TENSOR!r}")
            tensor = file.get_slice(TENSOR)
            dtype, shape = tensor.get_dtype(), tensor.get_shape()
            metadata = file.metadata() or {}
        with open_regular(path) as raw:
            header_bytes = int.from_bytes(raw.read(8), "little")
            offset = 8 + header_bytes + json.loads(raw.read(header_bytes))[TENSOR]["data_offsets"][0]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from None
    if dtype not in DTYPES:
        raise DataError(f"{path}: found tokens of type {dtype}, wanted U16, I32 or U32")
    if len(shape) != 1 or shape[0] == 0:
        raise DataError(f"{path}: found tokens of shape {shape}, wanted one dimension and at least one token")
    return TokenFile(dtype, metadata, (Shard(path, offset, shape[0]),))


def _check_shard_names(paths: list[Path]) -> None:
    """Raise DataError if the shards belong to several datasets, or one in between is missing."""
    parts = [re.fullmatch(r"(.*?)(\d*)", path.stem) for path in paths]
    prefixes = [part[1] for part in parts if part]
    if len(set(prefixes)) > 1:
        other = next(path for path, prefix in zip(paths, prefixes, strict=True) if prefix != prefixes[0])
        raise DataError(f"{other}: found beside {paths[0].name}, wanted the shards of one dataset in a folder")
    numbers = [int(part[2]) for part in parts if part and part[2]]
    for before, after in itertools.pairwise(numbers):
        if after != before + 1:
            raise DataError(f"{paths[0].parent}: found shard {before} and then shard {after}, wanted those between")


def _open_bin(path: Path) -> Shard:
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != LLMC_MAGIC:
        if size == 0 or size % 2:
            raise DataError(f"{path}: found {size} bytes, wanted uint16 tokens, two bytes each")
        return Shard(path, 0, size // 2)
    if header[1] != LLMC_VERSION:
        raise DataError(f"{path}: found an llm.c file of version {header[1]}, wanted {LLMC_VERSION} (uint16 tokens)")
    if size != LLMC_HEADER_BYTES + 2 * int(header[2]) or header[2] < 1:
        raise DataError(
            f"{path}: found {size:,} bytes, wanted {LLMC_HEADER_BYTES + 2 * int(header[2]):,} for the "
            f"{header[2]:,} tokens (at least one) that its header names"
        )
    return Shard(path, LLMC_HEADER_BYTES, int(header[2]))
