"""Effects of factorials: what the textbooks found in their own examples, and error rates that hold."""

from itertools import combinations

import numpy as np
import pytest

from harness.run.errors import ConfigError
from study.designs import LETTERS, Arm, Design, factorial_arms, make_design, parse_generators
from study.effects import Finding
from study.factorials import INTERACTS, Reading, contrasts_of, factorial_findings
from study.lenth import adjusted, critical, lenth_estimates
from study.results import Group, Result
from study.statistics import Noise

MONTGOMERY = [45, 71, 48, 65, 68, 60, 80, 65, 43, 100, 45, 104, 75, 86, 70, 96]
PROCESS = [70, 60, 89, 81, 69, 62, 88, 81, 60, 49, 88, 82, 60, 52, 86, 79]
REACTOR = [
    61, 53, 63, 61, 53, 56, 54, 61, 69, 61, 94, 93, 66, 60, 95, 98,
    56, 63, 70, 65, 59, 55, 67, 65, 44, 45, 78, 77, 49, 42, 81, 82,
]  # fmt: skip
TOLD = ("HELPS", "HURTS", INTERACTS)


def groups_of(design: Design, losses: dict[frozenset[str], list[float]]) -> list[Group]:
    """Return an arm's losses on seeds 0, 1, ... by the set of its factors that are on."""
    return [
        Group(
            arm.name,
            tuple(
                Result(f"{arm.name}-{seed}", arm.name, str(seed), str(seed), loss)
                for seed, loss in enumerate(losses[frozenset(arm.on)])
            ),
        )
        for arm in design.arms
    ]


def in_standard_order(values: list[int]) -> dict[frozenset[str], list[float]]:
    """Return a textbook's runs in Yates' order by the letters that are high."""
    letters = LETTERS[: len(values).bit_length() - 1]
    return {
        frozenset(letter for place, letter in enumerate(letters) if run >> place & 1): [float(value)]
        for run, value in enumerate(values)
    }


def read(values: list[int], reading: Reading | None = None) -> dict[str, Finding]:
    """Judge a textbook's full factorial; findings by their letters."""
    letters = LETTERS[: len(values).bit_length() - 1]
    design = make_design("full-factorial", list(letters))
    found, _ = factorial_findings(design, groups_of(design, in_standard_order(values)), reading or Reading(0.01))
    return {item.name.replace(" x ", ""): item for item in found}


def told(found: dict[str, Finding]) -> set[str]:
    return {name for name, item in found.items() if item.verdict in TOLD}


def test_filtration_rates_have_the_effects_of_the_book() -> None:
    """Montgomery, Design and Analysis of Experiments, example 6.2."""
    found = read(MONTGOMERY)
    assert told(found) == {"A", "C", "D", "AC", "AD"}
    assert {name: found[name].estimate.difference for name in ("A", "B", "C", "D", "AC", "AD")} == {
        "A": 21.625, "B": 3.125, "C": 9.875, "D": 14.625, "AC": -18.125, "AD": 16.625,
    }  # fmt: skip
    assert found["A"].estimate.se == pytest.approx(2.625)


def test_process_development_has_the_effects_of_the_book() -> None:
    """Box, Hunter and Hunter, section 5.14: an error of 0.55 from the five contrasts of three and four factors."""
    found = read(PROCESS, Reading(0.01, higher_orders_as_error=True))
    assert found["A"].estimate.se == pytest.approx(0.55, abs=0.005)
    assert found["A"].estimate.df == 5
    assert {name: found[name].estimate.difference for name in ("A", "B", "D", "BD")} == {
        "A": -8.0, "B": 24.0, "D": -5.5, "BD": 4.5,
    }  # fmt: skip
    assert told(found) == told(read(PROCESS)) == {"A", "B", "D", "BD"}


def test_reactor_has_the_effects_of_the_book() -> None:
    """Box, Hunter and Hunter, chapter 6: the full factorial, and its half with E=ABCD."""
    assert told(read(REACTOR)) == {"B", "D", "E", "BD", "DE"}
    words = parse_generators(["E=ABCD"], 5)
    half = Design("fraction", tuple("ABCDE"), tuple(factorial_arms("ABCDE", words)), words)
    found, _ = factorial_findings(half, groups_of(half, in_standard_order(REACTOR)), Reading(0.01))
    effects = {item.name.replace(" x ", ""): item.estimate.difference for item in found}
    assert {name: effects[name] for name in ("B", "D", "E", "BD", "DE")} == {
        "B": 20.5, "D": 12.25, "E": -6.25, "BD": 10.75, "DE": -9.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contrasts", "margin", "simultaneous"), [(7, 2.295, 4.867), (15, 2.156, 4.219), (31, 2.079, 3.965)]
)
def test_critical_values_are_those_of_the_published_table(contrasts: int, margin: float, simultaneous: float) -> None:
    """Ye and Hamada 2000, Journal of Quality Technology 32, 57."""
    assert critical(contrasts, 1) == pytest.approx(margin, rel=0.015)
    assert critical(contrasts, contrasts) == pytest.approx(simultaneous, rel=0.015)


def test_null_effects_are_called_in_one_study_of_twenty() -> None:
    draws = np.random.default_rng(7).standard_normal((2000, 15))
    wrong = [min(adjusted(lenth_estimates(row.tolist())[:5])) < 0.05 for row in draws]
    assert 0.03 < np.mean(wrong) < 0.07


def test_a_fraction_has_all_its_contrasts_and_says_what_is_mixed_up() -> None:
    design = make_design("fraction", list("abcde"), generators=["D=AB", "E=AC"])
    contrasts = contrasts_of(design)
    assert len(contrasts) == len(design.arms) - 1
    words = [word for contrast in contrasts for word in contrast.words]
    everything = {frozenset(c) for size in range(1, 6) for c in combinations(range(5), size)}
    assert len(words) == len(set(words))
    assert everything - set(words) == {frozenset({0, 1, 3}), frozenset({0, 2, 4}), frozenset({1, 2, 3, 4})}


def drawn(generator: np.random.Generator, by_seed: float, seeds: int = 4) -> tuple[Design, list[Group]]:
    """Draw a null factorial of three changes whose main effects differ between seeds with SD `by_seed`."""
    design = make_design("full-factorial", list("abc"))
    slopes = generator.normal(0, by_seed, (3, seeds)) / 2
    losses = {}
    for arm in design.arms:
        signs = np.array([1 if factor in arm.on else -1 for factor in "abc"])
        losses[frozenset(arm.on)] = (generator.standard_normal(seeds) + signs @ slopes).tolist()
    return design, groups_of(design, losses)


def test_effects_that_differ_between_seeds_are_judged_by_how_much_they_do() -> None:
    generator, wrong, covered, studies = np.random.default_rng(3), 0, 0, 400
    for _ in range(studies):
        design, groups = drawn(generator, by_seed=1.0)
        mains = [item for item in factorial_findings(design, groups, Reading(0.01))[0] if " x " not in item.name]
        assert len(mains) == 3
        wrong += any(item.verdict in TOLD for item in mains)
        low, high = mains[0].estimate.interval()
        covered += low < 0 < high
    assert wrong / studies < 0.08
    assert 0.92 < covered / studies < 0.98


def test_a_seed_on_which_an_arm_diverged_costs_that_seed_alone() -> None:
    design, groups = drawn(np.random.default_rng(1), 0.0)
    last = groups[-1].results
    damaged = [*groups[:-1], Group(groups[-1].recipe, (Result("x", "x", "0", "0", None), *last[1:]))]
    found, source = factorial_findings(design, damaged, Reading(0.01))
    assert found[0].estimate.df == 2
    assert "3 shared seeds" in source
    with pytest.raises(ConfigError, match="no seed has a loss of every arm"):
        factorial_findings(design, [*groups[:-1], Group("stack", ())], Reading(0.01))


def test_noise_by_hand_is_believed() -> None:
    design, groups = drawn(np.random.default_rng(1), 0.0, seeds=1)
    found, source = factorial_findings(design, groups, Reading(0.01, Noise(1.0, 9.0)))
    assert found[0].estimate.se == pytest.approx(2 / np.sqrt(8))
    assert source == "given by hand"


def test_no_higher_orders_no_error() -> None:
    design = Design("fraction", tuple("abcde"), (), parse_generators(["E=ABCD"], 5))
    arms = tuple(Arm(arm.name, arm.on) for arm in factorial_arms("abcde", design.generators))
    whole = Design(design.name, design.factors, arms, design.generators)
    losses = {frozenset(arm.on): [float(place)] for place, arm in enumerate(arms)}
    with pytest.raises(ConfigError, match="--higher-orders-as-error"):
        factorial_findings(whole, groups_of(whole, losses), Reading(0.01, higher_orders_as_error=True))
