"""Lay out an experiment for a user: what it costs, what it can see, what else the money would buy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.engine.costs import RunCost
from harness.report.text import aligned
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError
from harness.run.files import RUNS
from harness.run.recipe import recipe_hash
from harness.run.run_folder import open_run
from harness.run.units import in_hours
from study.designs import (
    LETTERS,
    ROMAN,
    Design,
    DesignName,
    Intervention,
    Resolution,
    alternatives,
    load_interventions,
    make_design,
    spell,
    with_stack,
)
from study.experiment import Experiment, TestSet, make_experiment, write_runs
from study.ledger import LEDGER, Scale, find_noise, load_ledger
from study.measures import BITS, NATS, bits_per_nat
from study.power import Analysis
from study.pricing import ArmText, Bill, bill_of, refuse_incomparable, texts_of
from study.prior import MANY_PAIRS, Subject, find_pair_prior


@dataclass(frozen=True)
class PlanRequest:
    """What to plan."""

    base_run: str
    interventions: Path | None
    name: str | None
    design: DesignName
    resolution: Resolution
    generators: list[str]
    with_stack: bool
    seeds: tuple[int, ...]
    world_size: int
    test_start_token: int | None
    test_batches: int
    dry_run: bool
    datasets_dir: Path
    runs_dir: Path


def plan(request: PlanRequest) -> None:
    """Print what an experiment costs and sees, and write its folders unless it is a dry run; raises ConfigError."""
    base = open_run(request.runs_dir, request.base_run)
    model, train = base.read_configs()
    interventions = load_interventions(request.interventions) if request.interventions else []
    design = make_design(
        request.design, [item.name for item in interventions], request.resolution, request.generators
    )
    if request.with_stack:
        design = with_stack(design)
    start = train.start_val_token if request.test_start_token is None else request.test_start_token
    experiment = make_experiment(
        request.name or f"{request.base_run}-{request.design}",
        request.base_run,
        design,
        interventions,
        request.seeds,
        TestSet(start, request.test_batches),
    )
    bill = bill_of(experiment, request.runs_dir, request.world_size)
    texts = texts_of(experiment, request.runs_dir, request.datasets_dir)
    refuse_incomparable(texts, bill)
    noise = known_noise(request.runs_dir, model, train, next(iter(bill.arms.values())))
    base_text, *others = texts.values()
    if any(text.is_otherwise_tokenized(base_text) for text in others):
        noise = in_bits(noise, base_text)
    describe(design, bill, noise)
    warn_of_memory(bill)
    describe_alternatives(request, experiment, interventions, bill, noise)
    if request.dry_run:
        return
    path = write_runs(experiment, request.runs_dir)
    print(f"\nWrote {len(experiment.runs)} run folders and {path}")
    name = experiment.name if request.runs_dir == RUNS else path.parent
    print(f"Train and score them: python experiment.py run {name} {request.datasets_dir}")
    print(f"Then judge them:      python experiment.py compare --experiment {name}")


@dataclass(frozen=True)
class PlanningNoise:
    """What a plan reckons with: the noise of one run, and what of it the analysis may use."""

    sd: float | None
    prior_df: float
    """Degrees of freedom that the comparison of arms will borrow; 0 where it rests on its own runs alone."""
    lasting_df: float
    """Those from MANY_PAIRS on."""
    source: str
    """Where it comes from, or why it is unknown."""
    unit: str = NATS

    def in_words(self) -> str:
        """Return the noise of a run as text, and how the rest of the plan calls it."""
        if self.sd is None:
            return f"unknown{self.source}; called sigma below"
        return f"sigma = {self.sd:.4f} {self.unit}{self.source}"

    def df_lent(self, seeds: int) -> float:
        """Return the degrees of freedom that are borrowed with so many shared seeds."""
        return self.prior_df if seeds < MANY_PAIRS else self.lasting_df


def known_noise(runs_dir: Path, model: ModelConfig, train: TrainConfig, cost: RunCost) -> PlanningNoise:
    """Give the noise that the ledger or public runs lead to expect, paired where the analysis is paired."""
    entries = load_ledger(runs_dir / LEDGER)
    scale = Scale(cost.parameters.total, cost.plan.train_tokens, None)
    subject = Subject(recipe_hash(model, train), scale, train.schedule_name != "constant", frozenset())
    prior, lasting = (find_pair_prior(entries, subject, pairs) for pairs in (1, MANY_PAIRS))
    if prior is not None:
        lasting_df = lasting.df if lasting else 0.0
        return PlanningNoise(prior.sd, prior.df, lasting_df, f" on {prior.df:.3g} df ({prior.source})")
    found = find_noise(entries, recipe_hash(model, train), scale)
    if found is None:
        return PlanningNoise(None, 0, 0, " for this recipe and scale")
    entry, borrowed = found
    source = f" on {entry.df} df from the ledger, {borrowed or 'own'}, to plan with and no more"
    return PlanningNoise(entry.sd, 0, 0, source)


def in_bits(noise: PlanningNoise, text: ArmText) -> PlanningNoise:
    """Return the noise for arms of different tokenizers, which are judged in bits per byte and borrow none."""
    why = ", in which different tokenizers are judged"
    if noise.sd is None or text.bytes_per_token is None:
        return PlanningNoise(None, 0, 0, f" in {BITS}{why}", BITS)
    return PlanningNoise(noise.sd * bits_per_nat(text.bytes_per_token), 0, 0, f"{why},{noise.source}", BITS)


def describe(design: Design, bill: Bill, noise: PlanningNoise) -> None:
    """Print what the experiment costs and what it can see."""
    costs = list(bill.arms.values())
    each = sorted({cost.plan.train_tokens for cost in costs})
    price = [cost.money for cost in costs if cost.money is not None]
    currency = costs[0].currency
    rows = [
        ("Design", f"{design.name}, {len(design.arms)} arms x {bill.seeds} seeds = {bill.runs} runs"),
        ("Tokens", f"{bill.tokens:,} ({' or '.join(f'{count:,}' for count in each)} a run)"),
        ("Time", "unknown: no speed measured or expected" if bill.hours is None else in_hours(bill.hours)),
        ("Cost", "unknown: no price_per_hour" if bill.money is None else f"{bill.money:,.2f} {currency}".rstrip()),
        ("Noise of a run", noise.in_words()),
        ("Standard error", in_words(design.effect_se(bill.seeds), noise)),
        ("Sees four in five", sees(design, bill.seeds, noise)),
    ]
    if price and max(price) > 1.001 * min(price):
        dearest = max(bill.arms, key=lambda arm: bill.arms[arm].money or 0)
        rows.insert(4, ("Cost of a run", f"{min(price):,.2f} to {max(price):,.2f} {currency} ({dearest})"))
    if design.generators:
        resolution = design.resolution() or 0
        rows.append(("Generators", f"{' '.join(design.generators_in_letters())} (resolution {ROMAN[resolution]})"))
    if design.is_factorial:
        rows.append(("Letters", ", ".join(f"{a} {name}" for a, name in zip(LETTERS, design.factors, strict=False))))
    width = max(len(label) for label, _ in rows) + 1
    for label, value in rows:
        print(f"{label + ':':<{width}} {value}")
    if design.generators:
        print("Aliases (effects of one or two factors that this fraction cannot tell apart):")
        for effect, others in design.aliases():
            print(f"  {' = '.join(map(spell, [effect, *others])) if others else spell(effect) + ' alone'}")


def analysis_of(design: Design, seeds: int, noise: PlanningNoise) -> Analysis:
    """Give how a design's effects will be tested: in which family, and on whose noise.

    Arms are compared with the baseline seed by seed, on seeds - 1 degrees of freedom and a prior's; effects of a
    factorial likewise but without a prior, since they may differ between seeds, and by Lenth's method on one seed.
    """
    se = design.effect_se(seeds)
    if not design.is_factorial:
        return Analysis(se, seeds - 1, max(1, len(design.arms) - 1), noise.df_lent(seeds))
    contrasts = len(design.arms) - 1 if seeds == 1 else 0
    return Analysis(se, seeds - 1, len(design.factors), contrasts=contrasts)


def sees(design: Design, seeds: int, noise: PlanningNoise) -> str:
    """Say in words which effect is called HELPS or HURTS four times in five."""
    if design.name == "replicates":
        return "-"
    analysis = analysis_of(design, seeds, noise)
    smallest = analysis.detectable()
    if math.isinf(smallest):
        return "nothing: one run of each arm, and no noise that the comparison may borrow"
    among = f", {analysis.family} judged together" if analysis.family > 1 else ""
    return f"an effect of {in_words(smallest, noise)}: so often it is called HELPS or HURTS{among}"


def in_words(sigmas: float, noise: PlanningNoise) -> str:
    """Write a number of sigmas, and in the unit of the losses where sigma is known."""
    return f"{sigmas:.2f} sigma" + ("" if noise.sd is None else f" = {sigmas * noise.sd:.4f} {noise.unit}")


def warn_of_memory(bill: Bill) -> None:
    """Say which arm needs the most memory, where that is more than the first's."""
    first = next(iter(bill.arms.values()))
    arm, peak = max(((name, cost.peak_gib) for name, cost in bill.arms.items()), key=lambda item: item[1])
    if peak > 1.1 * first.peak_gib:
        print(f"Memory: {arm} needs about {peak:.1f} GiB per GPU, the base {first.peak_gib:.1f}")


def describe_alternatives(
    request: PlanRequest,
    chosen: Experiment,
    interventions: Sequence[Intervention],
    bill: Bill,
    noise: PlanningNoise,
) -> None:
    """Print every design for these interventions, each with as many seeds as the same money buys."""
    design = chosen.as_design()
    if design.name == "replicates":
        return
    print(f"\nDesigns for these interventions, for {'the same money' if bill.money else 'as many runs'}:")
    rows = []
    found = alternatives([item.name for item in interventions])
    for other in found if design in found else [*found, design]:
        one = _bill_of_one_seed(request, chosen, other, interventions)
        if one is None:
            continue
        seeds = bill.seeds if other == design else _affordable(bill, one)
        label = f"{other.name} {ROMAN[other.resolution() or 0]}" if other.generators else other.name
        label = f"{'*' if other == design else ' '} {label}"
        if seeds < 1:
            rows.append([label, "-", "-", "-", "-", f"one seed of its {one.runs} arms costs more", ""])
            continue
        whole, smallest = Bill(one.arms, seeds), analysis_of(other, seeds, noise).detectable()
        rows.append(
            [
                label,
                str(seeds),
                str(whole.runs),
                "-" if whole.hours is None else in_hours(whole.hours),
                "-" if whole.money is None else f"{whole.money:,.0f}",
                "nothing" if math.isinf(smallest) else in_words(smallest, noise),
                other.sees(),
            ]
        )
    headings = ("  design", "seeds", "runs", "time", "cost", "HELPS four in five from", "sees")
    print("\n".join(aligned(headings, rows)))


def _affordable(bill: Bill, one: Bill) -> int:
    """Give the seeds of a design that the experiment's money buys, or its runs where there is no price."""
    if bill.money and one.money:
        return int(bill.money / one.money + 1e-9)
    return bill.runs // one.runs


def _bill_of_one_seed(
    request: PlanRequest, chosen: Experiment, design: Design, interventions: Sequence[Intervention]
) -> Bill | None:
    """Price one seed of another design; None where its arms cannot be, as two changes of one key together."""
    seeds = chosen.seeds[:1]
    try:
        other = make_experiment(chosen.name, chosen.base, design, interventions, seeds, chosen.test_set)
        return bill_of(other, request.runs_dir, request.world_size)
    except ConfigError:
        return None
