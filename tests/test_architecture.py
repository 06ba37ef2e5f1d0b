"""The rules of the house: who imports whom, how long things may get, and that nothing is read behind one's back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

COMMANDS = {"ddp_train", "test_loss", "test_smoke", "prepare_dataset", "plan_runs", "compare_runs", "report"}
COMMANDS |= {"import_weights", "export_hf", "ift_respond", "ift_judge"}
RESEARCHER = {"model", "data"}
STAGE = {"stage"}
# Tier of each room in harness/. A room imports `errors` and lower tiers; plan and run_folder also import config.
TIERS = {
    "errors": -1,
    "faults": -1,
    "console": -1,
    "background": -1,
    "config": 0,
    "plan": 0,
    "run_folder": 0,
    "command_line": 0,
    "train_state": 0,
    "watch": 0,
    "randomness": 1,
    "tokenizer": 1,
    "token_files": 1,
    "loss": 1,
    "key_value_cache": 1,
    "sampling": 1,
    "distributed": 1,
    "optim": 2,
    "checkpoint": 2,
    "metrics": 2,
    "loggers": 2,
    "messages": 2,
    "charts": 2,
    "evaluate": 2,
    "account": 2,
    "microbatch": 1,
    "resume": 3,
}
SAME_TIER = {
    ("plan", "config"), ("run_folder", "config"), ("command_line", "config"), ("command_line", "run_folder"),
    ("sampling", "tokenizer"),
}  # fmt: skip
# The rooms of every other package, and the highest tier of harness/ that they may import. A room imports those before
# it in its own package, and none of another's but for `BELOW`.
ROOMS = {
    "study": [
        "statistics", "designs", "ledger", "experiment", "results", "noise", "verdicts", "effects", "assemble",
        "tables", "drawing", "page",
    ],
    "exchange": ["hugging_face", "published", "vocabulary", "parity", "model_card"],
    "preparation": [
        "settings", "sources", "hub", "python_docs", "readers", "encoding", "duplicates", "token_writer", "work",
        "prepare",
    ],
    "instruction": [
        "recipe", "items", "examples", "scores", "journal", "answers", "compare", "measures", "prompt", "client",
        "judging", "strength", "ranking", "page", "finetune", "respond", "respondent", "own_words", "own_set",
    ],
}  # fmt: skip
HIGHEST_TIER = {"study": 0, "exchange": 0, "preparation": 1, "instruction": 0}
# Fine-tuning is training, so it takes the optimizer's side and the writing of tensors from tier 2.
HIGHEST_TIER_OF_ROOM = {"examples": 1, "finetune": 2, "respond": 1, "respondent": 2, "own_set": 1}
# Models are compared by the estimators, words and drawings of studies.
BELOW = {"instruction": {"study"}}
JUDGING = ["journal", "answers", "compare", "prompt", "client", "judging", "strength", "ranking", "page"]
PACKAGES = ["harness", *ROOMS]
TORCH_FREE = [
    "harness.run.config",
    "harness.run.plan",
    "harness.run.run_folder",
    "harness.run.errors",
    "harness.observers.charts",
]
TORCH_FREE += ["harness.observers.loggers", "harness.observers.notifications"]
TORCH_FREE += [f"{package}.{room}" for package in ("study", "preparation") for room in ROOMS[package]]
TORCH_FREE += ["harness.tokens.token_files", "plan_runs", "compare_runs", "report", "prepare_dataset"]
TORCH_FREE += [f"instruction.{room}" for room in JUDGING] + ["ift_judge"]
SOURCES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))])
LONGEST = {"main": 80, "train": 70}


def imports_of(path: Path) -> set[str]:
    """Give the project's own modules that a file imports, as `model` or `harness.run.plan`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    ours = COMMANDS | RESEARCHER | STAGE | {*PACKAGES, "tests"}
    return {name for name in found if name.split(".")[0] in ours}


def test_every_file_has_a_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | RESEARCHER | STAGE
    assert {path.stem for path in (ROOT / "harness").glob("*.py")} == TIERS.keys() | {"__init__"}
    for package, rooms in ROOMS.items():
        assert {path.stem for path in (ROOT / package).glob("*.py")} == {*rooms, "__init__"}
    assert not any((ROOT / package / "__init__.py").read_text() for package in PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    imported = imports_of(path)
    assert not imported & (COMMANDS | {"tests"})
    rooms = {name.removeprefix("harness.") for name in imported if name.startswith("harness.")}
    packages = {name.split(".")[0] for name in imported} & {*ROOMS}
    if path.parent == ROOT:
        if path.stem in RESEARCHER:
            assert all(TIERS[room] <= 1 for room in rooms)
            assert not imported & (RESEARCHER | STAGE)
            assert not packages
        return
    assert not imported & (RESEARCHER | STAGE)
    package = path.parent.name
    if package in ROOMS:
        assert packages <= {package} | BELOW.get(package, set())
        highest = HIGHEST_TIER[package]
        if package == "instruction":
            highest = HIGHEST_TIER_OF_ROOM.get(path.stem, highest)
        assert all(TIERS[room] <= highest for room in rooms)
        own = [name.split(".")[1] for name in imported if name.startswith(f"{package}.")]
        assert all(ROOMS[package].index(room) < ROOMS[package].index(path.stem) for room in own)
        return
    assert not packages
    for room in rooms:
        is_lower = TIERS[room] < TIERS.get(path.stem, 0) or room == "errors"
        assert is_lower or (path.stem, room) in SAME_TIER, f"{path.stem} imports {room}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_grows_past_a_page(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST.get(node.name, 40), f"{node.name} has {length} lines"
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([p for p in parameters if p.arg != "self"]) <= 6, f"{node.name} has too many parameters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_one_room(path: Path) -> None:
    if path.stem not in COMMANDS | {"distributed", "faults"}:
        assert "os.environ" not in path.read_text()
        assert "getenv" not in path.read_text()


def test_planning_and_drawing_need_no_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None\nimport {', '.join(TORCH_FREE)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
