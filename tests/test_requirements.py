"""What the set-up commands install is what pyproject.toml asks for, and every file but torch's has a hash."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HASHES = r"(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}.*\n)*)"
PINNED = re.compile(rf"^(?P<name>[\w.-]+)==(?P<version>[^ ;\\]+)[^\\\n]*\\?\n{HASHES}", re.MULTILINE)


@pytest.mark.parametrize("name", ["train", "dev"])
def test_every_need_is_pinned_with_hashes(name: str) -> None:
    needs = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"]["dev"] if name == "dev" else [])]
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text  # no address of anybody's mirror
    pinned: dict[str, set[str]] = {}
    for match in PINNED.finditer(text):
        assert match["hashes"], match["name"]
        pinned.setdefault(match["name"], set()).add(match["version"])
    assert len(pinned) == len(set(re.findall(r"^[\w.-]+(?===)", text, re.MULTILINE)))
    assert "torch" not in pinned  # whose build depends on the machine
    for need in map(Requirement, needs):
        if need.name == "torch":
            continue
        versions = pinned[re.sub(r"[._]", "-", need.name.lower())]
        assert all(need.specifier.contains(version) for version in versions), need
