"""Which word a comparison gets, whose noise it is held against, and how often the words are wrong."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from benchmarks.simulate_verdicts import CASES, Case, simulate
from harness.run.config import load_run_configs
from harness.run.errors import ConfigError
from harness.run.recipe import recipe_hash
from study.ledger import Entry, Scale, find_noise, load_ledger, record
from study.losses_table import read_losses
from study.noise import learn_noise
from study.results import Group, Result, RunMetadata, group_results
from study.statistics import Estimate, Noise, block_noise, clustered_mean, compare_means, seeds_to_see
from study.verdicts import (
    CANNOT_TELL,
    HELPS,
    HURTS,
    LEANS_BETTER,
    LEANS_WORSE,
    NO_LARGER,
    Judged,
    add_evaluation,
    judge,
    verdict_of,
)

BASELINE = [3.600, 3.612, 3.606]
KNOWN = Noise(0.01, 1000)
Seeds = Sequence[tuple[str, str]]


def seeds(*numbers: int) -> Seeds:
    return [(str(number), f"{number}/{number}") for number in numbers]


def make_metadata(**changes: Any) -> RunMetadata:
    """Make what a run folder knows, with a test set of 6 documents of 2 sequences."""
    defaults: dict[str, Any] = {
        "recipe": {},
        "recipe_hash": "r",
        "parameters": 1000,
        "step": 9,
        "tokens_seen": 5000,
        "hardware": "1x cpu",
        "tokens_per_second": None,
        "cost": None,
        "currency": "",
        "tokens_sha256": "t",
        "sequence_losses": np.zeros(12),
        "documents": np.repeat(np.arange(6), 2),
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


def judge_one(baseline: Group, arm: Group, **options: Any) -> Judged:
    (judged,) = judge(baseline, [arm], **options).arms
    return judged


# --- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "sd", "verdict"),
    [
        (-0.05, 0.01, HELPS),
        (0.05, 0.01, HURTS),
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
    judged = judge(baseline, arms, given=Noise(sd, 1000)).arms[0]
    assert judged.verdict == verdict
    assert judged.sentence.startswith(f"{verdict}: Δ {difference:+.4f} (95% CI ")
    assert judged.sentence.endswith("of 4, n 2 v 2.")


def test_leaning_alone_is_settled_alone() -> None:
    baseline, arm = make_group("base", [3.6, 3.6]), make_group("it", [3.576, 3.576])
    judged = judge_one(baseline, arm, given=KNOWN)
    assert judged.estimate is not None
    assert judged.p_holm == judged.estimate.p
    assert judged.verdict == HELPS


def test_a_small_but_certain_difference_is_named_by_its_direction() -> None:
    judged = judge_one(make_group("base", [3.6]), make_group("it", [3.599]), given=Noise(1e-4, 100))
    assert judged.verdict == HELPS


def test_margin_decides_what_is_no_larger() -> None:
    baseline, arm = make_group("base", [3.6]), make_group("it", [3.604])
    words = [judge_one(baseline, arm, given=KNOWN, margin=margin).verdict for margin in (0.01, 0.04)]
    assert words == [CANNOT_TELL, f"{NO_LARGER} 0.04"]


@pytest.mark.parametrize(("difference", "verdict"), [(0.0, f"{NO_LARGER} 0.01"), (0.5, HURTS), (-1e-9, HELPS)])
def test_words_without_any_noise(difference: float, verdict: str) -> None:
    assert verdict_of(Estimate(difference, 0.0, 4), 0.0 if difference else 1.0, 0.01) == verdict


def test_cannot_tell_says_what_it_could_have_seen() -> None:
    judged = judge_one(make_group("base", [3.674103] * 7), make_group("it", [3.678317]), given=Noise(0.012339, 6))
    assert judged.verdict == CANNOT_TELL
    assert "Δ +0.0042 (95% CI -0.0281..+0.0365), t +0.32 on 6 df." in judged.sentence
    assert "Effects under 0.0444 would be missed one time in five" in judged.sentence
    assert "To see 0.01: 25 seeds per arm" in judged.sentence
    assert "no effect" not in judged.sentence


def test_leaning_says_how_many_seeds_would_settle_it() -> None:
    arms = [make_group("it", [3.576]), *(make_group(f"null{n}", [3.6]) for n in range(3))]
    judged = judge(make_group("base", [3.6]), arms, given=Noise(0.0075, 1000)).arms[0]
    assert judged.verdict == LEANS_BETTER
    assert f"{seeds_to_see(0.024, 0.0075, alpha=0.05 / 4)} seeds per arm would settle it" in judged.sentence


# --- whose noise ---------------------------------------------------------------------------------------------


def test_shared_seeds_are_blocks() -> None:
    generator = np.random.default_rng(1)
    table = 3.6 + generator.normal(0, 0.1, 3) + generator.normal(0, 0.002, (4, 3))
    groups = [make_group(f"arm{n}", row.tolist(), seeds(1, 2, 3)) for n, row in enumerate(table)]
    judgement = judge(groups[0], groups[1:])
    assert judgement.method == "blocks"
    assert judgement.training is not None
    assert judgement.training.noise == block_noise(table)
    for row, judged in zip(table[1:], judgement.arms, strict=True):
        assert judged.estimate == compare_means(row.tolist(), table[0].tolist(), block_noise(table))
        assert judged.correlation == pytest.approx(np.corrcoef(row, table[0])[0, 1])


def test_order_of_runs_does_not_matter_to_blocks() -> None:
    baseline = make_group("base", [3.60, 3.70, 3.80], seeds(1, 2, 3))
    arm = make_group("it", [3.78, 3.59, 3.69], seeds(3, 1, 2))
    judged = judge_one(baseline, arm)
    assert judged.method == "blocks"
    wanted = stats.ttest_rel([3.59, 3.69, 3.78], [3.60, 3.70, 3.80])
    assert judged.estimate is not None
    assert (judged.estimate.t, judged.estimate.p) == pytest.approx((wanted.statistic, wanted.pvalue))


@pytest.mark.parametrize(
    ("of_baseline", "of_arm", "method"),
    [
        (seeds(1, 2, 3), seeds(1, 2, 3), "blocks"),
        (seeds(1, 2, 3), seeds(1, 2, 4), "pooled"),
        (seeds(1, 2, 3), seeds(1, 2), "pooled"),
        (seeds(1, 2, 3), seeds(1), "single-case"),
        (seeds(1, 1, 2), seeds(1, 1, 2), "pooled"),
        ([("1", "")] * 2, [("1", "")] * 2, "pooled"),
        ([("1", ""), ("2", "")], [("1", ""), ("2", "")], "blocks or pooled"),
        (seeds(1), seeds(1), "none"),
        (seeds(1), seeds(1, 2, 3), "pooled"),
    ],
)
def test_method(of_baseline: Seeds, of_arm: Seeds, method: str) -> None:
    generator = np.random.default_rng(2)
    baseline = make_group("base", generator.normal(3.6, 0.01, len(of_baseline)).tolist(), of_baseline)
    arm = make_group("it", generator.normal(3.6, 0.01, len(of_arm)).tolist(), of_arm)
    assert judge_one(baseline, arm).method in method
    if method == "blocks":
        # One arm on other seeds, and nothing can be a block.
        other = make_group("other", [3.6, 3.7], seeds(8, 9))
        assert {judged.method for judged in judge(baseline, [arm, other]).arms} == {"pooled"}


def test_pooled_noise_is_of_all_arms() -> None:
    baseline, arm, other = make_group("base", BASELINE), make_group("it", [3.5, 3.52]), make_group("o", [3.4, 3.41])
    judgement = judge(baseline, [arm, other])
    assert judgement.method == "pooled"
    squares = sum(np.var(group.losses) * len(group.losses) for group in (baseline, arm, other))
    found = judgement.arms[0].estimate
    assert found is not None
    assert found.df == 2 + 1 + 1
    assert found.se == pytest.approx(math.sqrt(squares / 4) * math.sqrt(1 / 3 + 1 / 2))


def test_two_groups_are_students_t() -> None:
    judged = judge_one(make_group("base", BASELINE), make_group("it", [3.59, 3.595, 3.60, 3.58]))
    wanted = stats.ttest_ind([3.59, 3.595, 3.60, 3.58], BASELINE)
    assert judged.estimate is not None
    assert (judged.estimate.t, judged.p_holm) == pytest.approx((wanted.statistic, wanted.pvalue))


def test_single_run_is_held_against_the_baselines_own_spread() -> None:
    noisy = make_group("noisy", [3.0, 4.0, 5.0])
    judgement = judge(make_group("base", BASELINE), [make_group("it", [3.58]), noisy])
    single, pooled = judgement.arms
    assert (single.method, pooled.method) == ("single-case", "pooled")
    assert single.estimate is not None
    assert (single.estimate.se, single.estimate.df) == pytest.approx((0.006 * math.sqrt(4 / 3), 2))
    assert judgement.method == "pooled"


def test_given_noise_comes_before_what_the_runs_show() -> None:
    baseline, arm = make_group("base", BASELINE, seeds(1, 2, 3)), make_group("it", [3.5, 3.6, 3.7], seeds(1, 2, 3))
    judged = judge_one(baseline, arm, given=KNOWN, borrow=lambda _: (Noise(9.0, 9), "the ledger"))
    assert judged.method == "given noise"
    assert judged.estimate == compare_means(arm.losses, baseline.losses, KNOWN)


def test_without_replicates_noise_is_borrowed_and_said_to_be() -> None:
    baseline, arm = make_group("base", [3.6]), make_group("it", [3.5])
    borrowed = Noise(0.01, 6), "borrowed from another recipe (small)"
    judgement = judge(baseline, [arm], borrow=lambda group: borrowed if group is baseline else None)
    (judged,) = judgement.arms
    assert judged.method == judgement.method == "ledger"
    assert judged.estimate == compare_means([3.5], [3.6], Noise(0.01, 6))
    assert judged.estimate.se == pytest.approx(0.01 * math.sqrt(2))
    assert judged.verdict == HELPS
    assert judged.warnings == ("noise borrowed from another recipe (small)",)


def test_a_recipes_own_noise_is_no_reason_to_warn() -> None:
    own = Noise(0.01, 6), "the ledger, from 7 runs of this recipe"
    assert judge_one(make_group("base", [3.6]), make_group("it", [3.5]), borrow=lambda _: own).warnings == ()


def test_replicates_come_before_the_ledger() -> None:
    judged = judge_one(make_group("base", BASELINE), make_group("it", [3.5]), borrow=lambda _: pytest.fail("asked"))
    assert judged.method == "single-case"


def test_unknown_noise_gives_no_verdict() -> None:
    judgement = judge(make_group("base", [3.6]), [make_group("it", [2.6]), make_group("o", [4.6])])
    assert judgement.training is None
    for judged in judgement.arms:
        assert (judged.verdict, judged.method, judged.estimate) == (CANNOT_TELL, "none", None)
        assert "noise unknown" in judged.sentence
        assert math.isnan(judged.p_holm)


def test_unequal_noises_are_said_beside_welch() -> None:
    quiet, loud = [3.600, 3.601, 3.602, 3.603], [3.5, 3.6, 3.7, 3.8]
    wanted = stats.ttest_ind(loud, quiet, equal_var=False).pvalue
    (warning,) = judge_one(make_group("base", quiet), make_group("it", loud)).warnings
    assert f"Welch gives p {wanted:.3g}" in warning
    assert judge_one(make_group("base", quiet[:3]), make_group("it", loud)).warnings == ()
    assert judge_one(make_group("base", quiet), make_group("it", [3.5, 3.501, 3.502, 3.503])).warnings == ()


# --- evaluation noise ----------------------------------------------------------------------------------------


def with_sequences(recipe: str, loss: float, sequences: NDArray[np.float64], **changes: Any) -> Group:
    return make_group(recipe, [loss], sequence_losses=sequences, **changes)


def test_evaluation_noise_is_added_to_training_noise() -> None:
    generator = np.random.default_rng(3)
    mine, theirs = generator.normal(3.5, 0.1, 12), generator.normal(3.6, 0.1, 12)
    baseline, arm = (with_sequences(name, float(x.mean()), x) for name, x in (("base", theirs), ("it", mine)))
    judged = judge_one(baseline, arm, given=Noise(0.02, 8))
    evaluation = clustered_mean(mine - theirs, np.repeat(np.arange(6), 2))
    assert judged.evaluation == evaluation
    assert judged.training is not None
    assert judged.training.se == pytest.approx(0.02 * math.sqrt(2))
    assert judged.estimate is not None
    assert judged.estimate.difference == pytest.approx(mine.mean() - theirs.mean())
    assert judged.estimate.se == pytest.approx(math.hypot(evaluation.se, judged.training.se))
    v1, v2 = evaluation.se**2, judged.training.se**2
    assert judged.estimate.df == math.floor((v1 + v2) ** 2 / (v1**2 / 5 + v2**2 / 8))


def test_test_set_of_one_document_settles_nothing() -> None:
    one = np.zeros(12, dtype=np.int64)
    baseline = with_sequences("base", 3.6, np.linspace(3.5, 3.7, 12), documents=one)
    arms = [with_sequences(name, 3.0, np.linspace(2.8, 3.2, 12), documents=one) for name in ("it", "too")]
    for judged in judge(baseline, arms, given=KNOWN).arms:
        assert judged.verdict == CANNOT_TELL


def test_tests_without_sequences_have_training_noise_alone() -> None:
    judged = judge_one(make_group("base", BASELINE), make_group("it", [3.5, 3.51, 3.52]))
    assert judged.evaluation is None
    assert judged.estimate == judged.training


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
    same = make_group("it", [3.5], hardware="1x cpu")
    assert judge_one(baseline, same).warnings == ()
    assert judge_one(baseline, make_group("it", [3.5], **change)).warnings == (warning,)


@pytest.mark.parametrize("shared", [None, seeds(1, 2, 3)])
def test_an_arm_with_a_diverged_run_gets_no_verdict_from_the_others(shared: Seeds | None) -> None:
    arm = make_group("it", [3.1, None, 3.11], shared)
    other = make_group("other", [3.1, 3.11, 3.12], shared)
    judged, beside = judge(make_group("base", BASELINE, shared), [arm, other]).arms
    assert judged.group.losses == [3.1, 3.11]
    assert (judged.verdict, judged.estimate) == (CANNOT_TELL, None)
    assert judged.sentence == "CANNOT TELL: diverged: it-1"
    assert (beside.verdict, beside.method) == (HELPS, "blocks" if shared else "pooled")


def test_an_arm_that_diverged_altogether_leaves_the_noise_alone() -> None:
    baseline, arm = make_group("base", BASELINE), make_group("it", [3.4, 3.41, 3.42])
    alone = judge(baseline, [arm]).training
    assert judge(baseline, [arm, make_group("gone", [None, None])]).training == alone


@pytest.mark.parametrize("loss", [3.7, 3.6999])
def test_replicates_without_any_spread_are_no_noise(loss: float) -> None:
    """The same run, seen again to the bit, does not say how much another would differ."""
    (judged,) = judge(make_group("base", [3.7] * 7), [make_group("it", [loss] * 3)]).arms
    assert (judged.verdict, judged.estimate) == (CANNOT_TELL, None)
    assert "no replicates that differ" in judged.sentence


def test_an_arm_equal_on_every_shared_seed_is_no_difference() -> None:
    losses = [3.7, 3.71, 3.68]
    shared = seeds(1, 2, 3)
    (judged,) = judge(make_group("base", losses, shared), [make_group("it", losses, shared)]).arms
    assert judged.verdict == f"{NO_LARGER} 0.01"


def test_more_evaluation_noise_never_narrows_an_interval() -> None:
    training = Estimate(-0.05, 0.01, 1)
    added = [add_evaluation(training, Estimate(-0.05, se, 500)) for se in (1e-4, 0.005, 0.0099)]
    highs = [estimate.interval()[1] for estimate in (training, *added)]
    assert highs == sorted(set(highs))


def test_a_baseline_with_a_diverged_run_is_no_measure() -> None:
    for judged in judge(make_group("base", [*BASELINE, None]), [make_group("it", [3.1, 3.2])]).arms:
        assert judged.verdict == CANNOT_TELL
        assert "diverged: base-3" in judged.sentence


def test_loss_that_is_not_finite_is_a_diverged_run(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("run,recipe,init_seed,train_seed,test_loss\na,base,,,3.6\nb,base,,,3.7\nc,it,,,nan\nd,it,,,inf\n")
    baseline, arm = group_results(read_losses(path))
    assert arm.diverged == ["c", "d"]
    assert judge_one(baseline, arm).sentence == "CANNOT TELL: diverged: c, d"


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
        ]
    )
    assert [[item.run for item in group.results] for group in found] == [["b-1", "b-2"], ["i-1"]]


def test_rows_of_a_table_with_equal_seeds_all_count() -> None:
    rows = [Result(f"run{n}", "base", "1", "1", 3.6 + n) for n in range(3)]
    (group,) = group_results(rows)
    assert len(group.losses) == 3


def test_worth_in_tokens_follows_the_baselines_curve() -> None:
    tokens = np.arange(1, 101) * 1e6
    curve = (tokens, 8 - 0.1 * np.log(tokens))
    baseline = make_group("base", BASELINE, curve=curve)
    arm = make_group("it", [loss - 0.01 for loss in BASELINE], curve=(tokens, tokens))
    judged = judge_one(baseline, arm)
    assert judged.tokens_factor == pytest.approx(math.exp(0.1))
    assert judge_one(make_group("base", BASELINE), make_group("it", BASELINE)).tokens_factor is None


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

STUDIES = 600


# benchmarks/simulate_verdicts.py runs all cases, with more studies.
@pytest.mark.parametrize("case", [case for case in CASES if not case.has_sequences], ids=lambda case: case.name)
def test_promises_hold_in_made_up_studies(case: Case) -> None:
    found = simulate(case, STUDIES, seed=5)
    margin = 4  # standard errors
    assert found.false_verdicts <= 0.05 + margin * math.sqrt(0.05 * 0.95 / STUDIES)
    # Not by never saying anything: Holm over five arms with one baseline wastes less than half.
    assert found.false_verdicts >= 0.01
    assert found.coverage == pytest.approx(0.95, abs=margin * found.coverage_se)
    assert found.power == pytest.approx(0.8, abs=margin * math.sqrt(0.8 * 0.2 / STUDIES))
