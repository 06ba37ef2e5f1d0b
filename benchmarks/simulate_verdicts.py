"""Do the verdicts keep their promises? Made-up studies with known truth, judged as real ones are.

  python -m benchmarks.simulate_verdicts --studies 2000

For every way in which training noise is estimated, thousands of studies are drawn from a normal distribution and go
through `study.verdicts.judge`. Three promises are checked:

- Where no arm differs from the baseline, at most 5% of the studies hold any HELPS or HURTS (Holm 1979).
- An effect as large as `detectable` says is found by its own test (HELPS or LEANS BETTER) four times in five.
- The 95% interval of a difference holds the true one in 95% of the studies.

Every rate is printed with its Monte Carlo standard error and goes to benchmarks/results/simulate_verdicts.json. Only
what a judgement tells without deciding by it is left out, because it takes longer than everything else.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.run.files import write_json
from study import verdicts
from study.results import Group, Result, RunMetadata
from study.statistics import detectable
from study.verdicts import HELPS, HURTS, LEANS_BETTER, Judgement, judge

RESULTS = Path(__file__).parent / "results" / "simulate_verdicts.json"
ARMS = 5
RUN_SD = 0.0123
"""Noise of one run, in nats per token: that of the published baseline."""
SEED_SD = 0.01
"""What runs of one seed have in common, on top, where seeds are shared."""
DOCUMENTS, SEQUENCES_EACH, DOCUMENT_SD, SEQUENCE_SD = 20, 3, 0.03, 0.03
"""A test set, and how its documents and sequences differ in what an arm makes of them."""


@dataclass(frozen=True)
class Case:
    """One way to lay out a study, and the method by which it must be judged."""

    name: str
    method: str
    baseline_runs: int
    arm_runs: int
    has_seeds: bool = False
    has_sequences: bool = False

    @property
    def degrees_of_freedom(self) -> int:
        """Degrees of freedom of the training noise."""
        if self.method == "blocks":
            return ARMS * (self.baseline_runs - 1)
        if self.method == "single-case":
            return self.baseline_runs - 1
        return self.baseline_runs - 1 + ARMS * (self.arm_runs - 1)

    @property
    def detectable(self) -> float:
        """The size of an effect that is said to be found four times in five."""
        return detectable(RUN_SD * math.sqrt(1 / self.baseline_runs + 1 / self.arm_runs), self.degrees_of_freedom)


CASES = (
    Case("blocks, 3 shared seeds", "blocks", 3, 3, has_seeds=True),
    Case("pooled, 4 baselines, 2 runs each", "pooled", 4, 2),
    Case("single-case, 7 baselines", "single-case", 7, 1),
    Case("blocks, 3 shared seeds, evaluation noise", "blocks", 3, 3, has_seeds=True, has_sequences=True),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a case, as rates with their Monte Carlo standard errors."""

    name: str
    method: str
    studies: int
    """As many without an effect, and as many with one."""
    false_verdicts: float
    """Studies without any true effect that hold a HELPS or HURTS."""
    false_verdicts_se: float
    detectable: float
    power: float | None
    """Studies that find a true effect of the detectable size in one arm; None where `detectable` is not exact."""
    power_se: float
    helps: float
    """Studies that call that effect HELPS, in a family of five arms."""
    coverage: float
    """Intervals that hold the true difference, over all arms."""
    coverage_se: float


@contextmanager
def without_sentences() -> Iterator[None]:
    """Leave out what a judgement only tells: the sentences that explain verdicts, and seed correlations."""
    kept = verdicts.explain, verdicts.seed_correlation
    verdicts.explain, verdicts.seed_correlation = lambda *_: "", lambda *_: math.nan
    try:
        yield
    finally:
        verdicts.explain, verdicts.seed_correlation = kept


def draw(generator: np.random.Generator, case: Case, effects: NDArray[np.float64]) -> Judgement:
    """Draw a study whose arms differ from the baseline by `effects`, and judge it."""
    runs = [case.baseline_runs, *[case.arm_runs] * ARMS]
    shared = generator.normal(0, SEED_SD, case.baseline_runs) if case.has_seeds else np.zeros(max(runs))
    groups = []
    for arm, (count, effect) in enumerate(zip(runs, [0.0, *effects], strict=True)):
        losses = 3.6 + effect + generator.normal(0, RUN_SD, count) + shared[:count]
        sequences = document_noise(generator) if case.has_sequences else None
        groups.append(make_group(f"arm{arm}", losses, case.has_seeds, sequences))
    judgement = judge(groups[0], groups[1:])
    assert {item.method for item in judgement.arms} == {case.method}
    return judgement


def document_noise(generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw what a recipe makes of every test sequence, whatever its seed; sequences of one document are alike."""
    documents = np.repeat(generator.normal(0, DOCUMENT_SD, DOCUMENTS), SEQUENCES_EACH)
    return documents + generator.normal(0, SEQUENCE_SD, DOCUMENTS * SEQUENCES_EACH)


def make_group(
    recipe: str, losses: NDArray[np.float64], has_seeds: bool, sequences: NDArray[np.float64] | None
) -> Group:
    """Make the replicates of one recipe; with sequences they carry a loss for each of them."""
    results = []
    for number, loss in enumerate(losses.tolist()):
        seed = str(number) if has_seeds else ""
        metadata = None if sequences is None else make_metadata(recipe, loss + sequences)
        total = loss if metadata is None else float(metadata.sequence_losses.mean())
        results.append(Result(f"{recipe}-{number}", recipe, seed, seed, total, metadata))
    return Group(recipe, tuple(results))


def make_metadata(recipe: str, sequence_losses: NDArray[np.float64]) -> RunMetadata:
    """Make what a run folder would know, of which only the sequences matter here."""
    return RunMetadata(
        recipe={},
        recipe_hash=recipe,
        parameters=1,
        step=0,
        tokens_seen=1,
        hardware="none",
        tokens_per_second=None,
        cost=None,
        currency="",
        tokens_sha256="",
        sequence_losses=sequence_losses,
        documents=np.repeat(np.arange(DOCUMENTS), SEQUENCES_EACH),
        curve=(np.empty(0), np.empty(0)),
        samples=(),
    )


def simulate(case: Case, studies: int, seed: int) -> Outcome:
    """Draw and judge `studies` studies without an effect, and as many with one in the first arm."""
    generator = np.random.default_rng([seed, CASES.index(case)])
    effects = np.zeros(ARMS)
    effects[0] = -case.detectable
    false = found = helps = 0
    covered = []
    with without_sentences():
        for _ in range(studies):
            null = draw(generator, case, np.zeros(ARMS))
            false += any(item.verdict in (HELPS, HURTS) for item in null.arms)
            real = draw(generator, case, effects)
            found += real.arms[0].verdict in (HELPS, LEANS_BETTER)
            helps += real.arms[0].verdict == HELPS
            covered.append([holds(judged, 0.0) for judged in null.arms])
            covered.append([holds(judged, truth) for judged, truth in zip(real.arms, effects, strict=True)])
    by_study = np.mean(covered, axis=1)
    return Outcome(
        name=case.name,
        method=case.method,
        studies=studies,
        false_verdicts=false / studies,
        false_verdicts_se=binomial_se(false / studies, studies),
        detectable=case.detectable,
        power=None if case.has_sequences else found / studies,
        power_se=binomial_se(found / studies, studies),
        helps=helps / studies,
        coverage=float(by_study.mean()),
        coverage_se=float(by_study.std(ddof=1)) / math.sqrt(len(by_study)),
    )


def holds(judged: verdicts.Judged, truth: float) -> bool:
    """Say whether an arm's interval holds the true difference."""
    assert judged.estimate is not None
    low, high = judged.estimate.interval()
    return low <= truth <= high


def binomial_se(rate: float, count: int) -> float:
    """Return the standard error of a rate."""
    return math.sqrt(rate * (1 - rate) / count)


def main() -> None:
    """Simulate every case, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, metavar="N", help="a case, twice (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    start = time.monotonic()
    print(f"{'case':<42}{'false verdicts':>18}{'effect':>9}{'found':>17}{'HELPS':>8}{'coverage':>18}")
    outcomes = []
    for case in CASES:
        outcome = simulate(case, arguments.studies, arguments.seed)
        outcomes.append(outcome)
        found = "-" if outcome.power is None else f"{outcome.power:.2%} ±{outcome.power_se:.2%}"
        print(
            f"{outcome.name:<42}{f'{outcome.false_verdicts:.2%} ±{outcome.false_verdicts_se:.2%}':>18}"
            f"{outcome.detectable:>9.4f}{found:>17}{outcome.helps:>8.1%}"
            f"{f'{outcome.coverage:.2%} ±{outcome.coverage_se:.2%}':>18}",
            flush=True,
        )
    document = {
        "studies": arguments.studies,
        "seed": arguments.seed,
        "arms": ARMS,
        "run_sd": RUN_SD,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, document)
    print(f"Wrote {arguments.output} after {time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
