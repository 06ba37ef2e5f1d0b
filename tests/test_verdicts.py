"""Which word a comparison gets, whose noise it is held against, and how often the words are wrong."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from benchmarks.simulate_verdicts import SIMULATIONS
from harness.run.config import load_run_configs
from harness.run.errors import ConfigError
from harness.run.recipe import recipe_hash
from study.advice import advice_on, best_buy
from study.assemble import Study
from study.ledger import Entry, Scale, find_noise, load_ledger, record
from study.losses_table import read_losses
from study.measures import NATS, Measured
from study.noise import learn_noise
from study.results import Group, Result, RunMetadata, group_results
from study.statistics import Noise, NoisePrior, clustered_mean, moderated, power
from study.tables import table_notes
from study.verdicts import (
    CANNOT_TELL,
    DIVERGES,
    HELPS,
    HURTS,
    LEANS_BETTER,
    LEANS_WORSE,
    NO_LARGER,
    Judged,
    Rules,
    judge,
)
from study.wording import curve_slope, sentence_of, tokens_worth_of

BASELINE = [3.600, 3.612, 3.606]
KNOWN = Noise(0.01, 1000)
Seeds = Sequence[tuple[str, str]]


def seeds(*numbers: int) -> Seeds:
    return [(str(number), f"{number}/{number}") for number in numbers]


def measured(sequences: NDArray[np.float64], documents: NDArray[np.int64] | None = None) -> Measured:
    """Make losses of test sequences, two a document unless their documents are given."""
    documents = np.repeat(np.arange(len(sequences) // 2), 2) if documents is None else documents
    return Measured(NATS, float(sequences.mean()), sequences, documents)


def make_metadata(**changes: Any) -> RunMetadata:
    """Make what a run folder knows, with a test set of 6 documents of 2 sequences."""
    defaults: dict[str, Any] = {
        "recipe": {},
        "recipe_hash": "r",
        "parameters": 1000,
        "step": 9,
        "tokens_seen": 5000,
        "hardware": "1x cpu",
        "decays": False,
        "tokens_per_second": None,
        "cost": None,
        "currency": "",
        "tokenizer": "gpt2",
        "measured": measured(np.zeros(12)),
        "curve": (np.empty(0), np.empty(0)),
        "samples": (),
    }
    return RunMetadata(**{**defaults, **changes})


def make_group(recipe: str, losses: Sequence[float | None], of_seeds: Seeds | None = None, **metadata: Any) -> Group:
    """Make the replicates of a recipe; with `metadata` as if they lay in run folders."""
    pairs = [("", "")] * len(losses) if of_seeds is None else of_seeds
    found = [make_metadata(**metadata) if metadata and loss is not None else None for loss in losses]
    return Group(
        recipe,
        tuple(
            Result(f"{recipe}-{number}", recipe, *pair, loss, known)
            for number, (loss, pair, known) in enumerate(zip(losses, pairs, found, strict=True))
        ),
    )


def judge_one(baseline: Group, arm: Group, **rules: Any) -> Judged:
    (judged,) = judge(baseline, [arm], Rules(**rules)).arms
    return judged


def said_of(baseline: Group, *arms: Group, **rules: Any) -> str:
    judgement = judge(baseline, arms, Rules(**rules))
    return sentence_of(judgement.arms[0], judgement)


# --- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "sd", "verdict"),
    [
        (-0.05, 0.01, HELPS),
        (0.05, 0.01, HURTS),
        (-0.004, 0.001, "BETTER BY LESS THAN 0.01"),
        (0.004, 0.001, "WORSE BY LESS THAN 0.01"),
        (-0.024, 0.01, LEANS_BETTER),
        (0.024, 0.01, LEANS_WORSE),
        (0.001, 0.002, f"{NO_LARGER} 0.01"),
        (-0.001, 0.002, f"{NO_LARGER} 0.01"),
        (0.004, 0.01, CANNOT_TELL),
        (-0.004, 0.01, CANNOT_TELL),
    ],
)
def test_words_in_a_family_of_four(difference: float, sd: float, verdict: str) -> None:
    baseline = make_group("base", [3.6, 3.6])
    arms = [make_group("it", [3.6 + difference] * 2), *(make_group(f"null{n}", [3.6] * 2) for n in range(3))]
    judgement = judge(baseline, arms, Rules(given=Noise(sd, 1000)))
    assert judgement.arms[0].verdict == verdict
    assert judgement.family == 4
    sentence = sentence_of(judgement.arms[0], judgement)
    assert sentence.startswith(f"{verdict}: Δ {difference:+.4f} (95% CI ")
    assert "of 4, n 2 v 2." in sentence


def test_leaning_alone_is_settled_alone() -> None:
    baseline, arm = make_group("base", [3.6, 3.6]), make_group("it", [3.576, 3.576])
    judged = judge_one(baseline, arm, given=KNOWN)
    assert judged.estimate is not None
    assert judged.p_holm == judged.estimate.p
    assert judged.verdict == HELPS


def test_a_difference_within_the_margin_is_adjusted_for_its_own_family() -> None:
    """One arm is within the margin at p 0.03 alone; with four more at its edge that is no longer enough."""
    baseline, arm = make_group("base", [3.6]), make_group("it", [3.6])
    noise = Noise(0.01 / math.sqrt(2) / 1.9, 1e6)
    assert judge_one(baseline, arm, given=noise).verdict == f"{NO_LARGER} 0.01"
    edge = [make_group(f"edge{n}", [3.61]) for n in range(4)]
    assert judge(baseline, [arm, *edge], Rules(given=noise)).arms[0].verdict == CANNOT_TELL


def test_margin_decides_what_is_no_larger() -> None:
    baseline, arm = make_group("base", [3.6]), make_group("it", [3.604])
    words = [judge_one(baseline, arm, given=KNOWN, margin=margin).verdict for margin in (0.01, 0.04)]
    assert words == [CANNOT_TELL, f"{NO_LARGER} 0.04"]


def test_cannot_tell_says_what_it_could_have_seen() -> None:
    said = said_of(make_group("base", [3.674103] * 7), make_group("it", [3.678317]), given=Noise(0.012339, 6))
    assert said.startswith("CANNOT TELL: Δ +0.0042 (95% CI -0.0281..+0.0365), t +0.32 on 6 df.")
    assert "Effects under 0.0444 would be missed one time in five" in said
    assert "P(better) 0.38; leaving it now loses 0.0042 on average" in said
    assert "no effect" not in said


# --- each difference on its own noise ------------------------------------------------------------------------


def test_shared_seeds_are_paired_whatever_other_arms_do() -> None:
    """A noisy arm, a missing cell and a diverged run cost their own arm something, and no other anything."""
    generator = np.random.default_rng(1)
    base, quiet, noisy = 3.6 + generator.normal(0, [[0.1], [0.1], [9.0]], (3, 5))
    quiet = base + 0.001 * generator.standard_normal(5)
    baseline, arm = (
        make_group("base", base.tolist(), seeds(1, 2, 3, 4, 5)),
        make_group("it", quiet.tolist(), seeds(1, 2, 3, 4, 5)),
    )
    others = [
        make_group("noisy", noisy.tolist(), seeds(1, 2, 3, 4, 5)),
        make_group("missing", noisy[:4].tolist(), seeds(1, 2, 3, 5)),
        make_group("diverged", [*noisy[:4].tolist(), None], seeds(1, 2, 3, 4, 5)),
    ]
    judged, _, missing, diverged = judge(baseline, [arm, *others]).arms
    wanted = stats.ttest_rel(arm.losses, baseline.losses)
    assert judged.estimate is not None
    assert (judged.estimate.t, judged.estimate.p, judged.estimate.df) == pytest.approx((*wanted, 4))
    assert judged.comparison.correlation == pytest.approx(np.corrcoef(base, quiet)[0, 1])
    assert [len(item.comparison.pairs) for item in (missing, diverged)] == [4, 4]


def test_order_of_runs_does_not_matter_to_pairs() -> None:
    baseline = make_group("base", [3.60, 3.70, 3.80], seeds(1, 2, 3))
    judged = judge_one(baseline, make_group("it", [3.78, 3.59, 3.69], seeds(3, 1, 2)))
    wanted = stats.ttest_rel([3.59, 3.69, 3.78], [3.60, 3.70, 3.80])
    assert judged.estimate is not None
    assert (judged.estimate.t, judged.estimate.p) == pytest.approx((wanted.statistic, wanted.pvalue))


@pytest.mark.parametrize(
    ("of_baseline", "of_arm", "method"),
    [
        (seeds(1, 2, 3), seeds(1, 2, 3), "pairs"),
        (seeds(1, 2, 3), seeds(1, 2, 4), "pairs"),
        (seeds(1, 2, 3), seeds(1, 2), "pairs"),
        (seeds(1, 2, 3, 4, 5), seeds(1, 6, 7, 8, 9), "unpaired"),
        (seeds(1, 2, 3), seeds(1), "single run"),
        (seeds(1, 1, 2), seeds(1, 1, 2), "unpaired"),
        ([("1", "")] * 2, [("1", "")] * 2, "unpaired"),
        (seeds(1), seeds(1), "none"),
        (seeds(1), seeds(1, 2, 3), "single run"),
    ],
)
def test_method(of_baseline: Seeds, of_arm: Seeds, method: str) -> None:
    generator = np.random.default_rng(2)
    baseline = make_group("base", generator.normal(3.6, 0.01, len(of_baseline)).tolist(), of_baseline)
    arm = make_group("it", generator.normal(3.6, 0.01, len(of_arm)).tolist(), of_arm)
    assert judge_one(baseline, arm).comparison.method == method


def test_runs_without_a_partner_are_said_to_be_left_out() -> None:
    baseline = make_group("base", [3.60, 3.61, 3.63], seeds(1, 2, 3))
    judged = judge_one(baseline, make_group("it", [3.58, 3.60, 3.4], seeds(1, 2, 9)))
    assert judged.warnings == ("2 runs without a partner on the same seed left out",)


def test_side_by_side_is_welch_with_few_degrees_of_freedom() -> None:
    quiet, loud = [3.600, 3.601, 3.602, 3.603], [3.5, 3.6, 3.7, 3.8]
    judged = judge_one(make_group("base", quiet), make_group("it", loud))
    wanted = stats.ttest_ind(loud, quiet, equal_var=False)
    assert judged.estimate is not None
    assert judged.estimate.t == pytest.approx(wanted.statistic)
    assert judged.estimate.df == 3  # Welch's 3.0005, rounded down
    tidy = judge_one(make_group("base", loud), make_group("it", [3.52, 3.61, 3.73, 3.79]))
    assert tidy.estimate is not None
    assert tidy.estimate.df == 4.5  # of Welch's 5.9 at most 1.5 (4 - 1)


def test_a_single_run_must_stand_five_times_the_noise_seen() -> None:
    judged = judge_one(make_group("base", BASELINE), make_group("it", [3.55]))
    assert judged.estimate is not None
    assert judged.guarded is not None
    assert (judged.estimate.se, judged.estimate.df) == pytest.approx((0.006 * math.sqrt(4 / 3), 2))
    assert judged.guarded.se == pytest.approx(0.006 * math.sqrt(25 + 1 / 3))
    assert judged.verdict == LEANS_BETTER
    assert "its own noise is unknown" in judged.warnings[0]
    assert judge_one(make_group("base", BASELINE), make_group("it", [3.4])).verdict == HELPS
    backwards = judge_one(make_group("base", [3.55]), make_group("it", BASELINE))
    assert backwards.p_holm == pytest.approx(judged.p_holm)
    assert "one run of the baseline" in backwards.warnings[0]


def test_given_noise_comes_before_what_the_runs_show() -> None:
    baseline, arm = make_group("base", BASELINE, seeds(1, 2, 3)), make_group("it", [3.5, 3.6, 3.7], seeds(1, 2, 3))
    judged = judge_one(baseline, arm, given=KNOWN, find_prior=lambda *_: pytest.fail("asked"))
    assert judged.comparison.method == "given noise"
    assert judged.estimate is not None
    assert (judged.estimate.se, judged.estimate.df) == (pytest.approx(0.01 * math.sqrt(2 / 3)), 1000)


def test_unknown_noise_gives_no_verdict() -> None:
    judgement = judge(make_group("base", [3.6]), [make_group("it", [2.6]), make_group("o", [4.6])])
    assert judgement.family == 0
    for judged in judgement.arms:
        assert (judged.verdict, judged.comparison.method, judged.estimate) == (CANNOT_TELL, "none", None)
        assert "noise unknown" in sentence_of(judged, judgement)
        assert math.isnan(judged.p_holm)


# --- strength that is lent -----------------------------------------------------------------------------------

PRIOR = NoisePrior(0.006, 6.0, "earlier runs")


@pytest.mark.parametrize("of_seeds", [seeds(1, 2, 3), None])
def test_a_prior_lends_its_degrees_of_freedom(of_seeds: Seeds | None) -> None:
    baseline, arm = make_group("base", BASELINE, of_seeds), make_group("it", [3.586, 3.601, 3.596], of_seeds)
    asked = []

    def find(one: Group, other: Group, pairs: int) -> NoisePrior:
        asked.append((one.recipe, other.recipe, pairs))
        return PRIOR

    judged = judge_one(baseline, arm, find_prior=find)
    assert asked == [("base", "it", 3 if of_seeds else 0)]
    assert judged.estimate is not None
    if of_seeds is None:
        parts = [moderated(float(np.var(group.losses, ddof=1)), 2, PRIOR)[0] / 3 for group in (baseline, arm)]
        assert judged.estimate.se**2 == pytest.approx(sum(parts))
        assert judged.estimate.df == 12
    else:
        own = float(np.var(np.subtract(arm.losses, baseline.losses), ddof=1))
        assert judged.estimate.se**2 == pytest.approx((6 * 2 * 0.006**2 + 2 * own) / 8 / 3)
        assert judged.estimate.df == 8
    assert judged.comparison.source.endswith("with earlier runs (0.006 on 6 df)")


def test_with_a_prior_one_run_each_is_enough() -> None:
    judged = judge_one(make_group("base", [3.6]), make_group("it", [3.55]), find_prior=lambda *_: PRIOR)
    assert judged.estimate == judged.guarded
    assert judged.estimate is not None
    assert (judged.estimate.se, judged.estimate.df) == (pytest.approx(0.006 * math.sqrt(2)), 6)
    assert (judged.verdict, judged.warnings) == (HELPS, ())


def test_a_prior_that_the_runs_contradict_is_set_aside_aloud() -> None:
    baseline, arm = make_group("base", [3.5, 3.6, 3.7]), make_group("it", [3.55])
    judged = judge_one(baseline, arm, find_prior=lambda *_: PRIOR)
    assert judged.comparison.method == "single run"
    assert judged.comparison == replace(judge_one(baseline, arm).comparison, warnings=judged.comparison.warnings)
    assert "set aside: earlier runs" in judged.warnings[0]


# --- rounding ------------------------------------------------------------------------------------------------


def test_equal_differences_of_rounded_losses_are_not_certainty() -> None:
    baseline = make_group("base", [3.6912, 3.6812], seeds(1, 2))
    judged = judge_one(baseline, make_group("it", [3.6911, 3.6811], seeds(1, 2)))
    assert judged.estimate is not None
    assert judged.estimate.se == pytest.approx(1e-4 * math.sqrt(2 / 12 / 2))
    assert judged.estimate.p > 0.1
    assert judged.verdict == f"{NO_LARGER} 0.01"


@pytest.mark.parametrize(("losses", "is_one_run"), [([3.7123456789] * 3, True), ([3.712] * 3, False)])
def test_replicates_equal_to_the_bit_are_one_run(losses: list[float], is_one_run: bool) -> None:
    (judged,) = judge(make_group("base", losses), [make_group("it", [3.6, 3.61, 3.62])]).arms
    assert judged.comparison.method == ("single run" if is_one_run else "unpaired")
    assert any("count as one" in warning for warning in judged.warnings) == is_one_run


def test_an_arm_equal_on_every_shared_seed_is_no_difference() -> None:
    losses = [3.7, 3.71, 3.68]
    shared = seeds(1, 2, 3)
    (judged,) = judge(make_group("base", losses, shared), [make_group("it", losses, shared)]).arms
    assert judged.verdict == f"{NO_LARGER} 0.01"


# --- evaluation noise ----------------------------------------------------------------------------------------


def with_sequences(
    recipe: str, loss: float, sequences: NDArray[np.float64], documents: NDArray[np.int64] | None = None
) -> Group:
    return make_group(recipe, [loss], measured=measured(sequences, documents))


def test_evaluation_noise_is_added_to_training_noise() -> None:
    generator = np.random.default_rng(3)
    mine, theirs = generator.normal(3.5, 0.1, 12), generator.normal(3.6, 0.1, 12)
    baseline, arm = (with_sequences(name, float(x.mean()), x) for name, x in (("base", theirs), ("it", mine)))
    judged = judge_one(baseline, arm, given=Noise(0.02, 8))
    evaluation = clustered_mean(mine - theirs, np.repeat(np.arange(6), 2))
    assert judged.evaluation == evaluation
    assert judged.comparison.estimate is not None
    assert judged.comparison.estimate.se == pytest.approx(0.02 * math.sqrt(2))
    assert judged.estimate is not None
    assert judged.estimate.difference == pytest.approx(mine.mean() - theirs.mean())
    assert judged.estimate.se == pytest.approx(math.hypot(evaluation.se, judged.comparison.estimate.se))
    assert evaluation.df <= judged.estimate.df <= 8


def test_a_diverged_run_does_not_hide_the_test_sequences_of_the_others() -> None:
    baseline = make_group("base", [3.6, None, 3.61], measured=measured(np.linspace(3.5, 3.7, 12)))
    assert judge_one(baseline, with_sequences("it", 3.5, np.linspace(3.4, 3.6, 12))).evaluation is not None


def test_test_set_of_one_document_settles_nothing() -> None:
    one = np.zeros(12, dtype=np.int64)
    baseline = with_sequences("base", 3.6, np.linspace(3.5, 3.7, 12), documents=one)
    arms = [with_sequences(name, 3.0, np.linspace(2.8, 3.2, 12), documents=one) for name in ("it", "too")]
    judgement = judge(baseline, arms, Rules(given=KNOWN))
    for judged in judgement.arms:
        assert judged.verdict == CANNOT_TELL
        assert "one document" in sentence_of(judged, judgement)
        assert "the test set's text is one document, so score on more" in advice_on(judged, judgement)
    assert best_buy(judgement) == ""


def test_tests_without_sequences_have_training_noise_alone() -> None:
    judged = judge_one(make_group("base", BASELINE), make_group("it", [3.5, 3.51, 3.52]))
    assert judged.evaluation is None
    assert judged.estimate == judged.comparison.estimate


# --- what is unfair, and what must not get lost --------------------------------------------------------------


def test_arms_that_saw_other_numbers_of_tokens_are_refused_all_at_once() -> None:
    baseline = make_group("base", BASELINE, tokens_seen=5000)
    arms = [make_group(f"arm{n}", [3.5], tokens_seen=5000 + n) for n in range(3)]
    with pytest.raises(ConfigError) as caught:
        judge(baseline, arms)
    assert caught.value.exit_status == 2
    assert [line.split(":")[0] for line in caught.value.lines] == ["arm1", "arm2"]
    assert "saw 5,002 tokens and base 5,000" in caught.value.lines[1]


def test_baseline_whose_runs_saw_other_numbers_of_tokens_is_refused() -> None:
    runs = make_group("base", [3.6], tokens_seen=1).results + make_group("base", [3.6], tokens_seen=2).results
    with pytest.raises(ConfigError, match="base: its replicates saw 1 and 2 tokens"):
        judge(Group("base", runs), [make_group("it", [3.5], tokens_seen=1)])


@pytest.mark.parametrize(
    ("change", "warning"),
    [({"hardware": "8x A100"}, "other hardware: 1x cpu, 8x A100"), ({"parameters": 1500}, "+500 parameters")],
)
def test_other_hardware_and_size_are_warned_of(change: dict[str, Any], warning: str) -> None:
    baseline = make_group("base", BASELINE, hardware="1x cpu")
    assert judge_one(baseline, make_group("it", BASELINE, hardware="1x cpu")).warnings == ()
    assert judge_one(baseline, make_group("it", BASELINE, **change)).warnings == (warning,)


@pytest.mark.parametrize("shared", [None, seeds(1, 2, 3, 4, 5)])
def test_runs_that_diverge_are_counted_beside_the_rest(shared: Seeds | None) -> None:
    base = [3.600, 3.612, 3.606, 3.61, 3.601]
    arms = [
        make_group("some", [3.1, None, 3.11, 3.105, 3.102], shared),
        make_group("all", [None] * 5, shared),
        make_group("none", [3.1, 3.11, 3.12, 3.1, 3.11], shared),
    ]
    judgement = judge(make_group("base", base, shared), arms)
    some, gone, none = judgement.arms
    assert (some.verdict, none.verdict) == (HELPS, HELPS)
    assert "Diverged: 1 of 5 runs, of the baseline 0 of 5 (Fisher p 1," in sentence_of(some, judgement)
    assert gone.verdict == DIVERGES
    assert sentence_of(gone, judgement).startswith("DIVERGES: every run of all diverged. Diverged: 5 of 5 runs")
    assert none.divergence is None
    alone = judge(make_group("base", base, shared), [arms[0], arms[2]])
    assert alone.arms[1].estimate == none.estimate


def test_a_baseline_replicate_that_diverged_is_left_out_and_named() -> None:
    whole = judge(make_group("base", BASELINE), [make_group("it", [3.1, 3.2])])
    judgement = judge(make_group("base", [*BASELINE, None]), [make_group("it", [3.1, 3.2])])
    assert judgement.arms[0].estimate == whole.arms[0].estimate
    assert "base: 1 of 4 runs diverged and have no loss: base-3." in table_notes(Study((), judgement))


def test_loss_that_is_not_finite_is_a_diverged_run(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("run,recipe,init_seed,train_seed,test_loss\na,base,,,3.6\nb,base,,,3.7\nc,it,,,nan\nd,it,,,inf\n")
    baseline, arm = group_results(read_losses(path))
    assert arm.diverged == ["c", "d"]
    assert said_of(baseline, arm).startswith("CANNOT TELL: every run of it diverged")


def test_the_same_seed_run_again_in_another_folder_is_no_replicate() -> None:
    def result(run: str, recipe: str, seed: int, loss: float) -> Result:
        (pair,) = seeds(seed)
        return Result(run, recipe, *pair, loss, make_metadata(recipe_hash=recipe))

    found = group_results(
        [
            result("b-1", "base", 1, 3.60),
            result("i-1", "it", 1, 3.50),
            result("b-1-again", "base", 1, 3.61),
            result("b-2", "base", 2, 3.62),
        ],
        in_folders=True,
    )
    assert [[item.run for item in group.results] for group in found] == [["b-1", "b-2"], ["i-1"]]


def test_rows_of_a_table_with_equal_seeds_all_count() -> None:
    rows = [Result(f"run{n}", "base", "1", "1", 3.6 + n) for n in range(3)]
    (group,) = group_results(rows)
    assert len(group.losses) == 3


def test_worth_in_tokens_follows_the_baselines_curve_where_a_difference_is_told() -> None:
    tokens = np.arange(1, 101) * 1e6
    curve = (tokens, 8 - 0.1 * np.log(tokens))
    baseline = make_group("base", BASELINE, curve=curve)
    slope = curve_slope(baseline)
    told = judge_one(baseline, make_group("it", [loss - 0.01 for loss in BASELINE]), given=Noise(0.001, 100))
    assert tokens_worth_of(told, slope) == pytest.approx(
        tuple(math.exp(0.1 * factor) for factor in (1, 1 - 0.1619944, 1 + 0.1619944)), rel=1e-4
    )
    open_still = judge_one(baseline, make_group("it", [loss - 0.01 for loss in BASELINE]), given=Noise(0.1, 100))
    assert tokens_worth_of(open_still, slope) is None
    assert curve_slope(make_group("base", BASELINE)) is None


# --- what to buy next ----------------------------------------------------------------------------------------


def test_advice_counts_the_fewest_seeds_for_the_word_in_this_table() -> None:
    """As many pairs as the power of the paired t test at 5% over the family asks for; one fewer is not enough."""
    known = {"cost": 21.0, "currency": "USD", "tokens_seen": 3_600_000, "tokens_per_second": 1000.0}
    shared = seeds(1, 2, 3, 4)
    baseline = make_group("base", [3.60, 3.70, 3.65, 3.62], shared, **known)
    arms = [make_group(name, [3.603, 3.699, 3.652, 3.615], shared, **known) for name in ("it", "too")]
    judgement = judge(baseline, arms, Rules(margin=0.005))
    noise = judgement.arms[0].comparison.noise
    assert noise is not None
    count = 4
    while power(0.005, noise.sd * math.sqrt(2 / count), count - 1, 0.025) < 0.8:
        count += 1
    assert count > 5
    more = count - 4
    assert advice_on(judgement.arms[0], judgement) == (
        f"To settle an effect of 0.005 four times in five: {2 * more} more runs (seeds 5 to {count} of this arm and "
        f"of the baseline), {2 * more * 21:,.2f} USD, {2 * more}.00 hours."
    )


def test_advice_on_a_single_run_reckons_with_the_pairs_that_it_would_have() -> None:
    """On the baseline's seeds a second run makes two pairs, on one degree of freedom: fewer than Welch's."""
    baseline = make_group("base", [3.600, 3.605, 3.602], seeds(1, 2, 3))
    judgement = judge(baseline, [make_group("it", [3.6], seeds(1))])
    noise = judgement.arms[0].comparison.noise
    assert noise is not None
    count = 2
    while power(0.01, noise.sd * math.sqrt(2 / count), count - 1) < 0.8:
        count += 1
    assert count > 2
    said = advice_on(judgement.arms[0], judgement)
    assert said.startswith(
        f"To settle an effect of 0.01 four times in five: {count - 1 + max(0, count - 3)} more runs"
    )


def test_advice_says_what_no_seed_removes() -> None:
    sequences = np.random.default_rng(5).normal(3.6, 0.1, 12)
    baseline = make_group("base", [3.6, 3.61], seeds(1, 2), measured=measured(np.full(12, 3.605)))
    judgement = judge(baseline, [make_group("it", [3.6, 3.609], seeds(1, 2), measured=measured(sequences))])
    assert "no number of seeds; the test set's own uncertainty is 0.0" in advice_on(judgement.arms[0], judgement)


def test_nothing_is_to_be_bought_for_what_is_settled() -> None:
    for loss, noise in ((3.5, 0.01), (3.6, 0.001), (3.599, 1e-5)):
        judgement = judge(make_group("base", [3.6]), [make_group("it", [loss])], Rules(given=Noise(noise, 1000)))
        assert advice_on(judgement.arms[0], judgement) == best_buy(judgement) == ""


def test_a_run_that_saves_next_to_nothing_is_not_recommended() -> None:
    """One more seed takes so little off this standard error that it could hardly change anybody's mind."""
    shared = seeds(1, 2, 3)
    judgement = judge(make_group("base", [3.6, 3.62, 3.61], shared), [make_group("it", [3.53, 3.6, 3.57], shared)])
    assert judgement.arms[0].is_open
    assert best_buy(judgement) == ""


def test_the_run_that_is_worth_most_is_the_undecided_one() -> None:
    shared = seeds(1, 2, 3)
    baseline = make_group("base", [3.6, 3.62, 3.61], shared)
    clear = make_group("clear", [3.5, 3.55, 3.5], shared)
    undecided = make_group("undecided", [3.58, 3.63, 3.6], shared)
    judgement = judge(baseline, [clear, undecided])
    assert best_buy(judgement).startswith("Worth most for a run: undecided, 2 more runs (seed 4 of this arm and of")


# --- the ledger ----------------------------------------------------------------------------------------------


def make_entry(**changes: Any) -> Entry:
    defaults: dict[str, Any] = {
        "component": "all",
        "recipe": "base",
        "recipe_hash": "r",
        "parameters": 1000,
        "train_tokens": 5000,
        "hardware": "1x cpu",
        "sd": 0.01,
        "df": 6,
        "runs": ("a", "b"),
    }
    return Entry(**{**defaults, **changes})


HERE = Scale(1000, 5000, "1x cpu")


def learned_from(runs: Sequence[tuple[str, str, float | None]]) -> dict[str, Entry]:
    results = tuple(
        Result(f"run{n}", "h", init, train, loss, None if loss is None else make_metadata(recipe_hash="h"))
        for n, (init, train, loss) in enumerate(runs)
    )
    return {entry.component: entry for entry in learn_noise(Group("base", results))}


def test_noise_is_learned_over_all_seeds() -> None:
    found = learned_from([("1", "1/1", 3.60), ("2", "2/2", 3.62), ("3", "3/3", 3.61)])
    assert found.keys() == {"all"}
    entry = found["all"]
    assert (entry.sd, entry.df) == pytest.approx((0.01, 2))
    assert (entry.recipe, entry.recipe_hash, entry.runs) == ("base", "h", ("run0", "run1", "run2"))
    assert (entry.parameters, entry.train_tokens, entry.hardware) == (1000, 5000, "1x cpu")


def test_a_component_is_learned_where_it_varies_alone() -> None:
    found = learned_from(
        [
            ("1", "1/1", 3.60),
            ("2", "1/1", 3.62),  # another init
            ("1", "2/1", 3.66),  # another order
            ("1", "1/2", 3.68),  # another dropout
            ("1", "1/3", 3.64),
        ]
    )
    assert found.keys() == {"init", "order", "dropout", "all"}
    wanted = {"init": ([3.60, 3.62], 1), "order": ([3.60, 3.66], 1), "dropout": ([3.60, 3.68, 3.64], 2)}
    for component, (losses, df) in wanted.items():
        assert (found[component].sd, found[component].df) == pytest.approx((np.std(losses, ddof=1), df))
    assert found["dropout"].runs == ("run0", "run3", "run4")
    assert found["all"].df == 4


def test_sets_that_share_the_other_seeds_are_pooled() -> None:
    found = learned_from([("1", "1/1", 3.0), ("2", "1/1", 3.2), ("1", "9/9", 5.0), ("2", "9/9", 5.4)])
    assert (found["init"].sd, found["init"].df) == pytest.approx((math.sqrt((0.02 + 0.08) / 2), 2))


@pytest.mark.parametrize(
    "runs",
    [[], [("1", "1/1", 3.6)], [("1", "1/1", 3.6), ("2", "2/2", None)]],
)
def test_nothing_is_learned_from_one_run(runs: list[tuple[str, str, float | None]]) -> None:
    assert learned_from(runs) == {}


def test_only_seeds_of_one_component_varying_are_not_all_the_noise() -> None:
    assert learned_from([("1", "1/1", 3.6), ("2", "1/1", 3.7)]).keys() == {"init"}


def test_ledger_replaces_what_it_learns_again(tmp_path: Path) -> None:
    path = tmp_path / "noise-ledger.json"
    assert load_ledger(path) == []
    kept = [make_entry(component="init"), make_entry(hardware="8x A100"), make_entry(recipe_hash="other")]
    record(path, [make_entry(sd=0.5), *kept])
    record(path, [make_entry(sd=0.02, runs=("a", "b", "c"))])
    assert load_ledger(path) == [*kept, make_entry(sd=0.02, runs=("a", "b", "c"))]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"entries": [{}]}',
        json.dumps({"entries": [{**make_entry().__dict__, "component": "luck"}]}),
        json.dumps({"entries": [{**make_entry().__dict__, "sd": -1.0}]}),
        json.dumps({"entries": [{**make_entry().__dict__, "df": 0}]}),
    ],
)
def test_ledger_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "noise-ledger.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ledger(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: ")


def test_own_noise_is_found_first_and_on_the_same_hardware() -> None:
    near, elsewhere, own = make_entry(recipe_hash="other", df=99), make_entry(hardware="8x A100", df=9), make_entry()
    assert find_noise([near, elsewhere, own], "r", HERE) == (own, "")
    assert find_noise([near, elsewhere], "r", HERE) == (elsewhere, "borrowed from other hardware (8x A100)")
    # A plan does not know its hardware yet.
    assert find_noise([near, elsewhere, own], "r", Scale(1000, 5000, None)) == (elsewhere, "")


def test_noise_of_one_component_is_not_lent() -> None:
    assert find_noise([make_entry(component=c) for c in ("init", "order", "dropout")], "r", HERE) is None


def test_noise_is_borrowed_from_the_nearest_of_the_same_scale() -> None:
    far, near = make_entry(recipe="far", parameters=1900), make_entry(recipe="near", train_tokens=4500)
    assert find_noise([far, near], "x", HERE) == (near, "borrowed from another recipe (near)")
    for change in ({"parameters": 2100}, {"parameters": 480}, {"train_tokens": 10_100}, {"train_tokens": 2400}):
        assert find_noise([make_entry(**change)], "x", HERE) is None
    assert find_noise([], "x", HERE) is None


def test_recipes_are_known_by_their_hash(make_run: Callable[..., Path]) -> None:
    def hash_of(name: str, **train: Any) -> str:
        folder = make_run(name, train=train)
        return recipe_hash(*load_run_configs(folder / "model.json", folder / "train.json"))

    base = hash_of("base")
    assert hash_of("seeded", random_seed=5, init_seed=6, notes="again") == base
    assert hash_of("other", learning_rate=0.5) != base


# --- how often the words are wrong ---------------------------------------------------------------------------

STUDIES = 250


# benchmarks/simulate_verdicts.py runs all situations, with more studies.
@pytest.mark.parametrize(
    "name",
    [
        "correlations .97 to .25, 5 shared seeds",
        "one arm 5 times as noisy, 7 v 1",
        "rounded to 3 decimals, 2 seeds",
        "43 unequal documents, 3 shared seeds",
        "5 arms exactly at the margin",
        "a stack that lacks half of the sum",
    ],
)
def test_promises_hold_in_made_up_studies(name: str) -> None:
    found = SIMULATIONS[name](name, np.random.default_rng(5), STUDIES)
    assert found.false[0] <= 0.055 + 3.5 * math.sqrt(0.05 * 0.95 / STUDIES)
    value, error = found.rates["coverage"]
    if name != "one arm 5 times as noisy, 7 v 1":  # one run does not show its own noise, and the table says so
        assert value >= 0.94 - 3.5 * error
