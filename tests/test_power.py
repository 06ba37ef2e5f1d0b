"""Power is that of the word in the table, by the analysis that will be used."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower

from study.lenth import adjusted, lenth_estimates
from study.looks import paired_p
from study.power import Analysis
from study.statistics import holm, power


def test_power_of_the_word_is_that_of_simulated_tables() -> None:
    """Four null arms and one with an effect on five shared seeds, each by its paired t, adjusted by Holm."""
    analysis = Analysis(se=np.sqrt(2 / 5), df=4, family=5)
    ratio = analysis.detectable()
    runs = np.random.default_rng(4).standard_normal((4000, 6, 5))
    runs[:, 1] -= ratio
    p = np.array([paired_p(runs[:, arm] - runs[:, 0], 5) for arm in range(1, 6)]).T
    found = [holm(row)[0] < 0.05 for row in p.tolist()]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_one_comparison_is_the_noncentral_t() -> None:
    analysis = Analysis(se=0.5, df=7, family=1)
    threshold = stats.t.ppf(0.975, 7)
    wanted = stats.nct.sf(threshold, 7, 3.0) + stats.nct.cdf(-threshold, 7, 3.0)
    assert analysis.power(3.0) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("arm", "baseline", "sd", "wanted"),
    [
        (1, 7, 0.0123, 0.044),
        (3, 3, 0.0123, 0.038),
        (5, 5, 0.0123, 0.025),
        (8, 8, 0.0123, 0.019),
        (16, 16, 0.0123, 0.013),
        (3, 3, 0.0013, 0.0040),
    ],
)
def test_detectable_effects(arm: int, baseline: int, sd: float, wanted: float) -> None:
    found = Analysis(sd * math.sqrt(1 / arm + 1 / baseline), arm + baseline - 2, family=1).detectable()
    assert float(f"{found:.2g}") == wanted
    solved = TTestIndPower().solve_power(None, nobs1=arm, alpha=0.05, power=0.8, ratio=baseline / arm)
    assert found == pytest.approx(sd * float(np.squeeze(solved)), rel=1e-4)


@pytest.mark.parametrize("df", [1, 2, 5 / 3, 6, 30, 1e4, 1e7])
def test_detectable_effect_has_a_power_of_four_fifths(df: float) -> None:
    assert power(Analysis(0.25, df, family=1).detectable(), 0.25, df) == pytest.approx(0.8, abs=1e-6)


def test_detectable_effect_with_known_noise() -> None:
    wanted = 0.0123 * math.sqrt(2) * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    assert Analysis(0.0123 * math.sqrt(2), 1e7, family=1).detectable() == pytest.approx(wanted, rel=1e-3)
    assert wanted == pytest.approx(0.049, abs=5e-4)


def test_without_noise_everything_is_detectable() -> None:
    assert Analysis(0.0, 4, family=1).detectable() == 0


def test_a_prior_finds_more_and_a_family_less() -> None:
    alone = Analysis(se=1.0, df=2, family=1).detectable()
    lent = Analysis(se=1.0, df=2, family=1, prior_df=9).detectable()
    many = Analysis(se=1.0, df=2, family=5, prior_df=9).detectable()
    assert lent < alone
    assert lent < many


def test_one_run_each_and_no_prior_sees_nothing() -> None:
    assert Analysis(se=np.sqrt(2), df=0, family=3).detectable() == math.inf


def test_an_unreplicated_factorial_sees_what_lenth_sees() -> None:
    """The same 16 runs, each contrast with a standard error of half a sigma, judged as a factorial is."""
    analysis = Analysis(se=0.5, df=0, family=5, contrasts=15)
    effects = 0.5 * np.random.default_rng(6).standard_normal((1500, 15))
    effects[:, 0] += 2.0
    found = [adjusted(lenth_estimates(row.tolist())[:5])[0] < 0.05 for row in effects]
    assert analysis.power(4.0) == pytest.approx(np.mean(found), abs=0.04)
    assert analysis.power(0.0) < 0.02
