"""Tokenise text into OUT_DIR/train.safetensors and OUT_DIR/validation.safetensors.

SOURCE is a folder or a glob of .txt and .md files, one document each, or python-docs: the English documentation
inside this Python installation, which needs no network.

  python prepare_dataset.py "books/*.txt" datasets/books
"""

import argparse
import ast
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import struct
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from harness.errors import ConfigError, DataError, exit_status_of
from harness.tokenizer import END_OF_TEXT_ID, gpt2_encoding

ROOT = Path(__file__).parent
TEXT_SUFFIXES = (".txt", ".md")
# Folders whose docstrings are written for test runners, not readers.
TEST_FOLDERS = {"test", "tests", "testing", "_tests", "idle_test", "site-packages", "__pycache__"}
DOCUMENTS_AT_ONCE = 256
HEADER_BYTES = 4096  # of the safetensors file, padded with spaces because the length is known only at the end


@dataclass(frozen=True)
class Document:
    """One text; its name is used in errors only."""

    name: str
    text: str


def main() -> None:
    """Read documents, tokenise them, and write both splits."""
    arguments = parse_arguments()
    documents = python_docs() if arguments.source == "python-docs" else text_files(arguments.source)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(TokenWriter(arguments.out_dir / f"{split}.safetensors", arguments.source))
            for split in ("train", "validation")
        )
        write_splits(documents, train, validation, arguments.validation_fraction, arguments.seed)
    for writer in (train, validation):
        print(f"{writer.path}: {writer.documents:,} documents, {writer.tokens:,} tokens")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a folder, a glob, or python-docs")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="for example datasets/books")
    parser.add_argument("--validation-fraction", type=_fraction, default=0.01, help="of the documents (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of validation documents (default 0)")
    return parser.parse_args()


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number between 0 and 1")
    return value


def text_files(source: str) -> Iterator[Document]:
    """Find the text files of a folder (at any depth) or a glob, and give them one by one in the order of names."""
    if source.startswith("hf:"):
        raise ConfigError(f"SOURCE: found {source}, wanted a folder, a glob or python-docs")
    if Path(source).is_dir():
        paths = sorted(path for path in Path(source).rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file())
    else:
        paths = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"SOURCE: found no {' or '.join(TEXT_SUFFIXES)} file in {source}")
    if unknown := [path for path in paths if path.suffix not in TEXT_SUFFIXES]:
        raise ConfigError(f"SOURCE: found {unknown[0]}, wanted {' or '.join(TEXT_SUFFIXES)} files")
    return map(_read_text, paths)


def _read_text(path: Path) -> Document:
    try:
        return Document(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found a byte that is not UTF-8 at {error.start}, wanted UTF-8 text") from None


def python_docs() -> Iterator[Document]:
    """Give the `pydoc` topics, and one document for each module with docstrings.

    The modules are those of the standard library and of the packages that this project depends on. They are parsed,
    never imported.
    """
    from pydoc_data import topics  # a large table, wanted here only

    for name, text in sorted(topics.topics.items()):
        yield Document(name, text.strip())
    names, paths = zip(*documented_modules(), strict=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, text in zip(names, pool.map(docstrings, paths, chunksize=16), strict=True):
            if text:
                yield Document(name, text)


def documented_modules() -> list[tuple[str, Path]]:
    """Give names and paths of the modules whose docstrings `python-docs` holds, in the order of their names."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    modules = [(f"python/{path.relative_to(standard_library)}", path) for path in standard_library.rglob("*.py")]
    for package in _dependencies():
        files = importlib.metadata.files(package) or []
        modules += [(str(file), Path(str(file.locate()))) for file in files if file.suffix == ".py"]
    return sorted((name, path) for name, path in modules if not TEST_FOLDERS & set(Path(name).parts))


def _dependencies() -> list[str]:
    """Give the names of the project's own dependencies, without versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted(
        "".join(itertools.takewhile(lambda c: c.isalnum() or c in "-_", entry)) for entry in project["dependencies"]
    )


def docstrings(path: Path) -> str:
    """Give a module's docstrings in source order, each but the first under its qualified name; "" if none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = [ast.get_docstring(tree) or ""]

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if text := ast.get_docstring(child):
                    parts.append(f"{prefix}{child.name}\n{text}")
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return "\n\n".join(part for part in parts if part)


class TokenWriter:
    """Writes one split as documents come, in bounded memory; the file appears under its name when it is whole."""

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.documents = 0
        self.tokens = 0
        self._bytes = 0
        self._source = source
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb")
        self._file.write(b" " * HEADER_BYTES)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, tokens: list[int], text_bytes: int) -> None:
        """Append one document's tokens and a document end."""
        self._file.write(np.array([*tokens, END_OF_TEXT_ID], dtype="<u2").tobytes())
        self.documents += 1
        self.tokens += len(tokens) + 1
        self._bytes += text_bytes

    def _finish(self) -> None:
        header = {
            "__metadata__": {
                "tokenizer": "gpt2",
                "source": self._source,
                "documents": str(self.documents),
                "bytes": str(self._bytes),
            },
            "tokens": {"dtype": "U16", "shape": [self.tokens], "data_offsets": [0, 2 * self.tokens]},
        }
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES - 8:
            raise ConfigError(f"SOURCE: found a name of {len(self._source)} characters, wanted a shorter one")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_BYTES - 8) + text)
        self._file.flush()
        os.fsync(self._file.fileno())
        with safe_open(self._temporary, framework="numpy"):
            pass  # the library itself agrees that the file is well formed
        self._temporary.replace(self.path)


def write_splits(
    documents: Iterable[Document], train: TokenWriter, validation: TokenWriter, fraction: float, seed: int
) -> None:
    """Tokenise documents on all cores and put each into a split, by a keyed hash of its text.

    Where a document goes depends on its text, `fraction` and `seed` alone. The last one goes to a split that would
    be empty; a single document is cut in two, at `fraction` from its end.
    """
    encoding = gpt2_encoding()
    remaining = iter(documents)
    held_back: Document | None = None
    with tqdm(unit=" documents") as bar:
        while batch := list(itertools.islice(remaining, DOCUMENTS_AT_ONCE)):
            ready = [held_back, *batch[:-1]] if held_back else list(batch[:-1])
            held_back = batch[-1]
            texts = [document.text for document in ready]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            for text, tokens in zip(texts, encoded, strict=True):
                writer = validation if _is_held_out(text, fraction, seed) else train
                writer.add(tokens, len(text.encode()))
            bar.update(len(ready))
            bar.set_postfix(tokens=f"{train.tokens + validation.tokens:,}", refresh=False)
        if held_back is None:
            raise DataError("SOURCE: found no document, wanted at least one")
        last = encoding.encode_ordinary(held_back.text)
        if not train.documents and not validation.documents:
            cut = round(len(last) * (1 - fraction))
            for writer, part in ((train, last[:cut]), (validation, last[cut:])):
                writer.add(part, len(encoding.decode_bytes(part)))
        else:
            is_held_out = _is_held_out(held_back.text, fraction, seed) if validation.documents else True
            writer = validation if is_held_out and train.documents else train
            writer.add(last, len(held_back.text.encode()))
        bar.update(1)


def _is_held_out(text: str, fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
