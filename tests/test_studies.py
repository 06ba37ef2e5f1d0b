"""Committed studies are judged anew to the verdicts that their pages print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

STUDIES = ROOT / "studies"
NAMES = ("*/experiment.json", "*/plan.json", "tokens.csv")
JUDGED = [path for page in STUDIES.glob("*/README.md") for name in NAMES for path in page.parent.glob(name)]


@pytest.mark.parametrize("judged", sorted(JUDGED), ids=lambda path: str(path.relative_to(STUDIES)))
def test_a_study_still_comes_to_its_verdicts(judged: Path) -> None:
    is_table = judged.suffix == ".csv"
    readme = STUDIES / judged.relative_to(STUDIES).parts[0] / "README.md"
    what = ["--losses", judged, "--baseline", "reached"] if is_table else ["--experiment", judged]
    words = ["experiment.py", "compare", *what, "--format", "json"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    arms = json.loads(done.stdout)["arms"]
    printed = [table for table in tables(readme) if {arm["recipe"] for arm in arms} <= table.keys()]
    assert arms
    assert printed, "no table of the page has all arms"
    for arm in arms:
        row = printed[0][arm["recipe"]]
        assert row["verdict"] == arm["verdict"]
        assert float(row["Δ"]) == pytest.approx(arm["difference"], abs=1e-6)


def tables(page: Path) -> list[dict[str, dict[str, str]]]:
    """Return the tables of verdicts on a page: rows by their recipe, each by its headings."""
    found: list[dict[str, dict[str, str]]] = []
    headings: list[str] = []
    for line in page.read_text().splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ") if line.startswith("| ") else []
        if not headings and "verdict" in cells:
            found.append({})
            headings = cells
        elif headings and cells:
            found[-1][cells[0]] = dict(zip(headings, cells, strict=False))
        elif not line.startswith("|"):
            headings = []
    return found
