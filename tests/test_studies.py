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
    table = [line.split(" | ") for line in readme.read_text().splitlines() if line.startswith("| ")]
    headings = next(row for row in table if "verdict" in row)
    rows = {
        row[0].removeprefix("| "): dict(zip(headings, row, strict=False))
        for row in table
        if len(row) == len(headings)
    }
    arms = json.loads(done.stdout)["arms"]
    assert len(arms) >= 5
    for arm in arms:
        printed = rows[arm["recipe"]]
        assert printed["verdict"] == arm["verdict"]
        assert float(printed["Δ"]) == pytest.approx(arm["difference"], abs=1e-6)
