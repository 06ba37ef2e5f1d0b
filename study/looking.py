"""What happens at a look: which arms stop, and which get the seeds that are saved.

An experiment's looks.json says what each look saw. The file is written before an arm is told from the rest, so that
what was stopped stays stopped, and a p value that was seen counts for all later ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from harness.run.errors import ConfigError
from harness.run.files import write_json
from study.experiment import Experiment, PlannedLooks, PlannedRun
from study.looks import Rule, Schedule, equally_spaced, error_of_repeated_looks
from study.statistics import ALPHA, Estimate, holm
from study.verdicts import CANNOT_TELL, DIVERGES, Judgement, is_sign_told, verdict_of

LOOKS_FILE = "looks.json"
DECIDED, HOPELESS, LAST = "decided", "cannot be decided within the plan", "the last look"
HOPE = 0.05
"""An arm stops where its chance of a word within the plan is below this."""
DRAWS = 4000
MOST_GROWTH = 2
"""No arm gets more than this many times the seeds that were planned."""


@dataclass(frozen=True)
class Look:
    """One look: after how many seeds, and of every arm what was seen; empty while it is being taken."""

    seeds: int
    p: Mapping[str, float]
    p_equivalent: Mapping[str, float]
    p_holm: Mapping[str, float]
    verdicts: Mapping[str, str]
    stopped: Mapping[str, str]


@dataclass(frozen=True)
class LookRecord:
    """What looks.json holds: looks taken, the seed counts of those to come, and looks that nobody had planned."""

    looks: tuple[Look, ...] = ()
    to_come: tuple[int, ...] = ()
    unplanned: tuple[int, ...] = ()
    """Seeds at which an unfinished experiment without planned looks was judged."""

    def stopped(self) -> dict[str, int]:
        """Give the arms that have stopped, with the number of seeds that each has."""
        return {arm: look.seeds for look in reversed(self.looks) for arm in look.stopped}

    def schedule(self, rule: Rule) -> Schedule:
        """Give the looks as they were and will be."""
        return Schedule(rule, (*(look.seeds for look in self.looks), *self.to_come))


def read_record(folder: Path) -> LookRecord:
    """Read an experiment's looks.json, empty where there is none; raises ConfigError."""
    path = folder / LOOKS_FILE
    if not path.is_file():
        return LookRecord()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        looks = tuple(Look(**look) for look in found["looks"])
        return LookRecord(looks, tuple(map(int, found["to_come"])), tuple(map(int, found["unplanned"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as the looks of an experiment ({error!r})") from None


def write_record(folder: Path, record: LookRecord) -> None:
    """Write looks.json."""
    write_json(folder / LOOKS_FILE, asdict(record))


def plan_looks(experiment: Experiment, looks: int, rule: Rule) -> PlannedLooks:
    """Fix the looks of an experiment, with the level of each for every number of arms that may still be open.

    Raises ConfigError where the design has no arms to compare, or too few seeds.
    """
    if experiment.as_design().is_factorial or len(experiment.arms) < 2:
        raise ConfigError(f"--looks: found design {experiment.design}, wanted one that compares arms with a baseline")
    seeds = len(experiment.seeds)
    schedule = equally_spaced(rule, looks, seeds)
    if looks < 2 or schedule is None:
        raise ConfigError(f"--looks: found {looks} over {seeds} seeds, wanted 2 or more, the first after 2 seeds")
    levels = tuple(schedule.levels(ALPHA / arms) for arms in range(1, len(experiment.arms)))
    return PlannedLooks(rule, schedule.seeds, levels)


def seeds_of(experiment: Experiment, count: int) -> tuple[int, ...]:
    """Give the first `count` seeds: those of the plan, then the smallest that it does not have."""
    seeds, candidate = list(experiment.seeds), 0
    while len(seeds) < count:
        candidate += 1
        if candidate not in seeds:
            seeds.append(candidate)
    return tuple(seeds[:count])


def runs_at(experiment: Experiment, record: LookRecord, count: int) -> list[PlannedRun]:
    """Give the runs of a look after `count` seeds: stopped arms have those of their last look alone."""
    stopped = record.stopped()
    planned = {(run.arm, run.seed): run for run in experiment.runs}
    found = []
    for place, seed in enumerate(seeds_of(experiment, count)):
        for arm in experiment.arms:
            if place < stopped.get(arm.name, count):
                new = PlannedRun(f"{experiment.name}-{arm.name}-s{seed}", arm.name, arm.on, seed)
                found.append(planned.get((arm.name, seed), new))
    return found


def as_looked_at(experiment: Experiment, folder: Path) -> Experiment:
    """Give an experiment with the runs of its latest look alone; raises ConfigError before the first.

    What has been trained since is for the next look: to see it earlier would be a look that nobody planned.
    """
    if experiment.looks is None:
        return experiment
    record = read_record(folder)
    if not record.looks:
        raise ConfigError(
            f"{folder.name}: no look has been taken yet; the first is after {experiment.looks.seeds[0]} seeds of "
            "every arm, and `run` takes it"
        )
    count = record.looks[-1].seeds
    before = replace(record, looks=record.looks[:-1])
    seeds = seeds_of(experiment, count)
    return replace(experiment, seeds=seeds, runs=tuple(runs_at(experiment, before, count)))


def take_look(
    record: LookRecord, rule: Rule, estimates: Mapping[str, Estimate | None], margin: float, still: Sequence[str]
) -> Look:
    """Judge all arms at the latest look, which is still empty, and say which stop; `still` names the open ones.

    Every arm has one p value for all its looks so far (see `study.looks`), and Holm's procedure adjusts those of all
    arms, stopped ones with what they had. Without an estimate an arm stays open.
    """
    schedule, current = record.schedule(rule), record.looks[-1]
    p = {arm: 1.0 if (found := estimates[arm]) is None else found.p for arm in still}
    same = {arm: 1.0 if (found := estimates[arm]) is None else found.p_equivalent(margin) for arm in still}
    arms = list(estimates)
    history = [*record.looks[:-1], replace(current, p=p, p_equivalent=same)]
    adjusted = _over_looks(schedule, [look.p for look in history], arms)
    adjusted_same = _over_looks(schedule, [look.p_equivalent for look in history], arms)
    verdicts, stopped = {}, {}
    for arm in arms:
        estimate = estimates[arm]
        verdicts[arm] = (
            CANNOT_TELL if estimate is None else verdict_of(estimate, adjusted[arm], adjusted_same[arm], margin)
        )
        if arm not in still:
            continue
        if is_sign_told(verdicts[arm]) or adjusted_same[arm] < ALPHA:
            stopped[arm] = DECIDED
        elif not record.to_come:
            stopped[arm] = LAST
        elif estimate is not None and chance_of_a_word(estimate, record, schedule, margin, len(arms)) < HOPE:
            stopped[arm] = HOPELESS
    return Look(current.seeds, p, same, adjusted, verdicts, stopped)


def _over_looks(schedule: Schedule, looks: Sequence[Mapping[str, float]], arms: Sequence[str]) -> dict[str, float]:
    """Give every arm's p value for all looks so far, adjusted for the number of arms."""
    ones = [schedule.sequential_p([look[arm] for look in looks if arm in look]) for arm in arms]
    return dict(zip(arms, holm(ones), strict=True))


def chance_of_a_word(estimate: Estimate, record: LookRecord, schedule: Schedule, margin: float, family: int) -> float:
    """Give the predictive chance that an arm is told, or told to be equal, by the last look of the plan.

    Over what the data so far say of effect and noise (a flat prior): the mean of the seeds to come is drawn, and the
    last look's test at its level for the whole family (Spiegelhalter, Freedman and Parmar 1994, JRSS A 157, 357).
    Stopping for a small chance rejects nothing, so it costs no error.
    """
    if estimate.se <= 0 or not math.isfinite(estimate.se):
        return 1.0
    now, end = record.looks[-1].seeds, schedule.seeds[-1]
    generator = np.random.default_rng(0)
    variance = now * estimate.se**2 * estimate.df / generator.chisquare(estimate.df, DRAWS)
    effect = estimate.difference + np.sqrt(variance / now) * generator.standard_normal(DRAWS)
    later = effect + np.sqrt(variance / (end - now)) * generator.standard_normal(DRAWS)
    final = (now * estimate.difference + (end - now) * later) / end
    own = now * estimate.se**2 * estimate.df + variance * generator.chisquare(end - now, DRAWS)
    se = np.sqrt(own / (estimate.df + end - now) / end)
    df = estimate.df + end - now
    level = schedule.levels(ALPHA / family)[-1]
    is_told = np.abs(final) > se * stdtrit(df, 1 - level / 2)
    is_same = np.abs(final) + se * stdtrit(df, 1 - level) < margin
    return float(np.mean(is_told | is_same))


def next_looks(experiment: Experiment, record: LookRecord, still: Sequence[str]) -> tuple[int, ...]:
    """Give the seed counts of the looks to come: the seeds that stopped arms do not need go to the open ones.

    The experiment stays within the runs that were planned. An arm's seeds then depend on other arms' results but not
    on its own, which leaves its error rate as it was.
    """
    if experiment.looks is None or not record.to_come or not still:
        return ()
    planned = experiment.looks.seeds[-1]
    now, left = record.looks[-1].seeds, len(record.to_come)
    stopped = record.stopped()
    used = sum(min(now, stopped.get(arm.name, now)) for arm in experiment.arms)
    free = len(experiment.arms) * planned - used
    end = min(MOST_GROWTH * planned, now + free // (len(still) + 1))
    if end <= record.to_come[-1]:
        return record.to_come
    return tuple(now + round((end - now) * place / left) for place in range(1, left + 1))


def note_unplanned(experiment: Experiment, folder: Path, seeds: int, arms: int) -> str:
    """Remember that an unfinished experiment was judged; say at the second time by how much the error grew.

    A look at the whole plan is the one that was promised, and is remembered nowhere. Empty where it is the first.
    """
    record = read_record(folder)
    if experiment.looks is not None or seeds < 2:
        return ""
    if seeds < len(experiment.seeds) and seeds not in record.unplanned:
        record = replace(record, unplanned=tuple(sorted((*record.unplanned, seeds))))
        write_record(folder, record)
    counts = tuple(sorted({count for count in record.unplanned if count < seeds} | {seeds}))
    if len(counts) < 2:
        return ""
    error = error_of_repeated_looks(counts, max(1, arms))
    at = ", ".join(map(str, counts))
    return (
        f"This is look {len(counts)} at a growing experiment (after {at} seeds), and nobody planned them: of tables "
        f"of changes that do nothing, {100 * error:.0f}% and not 5% have a false verdict at one of these looks. "
        "Plan looks with `run --looks K`."
    )


def looked_at(judgement: Judgement, experiment: Experiment, record: LookRecord) -> Judgement:
    """Return a judgement with the words of the latest look, whose p values and intervals count all looks.

    The intervals of all looks hold the truth together in 95% (Jennison and Turnbull 1989, JRSS B 51, 305: repeated
    confidence intervals).
    """
    look = record.looks[-1]
    if not look.verdicts or experiment.looks is None:
        return judgement
    schedule, stopped = record.schedule(experiment.looks.rule), record.stopped()
    levels = dict(zip(schedule.seeds, schedule.levels(), strict=True))
    arms = [
        replace(
            item,
            p_holm=look.p_holm[arm],
            verdict=DIVERGES if item.verdict == DIVERGES else look.verdicts[arm],
            level=1 - levels[stopped.get(arm, look.seeds)],
        )
        for item in judgement.arms
        for arm in [item.group.recipe]
    ]
    return replace(judgement, looks=len(record.looks), arms=tuple(arms))
