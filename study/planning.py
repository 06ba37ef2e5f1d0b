"""Lay out an experiment for a user: what it costs, what it can see, what else the money would buy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.engine.costs import RunCost
from harness.run.config import ModelConfig, TrainConfig
from harness.run.files import RUNS
from harness.run.recipe import recipe_hash
from harness.run.run_folder import RunFolder, open_run
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
from study.experiment import Experiment, TestSet, configs_of, cost_of_base, make_experiment, write_runs
from study.ledger import LEDGER, Scale, find_noise, load_ledger
from study.statistics import Noise, detectable


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
    cost = cost_of_base(base, model, train, request.world_size)
    noise, source = known_noise(request.runs_dir, model, train, cost)
    describe(experiment, design, cost, noise, source)
    warn_of_memory(experiment, request.runs_dir, base, cost)
    describe_alternatives(design, interventions, len(request.seeds), cost, noise)
    if request.dry_run:
        return
    path = write_runs(experiment, request.runs_dir)
    print(f"\nWrote {len(experiment.runs)} run folders and {path}")
    name = experiment.name if request.runs_dir == RUNS else path.parent
    print(f"Train and score them: python experiment.py run {name} datasets")
    print(f"Then judge them:      python experiment.py compare --experiment {name}")


def known_noise(runs_dir: Path, model: ModelConfig, train: TrainConfig, cost: RunCost) -> tuple[Noise | None, str]:
    """Return the ledger's noise for the base recipe, and where it comes from."""
    scale = Scale(cost.parameters.total, cost.plan.train_tokens, None)
    found = find_noise(load_ledger(runs_dir / LEDGER), recipe_hash(model, train), scale)
    if found is None:
        return None, "no noise in the ledger for this recipe or scale: effects in units of its sigma"
    entry, borrowed = found
    origin = borrowed or "this recipe's own"
    return entry.noise, f"sigma {entry.sd:.4f} on {entry.df} degrees of freedom from the ledger, {origin}"


def describe(experiment: Experiment, design: Design, cost: RunCost, noise: Noise | None, source: str) -> None:
    """Print what the experiment costs and what it can see."""
    seeds, runs = len(experiment.seeds), len(experiment.runs)
    hours, money = _times(runs, cost.hours), _times(runs, cost.money)
    rows = [
        ("Design", f"{design.name}, {len(design.arms)} arms x {seeds} seeds = {runs} runs"),
        ("Tokens", f"{runs * cost.plan.train_tokens:,} ({cost.plan.train_tokens:,} a run)"),
        ("Hours", "unknown: no speed measured or expected" if hours is None else f"{hours:,.2f}"),
        ("Cost", "unknown: no price_per_hour" if money is None else f"{money:,.2f} {cost.currency}".rstrip()),
        ("Noise", source),
        ("Standard error", in_nats(design.effect_se(seeds), noise)),
        ("Sees four in five", in_nats(smallest_effect(design, seeds, noise), noise)),
    ]
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


def smallest_effect(design: Design, seeds: int, noise: Noise | None) -> float | None:
    """Return the effect found four times in five, in units of sigma; None where no noise could be estimated."""
    df = design.degrees_of_freedom(seeds) or (noise.df if noise else 0)
    return detectable(design.effect_se(seeds), df) if df else None


def in_nats(sigmas: float | None, noise: Noise | None) -> str:
    """Write a number of sigmas in nats per token where sigma is known."""
    if sigmas is None:
        return "unknown: one run of each arm, and no noise in the ledger"
    return f"{sigmas:.2f} sigma" + ("" if noise is None else f" = {sigmas * noise.sd:.4f} nats per token")


def warn_of_memory(experiment: Experiment, runs_dir: Path, base: RunFolder, cost: RunCost) -> None:
    """Say which arm needs the most memory, where that is more than the base's."""
    needs = {
        run.arm: cost_of_base(base, *configs_of(experiment, runs_dir, run), cost.plan.world_size).peak_gib
        for run in experiment.runs[: len(experiment.arms)]
    }
    arm, peak = max(needs.items(), key=lambda item: item[1])
    if peak > 1.1 * cost.peak_gib:
        print(f"Memory: {arm} needs about {peak:.1f} GiB per GPU, the base {cost.peak_gib:.1f}")


def describe_alternatives(
    chosen: Design, interventions: Sequence[Intervention], seeds: int, cost: RunCost, noise: Noise | None
) -> None:
    """Print every design for these interventions, so that a cheaper one can be chosen."""
    if chosen.name == "replicates":
        return
    print(f"\nDesigns for these interventions, with {seeds} seeds:")
    print(f"  {'design':<24}{'runs':>6}{'hours':>9}{'cost':>10}  {'standard error':<34}sees")
    designs = alternatives([item.name for item in interventions])
    for design in designs if chosen in designs else [*designs, chosen]:
        runs = len(design.arms) * seeds
        hours, money = _times(runs, cost.hours), _times(runs, cost.money)
        label = f"{design.name} {ROMAN[design.resolution() or 0]}" if design.generators else design.name
        print(
            f"{'*' if design == chosen else ' '} {label:<24}{runs:>6}"
            f"{'-' if hours is None else f'{hours:,.1f}':>9}{'-' if money is None else f'{money:,.0f}':>10}"
            f"  {in_nats(design.effect_se(seeds), noise):<34}{design.sees()}"
        )


def _times(runs: int, of_one: float | None) -> float | None:
    return None if of_one is None else runs * of_one
