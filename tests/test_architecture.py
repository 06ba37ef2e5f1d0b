"""The rules of the house: who may look into which room, how long things may get, where the environment is read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# A room may import from those before it; observers and report from none of each other.
GROUND_FLOOR = {
    "run": {"run"},
    "tokens": {"run", "tokens"},
    "engine": {"run", "tokens", "engine"},
    "observers": {"run", "tokens", "engine", "observers", "report"},
    "report": {"run", "report"},
}
# What else each package, and model.py and data.py, may import besides harness.
ABOVE = {
    "model": set(),
    "data": set(),
    "training": {"training", "model", "data"},
    "study": {"study"},
    "exchange": {"exchange"},
    "preparation": {"preparation"},
    "instruction": {"instruction", "study"},
}
COMMANDS = {path.stem for path in ROOT.glob("*.py")} - ABOVE.keys()
OURS = {"harness", *ABOVE, *COMMANDS}
FILES = [path for name in OURS for path in [*(ROOT / name).rglob("*.py"), *ROOT.glob(f"{name}.py")]]
SOURCES = sorted(path for path in FILES if path.name != "__init__.py")
WITHOUT_TORCH = [
    "experiment", "prepare_dataset", "training.arguments", "harness.engine.costs", "harness.observers.observers",
]  # fmt: skip
LONGEST = {"main": 80, "train": 60}


def imports_of(path: Path) -> set[str]:
    """Return the project's own modules that a file imports, as `model` or `harness.run.plan`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = ROOT / node.module.replace(".", "/")
            found |= {f"{node.module}.{alias.name}" if inside.is_dir() else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS | {"tests", "benchmarks"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_look_only_where_they_may(path: Path) -> None:
    place = path.relative_to(ROOT).with_suffix("").parts
    imported = [name.split(".") for name in imports_of(path)]
    packages = {name[0] for name in imported} - {"harness"}
    if place[0] in COMMANDS:
        assert packages <= ABOVE.keys()
    elif place[0] == "harness":
        assert not packages
        assert {name[1] for name in imported} <= GROUND_FLOOR[place[1]]
    else:
        assert packages <= ABOVE[place[0]]


def test_nothing_goes_round_in_a_circle() -> None:
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports_of(path) for path in SOURCES}
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_grows_past_a_page(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            longest = LONGEST.get(node.name, 40) if path.stem in COMMANDS else 40
            assert length <= longest, f"{node.name} has {length} lines"
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([p for p in parameters if p.arg not in ("self", "cls")]) <= 6, (
                f"{node.name}: too many parameters"
            )


def test_the_root_has_room_for_nine() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 9
    assert not any(path.read_text() for path in FILES if path.name == "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_one_room(path: Path) -> None:
    if path.stem not in COMMANDS | {"distributed", "failpoints"}:
        assert "os.environ" not in path.read_text()
        assert "getenv" not in path.read_text()


def test_planning_judging_and_drawing_need_no_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None\nimport {', '.join(WITHOUT_TORCH)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)
