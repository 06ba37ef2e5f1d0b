"""Designs hold what they promise, and an experiment on disk is the base with nothing changed but what is patched."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.run.config import ModelConfig, TrainConfig, config_from
from harness.run.errors import ConfigError
from harness.run.recipe import recipe_hash
from study.designs import (
    BASELINE,
    DESIGNS,
    LETTERS,
    MAX_FACTORS,
    RESOLUTIONS,
    STACK,
    Arm,
    Design,
    DesignName,
    Intervention,
    alternatives,
    load_interventions,
    make_design,
    parse_generators,
    spell,
    with_stack,
)
from study.experiment import Experiment, documents_of, load_experiment, make_experiment, write_runs
from study.experiment import TestSet as Scored
from tests.helpers import write

Signs = NDArray[np.float64]
TEST_SET = Scored(0, 2)


def signs_of(design: Design) -> Signs:
    """Return the arms as rows of +-1."""
    return np.array([[1.0 if factor in arm.on else -1.0 for factor in design.factors] for arm in design.arms])


def contrasts(design: Design, size: int) -> dict[str, Signs]:
    """Return the columns of all effects of `size` factors, by their letters."""
    signs = signs_of(design)
    return {
        "".join(LETTERS[place] for place in chosen): signs[:, list(chosen)].prod(axis=1)
        for chosen in combinations(range(len(design.factors)), size)
    }


def factors(count: int) -> list[str]:
    return [f"change-{number}" for number in range(count)]


def possible_fractions() -> list[tuple[int, str]]:
    """Return the numbers of factors and the resolutions of which there is a fraction: a half of k factors has k."""
    return [(count, name) for count in range(2, MAX_FACTORS + 1) for name, r in RESOLUTIONS.items() if count >= r]


# --- fractions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "resolution"), possible_fractions())
def test_fraction_is_balanced_and_keeps_apart_what_its_resolution_says(count: int, resolution: str) -> None:
    design = make_design("fraction", factors(count), resolution)
    wanted = RESOLUTIONS[resolution]
    assert len(set(design.arms)) == len(design.arms) == 2 ** (count - len(design.generators)) < 2**count
    mains, pairs = contrasts(design, 1), contrasts(design, 2)
    for column in mains.values():
        assert column.sum() == 0
    for one, other in combinations(mains.values(), 2):
        assert one @ other == 0
    if wanted >= 4:
        assert all(main @ pair == 0 for main in mains.values() for pair in pairs.values())
    if wanted >= 5:
        assert all(one @ other == 0 for one, other in combinations(pairs.values(), 2))
    # The resolution is the smallest number of factors whose product is the same in all arms.
    constant = [
        size for size in range(1, count + 1) for c in contrasts(design, size).values() if abs(c.sum()) == len(c)
    ]
    assert design.resolution() == min(constant) >= wanted


@pytest.mark.parametrize(
    ("count", "resolution", "arms", "reached"),
    [
        (3, "III", 4, 3),
        (4, "III", 8, 4),
        (4, "IV", 8, 4),
        (5, "III", 8, 3),
        (5, "IV", 16, 5),
        (5, "V", 16, 5),
        (6, "III", 8, 3),
        (6, "IV", 16, 4),
        (6, "V", 32, 6),
        (7, "III", 8, 3),
        (7, "IV", 16, 4),
        (7, "V", 64, 7),
        (8, "III", 16, 4),
        (8, "IV", 16, 4),
        (8, "V", 64, 5),
    ],
)
def test_fractions_are_the_smallest_of_the_textbooks(count: int, resolution: str, arms: int, reached: int) -> None:
    # Box, Hunter and Hunter 2005, table 6.22.
    design = make_design("fraction", factors(count), resolution)
    assert (len(design.arms), design.resolution()) == (arms, reached)


def test_default_fraction_of_five_is_the_half_with_everything_apart() -> None:
    design = make_design("fraction", factors(5))
    assert design.generators_in_letters() == ["E=ABCD"]
    assert all(others == [] for _, others in design.aliases())
    assert design.effect_se(1) == 0.5


@pytest.mark.parametrize(
    ("count", "resolution"),
    [(count, name) for count in range(2, 5) for name, r in RESOLUTIONS.items() if count < r],
)
def test_impossible_resolution_is_refused_and_says_what_is_possible(count: int, resolution: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_design("fraction", factors(count), resolution)
    assert caught.value.exit_status == 2
    (line,) = caught.value.lines
    assert f"--resolution {resolution}" in line
    assert f"full-factorial ({2**count} arms)" in line


@pytest.mark.parametrize("name", ["fraction", "full-factorial"])
@pytest.mark.parametrize("count", [1, MAX_FACTORS + 1])
def test_factorials_are_of_two_to_eight(name: DesignName, count: int) -> None:
    with pytest.raises(ConfigError, match=f"found {count} interventions, wanted 2 to 8"):
        make_design(name, factors(count))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_full_factorial_has_every_combination_once(count: int) -> None:
    design = make_design("full-factorial", factors(count))
    wanted = {frozenset(on) for size in range(count + 1) for on in combinations(factors(count), size)}
    assert {frozenset(arm.on) for arm in design.arms} == wanted
    assert len(design.arms) == 2**count
    assert design.resolution() is None
    assert (design.arms[0].name, design.arms[-1].name) == (BASELINE, STACK)
    assert len({arm.name for arm in design.arms}) == 2**count


def test_stack_is_in_every_fraction() -> None:
    for count, resolution in possible_fractions():
        arms = make_design("fraction", factors(count), resolution).arms
        assert [arm.on for arm in arms if arm.name == STACK] == [tuple(factors(count))]


# --- aliases and generators ----------------------------------------------------------------------------------


def aliases_in_letters(design: Design) -> dict[str, list[str]]:
    return {spell(word): [spell(other) for other in others] for word, others in design.aliases()}


@pytest.mark.parametrize(("count", "resolution"), possible_fractions())
def test_aliases_are_the_effects_whose_columns_are_equal(count: int, resolution: str) -> None:
    design = make_design("fraction", factors(count), resolution)
    columns = {**contrasts(design, 1), **contrasts(design, 2)}
    assert len(design.aliases()) == len(columns)
    wanted = {
        letters: {other for other, column in columns.items() if other != letters and (column == mine).all()}
        for letters, mine in columns.items()
    }
    assert {letters: set(others) for letters, others in aliases_in_letters(design).items()} == wanted


def test_aliases_of_a_screening_design() -> None:
    design = make_design("fraction", factors(5), generators=["D=AB", "E=AC"])
    aliases = aliases_in_letters(design)
    assert design.resolution() == 3
    assert aliases["A"] == ["BD", "CE"]
    assert aliases["D"] == ["AB"]
    assert aliases["BC"] == ["DE"]


@pytest.mark.parametrize("texts", [["E=ABCD"], ["D=AB", "E=AC"], ["e=abcd"], ["A=BCDE"], ["D=ABC"]])
def test_generators_hold_in_every_arm(texts: list[str]) -> None:
    design = make_design("fraction", factors(5), generators=texts)
    signs = dict(zip("ABCDE", signs_of(design).T, strict=True))
    assert len(design.arms) == 2 ** (5 - len(texts))
    for text in texts:
        left, right = text.upper().split("=")
        assert (signs[left] == np.prod([signs[letter] for letter in right], axis=0)).all()


def test_generators_are_written_as_they_are_read() -> None:
    words = parse_generators(["F=ABC", "E=BCD"], 6)
    design = Design("fraction", tuple(factors(6)), (), words)
    assert design.generators_in_letters() == ["F=ABC", "E=BCD"]
    assert parse_generators(design.generators_in_letters(), 6) == words


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["E"], "'E', wanted for example E=ABCD"),
        (["=AB"], "wanted for example"),
        (["E=A"], "wanted for example"),
        (["EF=AB"], "wanted for example"),
        (["E=AAB"], "wanted for example"),
        (["E=ABE"], "wanted for example"),
        (["E=-ABCD"], "found - in"),
        (["F=ABCD"], "found F in 'F=ABCD', wanted letters of ABCDE"),
        (["E=ABCD", "E=ABC"], "mixes up main effects"),  # their product is D alone
        (["D=ABC", "E=ABC"], "mixes up main effects"),  # their product is DE
        (["D=AB", "D=AB"], "mixes up main effects"),
        (["C=AB", "D=AB", "E=AB", "A=CD", "B=CE"], "mixes up main effects"),
    ],
)
def test_generators_that_make_no_fraction_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_design("fraction", factors(5), generators=texts)
    assert caught.value.exit_status == 2
    (line,) = caught.value.lines
    assert line.startswith("--generators: found ")
    assert said in line


# --- the other designs ---------------------------------------------------------------------------------------


def test_one_at_a_time() -> None:
    design = make_design("one-at-a-time", ["a", "b", "c"])
    assert design.arms == (Arm(BASELINE, ()), Arm("a", ("a",)), Arm("b", ("b",)), Arm("c", ("c",)))
    assert with_stack(design).arms == (*design.arms, Arm(STACK, ("a", "b", "c")))


def test_leave_one_out() -> None:
    assert make_design("leave-one-out", ["a", "b", "c"]).arms == (
        Arm(BASELINE, ()),
        Arm(STACK, ("a", "b", "c")),
        Arm("without-a", ("b", "c")),
        Arm("without-b", ("a", "c")),
        Arm("without-c", ("a", "b")),
    )
    with pytest.raises(ConfigError, match="wanted at least 2"):
        make_design("leave-one-out", ["a"])


def test_replicates_are_of_the_baseline_alone() -> None:
    assert make_design("replicates", ["a", "b"]).arms == (Arm(BASELINE, ()),)


@pytest.mark.parametrize(("name", "count"), [("leave-one-out", 3), ("full-factorial", 3), ("one-at-a-time", 1)])
def test_stack_is_added_only_where_there_is_none_and_can_be_one(name: DesignName, count: int) -> None:
    with pytest.raises(ConfigError, match="--with-stack"):
        with_stack(make_design(name, factors(count)))


def contrast_weights(design: Design) -> Signs:
    """Return the weights of arm means that make up the design's first effect."""
    if design.is_factorial:
        return signs_of(design)[:, 0] * 2 / len(design.arms)
    weights = np.zeros(len(design.arms))
    weights[[0, -1]] = -1, 1
    return np.ones(1) if design.name == "replicates" else weights


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", DESIGNS)
def test_standard_error_is_that_of_the_contrast(name: DesignName, seeds: int) -> None:
    design = make_design(name, factors(5))
    assert design.effect_se(seeds) == pytest.approx(math.sqrt(sum(contrast_weights(design) ** 2) / seeds))


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, [("one-at-a-time", 2)]),
        (2, [("one-at-a-time", 3), ("leave-one-out", 4), ("full-factorial", 4)]),
        (
            5,
            [
                ("one-at-a-time", 6),
                ("leave-one-out", 7),
                ("fraction", 8),
                ("fraction", 16),
                ("full-factorial", 32),
            ],
        ),
        (9, [("one-at-a-time", 10)]),
    ],
)
def test_alternatives_are_all_designs_smallest_first(count: int, wanted: list[tuple[str, int]]) -> None:
    assert [(design.name, len(design.arms)) for design in alternatives(factors(count))] == wanted


def test_what_a_design_sees() -> None:
    said = {
        (design.name, design.resolution()): design.sees()
        for count in (4, 5)
        for design in [*alternatives(factors(count)), make_design("replicates", [])]
    }
    assert "screening" in said["fraction", 3]
    assert "two-way interactions mixed up with each other" in said["fraction", 4]
    assert said["fraction", 5] == "main effects and two-way interactions"
    assert said["full-factorial", None] == "main effects and every two-way interaction, clear of all others"
    assert said["replicates", None] == "the noise"
    assert len(set(said.values())) == len(said)


# --- interventions -------------------------------------------------------------------------------------------


def test_interventions_are_read(tmp_path: Path) -> None:
    document = {"clip": {"train": {"clipping_max_norm": 3.5}}, "big_2": {"model": {"n_layers": 3}, "train": {"a": 1}}}
    assert load_interventions(write(tmp_path / "i.json", document)) == [
        Intervention("clip", {"clipping_max_norm": 3.5}, {}),
        Intervention("big_2", {"a": 1}, {"n_layers": 3}),
    ]


BAD_INTERVENTIONS: dict[str, object] = {
    "": {"train": {"a": 1}},
    "a b": {"train": {"a": 1}},
    "../a": {"train": {"a": 1}},
    "a.b": {"train": {"a": 1}},
    BASELINE: {"train": {"a": 1}},
    STACK: {"train": {"a": 1}},
    "a": {},
    "b": {"optimizer": {"a": 1}},
    "c": [1],
    "d": {"train": {}},
    "e": {"train": {"a": 1}, "model": None},
}


def test_every_bad_intervention_has_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "i.json", {"good": {"train": {"a": 1}}, **BAD_INTERVENTIONS})
    with pytest.raises(ConfigError) as caught:
        load_interventions(path)
    assert caught.value.exit_status == 2
    assert len(caught.value.lines) == len(BAD_INTERVENTIONS)
    for line, name in zip(caught.value.lines, BAD_INTERVENTIONS, strict=True):
        assert line.startswith(f"{path}: ")
        assert name in line
        assert "\n" not in line


def test_no_intervention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no intervention"):
        load_interventions(write(tmp_path / "i.json", {}))


# --- runs of an experiment -----------------------------------------------------------------------------------

DROPOUT = Intervention("dropout", model={"drop_rate": 0.0})
RATE = Intervention("rate", train={"learning_rate": 0.02})
BOTH = Intervention("both", train={"weight_decay": 0.5}, model={"qkv_bias": True})
BASE_SEEDS = {"random_seed": 9, "init_seed": 8, "order_seed": 7, "dropout_seed": 6}


@pytest.fixture
def runs_dir(make_run: Callable[..., Path]) -> Path:
    """A runs folder with a base whose seeds are all set."""
    return make_run("base", train={**BASE_SEEDS, "notes": "mine"}).parent


def plan(
    interventions: Sequence[Intervention], seeds: Sequence[int] = (1, 2), name: str = "study", stacked: bool = False
) -> Experiment:
    design = make_design("one-at-a-time", [item.name for item in interventions])
    return make_experiment(name, "base", with_stack(design) if stacked else design, interventions, seeds, TEST_SET)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_arms_take_turns_so_that_stopping_early_stays_fair() -> None:
    runs = plan([DROPOUT, RATE], [3, 1]).runs
    assert [run.run for run in runs] == [
        "study-baseline-s3", "study-dropout-s3", "study-rate-s3",
        "study-baseline-s1", "study-dropout-s1", "study-rate-s1",
    ]  # fmt: skip
    assert [run.seed for run in runs] == [3, 3, 3, 1, 1, 1]


def test_only_what_is_patched_changes(runs_dir: Path) -> None:
    experiment = plan([DROPOUT, RATE, BOTH], stacked=True)
    base = {name: json.loads((runs_dir / "base" / f"{name}.json").read_text()) for name in ("model", "train")}
    patches: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        BASELINE: ({}, {}),
        "dropout": ({"drop_rate": 0.0}, {}),
        "rate": ({}, {"learning_rate": 0.02}),
        "both": ({"qkv_bias": True}, {"weight_decay": 0.5}),
        STACK: ({"drop_rate": 0.0, "qkv_bias": True}, {"learning_rate": 0.02, "weight_decay": 0.5}),
    }
    unseeded = {key: value for key, value in base["train"].items() if key not in BASE_SEEDS}
    assert [run.arm for run in experiment.runs] == 2 * list(patches)
    for run in experiment.runs:
        model, train = documents_of(experiment, runs_dir, run)
        notes = train.pop("notes")
        assert model == {**base["model"], **patches[run.arm][0]}
        assert train == {
            **{k: v for k, v in unseeded.items() if k != "notes"},
            **patches[run.arm][1],
            "random_seed": run.seed,
        }
        assert "study" in notes
        assert f"seed {run.seed}" in notes
        assert all(name in notes for name in run.on)


def test_all_seeds_of_a_run_are_its_own(runs_dir: Path) -> None:
    experiment = plan([RATE], [1, 2])
    seeds = []
    for run in experiment.runs:
        _, train = documents_of(experiment, runs_dir, run)
        seeds.append(config_from(TrainConfig, train, "train.json").seeds())
    assert seeds == [dict.fromkeys(("init_seed", "order_seed", "dropout_seed"), seed) for seed in (1, 1, 2, 2)]


def test_replicates_share_a_recipe_and_arms_do_not(runs_dir: Path) -> None:
    experiment = plan([DROPOUT, RATE])
    hashes: dict[str, set[str]] = {}
    for run in experiment.runs:
        model, train = documents_of(experiment, runs_dir, run)
        configs = config_from(ModelConfig, model, "model.json"), config_from(TrainConfig, train, "train.json")
        hashes.setdefault(run.arm, set()).add(recipe_hash(*configs))
    assert all(len(found) == 1 for found in hashes.values())
    assert len(set.union(*hashes.values())) == 3


def test_interventions_that_contradict_each_other_are_refused(runs_dir: Path) -> None:
    other = Intervention("other-rate", train={"learning_rate": 0.03})
    experiment = plan([RATE, other], stacked=True)
    with pytest.raises(ConfigError) as caught:
        write_runs(experiment, runs_dir)
    assert caught.value.exit_status == 2
    (line,) = caught.value.lines
    assert line == "train.json: learning_rate: found set by both rate and other-rate, wanted one of them"
    assert [path.name for path in runs_dir.iterdir()] == ["base"]
    # Each alone is fine.
    write_runs(plan([RATE, other]), runs_dir)


def test_interventions_that_agree_may_share_a_key(runs_dir: Path) -> None:
    same = Intervention("same-rate", train={"learning_rate": 0.02, "weight_decay": 0.3})
    experiment = plan([RATE, same], stacked=True)
    _, train = documents_of(experiment, runs_dir, experiment.runs[3])
    assert experiment.runs[3].arm == STACK
    assert (train["learning_rate"], train["weight_decay"]) == (0.02, 0.3)


def test_what_is_written_is_what_is_read(runs_dir: Path) -> None:
    interventions = [DROPOUT, RATE, BOTH, Intervention("fourth", train={"clipping_max_norm": 1.0})]
    design = make_design("fraction", [item.name for item in interventions], "IV")
    experiment = make_experiment("study", "base", design, interventions, [4, 5], Scored(16, 3))
    path = write_runs(experiment, runs_dir)
    assert path == runs_dir / "study" / "experiment.json"
    read = load_experiment(path)
    assert read == experiment
    assert read.as_design() == design
    for run in experiment.runs:
        written = tuple(json.loads((runs_dir / run.run / f"{name}.json").read_text()) for name in ("model", "train"))
        assert written == documents_of(experiment, runs_dir, run)


def test_writing_twice_changes_nothing(runs_dir: Path) -> None:
    write_runs(plan([RATE]), runs_dir)
    before = tree(runs_dir)
    write_runs(plan([RATE]), runs_dir)
    assert tree(runs_dir) == before


@pytest.mark.parametrize(
    ("interventions", "seeds"),
    [([RATE, DROPOUT], (1, 2)), ([RATE], (1, 3)), ([Intervention("rate", {"seed": 1})], (1,))],
)
def test_another_plan_of_the_same_name_is_refused(
    runs_dir: Path, interventions: list[Intervention], seeds: tuple[int, ...]
) -> None:
    write_runs(plan([RATE]), runs_dir)
    before = tree(runs_dir)
    with pytest.raises(ConfigError, match="found another experiment of this name, wanted a new --name"):
        write_runs(plan(interventions, seeds), runs_dir)
    assert tree(runs_dir) == before


@pytest.mark.parametrize("name", ["model.json", "train.json"])
def test_another_configuration_is_not_overwritten(runs_dir: Path, make_run: Callable[..., Path], name: str) -> None:
    experiment = plan([RATE])
    documents = dict(
        zip(("model.json", "train.json"), documents_of(experiment, runs_dir, experiment.runs[1]), strict=True)
    )
    folder = runs_dir / "study-rate-s1"
    folder.mkdir()
    for file, value in documents.items():
        write(folder / file, {**value, "$schema": "other"} if file == name else value)
    before = tree(runs_dir)
    with pytest.raises(ConfigError) as caught:
        write_runs(experiment, runs_dir)
    (line,) = caught.value.lines
    assert line == f"{folder / name}: found another configuration, wanted a new --name"
    assert tree(runs_dir) == before


def test_nothing_is_written_when_a_patch_is_invalid(runs_dir: Path) -> None:
    before = tree(runs_dir)
    bad = [
        Intervention("a", train={"learning_rates": 0.1}),
        Intervention("b", model={"drop_rate": 2.0}),
        Intervention("c", train={"weight_decay": "much"}),
    ]
    with pytest.raises(ConfigError) as caught:
        write_runs(plan([RATE, *bad], [1]), runs_dir)
    assert caught.value.exit_status == 2
    assert [line.split(": ")[0] for line in caught.value.lines] == [
        str(runs_dir / f"study-{name}-s1" / f"{part}.json")
        for name, part in zip("abc", ("train", "model", "train"), strict=True)
    ]
    assert "the nearest is learning_rate" in caught.value.lines[0]
    assert tree(runs_dir) == before
    assert [path.name for path in runs_dir.iterdir()] == ["base"]


@pytest.mark.parametrize("name", ["../elsewhere", "/", "x" * 125, "a b"])
def test_names_that_can_be_no_run_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name: found"):
        plan([RATE], name=name)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"plan": {}}', '{"plan": []}', '{"plan": {"name": "x"}}', "\x00"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "experiment.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: ")


def test_a_plan_of_no_known_design_or_no_runs_is_refused(runs_dir: Path) -> None:
    path = write_runs(plan([RATE]), runs_dir)
    document = json.loads(path.read_text())
    for change in ({"design": "two-at-a-time"}, {"runs": []}):
        write(path, {"experiment": {**document["experiment"], **change}})
        with pytest.raises(ConfigError, match="cannot be read as an experiment"):
            load_experiment(path)


def test_a_damaged_plan_is_not_overwritten(runs_dir: Path) -> None:
    path = write_runs(plan([RATE]), runs_dir)
    path.write_text('{"plan"')
    with pytest.raises(ConfigError):
        write_runs(plan([RATE]), runs_dir)
    assert path.read_text() == '{"plan"'
