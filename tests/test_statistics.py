"""Every estimator against scipy or statsmodels, against a textbook, or by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from study.comparisons import Side, compare, in_pairs, side_by_side, with_noise
from study.designs import Design, make_design
from study.power import Analysis
from study.results import Group, Result
from study.statistics import (
    Estimate,
    Noise,
    NoisePrior,
    clustered_mean,
    factorial_effects,
    fewest,
    holm,
    loss_slope,
    moderated,
    pooled_noise,
    power,
    sample_sd,
    tokens_worth,
)

PUBLISHED_SEVEN = [3.691526, 3.673453, 3.653593, 3.681356, 3.680505, 3.673943, 3.664345]


def draw(seed: int, *sizes: int) -> list[list[float]]:
    """Draw groups of losses, each with a mean of its own."""
    generator = np.random.default_rng(seed)
    return [generator.normal(3.6 + 0.01 * place, 0.01, size).tolist() for place, size in enumerate(sizes)]


# --- two groups ----------------------------------------------------------------------------------------------


def compared(arm: list[float], baseline: list[float], noise: Noise) -> Estimate:
    return with_noise(Side(tuple(arm), 1e-7), Side(tuple(baseline), 1e-7), noise)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (4, 7), (9, 2)])
def test_a_given_pooled_noise_is_students_t(sizes: tuple[int, int]) -> None:
    baseline, arm = draw(1, *sizes)
    noise = pooled_noise([baseline, arm])
    assert noise is not None
    found = compared(arm, baseline, noise)
    wanted = stats.ttest_ind(arm, baseline)
    assert found.difference == pytest.approx(np.mean(arm) - np.mean(baseline))
    assert (found.t, found.p, found.df) == pytest.approx((wanted.statistic, wanted.pvalue, wanted.df))
    for level in (0.95, 0.8):
        assert found.interval(level) == pytest.approx(tuple(wanted.confidence_interval(level)))


@pytest.mark.parametrize(("sizes", "df"), [((2, 2), 1.5), ((3, 3), 3), ((4, 7), 4.5), ((9, 2), 1.5)])
def test_side_by_side_is_welch_with_bounded_degrees_of_freedom(sizes: tuple[int, int], df: float) -> None:
    baseline, arm = draw(2, *sizes)
    found = side_by_side(Side(tuple(arm), 1e-7), Side(tuple(baseline), 1e-7), None, []).estimate
    wanted = stats.ttest_ind(arm, baseline, equal_var=False)
    assert found is not None
    assert found.t == pytest.approx(wanted.statistic)
    assert found.df == max(1, min(math.floor(wanted.df), df))


@pytest.mark.parametrize("dfs", [(4, 10), (1, 500), (30, 30)])
def test_two_uncertainties_add_up_as_cochran_and_cox_have_it(dfs: tuple[float, float]) -> None:
    """The t quantile at two-sided 1% is the mean of both, weighted by variances."""
    both = Estimate(0.5, 0.3, dfs[0]).plus(Estimate(9.0, 0.4, dfs[1]))
    assert (both.difference, both.se) == (0.5, pytest.approx(0.5))
    wanted = (0.09 * stats.t.ppf(0.995, dfs[0]) + 0.16 * stats.t.ppf(0.995, dfs[1])) / 0.25
    assert stats.t.ppf(0.995, both.df) == pytest.approx(wanted, rel=1e-6)
    assert dfs[0] <= both.df <= dfs[1]


@pytest.mark.parametrize("df", [1, 2, 5])
def test_more_uncertainty_hardly_narrows_an_interval(df: int) -> None:
    training = Estimate(-0.05, 0.01, df)
    for se in (1e-4, 0.005, 0.01, 0.02, 0.03):
        assert training.plus(Estimate(-0.05, se, 500)).half_width() > 0.85 * training.half_width()


def test_an_uncertainty_of_nothing_changes_nothing() -> None:
    assert Estimate(0.5, 0.3, 4).plus(Estimate(0.0, 0.0, 10)) == Estimate(0.5, 0.3, 4)
    assert Estimate(0.5, 0.0, 4).plus(Estimate(0.0, 0.0, 10)) == Estimate(0.5, 0.0, 4)


@pytest.mark.parametrize("t", [-3.0, -0.2, 0.0, 1.5])
@pytest.mark.parametrize("df", [2, 6, 200])
def test_what_acting_now_loses_is_the_mean_of_the_wrong_side(t: float, df: float) -> None:
    estimate = Estimate(0.02 * t, 0.02, df)
    wrong = 0.02 * stats.t(df, loc=-abs(t)).expect(lambda x: x, lb=0)
    assert estimate.expected_loss() == pytest.approx(wrong, rel=1e-3)
    assert estimate.p_better == pytest.approx(stats.t.cdf(-t, df))


def test_what_acting_on_two_runs_loses_is_unbounded() -> None:
    assert Estimate(-0.5, 0.1, 1).expected_loss() == math.inf
    assert Estimate(-0.5, 0.0, 1).expected_loss() == 0


def test_an_infinite_uncertainty_leaves_nothing_known() -> None:
    both = Estimate(0.5, 0.3, 4).plus(Estimate(0.5, math.inf, 1))
    assert both.se == math.inf
    assert both.p == 1
    assert both.interval() == (-math.inf, math.inf)
    assert Analysis(both.se, both.df, family=1).detectable() == math.inf


@pytest.mark.parametrize("n", [2, 3, 7])
def test_single_case_is_a_prediction_interval(n: int) -> None:
    baseline, (loss,) = draw(3, n, 1)
    found = compared([loss], baseline, Noise(sample_sd(baseline), n - 1))
    # Crawford and Howell's t, as printed.
    t = (loss - np.mean(baseline)) / (np.std(baseline, ddof=1) * math.sqrt((n + 1) / n))
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), n - 1))
    # Its interval says where one more baseline run would lie: 0 is inside just when the loss is.
    predicted = sm.OLS(baseline, np.ones(n)).fit().get_prediction(np.ones(1)).conf_int(obs=True)[0]
    low, high = found.interval()
    assert (loss - high, loss - low) == pytest.approx(tuple(predicted))


def test_published_schedule_against_the_seven_baselines() -> None:
    sd = sample_sd(PUBLISHED_SEVEN)
    assert np.mean(PUBLISHED_SEVEN) == pytest.approx(3.674103, abs=5e-7)
    assert sd == pytest.approx(0.012339, abs=5e-7)
    found = compared([3.601917], PUBLISHED_SEVEN, Noise(sd, 6))
    assert (found.difference, found.se) == pytest.approx((-0.072186, 0.01319), abs=5e-6)
    assert found.t == pytest.approx(-5.47, abs=5e-3)
    assert found.p == pytest.approx(0.0016, abs=5e-5)
    assert found.interval() == pytest.approx((-0.1045, -0.0399), abs=5e-5)


@pytest.mark.parametrize(
    ("difference", "se", "t", "p"),
    [(0.1, 0.0, math.inf, 0.0), (-0.1, 0.0, -math.inf, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.1, 0.0, 1.0)],
)
def test_without_noise_any_difference_is_certain(difference: float, se: float, t: float, p: float) -> None:
    found = Estimate(difference, se, 3)
    assert (found.t, found.p) == (t, p)


# --- noise ---------------------------------------------------------------------------------------------------


def test_pooled_noise_is_the_residual_of_a_one_way_analysis() -> None:
    groups = draw(4, 3, 1, 5, 2)
    frame = pd.DataFrame(
        [(arm, loss) for arm, losses in enumerate(groups) for loss in losses], columns=["arm", "loss"]
    )
    fit = smf.ols("loss ~ C(arm)", frame).fit()
    found = pooled_noise(groups)
    assert found is not None
    assert (found.sd**2, found.df) == pytest.approx((fit.mse_resid, fit.df_resid))


@pytest.mark.parametrize("groups", [[], [[3.6]], [[3.6], [3.7], [3.8]]])
def test_without_replicates_there_is_no_pooled_noise(groups: list[list[float]]) -> None:
    assert pooled_noise(groups) is None


def test_sample_sd_divides_by_n_minus_1_and_needs_two() -> None:
    assert sample_sd([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(sample_sd([1.0]))
    assert math.isnan(sample_sd([]))


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_two_arms_on_shared_seeds_are_the_paired_t(seeds: int) -> None:
    arm, baseline = draw(5, seeds, seeds)
    found, wanted = paired(arm, baseline), stats.ttest_rel(arm, baseline)
    assert (found.t, found.p, found.df) == pytest.approx((wanted.statistic, wanted.pvalue, wanted.df))
    assert found.interval() == pytest.approx(tuple(wanted.confidence_interval()))


def paired(arm: list[float], baseline: list[float]) -> Estimate:
    found = in_pairs(tuple(zip(arm, baseline, strict=True)), (Side((), 1e-7), Side((), 1e-7)), None, []).estimate
    assert found is not None
    return found


def test_what_a_seed_does_to_both_arms_is_no_noise() -> None:
    luck = np.array([0.5, 0.25, -2.0])
    groups = [
        Group(name, tuple(Result(f"{name}{n}", name, str(n), "0", loss) for n, loss in enumerate(mean + luck)))
        for name, mean in (("a", 3.0), ("b", 4.0))
    ]
    found = compare(*groups)
    assert found.noise is not None
    assert found.noise.sd == pytest.approx(0, abs=0.005)  # the digits that were recorded allow no less
    assert found.correlation == pytest.approx(1)


def test_moderated_variance_is_a_mean_weighted_by_degrees_of_freedom() -> None:
    prior = NoisePrior(0.01, 6, "")
    assert moderated(4e-4, 2, prior) == pytest.approx(((6 * 1e-4 + 2 * 4e-4) / 8, 8))
    assert moderated(0.0, 0, prior, runs=2) == pytest.approx((2e-4, 6))
    assert moderated(4e-4, 2, None) == (4e-4, 2)


# --- evaluation ----------------------------------------------------------------------------------------------


def bell_mccaffrey(sizes: NDArray[np.float64], within: float, shared: float) -> tuple[NDArray[np.float64], float]:
    """Give the CR2 quadratic form on cluster sums' residuals and its degrees of freedom, with full matrices."""
    total, clusters = sizes.sum(), np.repeat(np.arange(len(sizes)), sizes.astype(int))
    residual = np.eye(len(clusters)) - 1 / total
    rows = [(clusters == place) @ residual / math.sqrt(1 - size / total) / total for place, size in enumerate(sizes)]
    covariance = within * np.eye(len(clusters)) + shared * (clusters[:, None] == clusters)
    form = np.array(rows) @ covariance @ np.array(rows).T
    return np.array(rows), np.trace(form) ** 2 / (form**2).sum()


@pytest.mark.parametrize("sizes", [(3, 1, 4), (5, 5, 5, 5), (2, 9, 1, 1, 30)])
def test_clustered_mean_is_cr2_with_its_degrees_of_freedom(sizes: Sequence[int]) -> None:
    generator = np.random.default_rng(8)
    clusters = np.repeat(generator.permutation(100)[: len(sizes)], sizes)
    values = generator.normal(0.1, 1, len(clusters)) + clusters / 50
    found = clustered_mean(values, clusters)
    # One-way analysis of variance: what values of one document share, and what they do not.
    order = np.argsort(clusters, kind="stable")
    groups = np.split(values[order], np.cumsum(np.unique(clusters, return_counts=True)[1])[:-1])
    counts = np.array([len(group) for group in groups], dtype=float)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (len(values) - len(groups))
    between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups) / (len(groups) - 1)
    typical = (counts.sum() - (counts**2).sum() / counts.sum()) / (len(groups) - 1)
    rows, df = bell_mccaffrey(counts, within, max(0.0, (between - within) / typical))
    assert found.difference == pytest.approx(values.mean())
    assert found.se**2 == pytest.approx(((rows @ values[order]) ** 2).sum())
    assert found.df == pytest.approx(df)


def test_a_weight_counts_as_so_many_equal_values() -> None:
    generator = np.random.default_rng(9)
    values, weights = generator.normal(0.1, 1, 12), generator.integers(1, 9, 12)
    for clusters in (np.arange(12), np.repeat(np.arange(4), 3)):
        found = clustered_mean(values, clusters, weights.astype(np.float64))
        wanted = clustered_mean(np.repeat(values, weights), np.repeat(clusters, weights))
        assert (found.difference, found.se, found.df) == pytest.approx((wanted.difference, wanted.se, wanted.df))


@pytest.mark.parametrize("sizes", [(1, 1), (1,) * 20, (5, 5, 5, 5)])
def test_equal_clusters_are_cluster_robust_least_squares(sizes: Sequence[int]) -> None:
    generator = np.random.default_rng(8)
    clusters = np.repeat(generator.permutation(100)[: len(sizes)], sizes)
    values = generator.normal(0.1, 1, len(clusters)) + clusters / 50
    found = clustered_mean(values, clusters)
    # Its small-sample correction is G/(G-1) (n-1)/(n-k), and k is 1 here.
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True, "df_correction": True}, use_t=True
    )
    assert (found.difference, found.se, found.p) == pytest.approx((fit.params[0], fit.bse[0], fit.pvalues[0]))
    assert found.df == pytest.approx(len(sizes) - 1)
    assert found.interval() == pytest.approx(tuple(fit.conf_int()[0]))


def test_clusters_of_one_are_the_plain_standard_error() -> None:
    values = np.array(draw(9, 12)[0])
    found, wanted = clustered_mean(values, np.arange(12)), stats.ttest_1samp(values, 0)
    assert (found.t, found.p, found.df) == pytest.approx((wanted.statistic, wanted.pvalue, wanted.df))


def test_order_of_sequences_does_not_matter() -> None:
    values, clusters = np.array(draw(10, 12)[0]), np.repeat(np.arange(4), 3)
    order = np.random.default_rng(0).permutation(12)
    wanted = clustered_mean(values, clusters)
    found = clustered_mean(values[order], clusters[order])
    assert (found.difference, found.se, found.df) == pytest.approx((wanted.difference, wanted.se, wanted.df))


def test_one_document_says_nothing() -> None:
    found = clustered_mean(np.array([0.1, 0.2, 0.3]), np.zeros(3, dtype=np.int64))
    assert found.difference == pytest.approx(0.2)
    assert found.se == math.inf
    assert found.p == 1


def test_sequences_that_do_not_differ_have_no_error() -> None:
    assert clustered_mean(np.zeros(6), np.repeat(np.arange(3), 2)) == Estimate(0.0, 0.0, pytest.approx(2))


# --- many comparisons, and equivalence -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_holm(count: int) -> None:
    p_values = (np.random.default_rng(11).uniform(0, 1, count) ** 4).tolist()
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_with_ties_and_none() -> None:
    assert holm([0.01, 0.01, 0.04, 1.0]) == pytest.approx([0.04, 0.04, 0.08, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.03])
@pytest.mark.parametrize("seeds", [3, 8])
def test_equivalence_is_two_one_sided_tests(seeds: int, margin: float) -> None:
    arm, baseline = draw(12, seeds, seeds)
    wanted = ttost_paired(np.array(arm), np.array(baseline), -margin, margin)[0]
    assert paired(arm, baseline).p_equivalent(margin) == pytest.approx(wanted)
    noise = pooled_noise([arm, baseline])
    assert noise is not None
    unpaired = compared(arm, baseline, noise)
    wanted = ttost_ind(np.array(arm), np.array(baseline), -margin, margin, usevar="pooled")[0]
    assert unpaired.p_equivalent(margin) == pytest.approx(wanted)


@pytest.mark.parametrize(("difference", "p"), [(0.009, 0.0), (-0.009, 0.0), (0.01, 1.0), (-0.02, 1.0)])
def test_equivalence_without_noise(difference: float, p: float) -> None:
    assert Estimate(difference, 0.0, 5).p_equivalent(0.01) == p


# --- power ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", [0.0, 0.3, 1.0, 2.5, -2.5, 8.0])
@pytest.mark.parametrize(("arm", "baseline"), [(1, 7), (2, 2), (3, 3), (16, 16), (500, 500)])
def test_power(effect: float, arm: int, baseline: int) -> None:
    found = power(effect, math.sqrt(1 / arm + 1 / baseline), arm + baseline - 2)
    wanted = TTestIndPower().power(abs(effect), arm, 0.05, ratio=baseline / arm)
    assert found == pytest.approx(1.0 if math.isnan(wanted) else wanted, abs=1e-6)


def test_power_far_out_is_1() -> None:
    assert power(1e6, 1.0, 4) == pytest.approx(1)
    assert power(1.0, 1e-9, 1) == pytest.approx(1)


@pytest.mark.parametrize("least", [1, 2, 7])
@pytest.mark.parametrize("wanted", [1, 2, 3, 8, 9, 4000, 10_000])
def test_fewest_is_the_smallest_count_that_is_enough(least: int, wanted: int) -> None:
    assert fewest(lambda count: count >= wanted, least) == max(least, wanted)
    assert fewest(lambda count: count > 10_000, least) is None


# --- designed experiments ------------------------------------------------------------------------------------


def signs_of(design: Design) -> NDArray[np.float64]:
    """Return the main effects and two-way interactions as columns of +-1."""
    mains = np.array([[1.0 if factor in arm.on else -1.0 for factor in design.factors] for arm in design.arms])
    count = len(design.factors)
    pairs = [mains[:, a] * mains[:, b] for a in range(count) for b in range(a + 1, count)]
    return np.column_stack([mains, *pairs])


@pytest.mark.parametrize(("name", "factors"), [("full-factorial", "abc"), ("fraction", "abcde")])
def test_factorial_effects_are_twice_the_coefficients_of_least_squares(name: str, factors: str) -> None:
    design = make_design("full-factorial" if name == "full-factorial" else "fraction", list(factors))
    columns = signs_of(design)
    losses = np.random.default_rng(13).normal(3.6, 0.01, len(columns))
    found = factorial_effects(columns, losses)
    fit = sm.OLS(losses, sm.add_constant(columns)).fit()
    assert found == pytest.approx(2 * fit.params[1:])
    for column, effect in zip(columns.T, found, strict=True):
        assert effect == pytest.approx(losses[column > 0].mean() - losses[column < 0].mean())


# --- tokens --------------------------------------------------------------------------------------------------


def test_loss_slope_of_a_line_in_log_tokens() -> None:
    tokens = np.arange(1, 101) * 1e6
    losses = 8 - 0.3 * np.log(tokens)
    losses[:50] = 99.0  # the first half has no part in it
    assert loss_slope(tokens, losses) == pytest.approx(-0.3)


def test_loss_slope_of_a_power_law_is_that_of_its_last_half() -> None:
    tokens = np.arange(1, 1001) * 1e6
    slope = loss_slope(tokens, 1.7 + 400 * tokens**-0.3)
    derivative = -0.3 * 400 * tokens**-0.3
    assert slope is not None
    assert derivative[500] < slope < derivative[-1]


def test_loss_slope_leaves_out_what_is_not_finite() -> None:
    tokens = np.arange(1, 101) * 1e6
    losses = 8 - 0.3 * np.log(tokens)
    losses[[60, 70]] = math.nan, math.inf
    assert loss_slope(tokens, losses) == pytest.approx(-0.3)


@pytest.mark.parametrize(("steps", "is_known"), [(0, False), (1, False), (19, True), (18, False), (20, True)])
def test_loss_slope_needs_ten_points(steps: int, is_known: bool) -> None:
    tokens = np.arange(1, steps + 1) * 1e6
    assert (loss_slope(tokens, 8 - 0.3 * np.log(tokens)) is not None) == is_known


def test_rising_curve_has_no_slope_to_convert_by() -> None:
    tokens = np.arange(1, 101) * 1e6
    assert loss_slope(tokens, 3 + 0.1 * np.log(tokens)) is None


def test_tokens_worth() -> None:
    # 0.03 lower is what half as many tokens again would bring, where e-fold tokens bring 0.03 / ln 1.5.
    assert tokens_worth(-0.03, -0.03 / math.log(1.5)) == pytest.approx(1.5)
    assert tokens_worth(0.03, -0.03 / math.log(1.5)) == pytest.approx(1 / 1.5)
    assert tokens_worth(0.0, -0.1) == 1
    assert math.isfinite(tokens_worth(-1e9, -1e-9))
