"""Do the verdicts keep their promises? Made-up studies with known truth, judged as real ones are.

  nice python -m benchmarks.simulate_verdicts

A study is a table of losses that is written to a file and judged as `compare --losses` judges a user's; what a table
cannot hold (losses of single test sequences, looks, designs) goes through the functions that `compare` and `run` call
then. Of every situation half as many studies are drawn with an effect in the first arm as without one:

- false: studies in which an arm without effect is told to differ (HELPS, HURTS, BETTER or WORSE BY LESS THAN), or
  where arms differ by exactly the margin, in which one is told not to (NO DIFFERENCE);
- HELPS, and found (also LEANS BETTER): studies that say so of the effect, which is as large as the arm's own test,
  alone and with nothing missing, finds four times in five, unless a size is given;
- coverage: 95% intervals that hold the true difference, of all arms, and of the first arm, which is the odd one.

Rates come with their Monte Carlo standard errors and go to benchmarks/results/simulate_verdicts.json and .md.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

from harness.report.text import markdown_table
from harness.run.files import read_json, write_json, write_text
from study import looking
from study.assemble import ComparisonRequest, assemble
from study.comparisons import compare
from study.designs import STACK, make_design
from study.effects import ADDS_UP, stack_findings
from study.factorials import Reading, factorial_findings
from study.looking import Look, LookRecord, take_look
from study.losses_table import COLUMNS
from study.measures import BITS, NATS, Measured
from study.power import Analysis
from study.results import Group, Result, RunMetadata
from study.statistics import Floats, NoisePrior
from study.verdicts import (
    HELPS,
    LEANS_BETTER,
    MARGIN,
    NO_LARGER,
    SLIGHTLY_BETTER,
    SLIGHTLY_WORSE,
    Judged,
    Judgement,
    Rules,
    is_sign_told,
    judge,
)

RESULTS = Path(__file__).parent / "results" / "simulate_verdicts.json"
MEMORY = Path("/dev/shm")
ARMS = 5
RUN_SD = 0.0123
"""Noise of one run, in nats per token: that of the published baseline."""
LIKE_REAL = (0.97, 0.94, 0.90, 0.53, 0.25)
"""Correlations of arms with the baseline over shared seeds, as five real changes had them."""
DOCUMENT_SD, SEQUENCE_SD = 0.03, 0.03
"""How documents and sequences differ in what an arm makes of them."""
Rate = tuple[float, float]
"""A rate and its Monte Carlo standard error."""


@dataclass(frozen=True)
class Situation:
    """How a study is laid out, and what is untidy about it; sds are in units of RUN_SD."""

    runs: int = 4
    baseline_runs: int = 4
    sds: tuple[float, ...] = (1.0,) * ARMS
    follows: tuple[float, ...] | None = None
    """Correlations with the baseline over shared seeds; None where no seeds are shared."""
    sd: float = RUN_SD
    decimals: int = 6
    missing: tuple[int, int] | None = None
    """Arm (-1: the baseline) and seed of a cell that is not there."""
    diverging: float = 0.0
    effect: float | None = None
    offset: float = 0.0
    """True difference of every arm in the studies without an effect."""
    prior: NoisePrior | None = None
    """What is known beforehand; every recipe's variance is then drawn from it, or of pairs every arm's."""
    ignores_seeds: bool = False
    """The prior is of single runs, though seeds are shared; noises are then as without it."""
    documents: tuple[int, ...] = ()
    """Sequences in each document of the test set; none where losses of sequences are not there."""
    by_bytes: bool = False
    """Losses are of whole documents, weighted by their lengths: bits per byte of different tokenizers."""

    def own_effect(self) -> float:
        """Return the size of an effect that the first arm's own test finds four times in five."""
        if self.effect is not None:
            return self.effect
        sd = self.sd * self.sds[0]
        if self.follows is not None:
            se, df = sd * math.sqrt(2 * (1 - self.follows[0]) / self.runs), self.runs - 1
        else:
            se = math.hypot(sd / math.sqrt(self.runs), self.sd / math.sqrt(self.baseline_runs))
            df = self.runs + self.baseline_runs - 2
        return Analysis(se, df, family=1).detectable()


@dataclass
class Outcome:
    """What became of a situation; rates that say nothing of it are left out."""

    name: str
    false: Rate
    rates: dict[str, Rate] = field(default_factory=dict)


def draw(generator: np.random.Generator, s: Situation, effects: Sequence[float]) -> tuple[list[Group], list[float]]:
    """Draw a study, the baseline and its arms, which differ from it by `effects`; return it and the true differences.

    With a prior every recipe has a noise of its own, and where seeds are shared every difference; an effect is then
    as many times larger.
    """
    sds = s.sd * np.array([1.0, *s.sds])
    if s.prior is not None and not s.ignores_seeds:
        sds = s.prior.sd * np.sqrt(s.prior.df / generator.chisquare(s.prior.df, len(sds)))
    is_of_pairs = s.prior is not None and s.follows is not None and not s.ignores_seeds
    base = generator.standard_normal(s.baseline_runs)
    groups = [losses_of("baseline", s, 3.6 + sds[0] * base, -1, generator)]
    truths = list(effects)
    if s.prior is not None and is_of_pairs:
        truths = (np.array(effects) * sds[1:] / s.prior.sd).tolist()
    for arm, truth in enumerate(truths):
        own = sds[arm + 1] * generator.standard_normal(s.runs)
        if is_of_pairs:
            own = sds[0] * base + math.sqrt(2) * own
        elif s.follows is not None:
            rho = s.follows[arm]
            own = sds[arm + 1] * rho * base[: s.runs] + math.sqrt(1 - rho**2) * own
        groups.append(losses_of(f"arm{arm}", s, 3.6 + truth + own, arm, generator))
    return groups, truths


def losses_of(recipe: str, s: Situation, losses: Floats, arm: int, generator: np.random.Generator) -> Group:
    """Make the replicates of a recipe, as recorded: rounded, some diverged, one perhaps missing."""
    sequences = document_noise(generator, s.documents) if s.documents else None
    results = []
    for number, loss in enumerate(losses):
        if (arm, number) == s.missing:
            continue
        seed = "" if s.follows is None else str(number)
        metadata = None if sequences is None else known_of(recipe, loss + sequences, s)
        value = loss if metadata is None else metadata.measured.loss
        has_diverged = s.diverging > 0 and generator.random() < s.diverging
        kept = None if has_diverged else round(float(value), s.decimals)
        results.append(Result(f"{recipe}-{number}", recipe, seed, seed, kept, None if has_diverged else metadata))
    return Group(recipe, tuple(results))


def document_noise(generator: np.random.Generator, documents: Sequence[int]) -> Floats:
    """Draw what a recipe makes of every test sequence, whatever its seed; sequences of one document are alike."""
    each = np.repeat(generator.normal(0, DOCUMENT_SD, len(documents)), documents)
    noise: Floats = each + generator.normal(0, SEQUENCE_SD, sum(documents))
    return noise


def known_of(recipe: str, sequence_losses: Floats, s: Situation) -> RunMetadata:
    """Make what a run folder would know, of which only the losses matter here."""
    clusters, mean = np.repeat(np.arange(len(s.documents)), s.documents), float(sequence_losses.mean())
    measured = Measured(NATS, mean, sequence_losses, clusters)
    if s.by_bytes:
        lengths = np.array(s.documents, dtype=np.float64)
        of_documents = np.bincount(clusters, weights=sequence_losses) / lengths
        measured = Measured(BITS, mean, of_documents, np.arange(len(lengths)), lengths, bytes_per_token=1.0)
    return RunMetadata(
        recipe={}, recipe_hash=recipe, parameters=1, step=0, tokens_seen=1, hardware="none", decays=False,
        tokens_per_second=None, cost=None, currency="", tokenizer=None, measured=measured,
        curve=(np.empty(0), np.empty(0)), samples=(),
    )  # fmt: skip


def judged(s: Situation, groups: Sequence[Group], names: tuple[str, ...] = ()) -> Judgement:
    """Judge a study: as a table of losses through what `compare` calls, if a table can hold it."""
    if s.prior is not None or s.documents:
        return judge(groups[0], groups[1:], Rules(find_prior=lambda *_: s.prior))
    lines = [",".join(COLUMNS)]
    for group in groups:
        for result in group.results:
            loss = "nan" if result.loss is None else f"{result.loss:.{s.decimals}f}"
            lines.append(f"{result.run},{result.recipe},{result.init_seed},{result.train_seed},{loss}")
    with tempfile.NamedTemporaryFile("w", dir=MEMORY if MEMORY.is_dir() else None) as file:
        file.write("\n".join(lines))
        file.flush()
        return assemble(ComparisonRequest(Path("no-ledger"), names, "baseline", Path(file.name))).judgement


def simulate(name: str, s: Situation, generator: np.random.Generator, studies: int) -> Outcome:
    """Draw and judge `studies` studies without an effect, and half as many with one in the first arm."""
    arms = len(s.sds)
    null, real = np.full(arms, s.offset), np.zeros(arms)
    real[0] = -s.own_effect()
    false, helps, found, covered = [], [], [], []
    for number in range(studies):
        for effects in (null, real) if number % 2 else (null,):
            groups, truths = draw(generator, s, effects.tolist())
            items = judged(s, groups).arms
            covered.append([holds(item, truth) for item, truth in zip(items, truths, strict=True)])
            if effects is null:
                false.append(any(is_wrong(item, s.offset) for item in items))
            else:
                helps.append(items[0].verdict.startswith((HELPS, SLIGHTLY_BETTER)))
                found.append(helps[-1] or items[0].verdict == LEANS_BETTER)
    rates = {} if s.offset else {"HELPS": rate(helps), "found": rate(found)}
    rates["coverage"] = rate(np.nanmean(covered, axis=1))
    rates["first arm's"] = rate([row[0] for row in covered if not math.isnan(row[0])])
    return Outcome(name, rate(false), rates)


def is_wrong(item: Judged, offset: float) -> bool:
    """Say whether a verdict on an arm is false: without an effect a sign, at the margin that it is within it."""
    if offset:
        return item.verdict.startswith((NO_LARGER, SLIGHTLY_BETTER, SLIGHTLY_WORSE))
    return is_sign_told(item.verdict)


def holds(item: Judged, truth: float) -> float:
    """Return whether an arm's interval holds the true difference; NaN where there is no interval."""
    if item.estimate is None:
        return math.nan
    low, high = item.estimate.interval()
    return float(low <= truth <= high)


def rate(values: Sequence[float] | Floats) -> Rate:
    """Return a mean over studies with its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def shopped(name: str, generator: np.random.Generator, studies: int) -> Outcome:
    """Name the one arm of eleven that looks best."""
    s = Situation(sds=(1.0,) * 11)
    false = []
    for _ in range(studies):
        groups, _ = draw(generator, s, [0.0] * 11)
        best = min(groups[1:], key=lambda group: float(np.mean(group.losses)))
        (item,) = judged(s, groups, (best.recipe,)).arms
        false.append(is_sign_told(item.verdict))
    return Outcome(name, rate(false))


def looked(name: str, generator: np.random.Generator, studies: int, arms: int = 1) -> Outcome:
    """Look after every seed from 2 to 8, at levels that were fixed beforehand.

    No arm stops for being hopeless, which would make false verdicts fewer.
    """
    s = Situation(runs=8, baseline_runs=8, sds=(1.0,) * arms, follows=(0.5,) * arms)
    counts = tuple(range(2, 9))
    effect = Analysis(RUN_SD / math.sqrt(8), df=7, family=1).detectable()
    false, helps = [], []
    for _ in range(studies):
        for size in (0.0, effect):
            record = LookRecord(to_come=counts)
            groups, _ = draw(generator, s, [-size, *[0.0] * (arms - 1)])
            with patch.object(looking, "chance_of_a_word", return_value=1.0):
                while record.to_come:
                    record = next_look(record, groups)
            told = [is_sign_told(record.looks[-1].verdicts[f"arm{arm}"]) for arm in range(arms)]
            (false if size == 0 else helps).append(any(told) if size == 0 else told[0])
    return Outcome(name, rate(false), {"HELPS": rate(helps)})


def next_look(record: LookRecord, groups: Sequence[Group]) -> LookRecord:
    """Take the next look, as `run --looks` does, at as many seeds of every arm that has not stopped."""
    count, stopped = record.to_come[0], record.stopped()
    current = replace(record, looks=(*record.looks, Look(count, {}, {}, {}, {}, {})), to_come=record.to_come[1:])
    estimates = {}
    for arm in groups[1:]:
        seen = stopped.get(arm.recipe, count)
        pair = [Group(group.recipe, group.results[:seen]) for group in (groups[0], arm)]
        estimates[arm.recipe] = compare(*pair).guarded
    still = [arm for arm in estimates if arm not in stopped]
    look = take_look(current, "pocock", estimates, MARGIN, still)
    return replace(current, looks=(*record.looks, look))


def stacked(name: str, generator: np.random.Generator, studies: int, share: float = 0.5) -> Outcome:
    """Stack three changes of 0.05, of whose sum only a share is there; count ADDS UP, and how often a gap is told."""
    s = Situation(sds=(1.0,) * 4, follows=(0.8,) * 4)
    factors = ("arm0", "arm1", "arm2")
    gap = 0.15 * (1 - share)
    adds_up, told, covered, covers_best = [], [], [], []
    for _ in range(studies):
        (baseline, *arms), _ = draw(generator, s, [-0.05, -0.05, -0.05, -0.15 * share])
        arms[-1] = Group(STACK, arms[-1].results)
        total, best = stack_findings(baseline, arms, factors, Rules())
        adds_up.append(total.verdict == ADDS_UP)
        told.append("THE SUM" in total.verdict)
        for finding, truth, kept in ((total, gap, covered), (best, 0.05 - 0.15 * share, covers_best)):
            low, high = finding.interval()
            kept.append(low <= truth <= high)
    coverage = {"coverage": rate(covered), "coverage of the best part": rate(covers_best)}
    if share == 1:
        return Outcome(name, rate(told), {"ADDS UP": rate(adds_up), **coverage})
    return Outcome(name, rate(adds_up), {"gap told": rate(told), **coverage})


def crossed(name: str, generator: np.random.Generator, studies: int) -> Outcome:
    """Judge a 2^3 factorial over four seeds whose effects, zero on average, differ between seeds."""
    design = make_design("full-factorial", ["a", "b", "c"])
    signs = np.array([[1.0 if factor in arm.on else -1.0 for factor in "abc"] for arm in design.arms])
    false, covered = [], []
    for _ in range(studies):
        losses = 3.6 + signs @ generator.normal(0, RUN_SD / 2, (3, 4)) + generator.normal(0, RUN_SD, (8, 4))
        groups = [
            Group(arm.name, tuple(Result(f"{arm.name}{n}", "r", str(n), str(n), loss) for n, loss in enumerate(row)))
            for arm, row in zip(design.arms, losses.tolist(), strict=True)
        ]
        mains = [item for item in factorial_findings(design, groups, Reading(MARGIN))[0] if " x " not in item.name]
        false.append(any(is_sign_told(item.verdict) for item in mains))
        covered.append(np.mean([item.interval()[0] <= 0 <= item.interval()[1] for item in mains]))
    return Outcome(name, rate(false), {"coverage": rate(covered)})


UNEQUAL = (*[1] * 20, *[2] * 8, *[4] * 6, *[8] * 5, 20, 30, 40, 50)
"""Sequences of 43 documents of a test set; as uneven as a small set of real documents."""
NOISY, TWICE = (5.0, 1.0, 1.0, 1.0, 1.0), (2.0,) * ARMS
PRIOR_4, PRIOR_9 = NoisePrior(RUN_SD, 4.0, "earlier runs"), NoisePrior(0.0012, 9.0, "earlier runs")
Simulation = Callable[[str, np.random.Generator, int], Outcome]


def table(**options: object) -> Simulation:
    """Return the simulation of a situation."""
    situation = Situation(**options)  # type: ignore[arg-type]
    return lambda name, generator, studies: simulate(name, situation, generator, studies)


def shared(seeds: int, **options: object) -> Simulation:
    """Return the simulation of five arms on shared seeds."""
    return table(runs=seeds, baseline_runs=seeds, **options)


SIMULATIONS: Mapping[str, Simulation] = {
    "tidy: 3 shared seeds": shared(3, follows=(0.4,) * ARMS, effect=0.0312 * 0.7746),
    "tidy: 5 shared seeds": shared(5, follows=(0.4,) * ARMS),
    "tidy: 8 shared seeds": shared(8, follows=(0.4,) * ARMS),
    "tidy: 3 shared seeds, a prior of 9 df": shared(
        3, follows=(0.0,) * ARMS, effect=0.00304, sd=0.0012, prior=PRIOR_9
    ),
    "tidy: 4 v 4": table(),
    "tidy: 7 v 1": table(runs=1, baseline_runs=7),
    "tidy: 3 v 1, a prior of 9 df, effect 0.005": table(
        runs=1, baseline_runs=3, effect=0.005, sd=0.0012, prior=PRIOR_9
    ),
    "correlations .97 to .25, 4 shared seeds": shared(4, follows=LIKE_REAL),
    "correlations .97 to .25, 5 shared seeds": shared(5, follows=LIKE_REAL),
    "correlations .97 to .25, 8 shared seeds": shared(8, follows=LIKE_REAL),
    "pairs, a prior of 4 df, 4 seeds": shared(4, follows=(0.0,) * ARMS, prior=PRIOR_4),
    "pairs, a prior of 4 df, 5 seeds": shared(5, follows=(0.0,) * ARMS, prior=PRIOR_4),
    "pairs, a prior of 4 df, 8 seeds": shared(8, follows=(0.0,) * ARMS, prior=PRIOR_4),
    "correlations .97 to .25, a prior of runs (9 df), 3 seeds": shared(
        3, follows=LIKE_REAL, sd=0.0012, prior=PRIOR_9, ignores_seeds=True
    ),
    "one arm 5 times as noisy, 4 v 4": table(sds=NOISY),
    "one arm 5 times as noisy, 8 v 8": table(runs=8, baseline_runs=8, sds=NOISY),
    "one arm 5 times as noisy, 7 v 2": table(runs=2, baseline_runs=7, sds=NOISY),
    "one arm 5 times as noisy, 7 v 1": table(runs=1, baseline_runs=7, sds=NOISY),
    "all arms twice as noisy, 7 v 2": table(runs=2, baseline_runs=7, sds=TWICE),
    "all arms twice as noisy, 7 v 1": table(runs=1, baseline_runs=7, sds=TWICE),
    "5 seeds, correlation .9, nothing missing": shared(5, follows=(0.9,) * ARMS),
    "5 seeds, correlation .9, a cell of another arm missing": shared(5, follows=(0.9,) * ARMS, missing=(3, 2)),
    "5 seeds, correlation .9, a cell of the arm missing": shared(5, follows=(0.9,) * ARMS, missing=(0, 2)),
    "8 seeds, correlation .9, a cell of the arm missing": shared(8, follows=(0.9,) * ARMS, missing=(0, 2)),
    "rounded to 3 decimals, 2 seeds": shared(2, follows=(0.5,) * ARMS, sd=0.001, decimals=3),
    "rounded to 4 decimals, 2 seeds": shared(2, follows=(0.5,) * ARMS, sd=0.00003, decimals=4),
    "rounded to 3 decimals, 4 v 4": table(sd=0.001, decimals=3),
    "43 unequal documents, 3 shared seeds": shared(3, follows=(0.4,) * ARMS, sd=0.001, documents=UNEQUAL),
    "43 unequal documents, as much training noise": shared(5, follows=(0.4,) * ARMS, sd=0.01, documents=UNEQUAL),
    "20 equal documents, 3 shared seeds": shared(3, follows=(0.4,) * ARMS, documents=(3,) * 20),
    "looks after each of 2 to 8 seeds, one arm": partial(looked, arms=1),
    "looks after each of 2 to 8 seeds, five arms": partial(looked, arms=5),
    "5 arms exactly at the margin": shared(8, follows=(0.9,) * 5, offset=MARGIN),
    "12 arms exactly at the margin": shared(8, sds=(1.0,) * 12, follows=(0.9,) * 12, offset=MARGIN),
    "the best of eleven named alone, 4 v 4": shopped,
    "a stack that lacks half of the sum": stacked,
    "a stack that is the sum": partial(stacked, share=1.0),
    "a factorial whose effects differ between seeds": crossed,
    "one run in ten diverges, 4 v 4": table(diverging=0.1),
    "one run in ten diverges, 5 shared seeds": shared(5, follows=(0.9,) * ARMS, diverging=0.1),
    "tokenizers, 43 unequal documents, 4 v 4": table(documents=UNEQUAL, by_bytes=True),
    "tokenizers, 43 unequal documents, 3 shared seeds": shared(
        3, follows=(0.4,) * ARMS, sd=0.001, documents=UNEQUAL, by_bytes=True
    ),
}  # fmt: skip


def main() -> None:
    """Simulate every situation, print a table, and write it as JSON and as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000, metavar="N", help="a situation (default 4000)")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="situations whose name holds it; others keep the rows that FILE has",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    names = [name for name in SIMULATIONS if arguments.only in name]
    found = kept_outcomes(arguments.output) if arguments.only else {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(partial(simulated, arguments.seed, arguments.studies), names):
            print("  ".join(row_of(outcome)), flush=True)
            found[outcome.name] = outcome
            outcomes = [found[name] for name in SIMULATIONS if name in found]
            rows = [{"situation": one.name, "false": one.false, **one.rates} for one in outcomes]
            write_json(arguments.output, {"studies": arguments.studies, "seed": arguments.seed, "outcomes": rows})
    lines = markdown_table(["situation", "false, %", "rates, %"], [row_of(one) for one in outcomes])
    write_text(arguments.output.with_suffix(".md"), "\n".join(lines) + "\n")


def kept_outcomes(path: Path) -> dict[str, Outcome]:
    """Return what an earlier run wrote, by situation."""
    rows = read_json(path).get("outcomes", [])
    rates = [{key: tuple(value) for key, value in row.items() if isinstance(value, list)} for row in rows]
    names = [row["situation"] for row in rows]
    return {name: Outcome(name, row.pop("false"), row) for name, row in zip(names, rates, strict=True)}


def simulated(seed: int, studies: int, name: str) -> Outcome:
    """Simulate a situation by name; its numbers do not depend on which others are simulated."""
    generator = np.random.default_rng([seed, list(SIMULATIONS).index(name)])
    return SIMULATIONS[name](name, generator, studies)


def row_of(outcome: Outcome) -> list[str]:
    """Return a line of the table."""
    rates = ", ".join(f"{name} {percent(value)}" for name, value in outcome.rates.items())
    return [outcome.name, percent(outcome.false), rates]


def percent(value: Rate) -> str:
    """Write a rate and its standard error in percent."""
    return f"{100 * value[0]:.1f} ±{100 * value[1]:.1f}"


if __name__ == "__main__":
    main()
