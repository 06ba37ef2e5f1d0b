"""What happens at a look: who stops, who goes on with whose seeds, and what is written down."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.run.errors import ConfigError
from study.designs import Intervention, make_design
from study.experiment import Experiment, load_experiment, make_experiment, save_experiment
from study.experiment import TestSet as Scored
from study.looking import (
    DECIDED,
    HOPELESS,
    LAST,
    Look,
    LookRecord,
    as_looked_at,
    next_looks,
    note_unplanned,
    plan_looks,
    read_record,
    runs_at,
    take_look,
    write_record,
)
from study.statistics import Estimate

NAMES = ("a", "b", "c")


def experiment(seeds: int = 9, looks: int | None = 3) -> Experiment:
    changes = [Intervention(name, train={"learning_rate": 0.01 * (place + 2)}) for place, name in enumerate(NAMES)]
    design = make_design("one-at-a-time", NAMES)
    made = make_experiment("study", "base", design, changes, range(1, seeds + 1), Scored(0, 2))
    return made if looks is None else replace(made, looks=plan_looks(made, looks, "pocock"))


def empty_look(seeds: int) -> Look:
    return Look(seeds, {}, {}, {}, {}, {})


def test_looks_are_written_with_their_levels_and_read_back(tmp_path: Path) -> None:
    planned = experiment()
    assert planned.looks is not None
    assert planned.looks.seeds == (3, 6, 9)
    one, two, three = planned.looks.levels
    assert 0.05 > one[0] > two[0] > three[0] > 0
    save_experiment(planned, tmp_path / "experiment.json")
    assert load_experiment(tmp_path / "experiment.json").looks == planned.looks


@pytest.mark.parametrize(("seeds", "looks"), [(3, 3), (9, 1), (2, 2)])
def test_looks_need_seeds(seeds: int, looks: int) -> None:
    with pytest.raises(ConfigError, match="--looks: found"):
        experiment(seeds, looks)


def test_factorials_have_no_looks() -> None:
    design = make_design("full-factorial", NAMES)
    changes = [Intervention(name, train={"learning_rate": 0.02}) for name in NAMES]
    made = make_experiment("study", "base", design, changes, range(1, 7), Scored(0, 2))
    with pytest.raises(ConfigError, match="full-factorial"):
        plan_looks(made, 2, "pocock")


def test_decided_and_hopeless_arms_stop_and_their_seeds_go_to_the_rest() -> None:
    planned = experiment()
    record = LookRecord(looks=(empty_look(3),), to_come=(6, 9))
    estimates: dict[str, Estimate | None] = {
        "a": Estimate(-1.0, 0.004, 2), "b": Estimate(-0.03, 0.012, 2), "c": Estimate(0.02, 0.2, 2),
    }  # fmt: skip
    look = take_look(record, "pocock", estimates, 0.01, NAMES)
    assert look.verdicts["a"] == "HELPS"
    assert look.stopped == {"a": DECIDED, "c": HOPELESS}
    record = replace(record, looks=(look,))
    later = next_looks(planned, record, ["b"])
    assert len(later) == 2
    assert later[-1] > 9
    runs = runs_at(planned, replace(record, to_come=later), later[-1])
    assert len(runs) <= len(planned.runs)
    counts = {arm: sum(run.arm == arm for run in runs) for arm in ("baseline", *NAMES)}
    assert counts == {"baseline": later[-1], "a": 3, "b": later[-1], "c": 3}
    assert len({run.run for run in runs}) == len(runs)


def test_a_stopped_arm_keeps_its_word_and_the_last_look_ends_it() -> None:
    first = take_look(
        LookRecord((empty_look(3),), (6,)), "pocock",
        {"a": Estimate(-1.0, 0.004, 2), "b": Estimate(-0.02, 0.008, 2)}, 0.01, ["a", "b"],
    )  # fmt: skip
    assert list(first.stopped) == ["a"]
    second = take_look(
        LookRecord((first, empty_look(6)), ()), "pocock",
        {"a": Estimate(-1.0, 0.004, 2), "b": Estimate(-0.01, 0.01, 5)}, 0.01, ["b"],
    )  # fmt: skip
    assert second.verdicts["a"] == "HELPS"
    assert second.stopped == {"b": LAST}


def test_a_plan_with_looks_is_judged_as_the_latest_look_saw_it(tmp_path: Path) -> None:
    planned = experiment()
    with pytest.raises(ConfigError, match="no look has been taken yet; the first is after 3 seeds"):
        as_looked_at(planned, tmp_path)
    write_record(tmp_path, LookRecord((empty_look(3),), (6, 9)))
    assert read_record(tmp_path) == LookRecord((empty_look(3),), (6, 9))
    assert [run.seed for run in as_looked_at(planned, tmp_path).runs] == [1] * 4 + [2] * 4 + [3] * 4
    (tmp_path / "looks.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_record(tmp_path)


def test_a_second_look_that_nobody_planned_says_so(tmp_path: Path) -> None:
    growing = experiment(looks=None)
    assert note_unplanned(growing, tmp_path, 2, 3) == ""
    assert note_unplanned(growing, tmp_path, 2, 3) == ""
    second = note_unplanned(growing, tmp_path, 4, 3)
    assert "look 2 at a growing experiment (after 2, 4 seeds)" in second
    assert "9% and not 5%" in second or "8% and not 5%" in second or "10% and not 5%" in second
    whole = note_unplanned(growing, tmp_path, 9, 3)
    assert "look 3" in whole
    assert read_record(tmp_path).unplanned == (2, 4)  # the whole plan is the look that was promised


def test_a_finished_experiment_is_judged_without_a_trace(tmp_path: Path) -> None:
    assert note_unplanned(experiment(looks=None), tmp_path, 9, 3) == ""
    assert list(tmp_path.iterdir()) == []


def whole_procedure(generator: np.random.Generator, effects: tuple[float, ...]) -> tuple[dict[str, str], int]:
    """Run an experiment with three looks on made-up losses; give the last words, and the runs it took."""
    planned = experiment()
    assert planned.looks is not None
    losses = {name: generator.standard_normal(20) + effect for name, effect in zip(NAMES, effects, strict=True)}
    baseline = generator.standard_normal(20)
    record, still = LookRecord((), planned.looks.seeds), list(NAMES)
    while record.to_come and still:
        count = record.to_come[0]
        record = replace(record, looks=(*record.looks, empty_look(count)), to_come=record.to_come[1:])
        estimates: dict[str, Estimate | None] = {}
        for name in NAMES:
            difference = (losses[name] - baseline)[: record.stopped().get(name, count)]
            error = float(difference.std(ddof=1) / np.sqrt(len(difference)))
            estimates[name] = Estimate(float(difference.mean()), error, len(difference) - 1)
        look = take_look(record, "pocock", estimates, 0.01, still)
        record = replace(record, looks=(*record.looks[:-1], look))
        still = [name for name in still if name not in look.stopped]
        record = replace(record, to_come=next_looks(planned, record, still))
    return dict(record.looks[-1].verdicts), len(runs_at(planned, record, record.looks[-1].seeds))


def test_the_whole_procedure_keeps_its_error_rate_and_its_budget() -> None:
    generator, wrong, studies, most = np.random.default_rng(21), 0, 250, 0
    for _ in range(studies):
        words, runs = whole_procedure(generator, (0.0, 0.0, 0.0))
        wrong += any(word in ("HELPS", "HURTS") for word in words.values())
        most = max(most, runs)
    assert wrong / studies < 0.085
    assert most <= 36


def test_looks_save_runs_where_effects_are_large() -> None:
    generator = np.random.default_rng(22)
    taken = [whole_procedure(generator, (-6.0, -6.0, -6.0)) for _ in range(40)]
    assert np.mean([runs for _, runs in taken]) < 30
    assert np.mean([list(words.values()).count("HELPS") for words, _ in taken]) > 2.5


def test_runs_of_earlier_experiments_are_read_without_looks(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    save_experiment(experiment(looks=None), tmp_path / "experiment.json")
    assert "looks" not in (tmp_path / "experiment.json").read_text()
    assert load_experiment(tmp_path / "experiment.json").looks is None
