"""A table of test losses is read whole, or refused with every fault and its line."""

from pathlib import Path

import pytest

from harness.run.errors import ConfigError
from study.losses_table import read_losses
from study.results import Result

HEADER = "run,recipe,init_seed,train_seed,test_loss"
WITH_TOKENS = f"{HEADER},steps,tokens,test_set"


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "losses.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_is_right_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path, WITH_TOKENS, "a,base,1,1,3.6,10,640,t", "", "b,base,,, 3.7e0 ,10,640,t", "c,it,1,1,NaN,10,640,t"
    )
    assert read_losses(path) == [
        Result("a", "base", "1", "1", 3.6), Result("b", "base", "", "", 3.7), Result("c", "it", "1", "1", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "complaints"),
    [
        ([HEADER], ["found no rows"]),
        ([f"{HEADER},note", "a,base,,,3.6,x"], ["found columns"]),
        ([f"{HEADER},run", "a,base,,,3.6,x"], ["found columns"]),
        (["run,recipe,test_loss", "a,base,3.6"], ["found columns"]),
        ([HEADER, "a,base,,,3.6,7", "b,base,,3.6"], ["line 2: found 6 values, wanted 5", "line 3: found 4 values"]),
        ([HEADER, "a,base,,,3_6", "b,base,,,"], ["line 2: test_loss: found '3_6'", "line 3: test_loss: found ''"]),
        ([HEADER, "a,base,1,1,3.6", "b,it,1,1,3.5", "c,base,1,1,3.7"], ["line 4: found recipe 'base'"]),
        ([HEADER, "a,base,1,1,3.6", "a,it,1,1,3.5"], ["line 3: run 'a' appears twice, first in line 2"]),
        ([WITH_TOKENS, "a,base,1,1,3.6,10,640,t", "b,it,1,1,3.5,20,640,t"], ["line 3: steps: found '20'"]),
        ([WITH_TOKENS, "a,base,1,1,3.6,10,640,t", "b,it,1,1,3.5,10,641,t"], ["line 3: tokens: found '641'"]),
        ([WITH_TOKENS, "a,base,1,1,3.6,10,640,t", "b,it,1,1,3.5,10,640,u"], ["line 3: test_set: found 'u'"]),
    ],
)  # fmt: skip
def test_every_fault_has_its_line(tmp_path: Path, lines: list[str], complaints: list[str]) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        read_losses(path)
    assert caught.value.exit_status == 2
    assert len(caught.value.lines) == len(complaints)
    for line, complaint in zip(caught.value.lines, complaints, strict=True):
        assert line.startswith(f"{path}: ")
        assert complaint in line
