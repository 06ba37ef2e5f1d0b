"""Committed studies are judged anew to the verdicts that their pages print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.mark.parametrize("readme", sorted((ROOT / "studies").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_a_study_still_comes_to_its_verdicts(readme: Path) -> None:
    (experiment,) = [*readme.parent.glob("*/experiment.json"), *readme.parent.glob("*/plan.json")]
    words = ["experiment.py", "compare", "--experiment", experiment, "--format", "json"]
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
