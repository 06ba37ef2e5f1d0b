"""From what a user asks for to a judged study: read the runs, group them, choose the baseline, find the noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from harness.run.errors import ConfigError
from harness.run.run_folder import RunFolder, open_run
from study.comparisons import PriorFinder, no_prior
from study.effects import Finding, stack_findings
from study.experiment import Experiment, find_experiment, load_experiment
from study.factorials import Reading, factorial_findings
from study.ledger import LEDGER, Scale, load_ledger
from study.looking import as_looked_at, looked_at, read_record
from study.losses_table import read_losses
from study.measures import NATS
from study.prior import Subject, find_pair_prior, find_run_prior
from study.results import (
    CheckpointRule,
    Group,
    find_replicates,
    group_results,
    has_own_budget,
    is_scored,
    name_arms,
    read_runs,
)
from study.statistics import Noise, NoisePrior
from study.verdicts import MARGIN, Judgement, Rules, judge

PriorChoice = Literal["auto", "public", "none"]
PRIORS: tuple[PriorChoice, ...] = get_args(PriorChoice)


@dataclass(frozen=True)
class ComparisonRequest:
    """What to judge: named runs, a table of losses, or the runs of an experiment; and how."""

    runs_dir: Path
    names: tuple[str, ...] = ()
    """Runs, or recipes of a table or arms of an experiment; none means all."""
    baseline: str | None = None
    losses: Path | None = None
    experiment: str | None = None
    """Its name in `runs_dir`, or its path."""
    checkpoint: CheckpointRule = "last"
    only_named: bool = False
    margin: float = MARGIN
    given_noise: Noise | None = None
    prior: PriorChoice = "auto"
    """What may lend strength: the ledger, and public runs where the comparison is like them or the user says so."""
    higher_orders_as_error: bool = False
    """Of a factorial without replicates."""

    def folder_of_experiment(self) -> Path:
        """Return the folder of the experiment that is judged; raises ConfigError where there is none."""
        return find_experiment(self.runs_dir, self.experiment or "").parent


@dataclass(frozen=True)
class Study:
    """Judged results; `findings` are what a design says beyond the table, with where their noise is from."""

    groups: tuple[Group, ...]
    judgement: Judgement
    findings: tuple[Finding, ...] = ()
    effects_noise: str = ""
    experiment: Experiment | None = None
    incomplete: tuple[int, ...] = ()
    """Seeds of an experiment on which not every arm is scored yet."""
    notes: tuple[str, ...] = ()
    """What else a reader should know, in sentences."""


def gather(request: ComparisonRequest) -> tuple[list[Group], Experiment | None]:
    """Read all results that are asked for, in groups of replicates; raises ConfigError."""
    if request.losses is not None:
        return group_results(read_losses(request.losses)), None
    if request.experiment is not None:
        path = find_experiment(request.runs_dir, request.experiment)
        experiment = as_looked_at(load_experiment(path), path.parent)
        folders = {run: open_run(path.resolve().parent.parent, run.run) for run in experiment.runs}
        scored = [folder for folder in folders.values() if is_scored(folder, request.checkpoint)]
        folders_read = scored or list(folders.values())  # with none scored the error names what is missing
        return name_arms(read_runs(folders_read, request.checkpoint), experiment), experiment
    named = dict.fromkeys([*([request.baseline] if request.baseline else []), *request.names])
    named_folders = [open_run(request.runs_dir, name) for name in named]
    if not request.only_named:
        named_folders += _replicates(named_folders, request)
    if not named_folders:
        raise ConfigError(f"{request.runs_dir}: found no scored run, wanted one with a score of test_loss.py")
    return group_results(read_runs(named_folders, request.checkpoint), in_folders=True), None


def _replicates(named: Sequence[RunFolder], request: ComparisonRequest) -> list[RunFolder]:
    return find_replicates(named, request.runs_dir, request.checkpoint, everything=not request.names)


def assemble(request: ComparisonRequest) -> Study:
    """Read, choose the baseline, and judge; raises ConfigError where a comparison is impossible or unfair."""
    groups, experiment = gather(request)
    baseline = choose_baseline(groups, request, experiment)
    named = [find_group(groups, name, "RUN") for name in request.names]
    if request.baseline is not None and any(group is baseline for group in named):
        raise ConfigError(f"RUN: found {baseline.recipe}, which is the baseline, wanted other recipes")
    arms = [group for group in groups if group is not baseline]
    rules = Rules(request.margin, request.given_noise, prior_finder(request, groups), experiment is not None)
    judgement = judge(baseline, arms, rules)
    study = Study(tuple(groups), judgement)
    if experiment is not None:
        study = _beyond_the_table(request, experiment, study)
    # Naming arms narrows what is shown. The family stays whole: the best of eleven is lucky, whoever else is named.
    shown = tuple(item for item in study.judgement.arms if not named or any(item.group is one for one in named))
    notes = study.notes
    if len(shown) < len(arms):
        notes += (f"{len(shown)} of {len(arms)} shown: p values are adjusted for all of them.",)
    return replace(study, judgement=replace(study.judgement, arms=shown), notes=notes)


def prior_finder(request: ComparisonRequest, groups: Sequence[Group]) -> PriorFinder:
    """Return the function that finds what is known of a comparison's noise beforehand."""
    if request.prior == "none" or any(group.unit != NATS for group in groups):
        return no_prior  # what is known beforehand is known in nats per token
    entries = load_ledger(request.runs_dir / LEDGER)
    runs = frozenset(result.run for group in groups for result in group.results)
    public = True if request.prior == "public" else None

    def find(baseline: Group, arm: Group, pairs: int) -> NoisePrior | None:
        subject = _subject(baseline, arm, runs)
        if pairs:
            return find_pair_prior(entries, subject, pairs, public)
        return find_run_prior(entries, subject, public)

    return find


def _subject(baseline: Group, arm: Group, runs: frozenset[str]) -> Subject | None:
    if not baseline.metadata or not arm.metadata or has_own_budget(arm, baseline):
        return None
    first = baseline.metadata[0]
    return Subject(
        recipe_hash=first.recipe_hash,
        scale=Scale(first.parameters, first.tokens_seen, first.hardware),
        decays=first.decays and arm.metadata[0].decays,
        runs=runs,
    )


def _beyond_the_table(request: ComparisonRequest, experiment: Experiment, study: Study) -> Study:
    """Add what an experiment's looks and design say: words over all looks, effects, a stack's parts."""
    groups, judgement = study.groups, study.judgement
    if experiment.looks is not None:
        judgement = looked_at(judgement, experiment, read_record(request.folder_of_experiment()))
    seen = {result.run for group in groups for result in group.results}
    incomplete = tuple(sorted({run.seed for run in experiment.runs if run.run not in seen}))
    study = replace(study, judgement=judgement, experiment=experiment, incomplete=incomplete)
    design = experiment.as_design()
    if design.is_factorial:
        reading = Reading(request.margin, request.given_noise, request.higher_orders_as_error)
        try:
            effects, source = factorial_findings(design, groups, reading)
        except ConfigError as error:
            return replace(study, effects_noise=f"no effects, {error}")
        return replace(study, findings=tuple(effects), effects_noise=source)
    if design.name == "one-at-a-time":
        arms = [group for group in groups if group is not judgement.baseline]
        return replace(
            study, findings=tuple(stack_findings(judgement.baseline, arms, design.factors, judgement.rules))
        )
    return study


def choose_baseline(groups: Sequence[Group], request: ComparisonRequest, experiment: Experiment | None) -> Group:
    """Return the baseline that was asked for, else the experiment's, the first named run, or the most replicated."""
    if request.baseline is not None:
        return find_group(groups, request.baseline, "--baseline")
    if experiment is not None:
        return find_group(groups, experiment.compared_with, "--baseline")
    if request.names:
        return find_group(groups, request.names[0], "RUN")
    return max(groups, key=lambda group: len(group.results))


def find_group(groups: Sequence[Group], name: str, argument: str) -> Group:
    """Find a recipe by its name, or by the name of one of its runs; raises ConfigError."""
    for group in groups:
        if group.recipe == name:
            return group
    for group in groups:
        if any(result.run == name for result in group.results):
            return group
    known = ", ".join(group.recipe for group in groups)
    raise ConfigError(f"{argument}: found no recipe or run {name[:80]!r}, wanted one of {known}")
