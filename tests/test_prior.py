"""The prior of the training noise: fitted as the literature has it, and applied only where it may be."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from study.ledger import Entry, Scale
from study.prior import (
    PUBLIC_PRIOR,
    Subject,
    find_pair_prior,
    find_run_prior,
    fit_prior,
    is_contradicted,
    is_like_public,
)
from study.statistics import Noise

LIKE = Subject("r" * 64, Scale(163_000_000, 3_260_252_160, "8x A100"), decays=True, runs=frozenset({"a", "b"}))


def entry(**changes: object) -> Entry:
    found = Entry("all", "base", "r" * 64, 163_000_000, 3_260_252_160, "8x A100", 0.002, 5, ("x", "y"))
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sd", "df"), [(0.0012, 4.0), (0.02, 14.0)])
def test_a_fit_finds_what_variances_were_drawn_from(sd: float, df: float) -> None:
    generator = np.random.default_rng(2)
    dfs = generator.integers(3, 12, 4000).astype(float)
    true = df * sd**2 / generator.chisquare(df, len(dfs))
    found_sd, found_df = fit_prior((true * generator.chisquare(dfs) / dfs).tolist(), dfs.tolist())
    assert found_sd == pytest.approx(sd, rel=0.03)
    assert found_df == pytest.approx(df, rel=0.3)


def test_folders_of_mixed_code_do_not_widen_the_fit() -> None:
    generator = np.random.default_rng(3)
    clean = (0.001**2 * generator.chisquare(9, 60) / 9).tolist()
    without = fit_prior(clean, [9.0] * 60)
    with_two = fit_prior([*clean, 0.03**2, 0.02**2], [9.0] * 62)
    assert with_two[0] == pytest.approx(without[0], rel=0.02)
    assert with_two[1] > 20


def test_equally_noisy_recipes_make_a_firm_prior() -> None:
    variances = (0.001**2 * stats.chi2.ppf(np.linspace(0.01, 0.99, 50), 9) / 9).tolist()
    assert fit_prior(variances, [9.0] * 50)[1] > 100


def test_the_public_prior_is_for_what_is_like_it_or_where_the_user_says_so() -> None:
    assert is_like_public(LIKE)
    assert find_run_prior([], LIKE) == PUBLIC_PRIOR
    others = (
        replace(LIKE, decays=False),
        replace(LIKE, scale=replace(LIKE.scale, parameters=50_000_000)),
        replace(LIKE, scale=replace(LIKE.scale, train_tokens=30_000_000_000)),
    )
    for other in others:
        assert find_run_prior([], other) is None
        assert find_run_prior([], other, public=True) == PUBLIC_PRIOR
    assert find_run_prior([], LIKE, public=False) is None
    assert find_run_prior([], None) is None
    assert find_run_prior([], None, public=True) == PUBLIC_PRIOR


def test_own_replicates_take_over_as_they_come() -> None:
    few, many = (find_run_prior([entry(df=df)], LIKE) for df in (2, 60))
    assert few is not None
    assert many is not None
    assert PUBLIC_PRIOR.sd < few.sd < many.sd < 0.002
    assert many.df == PUBLIC_PRIOR.df + 60
    assert "noise ledger" in many.source
    assert "public" in many.source
    noisy = find_run_prior([entry(sd=0.012, df=6)], LIKE)
    assert noisy is not None
    assert (noisy.sd, noisy.df) == (0.012, 6)


def test_what_the_judged_runs_taught_is_no_prior_of_theirs() -> None:
    assert find_run_prior([entry(runs=("a", "b"))], LIKE, public=False) is None
    assert find_run_prior([entry(recipe_hash="s" * 64)], LIKE, public=False) is None


def test_a_noise_that_the_prior_excludes_sets_it_aside() -> None:
    assert is_contradicted(PUBLIC_PRIOR, Noise(0.0123, 6))
    assert not is_contradicted(PUBLIC_PRIOR, Noise(0.0015, 6))
    assert not is_contradicted(PUBLIC_PRIOR, Noise(0.0001, 6))
    assert not is_contradicted(PUBLIC_PRIOR, Noise(0.0, 6))


def test_pairs_of_earlier_experiments_are_a_prior_for_pairs() -> None:
    pairs = [entry(component="pairs", recipe=f"arm {n}", sd=0.0004 * 2 ** (n % 3), df=4) for n in range(6)]
    prior = find_pair_prior(pairs, LIKE, 8)
    assert prior is not None
    assert 0.0004 < prior.sd < 0.0016
    assert "6 arms" in prior.source
    run = find_pair_prior(pairs[:3], LIKE, 3)
    assert run is not None
    assert run.sd == PUBLIC_PRIOR.sd
    assert "as if seeds were not shared" in run.source
    assert find_pair_prior([replace(pair, runs=("a", "z")) for pair in pairs], LIKE, 3, public=False) is None
    # Four pairs say more of themselves than runs whose seeds cancel nothing, unless the user says otherwise.
    assert find_pair_prior(pairs[:3], LIKE, 4) is None
    assert find_pair_prior(pairs[:3], LIKE, 4, public=True) == run


def test_an_unknown_recipe_is_judged_at_the_promised_rate() -> None:
    """Three baseline runs and an arm of one, on recipes whose noise is drawn as the prior says."""
    generator, studies = np.random.default_rng(5), 20_000
    sd = PUBLIC_PRIOR.sd * np.sqrt(PUBLIC_PRIOR.df / generator.chisquare(PUBLIC_PRIOR.df, studies))
    losses = sd[:, None] * generator.standard_normal((studies, 4))
    own = losses[:, :3].std(axis=1, ddof=1)
    contradicted = np.array([is_contradicted(PUBLIC_PRIOR, Noise(float(value), 2)) for value in own[:2000]])
    lent = (PUBLIC_PRIOR.df * PUBLIC_PRIOR.sd**2 + 2 * own**2) / (PUBLIC_PRIOR.df + 2)
    t = (losses[:, 3] - losses[:, :3].mean(axis=1)) / np.sqrt(lent * (1 + 1 / 3))
    assert np.mean(2 * stats.t.sf(np.abs(t), PUBLIC_PRIOR.df + 2) < 0.05) == pytest.approx(0.05, abs=0.006)
    assert contradicted.mean() == pytest.approx(0.01, abs=0.01)
    assert math.isfinite(PUBLIC_PRIOR.sd)
