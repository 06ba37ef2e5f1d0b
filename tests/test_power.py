"""Power is that of the word in the table, by the analysis that will be used."""

import numpy as np
import pytest
from scipy import stats

from study.lenth import adjusted, lenth_estimates
from study.looks import paired_p
from study.power import Analysis
from study.statistics import holm


def test_power_of_the_word_is_that_of_simulated_tables() -> None:
    """Four null arms and one with an effect on five shared seeds, each by its paired t, adjusted by Holm."""
    analysis = Analysis(se=np.sqrt(2 / 5), df=4, family=5)
    ratio = analysis.detectable()
    assert ratio is not None
    runs = np.random.default_rng(4).standard_normal((4000, 6, 5))
    runs[:, 1] -= ratio
    p = np.array([paired_p(runs[:, arm] - runs[:, 0], 5) for arm in range(1, 6)]).T
    found = [holm(row)[0] < 0.05 for row in p.tolist()]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_one_comparison_is_the_noncentral_t() -> None:
    analysis = Analysis(se=0.5, df=7, family=1)
    threshold = stats.t.ppf(0.975, 7)
    wanted = stats.nct.sf(threshold, 7, 3.0) + stats.nct.cdf(-threshold, 7, 3.0)
    assert analysis.power(1.5) == pytest.approx(wanted, abs=1e-6)


def test_a_prior_finds_more_and_a_family_less() -> None:
    alone = Analysis(se=1.0, df=2, family=1).detectable()
    lent = Analysis(se=1.0, df=2, family=1, prior_df=9).detectable()
    many = Analysis(se=1.0, df=2, family=5, prior_df=9).detectable()
    assert alone is not None
    assert lent is not None
    assert many is not None
    assert lent < alone
    assert lent < many


def test_one_run_each_and_no_prior_sees_nothing() -> None:
    assert Analysis(se=np.sqrt(2), df=0, family=3).detectable() is None


def test_an_unreplicated_factorial_sees_what_lenth_sees() -> None:
    """The same 16 runs, each contrast with a standard error of half a sigma, judged as a factorial is."""
    analysis = Analysis(se=0.5, df=0, family=5, contrasts=15)
    effects = 0.5 * np.random.default_rng(6).standard_normal((1500, 15))
    effects[:, 0] += 2.0
    found = [adjusted(lenth_estimates(row.tolist())[:5])[0] < 0.05 for row in effects]
    assert analysis.power(2.0) == pytest.approx(np.mean(found), abs=0.04)
    assert analysis.power(0.0) < 0.02
