"""Looks fixed beforehand share one error rate; those that were not say how much it grew."""

import numpy as np
import pytest

from study.looks import RULES, Rule, Schedule, equally_spaced, error_of_repeated_looks, paired_p
from study.statistics import holm

POCOCK = {2: 0.0294, 3: 0.0221, 4: 0.0182, 5: 0.0158}
OBRIEN_FLEMING_LAST = {2: 0.0480, 3: 0.0451, 4: 0.0430, 5: 0.0413}


@pytest.mark.parametrize("looks", POCOCK)
def test_levels_are_those_of_the_tables_where_seeds_are_many(looks: int) -> None:
    """Jennison and Turnbull 2000, tables 2.1 and 2.3, for normal statistics at equal steps."""
    many = tuple(40 * look for look in range(1, looks + 1))
    assert Schedule("pocock", many).levels()[0] == pytest.approx(POCOCK[looks], abs=0.0017)
    assert Schedule("obrien-fleming", many).levels()[-1] == pytest.approx(OBRIEN_FLEMING_LAST[looks], abs=0.002)


def test_levels_are_stricter_where_seeds_are_few() -> None:
    assert Schedule("pocock", (2, 4, 6, 8)).levels()[0] < POCOCK[4] - 0.001
    levels = Schedule("obrien-fleming", (3, 6, 9)).levels()
    assert levels[0] < levels[1] < levels[2] < 0.05


@pytest.mark.parametrize("rule", RULES)
def test_a_null_arm_is_called_in_one_study_of_twenty(rule: Rule) -> None:
    schedule = Schedule(rule, (3, 5, 8))
    differences = np.random.default_rng(11).standard_normal((2000, 8))
    p = np.array([paired_p(differences, count) for count in schedule.seeds]).T
    wrong = [any(schedule.sequential_p(row[: look + 1]) < 0.05 for look in range(3)) for row in p.tolist()]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.015)


def test_a_family_of_arms_is_held_too() -> None:
    schedule, generator = Schedule("pocock", (3, 6)), np.random.default_rng(12)
    baseline, arms = generator.standard_normal((1000, 6)), generator.standard_normal((5, 1000, 6))
    p = np.array([[paired_p(arm - baseline, count) for count in (3, 6)] for arm in arms])  # arm, look, study
    wrong = 0
    for study in range(1000):
        looks = ([schedule.sequential_p(one[:look]) for one in p[:, :, study].tolist()] for look in (1, 2))
        wrong += any(min(holm(found)) < 0.05 for found in looks)
    assert wrong / 1000 < 0.065


@pytest.mark.parametrize("rule", RULES)
def test_one_p_value_agrees_with_the_levels_and_never_grows(rule: Rule) -> None:
    schedule = Schedule(rule, (3, 6, 9))
    levels = schedule.levels()
    for look, level in enumerate(levels):
        before = [1.0] * look
        assert schedule.sequential_p([*before, level * 0.98]) < 0.05 < schedule.sequential_p([*before, level * 1.03])
    assert schedule.sequential_p([levels[0] * 0.5, 0.9]) == schedule.sequential_p([levels[0] * 0.5])
    assert 0 < schedule.sequential_p([1e-12]) <= 3.1e-12 * (1 if rule == "pocock" else 1e12)


def test_looks_are_spaced_equally_and_the_first_needs_two_seeds() -> None:
    assert equally_spaced("pocock", 3, 9) == Schedule("pocock", (3, 6, 9))
    assert (
        equally_spaced("pocock", 4, 5) == Schedule("pocock", (2, 3, 4, 5)) or equally_spaced("pocock", 4, 5) is None
    )
    assert equally_spaced("pocock", 4, 4) is None


@pytest.mark.parametrize(
    ("counts", "arms", "wanted"), [((8,), 1, 0.05), ((2, 3, 4, 5, 6, 7, 8), 1, 0.178), ((2, 4), 1, 0.092)]
)
def test_looks_that_nobody_planned_say_how_much_the_error_grew(
    counts: tuple[int, ...], arms: int, wanted: float
) -> None:
    assert error_of_repeated_looks(counts, arms) == pytest.approx(wanted, abs=0.012)
