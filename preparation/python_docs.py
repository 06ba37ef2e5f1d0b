"""The English documentation inside this Python installation: two corpora that need no network."""

import ast
import importlib.metadata
import itertools
import multiprocessing
import os
import re
import sysconfig
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.run.files import ROOT

# Folders whose docstrings are written for test runners, not readers.
TEST_FOLDERS = {"test", "tests", "testing", "_tests", "idle_test", "site-packages", "__pycache__"}


SECTION = re.compile(r"\n(?=[^\n]+\n([*=~^-])\1{3,}\n)")  # before a heading and the line that underlines it
SHORTEST_SECTION = 200  # characters


def python_reference() -> Iterator[str]:
    """Yield the sections of the language reference, as `pydoc` has it: prose, with an example here and there.

    Topics of `pydoc` overlap, so a paragraph that an earlier section had is left out; what is held out is then in no
    other document.
    """
    from pydoc_data import topics  # a large table that only this function needs

    seen: set[str] = set()
    for _, topic in sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        for section in SECTION.sub("\0", topic.strip()).split("\0"):
            paragraphs = [part for part in section.strip().split("\n\n") if part not in seen]
            seen.update(paragraphs)
            text = "\n\n".join(paragraphs)
            if len(text) >= SHORTEST_SECTION:
                yield text


def python_docs() -> Iterator[str]:
    """Yield the `pydoc` topics, and one document for each module with docstrings.

    The modules are those of the standard library and of the packages that this project depends on. They are parsed,
    never imported.
    """
    from pydoc_data import topics  # a large table that only this function needs

    paths = [path for _, path in documented_modules()]
    with ProcessPoolExecutor(os.cpu_count(), initializer=_end_with_parent) as pool:
        texts = pool.map(docstrings, paths, chunksize=16)  # now: forking is unsafe once the caller has threads
        for _, topic in sorted(topics.topics.items()):
            yield topic.strip()
        yield from filter(None, texts)


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL; it would otherwise wait for work for ever."""

    def exit_after_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def documented_modules() -> list[tuple[str, Path]]:
    """Return names and paths of the modules whose docstrings `python-docs` holds, sorted by name."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    modules = [(f"python/{path.relative_to(standard_library)}", path) for path in standard_library.rglob("*.py")]
    for package in _dependencies():
        files = importlib.metadata.files(package) or []
        modules += [(str(file), Path(str(file.locate()))) for file in files if file.suffix == ".py"]
    return sorted((name, path) for name, path in modules if not TEST_FOLDERS & set(Path(name).parts))


def _dependencies() -> list[str]:
    """Return the names of the project's own dependencies, without versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted(
        "".join(itertools.takewhile(lambda c: c.isalnum() or c in "-_", entry)) for entry in project["dependencies"]
    )


def docstrings(path: Path) -> str:
    """Return a module's docstrings in source order, each but the first below its qualified name; "" if none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
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


@dataclass(frozen=True)
class EmbeddedText:
    """A corpus inside this Python installation."""

    read: Callable[[], Iterator[str]]
    """Yields its documents."""
    size: int
    """About so many bytes, for the progress bar and the estimate of disk space."""


EMBEDDED = {
    "python-docs": EmbeddedText(python_docs, 18_000_000),
    "python-reference": EmbeddedText(python_reference, 400_000),
}
